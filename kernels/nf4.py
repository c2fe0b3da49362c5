"""NF4 with nested scales (Dettmers et al. 2023, arXiv 2305.14314, section 3), the values of bitsandbytes bit for bit.

A row is cut into blocks of 64 weights. Each weight is stored as the 4-bit index of the nearest of 16 values (quantiles
of a normal distribution) after its block was divided by its largest magnitude, the *absmax*. The absmax is stored in 8
bits: less the tensor's mean absmax (the *offset*), in groups of 256 consecutive blocks, as the index into a map of 256
values times the group's own largest magnitude, the *group scale*. A weight reads, in fp32 and without a fused
multiply-add, each operation rounded,
    absmax = DYNAMIC_MAP[scale_code] * group_scale + offset,   weight = CODEBOOK[code] * absmax,
and is then rounded to the compute dtype: what `bitsandbytes.functional.dequantize_4bit` gives.

The bytes lie differently from bitsandbytes', so that a kernel decodes weights where the tensor cores take them (see
`words`), and a range of rows is a storage of its own, which is what fused projections need. Bits a weight:
4 + 8/64 + 32/16384 + 64/in, 4.14 for 4096 inputs.

Rounding follows bitsandbytes' CUDA kernels (csrc, kQuantizeBlockwise): the block is multiplied by the fp32 reciprocal
of its absmax, not divided by it; a code counts up where the product is *above* the midpoint of two values; a scale
that lies exactly between two values of the map takes the even index. The one exception is a block of zeros: its
reciprocal is infinite, the CUDA kernel takes code 0 and with a nested absmax decodes 64 equal numbers near zero; here,
as in bitsandbytes on the CPU, it takes the code of zero.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .words import in_columns, in_words

BLOCK = 64  # weights that share an absmax
GROUP = 256  # consecutive blocks that share a group scale
HALF = BLOCK // 2
ROW_CHUNK_ELEMENTS = 2**22  # weights that the plain torch code here decodes or encodes at a time

CODEBOOK = torch.tensor(
    [
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ],
    dtype=torch.float32,
)


def _dynamic_map() -> Tensor:
    """The signed 8-bit map (Dettmers et al. 2022, arXiv 2110.02861, section 2.2), (256,) fp32, ascending.

    Decade d of 0.1^(6 - d) is cut into 2^d equal cells, whose middles are taken with both signs; and 0 and 1.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
        values += middles.tolist() + (-middles).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32)


DYNAMIC_MAP = _dynamic_map()


@dataclass(frozen=True)
class NF4Tensor:
    """A quantised matrix (out, in), or several stacked by rows, each with its own offset and groups.

    Attributes:
        codes: (out, in / 2) uint8; four bytes are a word of eight weights, see `words`: the first four in the low
            nibbles, the others in the high ones.
        scale_codes: (out, in / 64) uint8, indices into DYNAMIC_MAP.
        group_scales: (groups,) fp32, those of all stacked matrices one after the other.
        group_start: (out,) int32: the index, in its matrix, of the row's first block, plus 256 times the index of the
            matrix' first group: block b of row r belongs to group (group_start[r] + b) >> 8.
        offset: (out,) fp32, the mean absmax of the row's matrix.
    """

    codes: Tensor
    scale_codes: Tensor
    group_scales: Tensor
    group_start: Tensor
    offset: Tensor

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

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five, in the order of the attributes, as operators take them."""
        return self.codes, self.scale_codes, self.group_scales, self.group_start, self.offset

    def rows(self, start: int, stop: int) -> "NF4Tensor":
        """Rows [start, stop), views of the same bytes."""
        codes, scale_codes, group_scales, group_start, offset = self.tensors()
        chosen = slice(start, stop)
        return NF4Tensor(codes[chosen], scale_codes[chosen], group_scales, group_start[chosen], offset[chosen])

    def columns(self, start: int, stop: int) -> "NF4Tensor":
        """Columns [start, stop), whole blocks: itself where these are all, else a matrix whose codes are copied."""
        if (start, stop) == (0, self.shape[1]):
            return self
        codes, scale_codes, group_scales, group_start, offset = self.tensors()
        blocks = slice(start // BLOCK, stop // BLOCK)
        codes = codes[:, blocks.start * HALF : blocks.stop * HALF].contiguous()  # kernels read blocks that are adjacent
        scale_codes = scale_codes[:, blocks].contiguous()
        return NF4Tensor(codes, scale_codes, group_scales, group_start + blocks.start, offset)


def groups_of(out_features: int, in_features: int) -> int:
    """Groups of one matrix."""
    return -(-out_features * (in_features // BLOCK) // GROUP)


def check_in_features(in_features: int, name: str) -> None:
    """Raise ValueError, naming the tensor, where a row is not a whole number of blocks."""
    if in_features % BLOCK:
        raise ValueError(
            f"{name}: NF4 needs rows that are a multiple of {BLOCK} weights, these have {in_features}; "
            "use the unquantised base (base='auto' and a checkpoint in 16 bits)"
        )


def empty(part_rows: Sequence[int], in_features: int, device: torch.device | str) -> NF4Tensor:
    """Room for several matrices of `part_rows` rows each, stacked; their groups are placed already.

    Raises ValueError where `in_features` is not a multiple of 64.
    """
    check_in_features(in_features, f"a matrix of {sum(part_rows)} x {in_features}")
    out_features, blocks = sum(part_rows), in_features // BLOCK
    starts, groups = [], 0
    for rows in part_rows:
        starts.append(torch.arange(rows, dtype=torch.int32) * blocks + GROUP * groups)
        groups += groups_of(rows, in_features)
    return NF4Tensor(
        torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device),
        torch.empty(out_features, blocks, dtype=torch.uint8, device=device),
        torch.empty(groups, dtype=torch.float32, device=device),
        torch.cat(starts).to(device),
        torch.empty(out_features, dtype=torch.float32, device=device),
    )


def quantize(weight: Tensor, out: NF4Tensor | None = None) -> NF4Tensor:
    """One matrix (out, in), fp32, bf16 or fp16 and finite, as NF4.

    Args:
        weight: on any device; taken to that of `out` a few rows at a time.
        out: room for this matrix alone (all but `group_start` is written); by default new, on the weight's device.

    Raises:
        ValueError: rows that are not a multiple of 64 weights; values that are not finite.
    """
    if out is None:
        out = empty([weight.shape[0]], weight.shape[1], weight.device)
    absmax = torch.empty(out.scale_codes.shape, dtype=torch.float32, device=out.device)
    for rows in row_chunks(*weight.shape):
        out.codes[rows], absmax[rows] = quantize_blocks(weight[rows].to(out.device))
    scale_codes, group_scales, offset = compress_absmax(absmax)
    if not offset.isfinite():
        raise ValueError("NF4 holds finite weights only, and some are not, or their sum overflows; check the weights")
    out.scale_codes.copy_(scale_codes)
    out.group_scales.copy_(group_scales)
    out.offset.copy_(offset.expand_as(out.offset))
    return out


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, in) -> codes (n, in / 2) uint8 as they are stored, absmax (n, in / 64) fp32, not yet compressed.

    The codes come from the exact absmax: rows can be quantised one after the other before the scales are known.
    """
    if weight.is_cuda:  # where there is a GPU there is Triton
        from . import nf4_triton

        return nf4_triton.quantize_blocks(weight)
    return quantize_blocks_reference(weight)


