"""FlashAttention: its operator as this version of torch has it, what it is given, and what new lengths cost."""

import time

import pytest
import torch
from colora.kernels.attention import packed_attention
from colora.kernels.attention_varlen import has_kernel, sequence_starts, varlen, varlen_backward

CPU = torch.device("cpu")


def test_sequence_starts() -> None:
    starts = sequence_starts((5, 1, 7), CPU)
    assert starts.dtype == torch.int32 and starts.tolist() == [0, 5, 6, 13]


def test_layers_share_the_starts_whatever_the_mode() -> None:
    with torch.inference_mode():
        first = sequence_starts((2, 3), CPU)
    assert sequence_starts((2, 3), CPU) is first
    assert not first.is_inference()  # such a tensor could not be kept for a backward pass


@pytest.mark.parametrize("window", [None, 3])
def test_the_operators_take_grouped_queries(window: int | None) -> None:
    fused = torch.empty(13, 8, 64, device="meta", dtype=torch.bfloat16)
    q, k, v = fused.split((4, 2, 2), dim=1)
    lengths = (5, 1, 7)
    out, log_sum = varlen(q, k, v, lengths, lengths, 0.3, window=window)
    assert out.shape == q.shape and out.dtype == q.dtype and log_sum.dtype == torch.float32
    gradients = varlen_backward(out, q, k, v, out, log_sum, lengths, lengths, 0.3, window=window)
    assert [x.shape for x in gradients] == [q.shape, k.shape, v.shape]


def test_no_kernel_on_the_cpu() -> None:
    assert not has_kernel(torch.empty(1, 1, 64, dtype=torch.bfloat16))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "dtype", "has"),
    [
        (64, torch.bfloat16, True),
        (256, torch.float16, True),
        (264, torch.bfloat16, False),
        (20, torch.bfloat16, False),
        (64, torch.float32, False),
    ],
)
def test_kernels_for(head_dim: int, dtype: torch.dtype, has: bool) -> None:
    assert has_kernel(torch.empty(1, 1, head_dim, dtype=dtype, device="cuda")) == has


def step(lengths: tuple[int, ...], window: int | None) -> float:
    """Seconds of a forward and a backward pass, heads as in Qwen3 8B."""
    fused = torch.randn(sum(lengths), 48, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn(sum(lengths), 32, 128, device="cuda", dtype=torch.bfloat16)
    torch.cuda.synchronize()
    started = time.perf_counter()
    packed_attention(*fused.split((32, 8, 8), dim=1), lengths, 128**-0.5, window).backward(grad)
    torch.cuda.synchronize()
    return time.perf_counter() - started


@pytest.mark.gpu
def test_new_lengths_cost_nothing() -> None:
    step((1536, 1000), None)
    step((1536, 1000), 512)
    step((2500, 96), None)  # cuDNN's plan for all lengths from 2433 to 2559
    rows: list[tuple[tuple[int, ...], int | None]] = [
        ((1400, 1160, 77), None),
        ((2000, 3000, 1096), 512),
        ((100, 156), 7),
        ((16000, 384), 1024),
        ((2450, 90), None),
    ]
    for row in rows:
        seconds = step(*row)
        assert seconds < 0.05, f"the first row of {row} took {seconds * 1e3:.0f} ms"
