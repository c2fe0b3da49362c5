"""The KL divergence to the reference policy as a part of the reward (`kl_in_reward`)."""

from collections.abc import Sequence

import torch

from ..rollout.records import RolloutRecord
from .advantages import nanstd
from .config import GRPOConfig
from .kl import kl_estimate
from .metrics import Metrics
from .packing import pack, training_sample
from .policy import Policy

KL = "kl"  # its name among the rewards of records and metrics


def add_kl(policy: Policy, records: Sequence[RolloutRecord], args: GRPOConfig, metrics: Metrics) -> None:
    """Note each completion's KL among its rewards; those that no reward function scored have none.

    Its weight there is -beta, so that the reward is R - beta sum_t KL_t (REINFORCE++, arXiv 2501.03262; RLOO, arXiv
    2402.14740), and `rewards/kl/mean` is logged in nats a completion.
    """
    scored = [record for record in records if record.reward is not None]
    values = completion_kl(policy, scored, args.kl_estimator, args.temperature, args.tokens_per_microbatch)
    for record in records:
        record.rewards[KL] = None
    for record, value in zip(scored, values, strict=True):
        record.rewards[KL] = value
    if values:
        metrics.add(f"rewards/{KL}/mean", sum(values) / len(values))
        metrics.add(f"rewards/{KL}/std", nanstd(torch.tensor(values)).item())


@torch.no_grad()
def completion_kl(
    policy: Policy, records: Sequence[RolloutRecord], estimator: str, temperature: float, token_budget: int
) -> list[float]:
    """sum_t KL_t of every completion, in nats, over the tokens that the model sampled, cut off or not.

    KL_t is estimated with the engine's log-probs, those of the policy that sampled the tokens: with k1 the sum is an
    unbiased estimate of its divergence from the reference, and one forward is enough.

    Args:
        policy: its base, with the adapter switched off, is the reference.
        estimator: `k1`, `k2` or `k3`.
        temperature: what the completions were sampled with.
        token_budget: most tokens in one forward.
    """
    samples = [training_sample(record, mask_truncated=False) for record in records]
    sums = {id(sample): 0.0 for sample in samples}
    for micro in pack(samples, token_budget, policy.device):
        with policy.reference():
            reference, _ = policy.logprobs(micro.tokens, micro.layout, micro.rows, micro.targets, temperature)
        engine = micro.stream([sample.engine_logprobs for sample in micro.samples])
        per_token = kl_estimate(engine, reference, estimator).double().split(micro.trained_lengths)
        sums |= {id(sample): part.sum().item() for sample, part in zip(micro.samples, per_token, strict=True)}
    return [sums[id(sample)] for sample in samples]
