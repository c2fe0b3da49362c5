"""The policy loss as pure functions of per-token streams.

The trainer knows log-probs, advantages and shares, not algorithms: an `Objective` says which share of the step's loss
each sequence's tokens have (the normaliser, over the whole optimizer step, so that the split into micro-batches cannot
matter) and what each token's loss is.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenStreams:
    """The trained tokens of one micro-batch, sequences one after the other; everything (tokens,) fp32.

    Attributes:
        logprobs: of the policy, with gradient.
        old_logprobs: of the policy that the ratio is taken against.
        advantages: of each token's completion.
        shares: each token's part of the step's loss (`Objective.shares`).
        corrections: importance weights from the rollout engine's policy to the old policy.
        sequence: (tokens,) int64, which sequence a token belongs to, from 0.
        ref_logprobs: of the reference policy; needed when beta is not 0.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    shares: Tensor
    corrections: Tensor
    sequence: Tensor
    ref_logprobs: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """A clipped policy-gradient objective with its normaliser and KL penalty.

    Attributes:
        loss_type: `grpo`, `bnpo`, `dr_grpo` or `dapo`; they differ in the normaliser.
        epsilon_low, epsilon_high: the clip range of the ratio is [1 - epsilon_low, 1 + epsilon_high].
        delta: cap on the unclipped ratio (two-sided clipping, INTELLECT-2, arXiv 2505.07291), or None.
        beta: weight of the KL penalty.
        bias_correction: multiply the KL by the ratio (DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
        max_completion_length: the constant of Dr. GRPO's normaliser.
    """

    loss_type: str
    epsilon_low: float
    epsilon_high: float
    delta: float | None
    beta: float
    bias_correction: bool
    max_completion_length: int

    def shares(self, trained_tokens: Sequence[int]) -> list[float]:
        """What one token of each sequence weighs in the loss of an optimizer step.

        Args:
            trained_tokens: trained tokens of every completion of the step, dropped and masked ones (0) included.

        Returns:
            A weight per sequence. grpo: 1 / (N len_i) (arXiv 2402.03300, eq. 3); bnpo and dapo: 1 / sum of len
            (DAPO, arXiv 2503.14476, eq. 8; bnpo's "local batch" is the optimizer step); dr_grpo: 1 / (N L_max)
            (arXiv 2503.20783, section 3.2).
        """
        count, total = len(trained_tokens), max(sum(trained_tokens), 1)
        if self.loss_type == "grpo":
            return [1.0 / (count * max(length, 1)) for length in trained_tokens]
        if self.loss_type in ("bnpo", "dapo"):
            return [1.0 / total] * count
        if self.loss_type == "dr_grpo":
            return [1.0 / (count * self.max_completion_length)] * count
        raise ValueError(f"loss_type={self.loss_type!r}: known are 'grpo', 'bnpo', 'dr_grpo', 'dapo'")

    def loss(self, streams: TokenStreams) -> tuple[Tensor, dict[str, Tensor]]:
        """The micro-batch's part of the step's loss, and per-token statistics.

        -min(r A, clip(r, 1 - low, 1 + high) A) + beta KL for each token (arXiv 2402.03300, eq. 3), r = pi / pi_old.

        Returns:
            loss: scalar with gradient; the step's loss is the sum over its micro-batches.
            statistics: (tokens,) detached: `ratio`, `clip_low`, `clip_high`, and `kl` when beta is not 0.
        """
        ratio = torch.exp(streams.logprobs - streams.old_logprobs)
        capped = ratio if self.delta is None else ratio.clamp(max=self.delta)
        clipped = ratio.clamp(1 - self.epsilon_low, 1 + self.epsilon_high)
        advantages = streams.advantages
        policy = -torch.minimum(capped * advantages, clipped * advantages) * streams.corrections
        statistics = {
            "ratio": ratio.detach(),
            "clip_low": ((capped < 1 - self.epsilon_low) & (advantages < 0)).float(),
            "clip_high": ((capped > 1 + self.epsilon_high) & (advantages > 0)).float(),
        }
        if self.beta != 0.0:
            assert streams.ref_logprobs is not None, "beta is not 0: the streams need ref_logprobs"
            kl = kl_k3(streams.logprobs, streams.ref_logprobs)
            if self.bias_correction:
                kl = kl * ratio
            policy = policy + self.beta * kl
            statistics["kl"] = kl.detach()
        return (policy * streams.shares).sum(), statistics


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(pi || ref) per token: exp(d) - d - 1 with d = ref - pi (arXiv 2402.03300, eq. 4)."""
    difference = ref_logprobs - logprobs
    return torch.exp(difference) - difference - 1


def truncated_importance_weights(old_logprobs: Tensor, engine_logprobs: Tensor, cap: float) -> Tensor:
    """min(pi_old / pi_engine, cap) per token (truncated importance sampling, Yao et al. 2025); no gradient.

    Args:
        old_logprobs, engine_logprobs: (tokens,) of the same sampled tokens.
        cap: the largest weight.
    """
    return torch.exp(old_logprobs - engine_logprobs).clamp(max=cap).detach()
