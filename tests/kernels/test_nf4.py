"""NF4 is bitsandbytes', bit for bit: codes, scales and decoded values, in three dtypes, whatever the shape.

bitsandbytes' CPU library rounds scale codes through a table of 65,536 bins, which its CUDA kernels, followed here, do
not: about one scale in a thousand comes out a step away. So scale codes are compared with bitsandbytes' exact search
(its path for dtypes without a kernel), and with the library's up to one step; everything else with the library.
"""

import pytest
import torch
from bitsandbytes import functional as bnb
from colora.kernels import nf4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WEIGHTS = {
    "gaussian": randn(331, 192),  # an odd number of rows, 993 blocks: the last group is not full
    "one_row": randn(1, 64),
    "whole_groups": randn(256, 128) * 0.02,
    "rows_of_different_size": randn(50, 320) * torch.logspace(-3, 2, 50)[:, None],
    "constant": torch.full((5, 64), 0.3),
    "zero": torch.zeros(7, 128),
    "zero_blocks": torch.cat([randn(70, 64), torch.zeros(70, 64)], dim=1),
    "tiny": randn(9, 128) * 2.0**-13,
    "huge": randn(9, 128).clamp(-3, 3) * 2.0**13,
    "tinier": randn(9, 128) * 2.0**-110,
    "huger": randn(9, 128) * 2.0**110,
}


def quantized_by_both(weight: Tensor) -> tuple[nf4.NF4Tensor, Tensor, bnb.QuantState]:
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return nf4.quantize(weight), packed, state


def exact_scale_codes(weight: Tensor) -> Tensor:
    """By bitsandbytes' search for the nearest, which it has for dtypes that its library lacks."""
    absmax = weight.float().view(-1, 64).abs().amax(1)
    centred = (absmax - absmax.mean()).double()
    return torch.ops.bitsandbytes.quantize_blockwise(centred, bnb.create_dynamic_map(), 256)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", WEIGHTS)
def test_what_bitsandbytes_gives(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name].to(dtype)
    if not weight.isfinite().all() or (weight == 0).all() != (WEIGHTS[name] == 0).all():
        pytest.skip(f"outside the range of {dtype}")
    ours, packed, state = quantized_by_both(weight)
    theirs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1).view(weight.shape)
    assert torch.equal(nf4.unpack_codes(ours.codes), theirs)
    assert torch.equal(ours.group_scales, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset.expand(weight.shape[0]))
    scale_codes = state.absmax.view(ours.scale_codes.shape)
    steps = ours.scale_codes.int() - scale_codes.int()
    assert steps.abs().max() <= 1 and (steps != 0).float().mean() <= 0.02
    if ours.group_scales.all():
        assert torch.equal(ours.scale_codes.view(-1), exact_scale_codes(weight))
    same_scales = nf4.NF4Tensor(ours.codes, scale_codes, ours.group_scales, ours.group_start, ours.offset)
    for decoded in DTYPES:
        state.dtype = decoded
        assert torch.equal(nf4.dequantize(same_scales, decoded), bnb.dequantize_4bit(packed, state))


def test_the_two_tables_are_bitsandbytes() -> None:
    assert torch.equal(nf4.CODEBOOK, bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4.DYNAMIC_MAP, bnb.create_dynamic_map())


@pytest.mark.parametrize("lower", range(128, 254))
def test_a_scale_between_two_values_takes_the_even_index(lower: int) -> None:
    """As bitsandbytes' CUDA search does, whose pivots are even."""
    middle = (nf4.DYNAMIC_MAP[lower] + nf4.DYNAMIC_MAP[lower + 1]) / 2
    around = [torch.nextafter(middle, limit) for limit in (torch.tensor(0.0), torch.tensor(1.0))]
    centred = torch.stack([middle, -middle, *around, *(-value for value in around), torch.ones(()), -torch.ones(())])
    codes, group_scales, offset = nf4.compress_absmax(centred[None])
    assert (group_scales.tolist(), offset.item()) == ([1.0], 0.0)  # so that nothing is rounded
    even, mirrored = lower + lower % 2, 254 - lower - 1
    assert codes[0, :6].tolist() == [even, mirrored + mirrored % 2, lower, lower + 1, mirrored + 1, mirrored]


