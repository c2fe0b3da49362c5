"""The gradients of one optimizer step: packed micro-batches, forward and backward for each.

Knows log-probs, advantages and shares; which algorithm made them is the objective's business.
"""

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..kernels.row_layout import Layout
from ..weightshare.guard import ParityGuard
from .config import GRPOConfig
from .correction import RolloutCorrection
from .losses import Objective
from .metrics import Metrics, Summary, TokenStatistics
from .packing import MicroBatch, TrainingSample, pack, repeated_prompts
from .policy import Policy
from .streams import TokenStreams

logger = logging.getLogger(__name__)

REPEATED = 0.25  # of a step's tokens: prompts computed again and again that are worth a word


class Learner:
    """Accumulates the gradient of an optimizer step in the adapter's masters.

    Args:
        policy: whose adapter is trained.
        args: the run's options.
        metrics: where losses, ratios and their like are noted.
        report: called with ("training", micro-batches done, in all).

    Attributes:
        old_is_engine: the ratio is taken against the policy that sampled, as the engine reported it ("bypass"): no
            forward for the old log-probs, and the clip bounds the gap between engine and trainer as well. Not by
            default where ratios are of sequences: GSPO's clip range is narrower than that gap.
        recomputes_old: `recompute_old_logprobs` is to be called on every generation.
    """

    def __init__(self, policy: Policy, args: GRPOConfig, metrics: Metrics, report: Callable[[str, int, int], None]):
        self.policy, self.args, self.metrics, self.report = policy, args, metrics, report
        self.objective = objective(args)
        one_update = args.updates_per_generation == 1
        bypass_suits = one_update and args.importance_sampling_level == "token"
        self.old_is_engine = args.old_logprobs == "engine" or (args.old_logprobs == "auto" and bypass_suits)
        self.recomputes_old = not (self.old_is_engine or one_update)
        self.guard = ParityGuard(args.parity_limit, policy.dtype)
        self._spoke_of_repeated = False

    def recompute_old_logprobs(self, samples: Sequence[TrainingSample]) -> None:
        """pi_old of every trained token, by the trainer: over several updates the ratio is to start at exactly 1."""
        for micro, logprobs, _ in self._scored(samples, entropy=False):
            for sample, part in zip(micro.samples, logprobs.split(micro.trained_lengths), strict=True):
                sample.old_logprobs = part.tolist()

    def accumulate(self, samples: Sequence[TrainingSample], step: int, first_update: bool) -> Tensor:
        """Add the gradients of an optimizer step; `share` of every sample is set.

        Args:
            samples: the step's completions. Those without advantage may be left out where neither a KL penalty nor
                an entropy bonus nor a quantile of the entropies is over all tokens.
            step: for messages.
            first_update: no optimizer step was made on these rollouts yet, so that log-probs can be compared with the
                engine's.

        Returns:
            The loss, a scalar without gradient.

        Raises:
            FloatingPointError: the loss is not finite, or no log-prob of the engine is.
            ParityError: engine and trainer disagree; nothing was updated yet.
        """
        statistics, started = TokenStatistics(), time.perf_counter()
        self._note_dropped(samples, step)
        entropy_share = self._choose_tokens(samples)
        if self.objective.beta == 0.0 and self.objective.entropy_coef == 0.0:
            samples = [sample for sample in samples if sample.advantage != 0.0]
        compared: list[tuple[Tensor, Tensor]] = []  # log-probs of (engine, trainer)
        total = torch.zeros((), device=self.policy.device)
        micro_batches = pack(samples, self.args.tokens_per_microbatch, self.policy.device)
        self._note_repeated(samples, micro_batches, step)
        for index, micro in enumerate(micro_batches):  # nothing in here waits for the device
            self.report("training", index, len(micro_batches))
            loss, pair = self._backward(micro, statistics, entropy_share, first_update)
            total += loss
            if first_update:
                compared.append(pair)
        if not micro_batches:  # nothing to learn from: the optimizer still takes its step, with zero gradients
            for parameter in self.policy.parameters():
                parameter.grad = torch.zeros_like(parameter)
        if not torch.isfinite(total):
            raise FloatingPointError(
                f"step {step}: the loss is {total.item()}; lower learning_rate or set max_grad_norm, check the "
                "rewards, and resume from the last checkpoint"
            )
        self._note(statistics.summaries())
        if compared:
            self._compare(step, *(torch.cat(side) for side in zip(*compared, strict=True)))
        if micro_batches:
            # Of whole sequences: with a shared prompt counted once, the faster step would seem the slower.
            tokens = sum(len(sample.tokens) for micro in micro_batches for sample in micro.samples)
            self.metrics.add("throughput/train_tokens_per_s", tokens / max(time.perf_counter() - started, 1e-9))
        return total

    @torch.no_grad()
    def _scored(self, samples: Sequence[TrainingSample], entropy: bool) -> Iterator[tuple[MicroBatch, Tensor, Tensor]]:
        """Log-probs and, if asked for, entropies of each micro-batch, forwarded without gradient."""
        for micro in pack(samples, self.args.tokens_per_microbatch, self.policy.device):
            logprobs, entropies = self.policy.logprobs(*self._row(micro), entropy=entropy)
            yield micro, logprobs, logprobs if entropies is None else entropies

    def _row(self, micro: MicroBatch) -> tuple[Tensor, Layout, Tensor, Tensor, float]:
        return micro.tokens, micro.layout, micro.rows, micro.targets, self.args.temperature

    def _choose_tokens(self, samples: Sequence[TrainingSample]) -> float:
        """Mark the tokens of high entropy, where the policy loss is to act on those only.

        The threshold is a quantile over all trained tokens of the optimizer step, which takes a forward of its own
        before it ("Beyond the 80/20 Rule", arXiv 2506.01939; TRL takes it over each micro-batch).

        Returns:
            What each token weighs in the step's mean entropy.
        """
        tokens, quantile = sum(len(sample.targets) for sample in samples), self.args.top_entropy_quantile
        if quantile < 1.0 and tokens:
            scored = [(micro, entropies.cpu()) for micro, _, entropies in self._scored(samples, entropy=True)]
            threshold = np.quantile(torch.cat([entropies for _, entropies in scored]).numpy(), 1.0 - quantile)
            tokens = 0
            for micro, entropies in scored:
                high = entropies >= float(threshold)
                tokens += int(high.sum())
                for sample, part in zip(micro.samples, high.split(micro.trained_lengths), strict=True):
                    sample.high_entropy = part.tolist()
        return 1.0 / max(tokens, 1)

    def _backward(
        self, micro: MicroBatch, statistics: TokenStatistics, entropy_share: float, first_update: bool
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Forward and backward of one micro-batch: its part of the loss, and the engine's and trainer's log-probs."""
        ref_logprobs = None
        if self.objective.beta != 0.0:
            with self.policy.reference():
                ref_logprobs, _ = self.policy.logprobs(*self._row(micro))
        has_bonus = self.objective.entropy_coef != 0.0
        logprobs, entropies = self.policy.logprobs(
            *self._row(micro), entropy=self.args.log_entropy or has_bonus, entropy_gradient=has_bonus
        )
        current = logprobs.detach()
        old = None
        if not self.old_is_engine:
            old = (
                micro.stream([sample.old_logprobs or [] for sample in micro.samples])
                if self.recomputes_old
                else current
            )
        streams = TokenStreams(
            logprobs=logprobs,
            engine_logprobs=micro.stream([sample.engine_logprobs for sample in micro.samples]),
            advantages=micro.per_token([sample.advantage for sample in micro.samples]),
            shares=micro.per_token([sample.share for sample in micro.samples]),
            lengths=micro.trained_lengths,
            old_logprobs=old,
            trainer_logprobs=current if old is None and first_update else old,
            ref_logprobs=ref_logprobs,
            entropies=entropies,
            entropy_share=entropy_share,
        )
        if self.args.top_entropy_quantile < 1.0:
            flags = micro.stream([sample.high_entropy or [] for sample in micro.samples], torch.bool)
            streams = replace(streams, high_entropy=flags)
        loss, per_token, sequences = self.objective.loss(streams)
        loss.backward()
        statistics.add(per_token, sequences)
        return loss.detach(), (streams.engine_logprobs, current)

    def _note_dropped(self, samples: Sequence[TrainingSample], step: int) -> None:
        dropped = sum(sample.dropped for sample in samples)
        self.metrics.add("correction/dropped_tokens", dropped)
        if dropped and not any(sample.targets for sample in samples):
            raise FloatingPointError(
                f"step {step}: none of the engine's {dropped} log-probs is finite; use bfloat16 where float16 "
                "overflows, check the engine's settings (engine_kwargs), and resume from the last checkpoint"
            )

    def _note_repeated(self, samples: Sequence[TrainingSample], micro_batches: list[MicroBatch], step: int) -> None:
        repeated, budget = repeated_prompts(samples, micro_batches)
        self.metrics.add("throughput/repeated_prompt_tokens", repeated)
        tokens = sum(len(micro.tokens) for micro in micro_batches)
        if repeated > REPEATED * tokens and not self._spoke_of_repeated:
            self._spoke_of_repeated = True
            logger.warning(
                "step %d: %.0f %% of the %d tokens in its rows are prompts computed again for other completions of "
                "their group, as rows have at most tokens_per_microbatch=%d tokens; with %d, if memory allows, each "
                "prompt of this step is computed once. This is said once.",
                step, 100 * repeated / tokens, tokens, self.args.tokens_per_microbatch, budget,
            )  # fmt: skip

    def _compare(self, step: int, engine: Tensor, trainer: Tensor) -> None:
        """The guard on this step's tokens, and its figures under TRL's names and ours."""
        report = self.guard.observe(step, engine, trainer)
        figures = report.metrics() | {
            "sampling/sampling_logp_difference/mean": report.mean_abs,
            "sampling/sampling_logp_difference/max": report.max_abs,
        }
        for name, value in figures.items():
            self.metrics.add(name, value)

    def _note(self, of: defaultdict[str, Summary]) -> None:
        """Log a step's statistics, under TRL's names where TRL has one."""
        note = self.metrics.add
        # As in TRL, a ratio of a sequence is one value, whatever its length.
        whole_sequences = self.args.importance_sampling_level == "sequence" or self.args.loss_type == "gmpo"
        low, high, cispo = of["clip_low"], of["clip_high"], of["cispo_clip"]
        low_mean = low.sequence_mean if whole_sequences else low.mean
        high_mean = high.sequence_mean if whole_sequences else high.mean
        note("entropy", of["entropy"].mean)
        note("kl", of["kl"].mean)
        note("clip_ratio/low_mean", low_mean)
        note("clip_ratio/high_mean", high_mean)
        note("clip_ratio/region_mean", low_mean + high_mean)
        note("clip_ratio/low_min", low.sequence_smallest)
        note("clip_ratio/high_max", high.sequence_largest)
        note("cispo_clip_ratio", cispo.sequence_mean if whole_sequences else cispo.mean)
        note("vespo/phi_seq_mean", of["vespo_phi"].sequence_mean)
        note("off_policy_masked_fraction", of["off_policy_dropped"].sequence_mean)

        ratio = of["rollout_ratio"]
        note("sampling/importance_sampling_ratio/min", ratio.smallest)
        note("sampling/importance_sampling_ratio/mean", ratio.mean)
        note("sampling/importance_sampling_ratio/max", ratio.largest)
        # How much of the loss is left by weights below 1 and by what is masked and rejected; how many equally weighted
        # tokens would tell as much as these, of one.
        share, kept = of["share"].mean, of["kept_share"].mean
        note("correction/kept_loss_weight", kept / share if share else math.nan)
        note("correction/effective_sample_size", ratio.mean**2 / of["squared_ratio"].mean if ratio.mean else math.nan)
        note("correction/outside_fraction", of["outside"].mean)
        note("correction/rejected_sequences", of["rejected"].sequence_mean)


def objective(args: GRPOConfig) -> Objective:
    """The objective that the options describe."""
    corrects = args.vllm_importance_sampling_correction
    return Objective(
        loss_type=args.loss_type,
        max_completion_length=args.completion_limit,
        importance_sampling_level=args.importance_sampling_level,
        epsilon_low=args.epsilon,
        epsilon_high=args.epsilon if args.epsilon_high is None else args.epsilon_high,
        delta=args.delta,
        beta=0.0 if args.kl_in_reward else args.beta,
        kl_estimator=args.kl_estimator,
        bias_correction=args.use_bias_correction_kl,
        entropy_coef=args.entropy_coef,
        off_policy_threshold=args.off_policy_mask_threshold,
        sapo_temperatures=(args.sapo_temperature_neg, args.sapo_temperature_pos),
        vespo_shapes=((args.vespo_k_neg, args.vespo_lambda_neg), (args.vespo_k_pos, args.vespo_lambda_pos)),
        correction=RolloutCorrection(
            mode=args.vllm_importance_sampling_mode if corrects else None,
            clip_min=args.vllm_importance_sampling_clip_min,
            clip_max=args.vllm_importance_sampling_clip_max,
            max_sequence_gap=args.max_sequence_gap,
        ),
    )
