"""Packed attention against a softmax written out query by query and against finite differences, in double precision."""

import pytest
import torch
from colora.kernels.attention import packed_attention
from torch import Tensor

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


@pytest.mark.parametrize("key_or_value", [1, 2])
def test_nan_reaches_all_that_see_it_and_no_other_sequence(key_or_value: int) -> None:
    # Not tried with a query: where all scores of a row are NaN, torch's kernel for the CPU gives 0.
    row = random_row(4, 2, tokens=12)
    clean = packed_attention(*row, (5, 7), SCALE)
    row[key_or_value][1] = torch.nan  # in the first sequence, its second token
    out = packed_attention(*row, (5, 7), SCALE)
    assert out[1:5].isnan().all()
    assert torch.equal(out[5:], clean[5:])


def test_one_token_sees_itself_alone() -> None:
    q, k, v = random_row(4, 2, tokens=1)
    out = packed_attention(q, k, v, [1], SCALE, window=1)
    torch.testing.assert_close(out, v.repeat_interleave(2, dim=1), rtol=0, atol=1e-15)


def test_lengths_that_do_not_fill_the_row_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths add up to 12, the row has 13 tokens"):
        packed_attention(*random_row(4, 2), [5, 7], SCALE)
