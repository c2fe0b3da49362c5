"""Packed attention against a softmax written out query by query and against finite differences, in double precision."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from colora.kernels import attention_dense
from colora.kernels.attention import packed_attention, packed_attention_reference
from colora.kernels.attention_dense import dense, dense_backward, dense_bucket, has_dense_kernel, padded_tokens
from colora.kernels.attention_plan import DENSE_FROM, Segment, attention_plan
from colora.kernels.row_layout import Entry
from torch import Tensor

from ..attention_on_cpu import play_kernels

LENGTHS = (5, 1, 7)
SCALE = 0.3


def random_row(heads: int, kv_heads: int, tokens: int = sum(LENGTHS), seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """q (tokens, heads, 6), k and v (tokens, kv_heads, 6), double."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, heads, 6), (tokens, kv_heads, 6), (tokens, kv_heads, 6))
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return q, k, v


def query_by_query(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], window: int | None) -> Tensor:
    """One softmax for each query and head over the keys that it may see."""
    out, group, start = torch.empty_like(q), q.shape[1] // k.shape[1], 0
    for length in lengths:
        for token in range(start, start + length):
            first = start if window is None else max(start, token - window + 1)
            for head in range(q.shape[1]):
                keys, values = k[first : token + 1, head // group], v[first : token + 1, head // group]
                out[token, head] = torch.softmax(keys @ q[token, head] * SCALE, 0) @ values
        start += length
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 7])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_equals_a_softmax_for_each_query(heads: int, kv_heads: int, window: int | None) -> None:
    row = random_row(heads, kv_heads)
    expected = query_by_query(*row, LENGTHS, window)
    torch.testing.assert_close(packed_attention(*row, LENGTHS, SCALE, window), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("window", [None, 2])
def test_gradients(window: int | None) -> None:
    row = [tensor.requires_grad_() for tensor in random_row(4, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: packed_attention(q, k, v, LENGTHS, SCALE, window), row)


@pytest.mark.parametrize(("key_or_value", "poison"), [(1, math.nan), (2, math.nan), (2, math.inf)])
def test_nan_reaches_all_that_see_it_and_no_other_sequence(key_or_value: int, poison: float) -> None:
    # Not tried with a query: where all scores of a row are NaN, torch's kernel for the CPU gives 0.
    row = random_row(4, 2, tokens=12)
    clean = packed_attention(*row, (5, 7), SCALE)
    row[key_or_value][1] = poison  # in the first sequence, its second token
    out = packed_attention(*row, (5, 7), SCALE)
    assert not out[1:5].isfinite().any()
    assert torch.equal(out[5:], clean[5:])


def test_one_token_sees_itself_alone() -> None:
    q, k, v = random_row(4, 2, tokens=1)
    out = packed_attention(q, k, v, [1], SCALE, window=1)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("lengths", "window", "message"),
    [
        ([5, 7], None, "lengths add up to 12, the row has 13 tokens"),
        ([5, 0, 8], None, r"at least 1 token, lengths are \[5, 0, 8\]"),
        ([], None, r"at least 1 token, lengths are \[\]"),
        ([13], 0, "a window of 0 tokens"),
    ],
)
def test_rows_that_make_no_sense_are_refused(lengths: list[int], window: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        packed_attention(*random_row(4, 2), lengths, SCALE, window)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(13, 4, 6\), \(13, 3, 6\), \(13, 3, 6\); expected"):
        packed_attention(*random_row(4, 3), LENGTHS, SCALE)


def of_cudnn(*lengths: int) -> Segment:
    return Segment(lengths, dense=True)


def varlen(*lengths: int, window: int | None = None) -> Segment:
    return Segment(lengths, window=window)


@pytest.mark.parametrize(
    ("lengths", "window", "plan"),
    [
        ((32768,), None, [of_cudnn(32768)]),
        ((2048,), None, [of_cudnn(2048)]),
        ((1536,), None, [varlen(1536)]),
        ((3,), None, [varlen(3)]),
        ((8192,), 1024, [varlen(8192, window=1024)]),
        ((4096,) * 8, None, [of_cudnn(*(4096,) * 8)]),
        ((1536, 1536), None, [of_cudnn(1536, 1536)]),
        ((1000, 1000), None, [varlen(1000, 1000)]),
        ((1900, 900, 300), None, [varlen(1900, 900, 300)]),
        ((4096, 4096, 2048, 2047, 100), None, [of_cudnn(4096), of_cudnn(4096), of_cudnn(2048), varlen(2047, 100)]),
        ((5000, 100, 300, 4096, 700), None, [of_cudnn(5000), varlen(100, 300), of_cudnn(4096), varlen(700)]),
        ((5000, 100), 512, [varlen(5000, 100, window=512)]),
        ((5000, 100), 5000, [of_cudnn(5000), varlen(100)]),
        ((9, (3000, 70, 20)), None, [varlen(9), of_cudnn(3000), varlen(70, 20)]),
        (((1000, 70), (500, 20, 2100)), None, [varlen(1000, 70, 500, 20), of_cudnn(2100)]),
        (((1024, 1024, 1024),), None, [of_cudnn(1024, 1024, 1024)]),
        (((90, 20), 9), 10, [varlen(90, window=10), Segment((20,), window=10, prompt=90), varlen(9)]),
        (((8, 1), 20), 9, [varlen(8, 1, 20, window=9)]),
    ],
)
def test_plan(lengths: tuple[Entry, ...], window: int | None, plan: list[Segment]) -> None:
    assert list(attention_plan(lengths, window).segments) == plan


def test_plan_with_another_threshold() -> None:
    plan = attention_plan((1536, 1500, 90), dense_from=1500)
    assert list(plan.segments) == [of_cudnn(1536), of_cudnn(1500), varlen(90)] and not plan.prompts


def test_prompts_of_a_plan() -> None:
    layout = (7, (5, 2, 1), (9, 4), 3)
    assert attention_plan(layout).prompts == ((7, 12, 15), (15, 24, 28))
    assert attention_plan(layout, window=8).prompts == ((7, 12, 15),)  # of the other one it would not see all


def test_padded_tokens_are_few_and_their_own_padding() -> None:
    assert [padded_tokens(n) for n in (1, 128, 129, 16384, 16385, 40000)] == [128, 128, 256, 16384, 16640, 40448]
    for tokens in (1, 1000, 5555, 16383, 32769, 131071):
        padded = padded_tokens(tokens)
        assert padded % 128 == 0 and padded_tokens(padded) == padded
        assert tokens <= padded < max(tokens + 128, tokens * (1 + 1 / 64))


def test_dense_calls_have_few_lengths_and_little_padding() -> None:
    assert [dense_bucket(n) for n in (1, 1100, 2049, 4097, 8193, 16385)] == [128, 1152, 2176, 4352, 8704, 16896]
    lengths = range(DENSE_FROM, 32769)
    buckets = [dense_bucket(tokens) for tokens in lengths]
    assert len(set(buckets)) == 1 + 16 + 16 + 16 + 32
    assert all(dense_bucket(bucket) == bucket for bucket in set(buckets))
    added = [bucket / tokens - 1 for bucket, tokens in zip(buckets, lengths, strict=True)]
    assert min(added) == 0 and max(added) < 1 / 16 and sum(added) / len(added) < 1 / 50
    assert all(dense_bucket(tokens) == padded_tokens(tokens) for tokens in (32769, 50000, 131071))


@pytest.mark.parametrize(("sequences", "length"), [(1, 128), (1, 1), (1, 150), (3, 45)])
def test_padding_of_dense_calls_changes_nothing(sequences: int, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    play_kernels(monkeypatch)
    row = [tensor.requires_grad_() for tensor in random_row(4, 2, tokens=sequences * length)]
    grad = torch.randn(row[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = packed_attention_reference(*row, (length,) * sequences, SCALE)
    with torch.no_grad():
        out, log_sum = dense(*row, sequences, SCALE)
        gradients = dense_backward(grad, *row, out, log_sum, sequences, SCALE)
    assert log_sum.shape == (4, sequences * length) and log_sum.isfinite().all() and log_sum.is_contiguous()
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for ours, exact in zip(gradients, torch.autograd.grad(expected, row, grad), strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)  # log-sum-exp is fp32


def test_cudnn_is_asked_for_a_backward_pass_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes run without autograd, where torch would offer what has a forward kernel only."""

    def asked(params: Any) -> bool:
        assert torch.is_grad_enabled() and params.query.requires_grad
        return True

    monkeypatch.setattr(attention_dense, "can_use_cudnn_attention", asked)
    row = [x.requires_grad_() for x in random_row(4, 2)]
    with torch.no_grad():
        assert has_dense_kernel(*row) and has_dense_kernel(*(x.detach() for x in row))


@pytest.mark.parametrize(("sequences", "length"), [(1, 128), (1, 100), (2, 128), (3, 45)])
def test_what_is_left_of_a_forward_pass_lies_the_same_way_always(
    sequences: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """cuDNN's plans know q, k and v alone: another layout of the rest would be read wrongly."""
    seen: list[list[tuple[int, ...]]] = []

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *_: object, **__: object):
        seen.append([x.stride() for x in (grad.transpose(1, 2), out.transpose(1, 2), log_sum)])
        assert all(x.is_contiguous() for x in (grad.transpose(1, 2), out.transpose(1, 2), log_sum))
        return q, k, v

    monkeypatch.setattr(attention_dense, "_backward", backward)
    q, k, v = random_row(4, 2, tokens=sequences * length)
    log_sum = torch.zeros(4, sequences * length)
    heads_first = q.transpose(0, 1).contiguous().transpose(0, 1)
    for grad, out in ((q, q), (heads_first, heads_first), (q[:1].expand_as(q), q)):
        dense_backward(grad, q, k, v, out, log_sum, sequences, SCALE)
        dense_backward(grad, q, k, v, out, log_sum.T.contiguous().T, sequences, SCALE)
    assert seen.count(seen[0]) == 6


GPU_ROWS = {
    "one": ((1000,), None),
    "one_token": ((1,), None),
    "one_dense": ((2048,), None),
    "one_dense_padded": ((2500,), None),
    "equal": ((1024, 1024), None),
    "equal_padded": ((1025, 1025), None),
    "short": ((129, 1, 127, 500, 300), None),
    "one_token_each": ((1, 1, 1), None),
    "window": ((700, 1, 129), 100),
    "window_of_one": ((300, 20), 1),
    "window_beyond_some": ((700, 1, 129), 500),
    "mixed": ((4100, 60, 2049, 129, 40), None),
}


HEADS = {
    "gqa_bf16": (2, 128, torch.bfloat16),
    "mha_fp16": (4, 128, torch.float16),
    "wide_bf16": (1, 256, torch.bfloat16),
}


@pytest.mark.gpu
@pytest.mark.parametrize(("lengths", "window"), GPU_ROWS.values(), ids=GPU_ROWS)
@pytest.mark.parametrize(("kv_heads", "head_dim", "dtype"), HEADS.values(), ids=HEADS)
def test_kernels_equal_double_precision(
    lengths: tuple[int, ...], window: int | None, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> None:
    tokens, heads = sum(lengths), 4
    generator = torch.Generator("cuda").manual_seed(0)
    fused, grad = (
        torch.randn(tokens, n, head_dim, generator=generator, device="cuda").to(dtype)
        for n in (heads + 2 * kv_heads, heads)
    )

    def run(fused: Tensor, grad: Tensor) -> list[Tensor]:
        """Output and gradient of the fused projection, whose slices q, k and v are."""
        leaf = fused.clone().requires_grad_()
        out = packed_attention(*leaf.split((heads, kv_heads, kv_heads), dim=1), lengths, head_dim**-0.5 * 1.3, window)
        out.backward(grad)
        return [out.detach().double(), leaf.grad.double()]

    u = torch.finfo(dtype).eps / 2
    for ours, exact in zip(run(fused, grad), run(fused.double(), grad.double()), strict=True):
        assert ours.shape == exact.shape
        assert (ours - exact).norm() < 2 * u * exact.norm()
        assert (ours - exact).abs().max() < 8 * u * exact.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [(2048,), (2500, 300), (1024, 1024), (300, 90, 250)], ids=["dense", "padded", "batch", "varlen"]
)
def test_kernels_pass_nan_on_within_its_sequence(lengths: tuple[int, ...]) -> None:
    q, k, v = (x.bfloat16().cuda() for x in random_row_of(64, sum(lengths)))
    v[20] = torch.nan
    out = packed_attention(q, k, v, lengths, SCALE)
    assert out[20 : lengths[0]].isnan().all()
    assert out[lengths[0] :].isfinite().all()


@pytest.fixture
def cudnn_switch() -> Iterator[Callable[[bool], None]]:
    """Sets torch's switch of cuDNN, until the test ends."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    yield torch.backends.cuda.enable_cudnn_sdp
    torch.backends.cuda.enable_cudnn_sdp(before)


def test_torchs_switch_of_cudnn_is_not_asked(
    cudnn_switch: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it is off, as after an import of vLLM, cuDNN is looked for all the same, and it is off again afterwards."""
    seen = []
    monkeypatch.setattr(
        attention_dense, "can_use_cudnn_attention", lambda params: seen.append(torch.backends.cuda.cudnn_sdp_enabled())
    )
    for switch in (False, True):
        cudnn_switch(switch)
        has_dense_kernel(*(torch.empty(128, 2, 64) for _ in range(3)))
        assert torch.backends.cuda.cudnn_sdp_enabled() == switch
    assert seen == [True, True]


@pytest.mark.gpu
@pytest.mark.parametrize("switch", [True, False])
def test_cudnn_has_the_kernels_that_it_is_chosen_for(cudnn_switch: Callable[[bool], None], switch: bool) -> None:
    cudnn_switch(switch)
    for heads, head_dim, dtype in HEADS.values():
        q, k, v = (torch.empty(2048, n, head_dim, device="cuda", dtype=dtype) for n in (4, heads, heads))
        assert has_dense_kernel(q, k, v) or head_dim > 128


@pytest.mark.gpu
def test_heads_without_a_kernel_take_the_reference() -> None:
    row = [x.cuda().bfloat16() for x in random_row_of(20, 130)]
    out = packed_attention(*row, (100, 30), SCALE, window=7)
    exact = packed_attention(*(x.double() for x in row), (100, 30), SCALE, window=7)
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)


def random_row_of(head_dim: int, tokens: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(tokens, heads, head_dim, generator=generator) for heads in (4, 2, 2))
