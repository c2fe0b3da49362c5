"""Block masks against those of torch from the dense mask, FlexAttention against the reference, and recompilations."""

import time

import pytest
import torch
from colora.kernels.attention import packed_attention_reference
from colora.kernels.attention_flex import BLOCK, first_visible, flex_packed_attention, packed_block_mask
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask

ROWS = [(300,), (1,), (127, 129), (128, 1, 130, 40), (5, 250, 1, 200), (128, 128, 128)]
WINDOWS = [None, 1, 7, 128, 130, 200]
CPU = torch.device("cpu")
LISTS = ("kv", "full_kv", "q", "full_q")


def seen(lengths: tuple[int, ...], window: int | None, padded: int) -> Tensor:
    """(padded, padded) bool from the definition; padding sees itself."""
    mask, start = torch.eye(padded, dtype=torch.bool), 0
    for length in lengths:
        position = torch.arange(length)
        distance = position[:, None] - position
        mask[start : start + length, start : start + length] = (distance >= 0) & (distance < (window or length))
        start += length
    return mask


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("lengths", ROWS, ids=str)
def test_block_mask_is_the_one_of_the_dense_mask(lengths: tuple[int, ...], window: int | None) -> None:
    ours = packed_block_mask(lengths, window, CPU)
    padded = ours.seq_lengths[0]
    assert padded % BLOCK == 0 and max(sum(lengths), 2 * BLOCK) <= padded < max(sum(lengths), BLOCK + 1) + BLOCK
    dense = seen(lengths, window, padded)
    theirs = create_block_mask(lambda _b, _h, q, k: dense[q, k], 1, 1, padded, padded, device="cpu", BLOCK_SIZE=BLOCK)
    for name in LISTS:
        counts, indices = (getattr(ours, f"{name}_{part}")[0, 0] for part in ("num_blocks", "indices"))
        expected, expected_indices = (getattr(theirs, f"{name}_{part}")[0, 0] for part in ("num_blocks", "indices"))
        assert torch.equal(counts, expected), name
        for row, count in enumerate(counts):
            assert set(indices[row, :count].tolist()) == set(expected_indices[row, :count].tolist()), name
        assert counts.dtype == indices.dtype == torch.int32 and indices.max() < padded // BLOCK


@pytest.mark.parametrize("window", [None, 3])
def test_first_visible(window: int | None) -> None:
    rows = seen((5, 1, 7), window, 16)
    assert first_visible((5, 1, 7), window, 16).tolist() == rows.int().argmax(dim=1).tolist()


@pytest.mark.parametrize("window", [None, 1, 130])
@pytest.mark.parametrize("lengths", [(1,), (128, 1, 130, 40)], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_equals_the_reference(lengths: tuple[int, ...], window: int | None, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads, 8) for heads in (4, kv_heads, kv_heads)]
    row = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    out = flex_packed_attention(*row, lengths, 0.3, window)
    expected = packed_attention_reference(*row, lengths, 0.3, window)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


def test_layers_share_a_mask() -> None:
    assert packed_block_mask((7, 300), None, CPU) is packed_block_mask((7, 300), None, CPU)
    assert packed_block_mask((7, 300), None, CPU) is not packed_block_mask((7, 300), 5, CPU)


def step(lengths: tuple[int, ...], window: int | None) -> float:
    """Seconds of a forward and a backward pass, heads as in Qwen3 8B."""
    fused = torch.randn(sum(lengths), 48, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(sum(lengths), 32, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    started = time.perf_counter()
    flex_packed_attention(*fused.split((32, 8, 8), dim=1), lengths, 128**-0.5, window).backward(grad)
    torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.mark.gpu
def test_one_compilation_serves_all_lengths() -> None:
    # 4096 tokens: as many as 32 heads of 128, and 32 blocks; what is equal there is not equal elsewhere.
    torch._dynamo.reset()
    step((4000, 96), None)
    counters.clear()
    rows: list[tuple[tuple[int, ...], int | None]] = [
        ((1536, 1400, 1160), None),
        ((100, 156), None),
        ((2048, 3000, 1096), 512),
        ((16000, 384), None),
        ((640, 128), 7),
    ]
    seconds = [step(*row) for row in rows]
    assert counters["stats"]["unique_graphs"] == 0
    assert seconds[0] < 0.05, f"the second row of new lengths took {seconds[0] * 1e3:.0f} ms"
