"""The gradients of one optimizer step: packed micro-batches, forward and backward for each.

Knows log-probs, advantages and shares; which algorithm made them is the objective's business.
"""

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..weightshare.guard import ParityGuard
from .config import GRPOConfig
from .losses import Objective, TokenStreams, truncated_importance_weights
from .metrics import Metrics, TokenStatistics
from .packing import MicroBatch, TrainingSample, pack
from .policy import Policy


class Learner:
    """Accumulates the gradient of an optimizer step in the adapter's masters.

    Args:
        policy: whose adapter is trained.
        args: the run's options.
        metrics: where losses, ratios and their like are noted.
        report: called with ("training", micro-batches done, in all).
    """

    def __init__(self, policy: Policy, args: GRPOConfig, metrics: Metrics, report: Callable[[str, int, int], None]):
        self.policy, self.args, self.metrics, self.report = policy, args, metrics, report
        self.objective = Objective(
            loss_type=args.loss_type,
            epsilon_low=args.epsilon,
            epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
            delta=args.delta,
            beta=args.beta,
            bias_correction=args.use_bias_correction_kl,
            max_completion_length=args.completion_limit,
        )
        # With one update per generation the ratio is taken against the policy that sampled, as the engine reported it:
        # no forward for the old log-probs, and the clip bounds the gap between engine and trainer as well.
        self.old_is_engine = args.updates_per_generation == 1
        self.guard = ParityGuard(args.parity_limit, policy.dtype)

    @torch.no_grad()
    def recompute_old_logprobs(self, samples: Sequence[TrainingSample]) -> None:
        """pi_old of every trained token, by the trainer: over several updates the ratio is to start at exactly 1."""
        for micro in pack(samples, self.args.tokens_per_microbatch, self.policy.device):
            logprobs, _ = self.policy.logprobs(
                micro.tokens, micro.lengths, micro.rows, micro.targets, self.args.temperature
            )
            for sample, part in zip(
                micro.samples, logprobs.split([len(s.targets) for s in micro.samples]), strict=True
            ):
                sample.old_logprobs = part.tolist()

    def accumulate(self, samples: Sequence[TrainingSample], step: int, first_update: bool) -> Tensor:
        """Add the gradients of an optimizer step; `share` of every sample is set.

        Args:
            samples: what is forwarded.
            step: for messages.
            first_update: no optimizer step was made on these rollouts yet, so that log-probs can be compared with the
                engine's.

        Returns:
            The loss, a scalar without gradient.

        Raises:
            FloatingPointError: the loss is not finite.
            ParityError: engine and trainer disagree; nothing was updated yet.
        """
        statistics, tokens, started = TokenStatistics(), 0, time.perf_counter()
        compared: list[tuple[Tensor, Tensor]] = []  # log-probs of (engine, trainer)
        total = torch.zeros((), device=self.policy.device)
        micro_batches = pack(samples, self.args.tokens_per_microbatch, self.policy.device)
        for index, micro in enumerate(micro_batches):
            self.report("training", index, len(micro_batches))
            loss, pair = self._backward(micro, statistics)
            if first_update:
                compared.append(pair)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"step {step}: the loss is {loss.item()}; lower learning_rate or set max_grad_norm, check the "
                    "rewards, and resume from the last checkpoint"
                )
            total += loss
            tokens += len(micro.tokens)
        if not micro_batches:  # nothing to learn from: the optimizer still takes its step, with zero gradients
            for parameter in self.policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self._note(statistics)
        if compared:
            self._compare(step, *(torch.cat(side) for side in zip(*compared, strict=True)))
        if tokens:
            self.metrics.add("throughput/train_tokens_per_s", tokens / max(time.perf_counter() - started, 1e-9))
        return total

    def _backward(self, micro: MicroBatch, statistics: TokenStatistics) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward and backward of one micro-batch: its part of the loss, and the engine's and trainer's log-probs."""
        args, row = self.args, (micro.tokens, micro.lengths, micro.rows, micro.targets, self.args.temperature)
        ref_logprobs = None
        if args.beta != 0.0:
            with self.policy.reference():
                ref_logprobs, _ = self.policy.logprobs(*row)
        logprobs, entropies = self.policy.logprobs(*row, entropy=args.log_entropy)
        engine = micro.stream([sample.engine_logprobs for sample in micro.samples])
        old = engine if self.old_is_engine else micro.stream([sample.old_logprobs or [] for sample in micro.samples])
        corrections = torch.ones_like(old)
        cap = args.vllm_importance_sampling_clip_max
        if not self.old_is_engine and args.vllm_importance_sampling_correction and cap is not None:
            corrections = truncated_importance_weights(old, engine, cap)
        streams = TokenStreams(
            logprobs=logprobs,
            old_logprobs=old,
            advantages=micro.per_token([sample.advantage for sample in micro.samples]),
            shares=micro.per_token([sample.share for sample in micro.samples]),
            corrections=corrections,
            sequence=micro.sequence,
            ref_logprobs=ref_logprobs,
        )
        loss, per_token = self.objective.loss(streams)
        loss.backward()
        for name, values in per_token.items():
            statistics.add(name, values, micro.sequence)
        if entropies is not None:
            statistics.add("entropy", entropies)
        return loss.detach(), (engine, logprobs.detach())

    def _compare(self, step: int, engine: Tensor, trainer: Tensor) -> None:
        """The guard on this step's tokens, and its figures under TRL's names and ours."""
        report, ratio = self.guard.observe(step, engine, trainer), torch.exp(trainer - engine)
        figures = report.metrics() | {
            "sampling/sampling_logp_difference/mean": report.mean_abs,
            "sampling/sampling_logp_difference/max": report.max_abs,
            "sampling/importance_sampling_ratio/min": ratio.min().item(),
            "sampling/importance_sampling_ratio/mean": report.ratio_mean,
            "sampling/importance_sampling_ratio/max": ratio.max().item(),
        }
        for name, value in figures.items():
            self.metrics.add(name, value)

    def _note(self, statistics: TokenStatistics) -> None:
        note = self.metrics.add
        note("entropy", statistics.mean("entropy"))
        note("clip_ratio/low_mean", statistics.mean("clip_low"))
        note("clip_ratio/high_mean", statistics.mean("clip_high"))
        note("clip_ratio/region_mean", statistics.mean("clip_low") + statistics.mean("clip_high"))
        note("clip_ratio/low_min", statistics.sequence_extremes("clip_low")[0])
        note("clip_ratio/high_max", statistics.sequence_extremes("clip_high")[1])
        note("kl", statistics.mean("kl"))