def test_a_group_without_spread_has_code_0() -> None:
    """What bitsandbytes' search makes of 0 / 0."""
    codes, group_scales, offset = nf4.compress_absmax(torch.full((2, 3), 0.5))
    assert codes.unique().tolist() == [0] and group_scales.tolist() == [0.0] and offset.item() == 0.5


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_packing_is_undone_and_nibbles_hold_the_columns_documented(rows: int, blocks: int, seed: int) -> None:
    codes = torch.randint(0, 16, (rows, 64 * blocks), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = nf4.pack_codes(codes)
    assert torch.equal(nf4.unpack_codes(packed), codes)
    for byte, low, high in ((0, 0, 16), (1, 1, 17), (2, 8, 24), (5, 3, 19), (15, 15, 31), (16, 32, 48), (30, 46, 62)):
        last = packed[-1, 32 * (blocks - 1) + byte]
        columns = codes[-1, 64 * (blocks - 1) :]
        assert (last & 15, last >> 4) == (columns[low], columns[high]), f"byte {byte}"


def test_rows_and_columns_are_storages_of_their_own() -> None:
    weights = [randn(70, 192, seed=1), randn(5, 192, seed=2) * 10, randn(33, 192, seed=3) * 0.1]
    stacked = nf4.empty([70, 5, 33], 192, "cpu")
    row, group = 0, 0
    for weight in weights:  # 210, 15 and 99 blocks: one group each
        out = stacked.rows(row, row + weight.shape[0])
        one = nf4.NF4Tensor(
            out.codes, out.scale_codes, stacked.group_scales[group : group + 1], out.group_start, out.offset
        )
        nf4.quantize(weight, one)
        row, group = row + weight.shape[0], group + 1
    whole = nf4.dequantize(stacked, torch.float32)
    assert torch.equal(whole, torch.cat([nf4.dequantize(nf4.quantize(w), torch.float32) for w in weights]))
    assert torch.equal(nf4.dequantize(stacked.rows(60, 90), torch.float32), whole[60:90])
    assert torch.equal(nf4.dequantize(stacked.columns(64, 192), torch.float32), whole[:, 64:])
    assert torch.equal(
        nf4.dequantize(stacked.rows(3, 80).columns(128, 192), torch.bfloat16), whole[3:80, 128:].bfloat16()
    )
    assert stacked.columns(0, 192) is stacked


def test_a_matrix_of_several_groups_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also quantised a few rows at a time the scales are those of the whole."""
    weight = randn(600, 256)
    whole = nf4.quantize(weight)
    monkeypatch.setattr(nf4, "ROW_CHUNK_ELEMENTS", 1000)
    for one, other in zip(nf4.quantize(weight).tensors(), whole.tensors(), strict=True):
        assert torch.equal(one, other)
    assert whole.group_scales.numel() == 600 * 4 / 256 + 0.625  # ten groups, the last of them not full
    assert torch.equal(nf4.dequantize(whole, torch.float16), nf4.dequantize_reference(whole, torch.float16))


def test_bits_of_a_weight() -> None:
    stored = nf4.empty([4096, 1024, 1024], 4096, "meta")
    assert stored.shape == (6144, 4096)
    assert 8 * stored.nbytes / (6144 * 4096) < 4.15


def test_what_cannot_be_held_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"a matrix of 8 x 100: NF4 needs rows that are a multiple of 64 weights, .* 100"
    ):
        nf4.quantize(torch.zeros(8, 100))
    for bad in (float("nan"), float("inf")):
        weight = torch.zeros(8, 128)
        weight[3, 100] = bad
        with pytest.raises(ValueError, match="finite weights only"):
            nf4.quantize(weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_bitsandbytes_gives_on_a_gpu(dtype: torch.dtype) -> None:
    """Its reciprocal is the card's approximate one there, so a weight next to a threshold may come out a code away."""
    weight = randn(4096, 4096).to("cuda", dtype)
    ours, packed, state = quantized_by_both(weight)
    theirs = torch.stack((packed.view(-1) >> 4, packed.view(-1) & 15), dim=1).view(weight.shape)
    assert (nf4.unpack_codes(ours.codes) != theirs).float().mean() < 1e-6
    assert torch.equal(ours.group_scales, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset.expand(weight.shape[0]))
    scale_codes = state.absmax.view(ours.scale_codes.shape)
    assert (ours.scale_codes != scale_codes).float().mean() < 1e-4
    same = nf4.NF4Tensor(nf4.pack_codes(theirs), scale_codes, ours.group_scales, ours.group_start, ours.offset)
    for decoded in DTYPES:
        state.dtype = decoded
        assert torch.equal(nf4.dequantize(same, decoded), bnb.dequantize_4bit(packed, state))
        assert torch.equal(nf4.dequantize_reference(same, decoded), bnb.dequantize_4bit(packed, state))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    """But for the mean, whose sum has another order: the scales are those of the card's own mean."""
    weight = randn(1001, 1088).to(dtype)
    here, there = nf4.quantize(weight), nf4.quantize(weight, nf4.empty([1001], 1088, "cuda"))
    assert torch.equal(here.codes, there.codes.cpu())
    torch.testing.assert_close(here.offset, there.offset.cpu(), rtol=1e-6, atol=0)
    for one, other in zip(there.tensors(), nf4.quantize(weight.cuda()).tensors(), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(nf4.dequantize(there, dtype), nf4.dequantize_reference(there, dtype))