def quantize_blocks_reference(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_blocks` in plain torch."""
    rows, in_features = weight.shape
    blocks = weight.reshape(rows, in_features // BLOCK, BLOCK).float()
    absmax = blocks.abs().amax(-1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[..., None]
    midpoints = ((CODEBOOK[:-1] + CODEBOOK[1:]) / 2).to(weight.device)
    codes = torch.bucketize(scaled, midpoints, out_int32=True).to(torch.uint8)
    return pack_codes(codes.view(rows, in_features)), absmax


def compress_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every absmax of one matrix, (out, in / 64) fp32 -> scale_codes (same shape) uint8, group_scales, offset ()."""
    offset = absmax.reshape(-1).mean()
    centred = absmax.reshape(-1) - offset
    padding = -centred.numel() % GROUP
    groups = torch.nn.functional.pad(centred, (0, padding)).view(-1, GROUP)
    group_scales = groups.abs().amax(-1)
    scaled = groups * (1.0 / group_scales.clamp(min=1e-38))[:, None]
    dynamic_map = DYNAMIC_MAP.to(absmax.device)
    midpoints = (dynamic_map[:-1] + dynamic_map[1:]) / 2
    # Above the midpoint the higher index, below it the lower one, on it the even one.
    codes = torch.bucketize(scaled, midpoints)
    on_midpoint = scaled == midpoints[codes.clamp(max=midpoints.numel() - 1)]
    codes += on_midpoint & (codes % 2 == 1)
    codes.masked_fill_(group_scales[:, None] == 0, 0)  # what CUDA's search makes of 0 / 0; it decodes to the offset
    return codes.to(torch.uint8).view(-1)[: absmax.numel()].view(absmax.shape), group_scales, offset


def decode_absmax(nf4: NF4Tensor) -> Tensor:
    """The absmax of every block, (out, in / 64) fp32."""
    blocks = torch.arange(nf4.scale_codes.shape[1], dtype=torch.int32, device=nf4.device)
    group = (nf4.group_start[:, None] + blocks) >> 8
    scale = DYNAMIC_MAP.to(nf4.device)[nf4.scale_codes.int()] * nf4.group_scales[group]
    return scale + nf4.offset[:, None]


def dequantize(nf4: NF4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out, in) in `dtype`, written to `out` (columns contiguous) where given."""
    if nf4.codes.is_cuda:
        from . import nf4_triton

        return nf4_triton.dequantize(nf4, dtype, out)
    return dequantize_reference(nf4, dtype, out)


def dequantize_reference(nf4: NF4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """`dequantize` in plain torch, in chunks of rows."""
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device)
    codebook = CODEBOOK.to(nf4.device)
    for rows in row_chunks(*nf4.shape):
        chunk = nf4.rows(rows.start, rows.stop)
        values = codebook[unpack_codes(chunk.codes).int()].view(chunk.shape[0], -1, BLOCK)
        out[rows] = (values * decode_absmax(chunk)[..., None]).view(chunk.shape)
    return out


def pack_codes(codes: Tensor) -> Tensor:
    """(n, in) uint8 below 16 -> (n, in / 2) uint8, see `NF4Tensor.codes`."""
    words = in_words(codes)
    return (words[..., :4] | words[..., 4:] << 4).reshape(codes.shape[0], -1)


def unpack_codes(packed: Tensor) -> Tensor:
    """(n, in / 2) uint8 -> (n, in) uint8 below 16, the inverse of `pack_codes`."""
    words = packed.view(packed.shape[0], -1, 4)
    return in_columns(torch.cat((words & 15, words >> 4), dim=-1))


def row_chunks(out_features: int, in_features: int) -> list[slice]:
    """Ranges of rows of at most ROW_CHUNK_ELEMENTS weights, at least a row each."""
    rows = max(1, ROW_CHUNK_ELEMENTS // in_features)
    return [slice(start, min(start + rows, out_features)) for start in range(0, out_features, rows)]
