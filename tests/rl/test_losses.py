"""Losses against the oracle's padded ones, value and gradient, in fp64."""

import pytest
import torch
from colora.rl.losses import Objective, TokenStreams, truncated_importance_weights

from ..oracle import grpo as oracle

LENGTHS = [3, 5, 1, 4]


def random_rows(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """log-probs, old, reference (4, 5) and mask for LENGTHS, with ratios well outside the clip range."""
    generator = torch.Generator().manual_seed(seed)
    logp, old, ref = (-3 * torch.rand(4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[1.0] * n + [0.0] * (5 - n) for n in LENGTHS], dtype=torch.float64)
    return logp, old, ref, mask


def objective(loss_type: str, **options: object) -> Objective:
    defaults = {"epsilon_low": 0.2, "epsilon_high": 0.28, "delta": None, "beta": 0.0, "bias_correction": True}
    return Objective(loss_type=loss_type, max_completion_length=7, **(defaults | options))  # type: ignore[arg-type]


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("bias_correction", [True, False])
def test_equals_the_oracle(loss_type: str, beta: float, delta: float | None, bias_correction: bool) -> None:
    logp, old, ref, mask = random_rows()
    advantages = torch.tensor([1.0, -0.5, 0.3, -2.0], dtype=torch.float64)
    padded = logp.clone().requires_grad_()
    options = oracle.Options(
        loss_type=loss_type,
        beta=beta,
        delta=delta,
        epsilon_high=0.28,
        use_bias_correction_kl=bias_correction,
        max_completion_length=7,
    )
    expected = oracle.loss(padded, old, ref if beta else None, mask, advantages, options)
    expected.backward()

    flat = mask.bool()
    packed = logp[flat].clone().requires_grad_()
    sequence = torch.arange(4)[:, None].expand(4, 5)[flat]
    ours = objective(loss_type, beta=beta, delta=delta, bias_correction=bias_correction)
    shares = torch.tensor(ours.shares(LENGTHS), dtype=torch.float64)[sequence]
    streams = TokenStreams(
        packed, old[flat], advantages[sequence], shares, torch.ones_like(shares), sequence, ref[flat] if beta else None
    )
    value, _ = ours.loss(streams)
    value.backward()
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(packed.grad, padded.grad[flat], rtol=1e-10, atol=1e-10)


def test_clip_statistics_mark_the_tokens_without_gradient() -> None:
    logp = torch.tensor([1.0, 0.0, -1.0, -1.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0, 1.0])
    ones, sequence = torch.ones(4), torch.zeros(4, dtype=torch.int64)
    loss, statistics = objective("grpo").loss(TokenStreams(logp, torch.zeros(4), advantages, ones, ones, sequence))
    loss.backward()
    clipped = (statistics["clip_low"] + statistics["clip_high"]).bool()
    assert clipped.tolist() == [True, False, True, False]
    assert ((logp.grad == 0) == clipped).all()


def test_corrections_scale_the_policy_term_only() -> None:
    logp, ref = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0])
    half, sequence = torch.full((2,), 0.5), torch.zeros(2, dtype=torch.int64)
    ours = objective("grpo", beta=1.0, bias_correction=False)

    def value(corrections: torch.Tensor, advantage: float) -> float:
        return ours.loss(TokenStreams(logp, logp, torch.full((2,), advantage), half, corrections, sequence, ref))[
            0
        ].item()

    kl = value(torch.ones(2), 0.0)
    assert value(half, 1.0) - kl == pytest.approx(0.5 * (value(torch.ones(2), 1.0) - kl))


def test_importance_weights_are_capped() -> None:
    weights = truncated_importance_weights(torch.tensor([0.0, -1.0]), torch.tensor([-3.0, -1.0]), cap=2.0)
    assert weights.tolist() == [2.0, 1.0]


def test_unknown_loss_type_is_named() -> None:
    with pytest.raises(ValueError, match="'ppo'.*'grpo'"):
        objective("ppo").shares([1])
