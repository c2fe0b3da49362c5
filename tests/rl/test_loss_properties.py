"""What must hold of every loss, whatever the streams: found counter-examples are shrunk by hypothesis."""

from dataclasses import replace

import pytest
import torch
from colora.rl.losses import CLIPPED, LOSS_TYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from ..oracle import grpo as oracle
from .stream_cases import Rows, our_objective, random_rows, step_loss

EXACT = {"rtol": 1e-10, "atol": 1e-12}
QUICK = settings(max_examples=60, deadline=None, derandomize=True)
CORRECTIONS = [None, "token_truncate", "token_mask", "sequence_truncate", "sequence_mean_mask"]


@st.composite
def configured(draw: st.DrawFn) -> tuple[oracle.Options, bool]:
    """Any combination of the options, and whether old log-probs are bypassed."""
    options = oracle.Options(
        loss_type=draw(st.sampled_from(LOSS_TYPES)),
        importance_sampling_level=draw(st.sampled_from(["token", "sequence", "sequence_token"])),
        epsilon_high=draw(st.sampled_from([None, 0.28, 5.0])),
        delta=draw(st.sampled_from([None, 1.5])),
        beta=draw(st.sampled_from([0.0, 0.2])),
        kl_estimator=draw(st.sampled_from(["k1", "k2", "k3"])),
        use_bias_correction_kl=draw(st.booleans()),
        entropy_coef=draw(st.sampled_from([0.0, 0.1])),
        top_entropy_quantile=draw(st.sampled_from([1.0, 0.5])),
        off_policy_threshold=draw(st.sampled_from([None, 0.05])),
        correction_mode=draw(st.sampled_from(CORRECTIONS)),
        max_sequence_gap=draw(st.sampled_from([None, 0.2])),
    )
    return options, draw(st.booleans())


def results(options: oracle.Options, rows: Rows, bypass: bool, parts: list[list[int]] | None = None) -> list:
    return list(step_loss(our_objective(options), rows, options.top_entropy_quantile, bypass, parts))


def assert_same(ours: list, theirs: list) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, **EXACT)


@QUICK
@given(configured(), st.integers(0, 100), st.permutations(range(5)), st.lists(st.booleans(), min_size=4, max_size=4))
def test_order_and_split_into_micro_batches_change_nothing(
    case: tuple[oracle.Options, bool], seed: int, order: list[int], cuts: list[bool]
) -> None:
    options, bypass = case
    parts = [[order[0]]]
    for index, cut in zip(order[1:], cuts, strict=True):
        if cut:
            parts.append([])
        parts[-1].append(index)
    rows = random_rows(seed)
    assert_same(results(options, rows, bypass, parts), results(options, rows, bypass))


@QUICK
@given(configured(), st.integers(0, 100), st.integers(1, 5))
def test_padding_changes_nothing(case: tuple[oracle.Options, bool], seed: int, padding: int) -> None:
    options, bypass = case
    rows = random_rows(seed)
    zeros = torch.zeros(5, padding, dtype=torch.float64)
    wide = Rows(*(torch.cat([value, zeros.to(value.dtype)], dim=1) for value in vars(rows).values()))
    loss, *gradients = results(options, wide, bypass)
    expected = results(options, rows, bypass)
    assert_same([loss, *(gradient[:, :6] for gradient in gradients)], expected)
    assert all((gradient[:, 6:] == 0).all() for gradient in gradients)


@QUICK
@given(configured(), st.integers(0, 100), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_masked_tokens_have_exactly_no_influence(case: tuple[oracle.Options, bool], seed: int, poison: float) -> None:
    options, bypass = case
    rows = random_rows(seed)
    tensors = {name: value for name, value in vars(rows).items() if name != "mask"}
    poisoned = replace(rows, **{name: torch.where(rows.mask, value, poison) for name, value in tensors.items()})
    for clean, with_poison in zip(results(options, rows, bypass), results(options, poisoned, bypass), strict=True):
        assert torch.equal(clean, with_poison)
        assert clean.ndim == 0 or (clean[~rows.mask] == 0).all()


@QUICK
@given(st.integers(0, 1000), st.sampled_from([3e-4, 0.1, 10.0]), st.booleans())
def test_gspo_token_with_equal_advantages_is_gspo(seed: int, epsilon: float, bypass: bool) -> None:
    """arXiv 2507.18071, section 4.3: value and gradient."""
    rows = random_rows(seed)
    gspo = oracle.Options(loss_type="grpo", importance_sampling_level="sequence", epsilon=epsilon)
    by_token = replace(gspo, importance_sampling_level="sequence_token")
    assert_same(results(by_token, rows, bypass), results(gspo, rows, bypass))


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_on_policy_all_losses_agree_up_to_their_normalisation(level: str) -> None:
    """With pi = pi_old = mu every ratio is 1 and no bound is met: the gradient is -share * A for each token.

    For a sequence's ratio, where the completion has one advantage.
    """
    rows = random_rows(spread=0.0)
    for loss_type in LOSS_TYPES:
        options = oracle.Options(loss_type=loss_type, importance_sampling_level=level, epsilon_high=1.0)
        shares = torch.tensor(our_objective(options).shares(rows.mask.sum(1).tolist()), dtype=torch.float64)
        expected = -shares[:, None] * rows.advantages * rows.mask
        for bypass in (False, True):
            _, gradient, _ = results(options, rows, bypass)
            torch.testing.assert_close(gradient, expected, **EXACT, msg=lambda m, n=loss_type: f"{n}: {m}")


@QUICK
@given(st.sampled_from(CLIPPED), st.integers(0, 100), st.floats(0.5, 2.0))
def test_scaled_advantages_scale_the_gradient(loss_type: str, seed: int, factor: float) -> None:
    rows = random_rows(seed)
    options = oracle.Options(loss_type=loss_type)
    scaled = results(options, replace(rows, advantages=rows.advantages * factor), False)
    assert_same(scaled, [value * factor for value in results(options, rows, False)])
