"""The loss of an optimizer step, composed of pure functions of per-token streams.

The trainer knows log-probs, advantages and shares, not algorithms: an `Objective` says which share of the step's loss
each sequence's tokens have (the normaliser, over the whole optimizer step, so that the split into micro-batches cannot
matter) and what each token's loss is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .correction import Corrected, RolloutCorrection
from .kl import kl_estimate
from .policy_terms import (
    Statistics,
    cispo_term,
    clipped_term,
    gmpo_term,
    off_policy_kept,
    ratio_at_level,
    sapo_term,
    vespo_term,
)
from .streams import Sequences, TokenStreams

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
LOSS_TYPES = (*CLIPPED, "cispo", "sapo", "vespo", "gmpo")


@dataclass(frozen=True)
class Objective:
    """A policy-gradient objective with its normaliser, rollout correction, KL penalty and entropy bonus.

    Attributes:
        loss_type: one of LOSS_TYPES.
        max_completion_length: the constant of Dr. GRPO's normaliser.
        importance_sampling_level: whose ratio: `token`, `sequence` (GSPO) or `sequence_token` (GSPO-token); vespo and
            gmpo have their own.
        epsilon_low, epsilon_high: the clip range of the ratio is [1 - epsilon_low, 1 + epsilon_high]; for cispo the
            largest ratio is epsilon_high; for gmpo the range is [-epsilon_low, epsilon_high] of the log-ratio.
        delta: bound on the ratio before the minimum (two-sided clipping), or None.
        beta: weight of the KL penalty.
        kl_estimator: `k1`, `k2` or `k3`.
        bias_correction: multiply the KL by the ratio (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
        entropy_coef: weight of the mean entropy of the step's tokens, which is taken from the loss.
        off_policy_threshold: of `off_policy_kept`, or None.
        sapo_temperatures: (for A <= 0, for A > 0).
        vespo_shapes: (k, lambda) for A < 0, and for A >= 0.
        correction: of the gap between engine and trainer.
    """

    loss_type: str
    max_completion_length: int
    importance_sampling_level: str = "token"
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_estimator: str = "k3"
    bias_correction: bool = True
    entropy_coef: float = 0.0
    off_policy_threshold: float | None = None
    sapo_temperatures: tuple[float, float] = (1.05, 1.0)
    vespo_shapes: tuple[tuple[float, float], tuple[float, float]] = ((3.0, 2.0), (2.0, 3.0))
    correction: RolloutCorrection = field(default_factory=RolloutCorrection)

    def __post_init__(self) -> None:
        if self.loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={self.loss_type!r}: known are {', '.join(LOSS_TYPES)}")

    def shares(self, trained_tokens: Sequence[int]) -> list[float]:
        """What one token of each sequence weighs in the loss of an optimizer step.

        Args:
            trained_tokens: trained tokens of every completion of the step, dropped and masked ones (0) included.

        Returns:
            A weight per sequence. grpo, sapo, gmpo: 1 / (N len_i) (arXiv 2402.03300, eq. 3); bnpo, dapo, cispo, vespo:
            1 / sum of len (DAPO, arXiv 2503.14476, eq. 8; bnpo's "local batch" is the optimizer step); dr_grpo:
            1 / (N L_max) (arXiv 2503.20783, section 3.2); luspo: 1 / N, so that a sequence weighs as much as it is
            long (arXiv 2602.05261).
        """
        count, total = len(trained_tokens), max(sum(trained_tokens), 1)
        if self.loss_type in ("grpo", "sapo", "gmpo"):
            return [1.0 / (count * max(length, 1)) for length in trained_tokens]
        if self.loss_type == "dr_grpo":
            return [1.0 / (count * self.max_completion_length)] * count
        if self.loss_type == "luspo":
            return [1.0 / count] * count
        return [1.0 / total] * count

    def loss(self, streams: TokenStreams) -> tuple[Tensor, Statistics, Sequences]:
        """The micro-batch's part of the step's loss, and per-token statistics.

        For each token: share * (policy term * correction weight + beta * KL), less the entropy bonus.

        Returns:
            loss: scalar with gradient; the step's loss is the sum over its micro-batches.
            statistics: (tokens,) without gradient, 0 for masked tokens: what the loss type has of `clip_low`,
                `clip_high`, `cispo_clip` and `vespo_phi`; `kl`, `entropy`, `off_policy_dropped` where there is such;
                of the correction `rollout_ratio`, `squared_ratio`, `outside`, `rejected`, `share` and `kept_share`.
            sequences: of the tokens, to sum the statistics by.
        """
        streams = streams.cleaned()
        sequences = streams.sequences
        corrected = self.correction.apply(streams)
        old = streams.engine_logprobs if streams.old_logprobs is None else streams.old_logprobs
        log_ratio = streams.logprobs - old + corrected.log_shift
        ratio = ratio_at_level(log_ratio, sequences, self.importance_sampling_level)
        policy, statistics = self._policy_term(streams, log_ratio, ratio, corrected)
        if self.loss_type != "vespo":
            policy = policy * corrected.weights
        if self.off_policy_threshold is not None:
            kept = off_policy_kept(
                streams.logprobs.detach(),
                streams.engine_logprobs,
                streams.advantages,
                sequences,
                self.off_policy_threshold,
            )
            policy, statistics["off_policy_dropped"] = policy * kept, 1 - kept
        if streams.high_entropy is not None:
            policy = policy * streams.high_entropy
        if self.beta != 0.0:
            assert streams.ref_logprobs is not None, "beta is not 0: the streams need ref_logprobs"
            kl = kl_estimate(streams.logprobs, streams.ref_logprobs, self.kl_estimator)
            if self.bias_correction:
                kl = kl * ratio
            policy, statistics["kl"] = policy + self.beta * kl, kl.detach()
        loss = (policy * streams.shares * corrected.kept).sum()
        if streams.entropies is not None:
            statistics["entropy"] = streams.entropies.detach()
            if self.entropy_coef != 0.0:
                loss = loss - self.entropy_coef * self._entropy(streams, corrected)
        return loss, statistics | _correction_statistics(streams, corrected), sequences

    def _policy_term(
        self, streams: TokenStreams, log_ratio: Tensor, ratio: Tensor, corrected: Corrected
    ) -> tuple[Tensor, Statistics]:
        logprobs, advantages, sequences = streams.logprobs, streams.advantages, streams.sequences
        if self.loss_type == "cispo":
            return cispo_term(ratio, logprobs, advantages, self.epsilon_high)
        if self.loss_type == "sapo":
            return sapo_term(ratio, advantages, *self.sapo_temperatures)
        if self.loss_type == "vespo":
            negative, positive = self.vespo_shapes
            return vespo_term(
                log_ratio, logprobs, advantages, sequences, corrected.sequence_log_weights, positive, negative
            )
        if self.loss_type == "gmpo":
            return gmpo_term(log_ratio, advantages, sequences, self.epsilon_low, self.epsilon_high)
        return clipped_term(ratio, advantages, self.epsilon_low, self.epsilon_high, self.delta)

    def _entropy(self, streams: TokenStreams, corrected: Corrected) -> Tensor:
        """The micro-batch's part of the step's mean entropy, over the tokens that the policy term acts on."""
        assert streams.entropies is not None
        acting = corrected.kept if streams.high_entropy is None else corrected.kept * streams.high_entropy
        return (streams.entropies * acting).sum() * streams.entropy_share


def _correction_statistics(streams: TokenStreams, corrected: Corrected) -> Statistics:
    assert streams.mask is not None
    ratios = torch.where(streams.mask, corrected.ratios, 0)
    return {
        "rollout_ratio": ratios,
        "squared_ratio": ratios**2,
        "outside": corrected.outside,
        "rejected": 1 - corrected.kept,
        "share": streams.shares,
        "kept_share": streams.shares * ratios.clamp(max=1),
    }
