"""Correction of the gap between the engine that sampled and the trainer that learns.

Engine and trainer compute the same policy with different kernels, so tokens were sampled from mu, not from pi_old.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .streams import MAX_LOG_RATIO, TokenStreams

MODES = (
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "sequence_mean_truncate",
    "sequence_mean_mask",
)
LEAST_LOG_WEIGHT = math.log(1e-8)  # stands for the logarithm of weight 0


@dataclass(frozen=True)
class Corrected:
    """What the correction does to a micro-batch; all (tokens,), without gradient.

    Attributes:
        log_shift: added to the log-ratio of pi to pi_old; not 0 only where bypass and `token_truncate` meet.
        weights: factor of the policy term.
        sequence_log_weights: what the weights add to the logarithm of the sequence's importance weight (VESPO).
        kept: 0 where the sequence is rejected, else 1: a factor of everything.
        ratios: the importance weight from mu that is in force, in `weights` or in the ratio, 0 where rejected.
        outside: 1 where the ratio was outside the bounds.
    """

    log_shift: Tensor
    weights: Tensor
    sequence_log_weights: Tensor
    kept: Tensor
    ratios: Tensor
    outside: Tensor


@dataclass(frozen=True)
class RolloutCorrection:
    """Importance weights from the engine's policy mu to the one the ratio starts at, bounded, and rejection.

    rho is the ratio that is bounded, with the log-ratios l_t = log pi_old - log mu of a sequence's tokens:

    - `token_...`: exp(l_t). Truncated: Yao et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL
      Training"; masked outside [clip_min, clip_max]: IcePop, "Every Step Evolves", arXiv 2510.18855.
    - `sequence_...`: exp(sum l_t), whose spread grows with the length: over some thousand tokens a gap of 0.01 nats a
      token takes most sequences out of any bounds.
    - `sequence_mean_...`: exp(mean l_t), the geometric mean, whatever the length. No unbiased weight, but a good test.

    `truncate` bounds rho by [clip_min, clip_max]; `mask` makes it 0 outside of them.

    What is multiplied. With pi_old by the trainer: the policy term (not the KL penalty) by the bounded rho, and pi /
    pi_old is another factor. In bypass (pi_old = mu) the ratio pi / mu itself is the importance weight, so rho is taken
    from l_t = log pi - log mu without gradient and is not multiplied on again: `token_truncate` bounds the ratio (its
    gradient stays that of a ratio with that value), the masks multiply by 0 or 1, and the sequence caps by
    (bounded rho) / rho.

    Rejection: a sequence whose mean log-ratio of trainer to engine, with the weights that sampled, is further from 0
    than `max_sequence_gap` contributes nothing: engine and trainer do not agree on what it is.

    Attributes:
        mode: one of MODES, or None: no weights; in bypass the ratio is then not bounded by them.
        clip_min, clip_max: None: no bound.
        max_sequence_gap: nats a token; None: no rejection.
    """

    mode: str | None = "token_truncate"
    clip_min: float | None = None
    clip_max: float | None = 2.0
    max_sequence_gap: float | None = None

    def __post_init__(self) -> None:
        if self.mode is not None and self.mode not in MODES:
            raise ValueError(f"vllm_importance_sampling_mode={self.mode!r}: known are {', '.join(MODES)}")

    @torch.no_grad()
    def apply(self, streams: TokenStreams) -> Corrected:
        """Weights for `cleaned()` streams."""
        bypass = streams.old_logprobs is None
        start = streams.logprobs.detach() if streams.old_logprobs is None else streams.old_logprobs
        ones = torch.ones_like(start)
        log_ratio = start - streams.engine_logprobs
        level, outside, shift = self._level(streams, log_ratio), torch.zeros_like(ones), torch.zeros_like(ones)
        bounded, weights = (level.exp() if bypass else ones), ones
        if self.mode is not None:
            ratio = level.exp()
            least = 0.0 if self.clip_min is None else self.clip_min
            most = math.inf if self.clip_max is None else self.clip_max
            inside = (ratio >= least) & (ratio <= most)
            bounded = ratio.clamp(least, most) if self.mode.endswith("_truncate") else ratio * inside
            outside = (~inside).to(ratio.dtype)
            if not bypass:
                weights = bounded
            elif self.mode == "token_truncate":
                shift = level.clamp(math.log(least) if least else -math.inf, math.log(most)) - log_ratio
            else:
                weights = bounded / ratio
        kept = self._kept(streams)
        return Corrected(shift, weights, self._sequence_log_weights(streams, weights), kept, bounded * kept, outside)

    def _level(self, streams: TokenStreams, log_ratio: Tensor) -> Tensor:
        """The logarithm of rho, for each token."""
        sequences = streams.sequences
        if self.mode in ("sequence_truncate", "sequence_mask"):
            log_ratio = sequences.spread(sequences.sums(log_ratio))
        elif self.mode in ("sequence_mean_truncate", "sequence_mean_mask"):
            log_ratio = sequences.spread(sequences.means(log_ratio))
        return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)

    def _sequence_log_weights(self, streams: TokenStreams, weights: Tensor) -> Tensor:
        logs = weights.log().clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
        if self.mode in ("token_truncate", "token_mask"):
            logs = streams.sequences.spread(streams.sequences.sums(logs * streams.sequences.mask))
        return logs

    def _kept(self, streams: TokenStreams) -> Tensor:
        if self.max_sequence_gap is None or streams.trainer_logprobs is None:
            return torch.ones_like(streams.engine_logprobs)
        gap = streams.sequences.means(streams.trainer_logprobs - streams.engine_logprobs).abs()
        return streams.sequences.spread((gap <= self.max_sequence_gap).to(gap.dtype))
