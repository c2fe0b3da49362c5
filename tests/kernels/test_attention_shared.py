"""Continuations of one prompt: as if each were a sequence of its own behind a prompt of its own."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from colora.kernels import attention, attention_shared
from colora.kernels.attention import KeptAttention, kept_attention, packed_attention, packed_attention_reference
from colora.kernels.attention_varlen import sequence_starts
from colora.kernels.row_layout import Layout, is_layout, positions, prolonged, row_tokens
from torch import Tensor

from ..attention_on_cpu import play_kernels

SCALE = 0.4
LAYOUTS: dict[str, list] = {
    "one_prompt": [(5, 3, 1, 4)],
    "one_continuation": [(7, 6)],
    "between_sequences": [4, (6, 2, 3), 1, 3, (1, 1, 1), 5],
    "prompts_side_by_side": [(3, 2), (4, 5, 1)],
}


def test_layout() -> None:
    layout = [2, (3, 2, 1)]
    assert row_tokens(layout) == 8
    assert positions(layout).tolist() == [0, 1, 0, 1, 2, 3, 4, 3]
    assert prolonged(layout, 4) == [2, (3, 2, 5)]
    assert prolonged([2, 3], 4) == [2, 7]
    assert is_layout(layout)
    for wrong in ([], [0], [(3,)], [(3, 0)], [(0, 3)], [2, ()]):
        assert not is_layout(wrong), wrong


def random_row(layout: Layout, dtype: torch.dtype = torch.float64, device: str = "cpu", size: int = 8) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    tokens = row_tokens(layout)
    return [torch.randn(tokens, heads, size, generator=generator, device=device).to(dtype) for heads in (4, 2, 2)]


def apart(row: list[Tensor], layout: Layout, window: int | None) -> Tensor:
    """Each continuation in a sequence with a copy of its prompt."""
    pieces, start = [], 0
    for entry in layout:
        prompt, *continuations = (entry,) if isinstance(entry, int) else entry
        first = [x[start : start + prompt] for x in row]
        pieces.append(packed_attention_reference(*first, [prompt], SCALE, window))
        start += prompt
        for length in continuations:
            whole = [torch.cat((x, y[start : start + length])) for x, y in zip(first, row, strict=True)]
            pieces.append(packed_attention_reference(*whole, [prompt + length], SCALE, window)[prompt:])
            start += length
    return torch.cat(pieces)


def with_gradients(attention: Callable[..., Tensor], row: list[Tensor], *options: object) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in row]
    out = attention(*inputs, *options)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_equals_sequences_of_their_own(layout: Layout, window: int | None) -> None:
    row = random_row(layout)
    true = with_gradients(lambda *x: apart(list(x), layout, window), row)
    for ours, expected in zip(with_gradients(packed_attention, row, layout, SCALE, window), true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("window", [None, 1, 3, 5, 100])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dense_from", [4, 100])
def test_the_way_over_kernels(
    layout: Layout, window: int | None, dense_from: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a GPU, on the CPU's operators: parts of a softmax put together, gradients of a prompt added up."""
    played, row = play_kernels(monkeypatch), random_row(layout)
    true = with_gradients(lambda *x: apart(list(x), layout, window), row)
    ours = with_gradients(packed_attention, row, layout, SCALE, window, dense_from)
    assert played.forwards and played.backwards
    for found, expected in zip(ours, true, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # log-sum-exp is fp32


@pytest.mark.parametrize("layout", [[(128, 100, 70), 4], [(300, 200)], [9, (129, 1, 130)], [(127, 200)], [(200, 3)]])
def test_of_long_prompts_all_but_the_end_goes_to_cudnn(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    play_kernels(monkeypatch)
    monkeypatch.setattr(attention_shared, "DENSE_PROMPT_FROM", 128)
    row = random_row(layout)
    true = with_gradients(lambda *x: apart(list(x), layout, None), row)
    for found, expected in zip(with_gradients(packed_attention, row, layout, SCALE), true, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_parts_of_a_row_are_freed_before_prompts_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put together is as large as they are."""
    play_kernels(monkeypatch)
    varlen, add_prompt, parts = attention.varlen, attention.add_prompt, []

    def watched_varlen(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        out, log_sum = varlen(*arguments, **more)
        parts.append(weakref.ref(out))
        return out, log_sum

    def watched_add_prompt(*arguments: Any) -> tuple[Tensor, Tensor]:
        assert parts and not any(part() is not None for part in parts)
        return add_prompt(*arguments)

    monkeypatch.setattr(attention, "varlen", watched_varlen)
    monkeypatch.setattr(attention, "add_prompt", watched_add_prompt)
    layout = LAYOUTS["between_sequences"]
    packed_attention(*random_row(layout), layout, SCALE, dense_from=4)


def test_what_was_kept_is_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    played, layout = play_kernels(monkeypatch), LAYOUTS["between_sequences"]
    row, kept = random_row(layout), KeptAttention()
    expected = with_gradients(packed_attention, row, layout, SCALE)
    with torch.no_grad():
        out = packed_attention(*row, layout, SCALE, kept=kept)
    assert torch.equal(out, expected[0])
    forwards = played.forwards
    ours = with_gradients(lambda *x: packed_attention(*x, layout, SCALE, kept=kept), row)
    assert all(map(torch.equal, ours, expected)) and played.forwards == forwards
    likes = kept_attention(torch.empty(row_tokens(layout), 3, dtype=torch.float64), *row[0].shape[1:])
    for like, there in zip(likes, (kept.out, kept.log_sum), strict=True):
        assert like.shape == there.shape and like.dtype == there.dtype


def test_starts_of_a_row_with_many_prompts_outlast_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to the device once for a row, and not again with each layer."""
    played = play_kernels(monkeypatch)

    def varlen(*arguments: Any, **more: Any) -> tuple[Tensor, Tensor]:
        for lengths in arguments[3:5]:
            sequence_starts(lengths, arguments[0].device)
        return played.varlen(*arguments, **more)

    monkeypatch.setattr(attention, "varlen", varlen)
    monkeypatch.setattr(attention_shared, "varlen", varlen)
    sequence_starts.cache_clear()
    layout, misses = [(105 + family, 1, family + 1) for family in range(64)], []
    for _layer in range(2):
        packed_attention(*random_row(layout), layout, SCALE)
        misses.append(sequence_starts.cache_info().misses)
    assert misses[0] == misses[1] > 128


def test_what_is_not_finite_stays_in_what_sees_it() -> None:
    layout = [(4, 3, 2), 3]
    row = random_row(layout)
    row[1][5] = torch.nan  # second token of the first continuation
    out = packed_attention(*row, layout, SCALE)
    assert out[:4].isfinite().all() and out[5:7].isnan().all() and out[7:].isfinite().all()
    row[1][2] = torch.nan  # of the prompt
    out = packed_attention(*row, layout, SCALE)
    assert out[2:9].isnan().all() and out[9:].isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize(
    "layout",
    [
        [(512, 700, 300, 1000)],
        [(3000, 130, 1), 900, (40, 2500, 60)],
        [(9000, 2048, 1024)],
        [(9000, 8192, 300)],
        [(300, 1, 1, 1), 20],
        [(5000, 1), 7],
    ],
    ids=str,
)
def test_kernels_on_the_card(layout: Layout, window: int | None) -> None:
    """Against fp32, no further than sequences of their own are, twice over."""
    exact = random_row(layout, torch.float32, "cuda", 128)
    row = [x.bfloat16() for x in exact]
    rounded = [x.float() for x in row]
    true = with_gradients(lambda *x: apart(list(x), layout, window), rounded)
    other = with_gradients(lambda *x: apart(list(x), layout, window), row)
    for ours, theirs, expected in zip(
        with_gradients(packed_attention, row, layout, SCALE, window), other, true, strict=True
    ):
        error, bound = ((x.float() - expected).norm() / expected.norm() for x in (ours, theirs))
        assert error < 2 * bound + 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize("layout", [[4100], [2500, 2500], [(3000, 130, 1), 900, (40, 2500, 60)]], ids=str)
def test_what_was_kept_is_enough_on_the_card(layout: Layout, window: int | None) -> None:
    row, kept = random_row(layout, torch.bfloat16, "cuda", 128), KeptAttention()
    expected = with_gradients(packed_attention, row, layout, SCALE, window)
    with torch.no_grad():
        packed_attention(*row, layout, SCALE, window, kept=kept)
    assert kept.out is not None and kept.log_sum is not None
    back = KeptAttention(kept.out.cpu().cuda(), kept.log_sum.cpu().cuda())  # in other memory
    ours = with_gradients(lambda *x: packed_attention(*x, layout, SCALE, window, kept=back), row)
    for found, whole in zip(ours, expected, strict=True):
        assert (found - whole).float().norm() < 1e-3 * whole.float().norm()  # kernels add in any order
