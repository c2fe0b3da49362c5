"""FP4: four-bit floating point weights (e2m1) with a scale of three mantissa bits for every 32, decoded by arithmetic.

A weight is value(code) * scale(block). A code is a sign, two exponent bits and one mantissa bit: 0, 1/2, 1, 3/2, 2, 3,
4, 6 and their negatives, the elements of OCP's MXFP4 (Microscaling Formats v1.0, section 5.3.3) and of NVFP4. A block
is 32 weights of a row. Its scale is a byte, eight steps to each power of two, times a power of two of the row:
    scale = (1 + (byte & 7) / 8) * 2^(byte // 8 - 31) * row_scale,
so that a row's blocks may differ by 2^31 and rows by as much as they like. Bits a weight: 4 + 8/32 + 32/in, 4.26 for
4096 inputs.

Three mantissa bits are what makes it exact: value * scale has at most 2 + 4 = 6 significant bits, and bf16 has 8. So
the decoded matrix is the same in bf16 and fp32 (and in fp16, as far as its range goes), and a kernel may apply the
scale to the weight or to a sum of its products, in bf16 or in fp32: trainer and engine compute with identical weights.

The four bits of a code do not lie together: they are spread over a 32-bit word of eight codes so that a GPU gets two of
them as bf16, but for their scale, by a rotation and a mask (`fp4_triton`), where NF4's need a table.

A block's scale is searched for: of those near a sixth of its largest magnitude (which maps that to 6) up to a quarter
of it (to 4, which leaves out the gap between 4 and 6, Cook et al. 2025, arXiv 2512.02010) the one with the least
squared error. Weights that are decoded and quantised again stay the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .words import in_columns, in_words

BLOCK = 32  # weights that share a scale
CHUNK = 64  # weights that a kernel decodes at a time; a row is a whole number of chunks
ROW_CHUNK_ELEMENTS = 2**22  # weights that are decoded or encoded at a time

VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # of the three bits below the sign
SCALE_STEPS = range(-2, 7)  # candidates, from the largest scale not above a sixth of the largest magnitude
ROW_EXPONENTS = (-90, 124)  # bounds of log2(row_scale): everything down to 2^-31 times it is a normal number of bf16
_STEPS_BELOW_ONE = 8 * 31  # of the byte of scale 1 * row_scale
# Where bits 0 (mantissa), 1 and 2 (exponent) and 3 (sign) of the eight codes of a word are. See `fp4_triton`.
_BIT = (
    (6, 7, 8, 15),
    (22, 23, 24, 31),
    (9, 10, 11, 18),
    (25, 26, 27, 2),
    (12, 13, 14, 21),
    (28, 29, 30, 5),
    (4, 0, 1, 3),
    (20, 16, 17, 19),
)


@dataclass(frozen=True)
class FP4Tensor:
    """A quantised matrix (out, in), or several stacked by rows: every row stands alone.

    Attributes:
        codes: (out, in / 2) uint8; four bytes are a word, the lowest first, of eight weights, see `words`.
        scale_codes: (out, in / 32) uint8.
        row_scales: (out,) fp32, powers of two.
    """

    codes: Tensor
    scale_codes: Tensor
    row_scales: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix it stands for."""
        return self.codes.shape[0], 2 * self.codes.shape[1]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """The three, in the order of the attributes, as operators take them."""
        return self.codes, self.scale_codes, self.row_scales

    def rows(self, start: int, stop: int) -> "FP4Tensor":
        """Rows [start, stop), views of the same bytes."""
        return FP4Tensor(*(tensor[start:stop] for tensor in self.tensors()))

    def columns(self, start: int, stop: int) -> "FP4Tensor":
        """Columns [start, stop), multiples of 64: itself where these are all, else with codes and scales copied."""
        if (start, stop) == (0, self.shape[1]):
            return self
        codes = self.codes[:, start // 2 : stop // 2].contiguous()  # kernels read chunks that are adjacent
        return FP4Tensor(codes, self.scale_codes[:, start // BLOCK : stop // BLOCK].contiguous(), self.row_scales)


def check_in_features(in_features: int, name: str) -> None:
    """Raise ValueError, naming the tensor, where a row is not a whole number of chunks."""
    if in_features % CHUNK:
        raise ValueError(
            f"{name}: FP4 needs rows that are a multiple of {CHUNK} weights, these have {in_features}; "
            "use the unquantised base (base='auto')"
        )


def empty(out_features: int, in_features: int, device: torch.device | str) -> FP4Tensor:
    """Room for a matrix. Raises ValueError where `in_features` is not a multiple of 64."""
    check_in_features(in_features, f"a matrix of {out_features} x {in_features}")
    return FP4Tensor(
        torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device),
        torch.empty(out_features, in_features // BLOCK, dtype=torch.uint8, device=device),
        torch.empty(out_features, dtype=torch.float32, device=device),
    )


def quantize(weight: Tensor, out: FP4Tensor | None = None) -> FP4Tensor:
    """A matrix (out, in), fp32, bf16 or fp16 and finite, as FP4.

    Args:
        weight: on any device; taken to that of `out` a few rows at a time.
        out: room for it; by default new, on the weight's device.

    Raises:
        ValueError: rows that are not a multiple of 64 weights; values that are not finite.
    """
    if out is None:
        out = empty(weight.shape[0], weight.shape[1], weight.device)
    for rows in row_chunks(*weight.shape):
        part = quantize_rows(weight[rows].to(out.device).float())
        for ours, found in zip(out.tensors(), part.tensors(), strict=True):
            ours[rows] = found
    return out


def quantize_rows(weight: Tensor) -> FP4Tensor:
    """All of a matrix (n, in) fp32 at once; needs some six times its memory."""
    rows, in_features = weight.shape
    blocks = weight.reshape(rows, in_features // BLOCK, BLOCK)
    largest = blocks.abs().amax(-1)
    if not largest.isfinite().all():
        raise ValueError("FP4 holds finite weights only, and some are not; check the weights")
    sixth = largest / VALUES[-1].item()
    _, exponent = torch.frexp(sixth.amax(-1))
    row_scales = torch.ldexp(torch.ones_like(sixth[:, 0]), exponent.clamp(*ROW_EXPONENTS))
    scale_codes = _best_scales(blocks, _scale_code_below(sixth / row_scales[:, None]), row_scales)
    magnitudes = _magnitude_codes(blocks.abs() / _block_scales(scale_codes, row_scales)[..., None])
    codes = magnitudes | blocks.signbit().to(torch.uint8) << 3
    codes.masked_fill_(magnitudes == 0, 0)  # no negative zeros
    return FP4Tensor(pack_codes(codes.view(rows, in_features)), scale_codes, row_scales)


def _best_scales(blocks: Tensor, first: Tensor, row_scales: Tensor) -> Tensor:
    """(n, in / 32) uint8: of the codes around `first` those with the least squared error."""
    values, magnitudes = VALUES.to(blocks.device), blocks.abs()
    best, least = first.clamp(0, 255), torch.full_like(magnitudes[..., 0], torch.inf)
    for step in SCALE_STEPS:
        code = (first + step).clamp(0, 255)
        relative = _scale_values(code)
        scaled = magnitudes / (relative * row_scales[:, None])[..., None]
        # Of the scaled weights, whose squares are in range whatever the weights' own are.
        error = (values[_magnitude_codes(scaled).int()] - scaled).square().sum(-1) * relative.square()
        best, least = torch.where(error < least, code, best), torch.minimum(error, least)
    return best.to(torch.uint8)


def _scale_code_below(relative: Tensor) -> Tensor:
    """int32: of the largest scale that is not above it, unbounded; for multiples of the row's scale, at least 0."""
    return (relative.view(torch.int32) >> 20) - 8 * 127 + _STEPS_BELOW_ONE


def _scale_values(codes: Tensor) -> Tensor:
    """The scales of codes 0 to 255, int32, as multiples of the row's; fp32, exact."""
    return ((codes + (8 * 127 - _STEPS_BELOW_ONE)) << 20).view(torch.float32)


def _block_scales(scale_codes: Tensor, row_scales: Tensor) -> Tensor:
    return _scale_values(scale_codes.int()) * row_scales[:, None]


def _magnitude_codes(scaled: Tensor) -> Tensor:
    """uint8: the nearest of VALUES, of two that are as near the smaller; for numbers of at least 0."""
    midpoints = ((VALUES[:-1] + VALUES[1:]) / 2).to(scaled.device)
    return torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)


def dequantize(fp4: FP4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out, in) in `dtype`, written to `out` (columns contiguous) where given."""
    if fp4.codes.is_cuda:  # where there is a GPU there is Triton
        from . import fp4_triton

        return fp4_triton.dequantize(fp4, dtype, out)
    return dequantize_reference(fp4, dtype, out)


def dequantize_reference(fp4: FP4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`dequantize` in plain torch, in chunks of rows."""
    if out is None:
        out = torch.empty(fp4.shape, dtype=dtype, device=fp4.device)
    values = torch.cat((VALUES, -VALUES)).to(fp4.device)
    for rows in row_chunks(*fp4.shape):
        chunk = fp4.rows(rows.start, rows.stop)
        decoded = values[unpack_codes(chunk.codes).int()].view(chunk.shape[0], -1, BLOCK)
        out[rows] = (decoded * _block_scales(chunk.scale_codes, chunk.row_scales)[..., None]).view(chunk.shape)
    return out


def pack_codes(codes: Tensor) -> Tensor:
    """(n, in) uint8 below 16 -> (n, in / 2) uint8, see `FP4Tensor.codes`."""
    eights = in_words(codes).long()
    words = torch.zeros_like(eights[..., 0])
    for which, places in enumerate(_BIT):
        for bit, place in enumerate(places):
            words |= (eights[..., which] >> bit & 1) << place
    return words.to(torch.int32).view(torch.uint8)


def unpack_codes(packed: Tensor) -> Tensor:
    """(n, in / 2) uint8 -> (n, in) uint8 below 16, the inverse of `pack_codes`."""
    words = packed.contiguous().view(torch.int32)
    codes = torch.zeros(*words.shape, 8, dtype=torch.uint8, device=packed.device)
    for which, places in enumerate(_BIT):
        for bit, place in enumerate(places):
            codes[..., which] |= ((words >> place & 1) << bit).to(torch.uint8)
    return in_columns(codes)


def row_chunks(out_features: int, in_features: int) -> list[slice]:
    """Ranges of rows of at most ROW_CHUNK_ELEMENTS weights, at least a row each."""
    rows = max(1, ROW_CHUNK_ELEMENTS // in_features)
    return [slice(start, min(start + rows, out_features)) for start in range(0, out_features, rows)]


def stacked(matrices: Sequence[FP4Tensor]) -> FP4Tensor:
    """Several matrices of as many inputs, one beneath the other, copied."""
    return FP4Tensor(*(torch.cat(tensors) for tensors in zip(*(each.tensors() for each in matrices), strict=True)))
