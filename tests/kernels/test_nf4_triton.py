"""The kernels that quantise and dequantise a matrix give the bits of the plain version, interpreted or on a card."""

import os

import pytest
import torch
from colora.kernels import nf4
from torch import Tensor

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
# The interpreter truncates to bf16 where a card rounds.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_CARD else [])
SHAPES = [(1, 64), (70, 128), (33, 320), (5, 1216)]


def weights(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    weight = torch.randn(shape, generator=generator, device=DEVICE) * 0.02
    weight[0, :64] = 0  # a block without a largest magnitude
    return weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_blocks(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from colora.kernels.nf4_triton import quantize_blocks

    weight = weights(*shape).to(dtype)
    for ours, plain in zip(quantize_blocks(weight), nf4.quantize_blocks_reference(weight), strict=True):
        assert ours.dtype == plain.dtype
        assert torch.equal(ours, plain)


def test_a_weight_on_a_midpoint_takes_the_lower_code() -> None:
    """Where the block's largest magnitude is 1, so that nothing is rounded before the comparison."""
    from colora.kernels.nf4_triton import quantize_blocks

    weight = torch.ones(1, 64, device=DEVICE)
    weight[0, :15] = ((nf4.CODEBOOK[:-1] + nf4.CODEBOOK[1:]) / 2).to(DEVICE)
    codes, _ = quantize_blocks(weight)
    assert nf4.unpack_codes(codes)[0, :15].tolist() == list(range(15))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dequantised_weights(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from colora.kernels.nf4_triton import dequantize

    stored = nf4.quantize(weights(*shape))
    assert torch.equal(dequantize(stored, dtype), nf4.dequantize_reference(stored, dtype))


def test_dequantised_rows_and_columns_of_stacked_matrices() -> None:
    """Every code and scale code, groups that begin within the rows, and a result within wider rows."""
    from colora.kernels.nf4_triton import dequantize

    stored = nf4.empty([70, 50, 9], 192, DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for codes in (stored.codes, stored.scale_codes):
        codes.random_(0, 256, generator=generator)
    stored.group_scales.normal_(generator=generator)
    stored.offset.normal_(generator=generator)
    for part in (stored, stored.rows(64, 125), stored.columns(64, 192)):
        wide = torch.full((part.shape[0], 200), 7.0, device=DEVICE)
        out = wide[:, : part.shape[1]]
        assert dequantize(part, torch.float32, out) is out
        assert torch.equal(out, nf4.dequantize_reference(part, torch.float32))
        assert (wide[:, part.shape[1] :] == 7).all(), "beyond the result"


def test_no_rows() -> None:
    from colora.kernels.nf4_triton import dequantize, quantize_blocks

    assert dequantize(nf4.empty([0], 64, DEVICE), torch.float32).shape == (0, 64)
    assert [tuple(t.shape) for t in quantize_blocks(torch.empty(0, 64, device=DEVICE))] == [(0, 32), (0, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_large_matrix_on_the_card(dtype: torch.dtype) -> None:
    weight = weights(19456, 2560).to(dtype)
    stored = nf4.quantize(weight)
    codes, absmax = nf4.quantize_blocks_reference(weight)
    assert torch.equal(stored.codes, codes)
    assert torch.equal(nf4.dequantize(stored, dtype), nf4.dequantize_reference(stored, dtype))
