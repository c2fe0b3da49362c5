"""Decode attention that reads shared blocks once, against every sequence on its own, interpreted or on a card."""

import os
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = torch.device("cuda" if ON_CARD else "cpu")
BLOCK = 16
DTYPE = torch.bfloat16 if ON_CARD else torch.float16  # which the interpreter cannot multiply
BOUND = {torch.bfloat16: 2 / 256, torch.float16: 2 / 2048}


class Cache:
    """vLLM's cache: it lies as (blocks, tokens, kv_heads, 2 * head_dim), seen as (blocks, kv_heads, tokens, ...)."""

    def __init__(self, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
        torch.manual_seed(0)
        tokens = torch.randn(blocks, BLOCK, kv_heads, 2 * head_dim, device=DEVICE, dtype=torch.float32)
        self.cache = tokens.to(dtype).transpose(1, 2)
        self._free = torch.randperm(blocks).tolist()

    def take(self, tokens: int) -> list[int]:
        return [self._free.pop() for _ in range(-(-tokens // BLOCK))]


def table_of(rows: Sequence[Sequence[int]], width: int) -> Tensor:
    """Blocks behind a sequence's own are anything: -7 must never be read."""
    padded = [[*row, *[-7] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int32, device=DEVICE)


def group(cache: Cache, prompt: int, completions: Sequence[int]) -> tuple[list[list[int]], list[int]]:
    """Sequences with the full blocks of a prompt in common: their blocks and lengths."""
    common = cache.take(prompt // BLOCK * BLOCK)
    lengths = [prompt + completion for completion in completions]
    return [[*common, *cache.take(length - prompt // BLOCK * BLOCK)] for length in lengths], lengths


def mixed(*pieces: tuple[list[list[int]], list[int]], order: Sequence[int] = ()) -> tuple[list[list[int]], list[int]]:
    rows = [row for piece in pieces for row in piece[0]]
    lengths = [length for piece in pieces for length in piece[1]]
    order = order or range(len(rows))
    return [rows[i] for i in order], [lengths[i] for i in order]


def check(
    cache: Cache, rows: list[list[int]], lengths: list[int], heads: int, max_sequences: int = 0
) -> tuple[object, Tensor]:
    from colora.kernels import decode_attention_triton as kernels
    from colora.kernels.decode_attention import DecodeAttention, DecodeShape, decode_attention_reference

    kv_heads, _, width = cache.cache.shape[1:]
    dtype, head_dim = cache.cache.dtype, width // 2
    table = table_of(rows, max(map(len, rows)) + 3)
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    qkv = torch.randn(len(rows), heads + 5, head_dim, device=DEVICE, dtype=torch.float32).to(dtype)
    q, out = qkv[:, :heads], torch.full((len(rows), heads, head_dim), 7.0, device=DEVICE, dtype=dtype)
    shape = DecodeShape(heads, kv_heads, head_dim, BLOCK, dtype)
    attention = DecodeAttention(shape, max_sequences or len(rows), DEVICE)
    attention.plan(table, seq_lens)
    items = attention._items[:, : int(attention._item_count)]
    assert items.shape[1] <= attention._target + 2 * len(rows)  # programs that `attend` launches
    assert (items[kernels.ITEM_ROW.value] + items[kernels.ITEM_ROWS.value]).max() <= len(attention._partial)
    attention.attend(q, cache.cache, table, out, head_dim**-0.5)
    expected = decode_attention_reference(q, cache.cache, table, seq_lens, head_dim**-0.5)
    error = (out.float() - expected.float()).abs().max() / cache.cache.float().abs().max()
    assert error < BOUND[dtype]
    return attention, out


def shared_tokens(attention: object, count: int) -> list[int]:
    return attention._sequences[3, :count].tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16] if ON_CARD else [torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (7, 1, 128), (3, 3, 64), (4, 2, 256)])
def test_a_group_reads_its_prompt_once(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    cache = Cache(80, kv_heads, head_dim, dtype)
    rows, lengths = group(cache, 32 * BLOCK + 5, [1, 30, 64, 131])
    attention, _ = check(cache, rows, lengths, heads)
    assert shared_tokens(attention, 4) == [32 * BLOCK] * 4


def test_groups_out_of_order_with_others_and_padding() -> None:
    cache = Cache(200, 2, 64, DTYPE)
    first, second = group(cache, 320, [1, 17, 40]), group(cache, 400, [3, 90])
    alone, short = group(cache, 300, [1]), group(cache, 40, [2, 2])  # 32 tokens in common are not worth it
    padding: tuple[list[list[int]], list[int]] = ([[]], [0])
    rows, lengths = mixed(first, second, alone, short, padding, order=[3, 0, 5, 1, 6, 4, 8, 2, 7])
    attention, out = check(cache, rows, lengths, heads=8, max_sequences=16)
    assert shared_tokens(attention, 9) == [400, 320, 0, 320, 0, 400, 0, 320, 0]
    assert not out[6].any()


def test_a_group_too_large_for_an_item() -> None:
    cache = Cache(120, 1, 64, DTYPE)
    rows, lengths = group(cache, 304, range(1, 12))  # 16 heads: four sequences an item
    attention, _ = check(cache, rows, lengths, heads=16)
    assert shared_tokens(attention, 11) == [304] * 11


def test_prompts_that_fork_share_what_all_have() -> None:
    """Two pairs share 512 tokens each, and all four the first 272 of them: the pairs are what is shared."""
    cache = Cache(150, 1, 64, DTYPE)
    common = cache.take(272)
    pairs = []
    for _ in range(2):
        more = cache.take(240)
        pairs += [[*common, *more, *cache.take(20)] for _ in range(2)]
    attention, _ = check(cache, pairs, [532] * 4, heads=2)
    assert shared_tokens(attention, 4) == [512] * 4


@pytest.mark.parametrize(
    ("theirs", "order", "expected"),
    [
        (304, (0, 1, 2, 3), [640, 640, 640, 0]),
        (304, (3, 0, 1, 2), [640, 640, 640, 0]),
        (592, (0, 1, 2, 3), [592] * 4),
        (592, (3, 0, 1, 2), [640, 640, 640, 0]),  # it leads nobody, and whoever is first does not join
    ],
)
def test_who_has_little_of_a_prompt_stays_alone(theirs: int, order: tuple[int, ...], expected: list[int]) -> None:
    """Three samples of a prompt, and one of another that begins alike."""
    cache = Cache(150, 1, 64, torch.float16)
    rows, lengths = group(cache, 640, [5, 40, 9])
    rows.append([*rows[0][: theirs // BLOCK], *cache.take(400)])
    lengths.append(theirs + 390)
    attention, _ = check(cache, [rows[i] for i in order], [lengths[i] for i in order], heads=2)
    assert shared_tokens(attention, 4) == [expected[i] for i in order]


def test_identical_sequences_leave_nothing_of_their_own() -> None:
    cache = Cache(40, 2, 64, DTYPE)
    row = cache.take(512)
    attention, _ = check(cache, [row, row, row], [512, 512, 512], heads=4)
    assert shared_tokens(attention, 3) == [512] * 3


def test_nan_stays_where_it_is_seen() -> None:
    """A NaN in one sequence's own keys, infinity behind another's end: nobody else sees them."""
    cache = Cache(80, 2, 64, DTYPE)
    rows, lengths = group(cache, 320, [5, 5, 5])
    cache.cache[rows[1][-1], :, 2] = float("nan")
    cache.cache[rows[2][-1], :, 9] = float("inf")  # five tokens of its block are the sequence's
    from colora.kernels.decode_attention import DecodeAttention, DecodeShape

    attention = DecodeAttention(DecodeShape(4, 2, 64, BLOCK, DTYPE), 3, DEVICE)
    table, seq_lens = table_of(rows, 30), torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    q = torch.randn(3, 4, 64, device=DEVICE).to(DTYPE)
    out = torch.empty_like(q)
    attention.plan(table, seq_lens)
    attention.attend(q, cache.cache, table, out, 0.125)
    assert out.isnan().flatten(1).any(1).tolist() == [False, True, False]
    assert out[1].isnan().all()


@pytest.mark.parametrize("heads", [4, 64])
def test_buffers_have_the_bytes_that_are_set_aside_for_them(heads: int) -> None:
    from colora.kernels.decode_attention import DecodeAttention, DecodeShape, buffer_bytes

    shape = DecodeShape(heads, 1, 64, BLOCK, DTYPE)
    buffers = [value for value in vars(DecodeAttention(shape, 5, DEVICE)).values() if isinstance(value, Tensor)]
    assert sum(buffer.nbytes for buffer in buffers) == buffer_bytes(shape, 5, DEVICE)


def test_sequences_that_fill_an_item_each() -> None:
    """64 heads a key-value head: what a group shares is read for each of its members."""
    cache = Cache(80, 1, 64, DTYPE)
    rows, lengths = group(cache, 320, [1, 30, 64])
    attention, _ = check(cache, rows, lengths, heads=64)
    assert shared_tokens(attention, 3) == [320] * 3


def test_errors() -> None:
    from colora.kernels.decode_attention import DecodeAttention, DecodeShape

    with pytest.raises(ValueError, match="no kernels for"):
        DecodeAttention(DecodeShape(4, 2, 80, BLOCK, DTYPE), 3, DEVICE)
    attention = DecodeAttention(DecodeShape(4, 2, 64, BLOCK, DTYPE), 3, DEVICE)
    with pytest.raises(ValueError, match="4 sequences, but it was made for 3"):
        attention.plan(table_of([[1]] * 4, 2), torch.ones(4, dtype=torch.int32, device=DEVICE))


@pytest.mark.gpu
def test_a_captured_step_serves_others() -> None:
    """The graph of one step, replayed for other lengths and other groups, at the size of an 8B model's layer."""
    from colora.kernels.decode_attention import DecodeAttention, DecodeShape, decode_attention_reference

    cache, sequences, width = Cache(4000, 8, 128, torch.bfloat16), 8, 1200
    attention = DecodeAttention(DecodeShape(32, 8, 128, BLOCK, torch.bfloat16), 16, DEVICE)
    table = torch.zeros(sequences, width, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.full((sequences,), 9000, dtype=torch.int32, device=DEVICE)
    q = torch.randn(sequences, 32, 128, device=DEVICE).to(torch.bfloat16)
    out = torch.empty_like(q)
    attention.plan(table, seq_lens)
    attention.attend(q, cache.cache, table, out, 0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.attend(q, cache.cache, table, out, 0.1)
    steps = [group(cache, 17_000, [1, 300, 40, 5, 6, 700, 8, 9]), group(cache, 30, [1, 2])]
    steps.append(mixed(group(cache, 9_000, [100, 1, 50]), group(cache, 500, [3, 4]), order=[3, 0, 4, 2, 1]))
    for rows, lengths in steps:
        table.fill_(-7)
        seq_lens.zero_()
        for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            table[i, : len(row)] = torch.tensor(row, dtype=torch.int32)
            seq_lens[i] = length
        attention.plan(table, seq_lens)
        graph.replay()
        expected = decode_attention_reference(q, cache.cache, table, seq_lens, 0.1)
        error = (out.float() - expected.float()).abs().max() / cache.cache.float().abs().max()
        assert error < BOUND[torch.bfloat16]
