"""Random token streams, as rows for the oracle and flat for `Objective`, both in double precision."""

from dataclasses import dataclass

import torch
from colora.rl.correction import RolloutCorrection
from colora.rl.losses import Objective
from colora.rl.streams import TokenStreams
from torch import Tensor

from ..oracle import grpo as oracle

# Tokens that count, holes (a tool's words) among them; a row of one token, and one where none counts.
MASK = torch.tensor(
    [[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
).bool()
ADVANTAGES = torch.tensor([1.0, -0.7, -1.5, 2.0, 0.4], dtype=torch.float64)


@dataclass
class Rows:
    """All (B, C)."""

    logp: Tensor
    engine: Tensor
    old: Tensor
    ref: Tensor
    entropy: Tensor
    mask: Tensor
    advantages: Tensor


def random_rows(seed: int = 0, spread: float = 0.3) -> Rows:
    """Log-probs of policies that differ by `spread` nats, so that bounds are met by some tokens and not by others."""
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    logp = -1.0 - noise().abs()
    engine, old, ref = (logp + spread * noise() for _ in range(3))
    return Rows(logp, engine, old, ref, noise().abs(), MASK.clone(), ADVANTAGES[:, None].expand(MASK.shape).clone())


def our_objective(options: oracle.Options) -> Objective:
    return Objective(
        loss_type=options.loss_type,
        max_completion_length=options.max_completion_length,
        importance_sampling_level=options.importance_sampling_level,
        epsilon_low=options.epsilon,
        epsilon_high=options.epsilon if options.epsilon_high is None else options.epsilon_high,
        delta=options.delta,
        beta=options.beta,
        kl_estimator=options.kl_estimator,
        bias_correction=options.use_bias_correction_kl,
        entropy_coef=options.entropy_coef,
        off_policy_threshold=options.off_policy_threshold,
        sapo_temperatures=options.sapo_temperatures,
        vespo_shapes=(options.vespo_negative, options.vespo_positive),
        correction=RolloutCorrection(
            options.correction_mode, options.clip_min, options.clip_max, options.max_sequence_gap
        ),
    )


def step_loss(
    objective: Objective, rows: Rows, quantile: float = 1.0, bypass: bool = False, parts: list[list[int]] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of a step by `objective`, and its gradients by log-probs and entropies, (B, C).

    Args:
        parts: the rows of each micro-batch, in order; by default all in one.
    """
    logp, entropy = rows.logp.clone().requires_grad_(), rows.entropy.clone().requires_grad_()
    live = rows.mask & rows.engine.isfinite()
    shares = torch.tensor(objective.shares(live.sum(1).tolist()), dtype=logp.dtype)[:, None].expand(logp.shape)
    high = None
    if quantile < 1:
        high = rows.entropy >= torch.quantile(rows.entropy[live], 1 - quantile)
    acting = int(live.sum() if high is None else (live & high).sum())
    total = torch.zeros((), dtype=logp.dtype)
    for part in parts or [list(range(len(logp)))]:
        streams = TokenStreams(
            logprobs=logp[part].flatten(),
            engine_logprobs=rows.engine[part].flatten(),
            advantages=rows.advantages[part].flatten(),
            shares=shares[part].flatten(),
            lengths=[logp.shape[1]] * len(part),
            old_logprobs=None if bypass else rows.old[part].flatten(),
            trainer_logprobs=(rows.logp if bypass else rows.old)[part].flatten(),
            ref_logprobs=rows.ref[part].flatten(),
            entropies=entropy[part].flatten(),
            entropy_share=1 / max(acting, 1),
            high_entropy=None if high is None else high[part].flatten(),
            mask=rows.mask[part].flatten(),
        )
        total = total + objective.loss(streams)[0]
    gradients = torch.autograd.grad(total, [logp, entropy], allow_unused=True)
    by_logp, by_entropy = (torch.zeros_like(logp) if gradient is None else gradient for gradient in gradients)
    return total.detach(), by_logp, by_entropy


def oracle_loss(options: oracle.Options, rows: Rows, bypass: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the oracle."""
    logp, entropy = rows.logp.clone().requires_grad_(), rows.entropy.clone().requires_grad_()
    total = oracle.loss(
        logp,
        None if bypass else rows.old,
        rows.ref,
        rows.mask,
        rows.advantages,
        options,
        rows.engine,
        rows.logp if bypass else rows.old,
        entropy,
    )
    gradients = torch.autograd.grad(total, [logp, entropy], allow_unused=True)
    by_logp, by_entropy = (torch.zeros_like(logp) if gradient is None else gradient for gradient in gradients)
    return total.detach(), by_logp, by_entropy
