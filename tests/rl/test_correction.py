"""The rollout correction: what it multiplies, what it rejects, and what is left of the loss at long contexts."""

from dataclasses import replace

import pytest
import torch
from colora.rl.correction import MODES, RolloutCorrection
from colora.rl.losses import Objective
from colora.rl.streams import TokenStreams

GAP = torch.tensor([0.1, -0.3, 1.5, -2.0, -0.1, -0.05, 0.4])  # log pi_old - log mu, of two sequences
LENGTHS = [4, 3]
LOW, HIGH = 0.5, 1.4


def streams(gap: torch.Tensor = GAP, lengths: list[int] | None = None, bypass: bool = False) -> TokenStreams:
    """On-policy (pi is pi_old) with positive advantages and equal shares."""
    tokens = len(gap)
    logp = torch.full((tokens,), -1.0, dtype=gap.dtype, requires_grad=True)
    return TokenStreams(
        logprobs=logp,
        engine_logprobs=logp.detach() - gap,
        advantages=torch.ones_like(gap),
        shares=torch.full_like(gap, 1 / tokens),
        lengths=LENGTHS if lengths is None else lengths,
        old_logprobs=None if bypass else logp.detach(),
        trainer_logprobs=logp.detach(),
    )


def gradient(correction: RolloutCorrection, of: TokenStreams, **options: float) -> torch.Tensor:
    """By the log-probs, times minus the number of tokens: the importance weight of each token. No ratio is clipped."""
    wide = {"epsilon_low": 1.0, "epsilon_high": 1e12}
    loss, _, _ = Objective("dapo", 8, correction=correction, **(wide | options)).loss(of)  # type: ignore[arg-type]
    (by_logp,) = torch.autograd.grad(loss, of.logprobs)
    return -by_logp * len(by_logp)


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_weight_in_the_gradient(mode: str, bypass: bool) -> None:
    """Once, bypassed or not. In bypass each token's own ratio is a factor, which the correction bounds."""
    low = 0.9 if mode.startswith("sequence_mean") else LOW
    correction = RolloutCorrection(mode, low, HIGH)
    first, second = GAP[:4], GAP[4:]
    level = {
        "token": GAP,
        "sequence": torch.cat([first.sum().expand(4), second.sum().expand(3)]),
        "sequence_mean": torch.cat([first.mean().expand(4), second.mean().expand(3)]),
    }[mode.rsplit("_", 1)[0]].exp()
    inside = ((level >= low) & (level <= HIGH)).float()
    assert set(inside.tolist()) == {0.0, 1.0}
    bounded = level.clamp(low, HIGH) if mode.endswith("truncate") else level * inside
    expected = bounded if not bypass or mode.startswith("token") else GAP.exp() * bounded / level
    torch.testing.assert_close(gradient(correction, streams(bypass=bypass)), expected)


def test_bypass_and_recomputed_give_the_same_token_weights_on_policy() -> None:
    for mode in ("token_truncate", "token_mask"):
        correction = RolloutCorrection(mode, LOW, HIGH)
        torch.testing.assert_close(gradient(correction, streams(bypass=True)), gradient(correction, streams()))


def test_without_a_correction_only_the_ratio_weighs() -> None:
    correction = RolloutCorrection(None)
    torch.testing.assert_close(gradient(correction, streams()), torch.ones(7))
    torch.testing.assert_close(gradient(correction, streams(bypass=True)), GAP.exp())


def test_a_sequence_with_a_wide_mean_gap_contributes_nothing() -> None:
    gap = torch.tensor([0.5, -0.5, 0.02, 0.0, 0.3, 0.2, 0.1])  # means 0.005 and 0.2
    rejecting = RolloutCorrection(None, max_sequence_gap=0.1)
    for bypass in (False, True):
        weights = gradient(rejecting, streams(gap, bypass=bypass), beta=0.0)
        assert (weights[:4] > 0).all() and (weights[4:] == 0).all()
        assert (gradient(rejecting, streams(-gap, bypass=bypass))[4:] == 0).all()
    unknown = replace(streams(gap), trainer_logprobs=None)
    assert (gradient(rejecting, unknown) == 1).all()
    with_kl = replace(streams(gap), ref_logprobs=torch.full((7,), -1.5))
    assert (gradient(rejecting, with_kl, beta=1.0)[4:] == 0).all()


def test_statistics() -> None:
    objective = Objective("dapo", 8, correction=RolloutCorrection("token_mask", LOW, HIGH, max_sequence_gap=0.18))
    _, statistics, _ = objective.loss(streams())
    assert statistics["outside"].tolist() == [0, 0, 1, 1, 0, 0, 1]
    assert statistics["rejected"].tolist() == [0, 0, 0, 0, 0, 0, 0]
    expected = torch.tensor([0.1, -0.3, -torch.inf, -torch.inf, -0.1, -0.05, -torch.inf]).exp()
    torch.testing.assert_close(statistics["rollout_ratio"], expected)
    torch.testing.assert_close(statistics["kept_share"], expected.clamp(max=1) / 7)


def test_an_unknown_mode_is_named() -> None:
    with pytest.raises(ValueError, match="'sentence_mask': known are token_truncate, "):
        RolloutCorrection("sentence_mask")


# ---- 8K tokens ------------------------------------------------------------------------------------------------------

DEFAULT = RolloutCorrection("token_truncate", None, 2.0, max_sequence_gap=0.1)
TRLS = RolloutCorrection("sequence_mask", None, 3.0)
TOKENS, COMPLETIONS, NATS = 8192, 32, 0.01


def long_gaps(kind: str) -> torch.Tensor:
    """|gap| is 0.01 nats a token on average: random with mean 0, or the same for every token."""
    if kind == "random":
        noise = torch.randn(TOKENS * COMPLETIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return noise * NATS / noise.abs().mean()
    return torch.full((TOKENS * COMPLETIONS,), NATS if kind == "trainer_higher" else -NATS, dtype=torch.float64)


def kept(correction: RolloutCorrection, gap: torch.Tensor, bypass: bool) -> tuple[float, float]:
    """(logged share of the loss weight, size of the gradient over that without a gap, weights above 1 as 1)."""
    of = streams(gap, [TOKENS] * COMPLETIONS, bypass)
    objective = Objective("dapo", TOKENS, correction=correction)
    _, statistics, _ = objective.loss(of)
    logged = (statistics["kept_share"].sum() / statistics["share"].sum()).item()
    weights = gradient(correction, of, epsilon_low=0.2, epsilon_high=0.28)
    return logged, weights.clamp(max=1).mean().item()


@pytest.mark.parametrize("bypass", [True, False])
@pytest.mark.parametrize(("kind", "trl_keeps"), [("random", 0.60), ("trainer_lower", 0.0), ("trainer_higher", 0.0)])
def test_8k_tokens_with_a_gap_keep_their_weight_and_with_trls_default_do_not(
    kind: str, trl_keeps: float, bypass: bool
) -> None:
    gap = long_gaps(kind)
    for value in kept(DEFAULT, gap, bypass):
        assert value >= 0.95
    if not bypass:  # TRL has no bypass
        for value in kept(TRLS, gap, bypass=False):
            assert value == pytest.approx(trl_keeps, abs=0.1)
