"""Continuations of one prompt: as if each were a sequence of its own behind a prompt of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from colora.kernels import attention_shared
from colora.kernels.attention import packed_attention, packed_attention_reference
from colora.kernels.attention_shared import continued_attention, continued_attention_reference
from colora.kernels.attention_varlen import sequence_starts
from colora.kernels.row_layout import Layout, is_layout, positions, prolonged, row_tokens
from torch import Tensor

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


def cpu_flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], keys: tuple[int, ...], causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """`flash` by the CPU's operator, which has the same contract but takes one sequence at a time."""
    parts = zip(q.split(lengths), k.split(keys), v.split(keys), strict=True)
    outs = [_cpu(*part, causal, scale) for part in parts]
    return torch.cat([out for out, _ in outs]), torch.cat([log_sum for _, log_sum in outs], 1)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)[None]


def _cpu(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(_heads_first(x, q.shape[1]) for x in (q, k, v)), is_causal=causal, scale=scale
    )
    return out[0].transpose(0, 1), log_sum[0]


def cpu_flash_backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, grad: Tensor,
    lengths: tuple[int, ...], keys: tuple[int, ...], causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    found: list[list[Tensor]] = [[], [], []]
    queries = zip(*(x.split(lengths) for x in (q, out, grad)), log_sum.split(lengths, 1), strict=True)
    for (q_s, out_s, grad_s, log_s), k_s, v_s in zip(queries, k.split(keys), v.split(keys), strict=True):
        expanded = [_heads_first(x, q.shape[1]) for x in (grad_s, q_s, k_s, v_s, out_s)]
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *expanded, log_s[None], 0.0, causal, scale=scale
        )
        for place, grad_x, x in zip(found, grads, (q_s, k_s, v_s), strict=True):
            place.append(grad_x[0].transpose(0, 1).unflatten(1, (x.shape[1], -1)).sum(2))
    return tuple(torch.cat(parts) for parts in found)  # type: ignore[return-value]


@pytest.mark.parametrize("lengths", [(3, 1, 4), (6,), (2, 2)])
def test_the_parts_softmax_is_put_together(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs on a GPU, on the CPU's operators in its place."""
    monkeypatch.setattr(attention_shared, "flash", cpu_flash)
    monkeypatch.setattr(attention_shared, "flash_backward", cpu_flash_backward)
    row = random_row([5 + sum(lengths)])

    def attend(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def of_row(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q[5:], (k[:5], v[:5]), (k[5:], v[5:]), lengths, SCALE)

        return of_row

    true = with_gradients(attend(continued_attention_reference), row)
    for ours, expected in zip(with_gradients(attend(continued_attention), row), true, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)  # its parts meet in fp32


def test_starts_of_a_row_with_many_prompts_outlast_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """They go to the device once for a row, and not again with each layer."""

    def flash(*arguments: Any) -> tuple[Tensor, Tensor]:
        for lengths in arguments[3:5]:
            sequence_starts(lengths, arguments[0].device)
        return cpu_flash(*arguments)

    monkeypatch.setattr(attention_shared, "flash", flash)
    sequence_starts.cache_clear()
    misses = []
    for _layer in range(2):
        for family in range(64):
            prompt, lengths = 5 + family, (1, family + 1)
            q, k, v = random_row([prompt + sum(lengths)])
            own = (k[prompt:], v[prompt:])
            continued_attention(q[prompt:], (k[:prompt], v[:prompt]), own, lengths, SCALE)
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
    [[(512, 700, 300, 1000)], [(3000, 130, 1), 900, (40, 2500, 60)], [(9000, 2048, 1024)], [(300, 1, 1, 1), 20]],
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
