"""FP4 is exact where it says so, its quantiser takes the best of its candidates, and what is quantised stays."""

import itertools

import pytest
import torch
from colora.kernels import fp4
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_codes(rows: int, in_features: int, row_scale: float = 1.0) -> fp4.FP4Tensor:
    generator = torch.Generator().manual_seed(0)
    stored = fp4.empty(rows, in_features, "cpu")
    stored.codes.random_(0, 256, generator=generator)
    stored.scale_codes.random_(0, 256, generator=generator)
    stored.row_scales.fill_(row_scale)
    return stored


WEIGHTS = {
    "gaussian": randn(31, 192),
    "one_row": randn(1, 64),
    "rows_of_different_size": randn(50, 320) * torch.logspace(-30, 30, 50)[:, None],
    "blocks_of_different_size": (randn(9, 10, 32) * torch.logspace(-6, 2, 10)[:, None]).view(9, 320),
    "constant": torch.full((5, 64), 0.3),
    "zero": torch.zeros(7, 128),
    "zero_blocks": torch.cat([randn(70, 64), torch.zeros(70, 64)], dim=1),
    "largest": torch.full((2, 64), 2.0**127),
    "smallest_of_fp32": torch.full((2, 64), 1e-45),
}


def test_every_weight_is_exact_in_bf16() -> None:
    """Every value times every scale, at both ends of the rows' scales: bf16 holds what fp32 does."""
    for exponent in (*fp4.ROW_EXPONENTS, 0):
        stored = fp4.empty(256, 64, "cpu")
        stored.codes.copy_(fp4.pack_codes((torch.arange(64) % 16).to(torch.uint8).repeat(256, 1)))
        stored.scale_codes.copy_(torch.arange(256, dtype=torch.uint8)[:, None].expand(256, 2))
        stored.row_scales.fill_(2.0**exponent)
        exact = fp4.dequantize(stored, torch.float32)
        assert torch.equal(fp4.dequantize(stored, torch.bfloat16).float(), exact)
        scales = [(1 + byte % 8 / 8) * 2.0 ** (byte // 8 - 31 + exponent) for byte in range(256)]
        signed = E2M1 + [-value for value in E2M1]
        assert exact[:, :16].tolist() == [[value * scale for value in signed] for scale in scales]


def test_packing_is_a_permutation_of_the_bits() -> None:
    codes = torch.randint(0, 16, (5, 192), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    assert torch.equal(fp4.unpack_codes(fp4.pack_codes(codes)), codes)
    single = torch.zeros(128, 32, dtype=torch.uint8)
    single[torch.arange(128), torch.arange(128) // 4] = (1 << torch.arange(128) % 4).to(torch.uint8)
    words = fp4.pack_codes(single).view(torch.int32).long() % 2**32
    assert ((words > 0).sum(1) == 1).all(), "each bit of a code is one bit of one word"
    assert [sorted(word[word > 0].tolist()) for word in words.T] == [[2**bit for bit in range(32)]] * 4


@pytest.mark.parametrize("name", WEIGHTS)
def test_what_is_decoded_is_near_and_is_quantised_to_itself(name: str) -> None:
    weight = WEIGHTS[name]
    decoded = fp4.dequantize(fp4.quantize(weight), torch.float32)
    assert decoded.isfinite().all()
    again = fp4.dequantize(fp4.quantize(decoded), torch.float32)
    assert torch.equal(again, decoded)
    if name != "smallest_of_fp32":
        # A block's largest magnitude is mapped to 4 to 6, or a step above; the widest gap of values is 2.
        largest = weight.view(weight.shape[0], -1, 32).abs().amax(-1, keepdim=True)
        assert ((decoded - weight).view_as(weight.view(weight.shape[0], -1, 32)).abs() <= largest / 4 * 1.01).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_are_quantised_as_they_are(dtype: torch.dtype) -> None:
    weight = randn(9, 128).to(dtype)
    for ours, theirs in zip(fp4.quantize(weight).tensors(), fp4.quantize(weight.float()).tensors(), strict=True):
        assert torch.equal(ours, theirs)


def test_no_scale_nearby_is_better() -> None:
    """By brute force, in double precision: of the candidates none has a smaller error, and few of the rest have."""
    weight = randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    stored = fp4.quantize(weight)
    decoded = fp4.dequantize(stored, torch.float32)
    values = torch.tensor(E2M1 + [-value for value in E2M1]).double()
    missed = 0
    for row, block in itertools.product(range(40), range(2)):
        columns = slice(32 * block, 32 * block + 32)
        exact = weight[row, columns].double()
        ours = (decoded[row, columns].double() - exact).square().sum()
        best = torch.inf
        for code in range(256):
            grid = values * (1 + code % 8 / 8) * 2.0 ** (code // 8 - 31) * stored.row_scales[row]
            error = (grid[:, None] - exact).abs().amin(0).square().sum()
            best = min(best, error.item())
        assert ours <= best * 1.02
        missed += ours > best * (1 + 1e-5)
    assert missed <= 4


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), scale=st.floats(-60, 60), tail=st.floats(1.2, 30))
def test_each_code_is_the_nearest(seed: int, scale: float, tail: float) -> None:
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(tail).sample((3, 64)) * 2.0**scale
    stored = fp4.quantize(weight)
    decoded = fp4.dequantize(stored, torch.float32)
    scales = 2.0 ** (stored.scale_codes // 8 - 31.0) * (1 + stored.scale_codes % 8 / 8) * stored.row_scales[:, None]
    grid = torch.tensor(E2M1 + [-value for value in E2M1]) * scales.repeat_interleave(32, 1)[..., None]
    nearest = (grid - weight[..., None]).abs().amin(-1)
    torch.testing.assert_close((decoded - weight).abs(), nearest, rtol=1e-5, atol=0)


def test_chunks_of_rows_and_places_to_write_to(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = randn(30, 128)
    whole = fp4.quantize(weight)
    monkeypatch.setattr(fp4, "ROW_CHUNK_ELEMENTS", 7 * 128)
    room = fp4.empty(40, 128, "cpu")
    assert fp4.quantize(weight, room.rows(5, 35)).codes.data_ptr() == room.codes[5].data_ptr()
    for ours, theirs in zip(room.rows(5, 35).tensors(), whole.tensors(), strict=True):
        assert torch.equal(ours, theirs)
    decoded = fp4.dequantize(whole, torch.float32)
    out = torch.empty(30, 128)
    assert fp4.dequantize(whole, torch.float32, out) is out and torch.equal(out, decoded)


def test_rows_and_columns_are_matrices_of_their_own() -> None:
    stored = fp4.quantize(randn(20, 320))
    decoded = fp4.dequantize(stored, torch.float32)
    assert torch.equal(fp4.dequantize(stored.rows(3, 11), torch.float32), decoded[3:11])
    assert torch.equal(fp4.dequantize(stored.columns(64, 256), torch.float32), decoded[:, 64:256])
    assert stored.columns(0, 320) is stored
    assert (stored.shape, stored.columns(64, 256).shape) == ((20, 320), (20, 192))
    whole = fp4.stacked([stored.rows(0, 7), stored.rows(7, 20)])
    assert torch.equal(fp4.dequantize(whole, torch.float32), decoded)


def test_bits_a_weight() -> None:
    assert fp4.empty(16, 4096, "meta").nbytes * 8 == 16 * 4096 * 4.25 + 16 * 32


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    weight = randn(9, 128)
    weight[4, 70] = value
    with pytest.raises(ValueError, match="FP4 holds finite weights only"):
        fp4.quantize(weight)


def test_rows_that_are_no_multiple_of_64_are_refused() -> None:
    with pytest.raises(ValueError, match="a matrix of 3 x 96: FP4 needs rows that are a multiple of 64 weights"):
        fp4.quantize(randn(3, 96))
