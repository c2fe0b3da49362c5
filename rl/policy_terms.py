"""What each token adds to the policy loss: one pure function for each published objective.

All take and return (tokens,). `log_ratio` and `ratio` are of pi to pi_old and carry the gradient; a statistic is
without gradient. Losses are minimised, so each is minus what its paper maximises; the normalisers are in `losses`.
"""

import torch
from torch import Tensor

from .correction import LEAST_LOG_WEIGHT
from .streams import MAX_LOG_RATIO, Sequences

LEVELS = ("token", "sequence", "sequence_token")
Statistics = dict[str, Tensor]


def ratio_at_level(log_ratio: Tensor, sequences: Sequences, level: str) -> Tensor:
    """pi / pi_old of each token, or of its sequence.

    token: r_t = exp(l_t), the ratio of PPO and GRPO. sequence: s = exp(mean of l_t), the same for all tokens of a
    sequence (GSPO, arXiv 2507.18071, eq. 7). sequence_token: the value of s with the gradient of r_t, so that tokens
    may have advantages of their own (GSPO-token, eq. 14); with equal advantages its gradient is GSPO's.

    Args:
        log_ratio: l_t = log pi - log pi_old.
        level: one of LEVELS.

    Raises:
        ValueError: an unknown level.
    """
    if level == "sequence":
        log_ratio = sequences.spread(sequences.means(log_ratio))
    elif level == "sequence_token":
        mean = sequences.spread(sequences.means(log_ratio.detach()))
        log_ratio = log_ratio - log_ratio.detach() + mean
    elif level != "token":
        raise ValueError(f"importance_sampling_level={level!r}: known are {', '.join(LEVELS)}")
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def clipped_term(
    ratio: Tensor, advantages: Tensor, epsilon_low: float, epsilon_high: float, delta: float | None
) -> tuple[Tensor, Statistics]:
    """-min(r A, clip(r, 1 - low, 1 + high) A): grpo, bnpo, dr_grpo, dapo, luspo, and GSPO with the sequence's ratio.

    GRPO: DeepSeekMath, arXiv 2402.03300, eq. 3. Two epsilons ("clip higher"): DAPO, arXiv 2503.14476, eq. 8. The first
    r bounded by `delta` as well, which matters where A < 0: INTELLECT-2, arXiv 2505.07291.
    """
    capped = ratio if delta is None else ratio.clamp(max=delta)
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    term = -torch.minimum(capped * advantages, clipped * advantages)
    return term, {
        "clip_low": ((capped < 1 - epsilon_low) & (advantages < 0)).to(term.dtype),
        "clip_high": ((capped > 1 + epsilon_high) & (advantages > 0)).to(term.dtype),
    }


def cispo_term(ratio: Tensor, logprobs: Tensor, advantages: Tensor, ratio_max: float) -> tuple[Tensor, Statistics]:
    """-sg[min(r, ratio_max)] A log pi: CISPO, MiniMax-M1, arXiv 2506.13585, eq. 4; no token loses its gradient.

    `ratio_max` is `epsilon_high` itself, not 1 + epsilon_high, as in TRL; ScaleRL (arXiv 2510.13786) has 5.
    """
    term = -ratio.detach().clamp(max=ratio_max) * advantages * logprobs
    return term, {"cispo_clip": ((ratio > ratio_max) & (advantages > 0)).to(term.dtype)}


def sapo_term(
    ratio: Tensor, advantages: Tensor, temperature_negative: float, temperature_positive: float
) -> tuple[Tensor, Statistics]:
    """-4 / tau sigmoid(tau (r - 1)) A, with a tau for each sign of A: SAPO, arXiv 2511.20347."""
    tau = _choose(advantages > 0, temperature_positive, temperature_negative, advantages)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages, {}


def vespo_term(
    log_ratio: Tensor,
    logprobs: Tensor,
    advantages: Tensor,
    sequences: Sequences,
    sequence_log_weights: Tensor,
    shape_positive: tuple[float, float],
    shape_negative: tuple[float, float],
) -> tuple[Tensor, Statistics]:
    """-sg[phi(W)] A log pi with phi(W) = W^k exp(lambda (1 - W)): VESPO, arXiv 2602.10693.

    W = prod_t pi / mu is the sequence's importance weight from the engine's policy: the product of the tokens' ratios
    and of the correction's weights, which are therefore not multiplied on again. log W is bounded by [log 1e-8, 20].

    Args:
        sequence_log_weights: `correction.Corrected.sequence_log_weights`.
        shape_positive, shape_negative: (k, lambda) where A is at least 0, and where it is below.
    """
    with torch.no_grad():
        bounded = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        log_weight = sequences.spread(sequences.sums(bounded * sequences.mask)) + sequence_log_weights
        log_weight = log_weight.clamp(LEAST_LOG_WEIGHT, MAX_LOG_RATIO)
        power = _choose(advantages >= 0, shape_positive[0], shape_negative[0], advantages)
        rate = _choose(advantages >= 0, shape_positive[1], shape_negative[1], advantages).clamp(min=1e-4)
        phi = torch.exp(rate + power * log_weight - rate * log_weight.exp())
    return -phi * advantages * logprobs, {"vespo_phi": phi}


def gmpo_term(
    log_ratio: Tensor, advantages: Tensor, sequences: Sequences, epsilon_low: float, epsilon_high: float
) -> tuple[Tensor, Statistics]:
    """-A (prod_t of the clipped r_t)^(1 / |y|): GMPO, arXiv 2507.20673.

    Ratios are clipped one by one and as logarithms, at epsilon_high where A > 0 and at -epsilon_low elsewhere;
    the paper's range (e^-0.4, e^0.4) is epsilon 0.4.
    """
    positive = advantages > 0
    clipped = torch.where(positive, log_ratio.clamp(max=epsilon_high), log_ratio.clamp(min=-epsilon_low))
    mean = sequences.spread(sequences.means(clipped)).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return -torch.exp(mean) * advantages, {
        "clip_low": ((log_ratio < -epsilon_low) & (advantages < 0)).to(mean.dtype),
        "clip_high": ((log_ratio > epsilon_high) & positive).to(mean.dtype),
    }


@torch.no_grad()
def off_policy_kept(
    logprobs: Tensor, engine_logprobs: Tensor, advantages: Tensor, sequences: Sequences, threshold: float
) -> Tensor:
    """0 where A < 0 and the mean over the sequence of log mu - log pi is above `threshold`, else 1.

    DeepSeek-V3.2, arXiv 2512.02556, section 3.1, "off-policy sequence masking": what the policy would hardly say any
    more need not be made less likely.
    """
    drift = sequences.spread(sequences.means(engine_logprobs - logprobs))
    return ((advantages >= 0) | (drift <= threshold)).to(logprobs.dtype)


def _choose(condition: Tensor, yes: float, no: float, like: Tensor) -> Tensor:
    """torch.where in the dtype of `like`: with two numbers it would be fp32."""
    return torch.where(condition, torch.full_like(like, yes), torch.full_like(like, no))
