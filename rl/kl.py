"""Estimates of a KL divergence from the log-probs of sampled tokens (Schulman 2020, "Approximating KL Divergence")."""

import torch
from torch import Tensor

from .streams import MAX_LOG_RATIO

ESTIMATORS = ("k1", "k2", "k3")


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k3") -> Tensor:
    """Estimate of KL(pi || reference) for each token, with d = log pi - log reference.

    k1 = d; k2 = d^2 / 2; k3 = exp(-d) + d - 1 (also DeepSeekMath, arXiv 2402.03300, eq. 4). k1 and k3 are unbiased as
    values, k2 and k3 never negative. As a loss, differentiated through `logprobs`, they are something else: the mean
    gradient of k1 is zero, that of k2 is the gradient of the KL on samples of pi, and k3 needs the ratio as a factor
    (DeepSeek-V3.2, arXiv 2512.02556, section 3.1). k1 belongs in the reward.

    Args:
        logprobs, ref_logprobs: (tokens,) natural logarithms, for the same tokens.
        estimator: `k1`, `k2` or `k3`.

    Returns:
        (tokens,) nats, differentiable in `logprobs`; d is bounded by +-20.

    Raises:
        ValueError: an unknown estimator.
    """
    difference = (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return difference
    if estimator == "k2":
        return difference**2 / 2
    if estimator == "k3":
        return torch.exp(-difference) + difference - 1
    raise ValueError(f"kl_estimator={estimator!r}: known are {', '.join(ESTIMATORS)}")
