"""NF4 on the GPU: how a kernel decodes a block, and the two passes over a whole matrix, quantise and dequantise.

The values are those of `nf4.py`, bit for bit. A decoded weight is codebook[code] * absmax, an fp32 product that is
rounded once, so nothing coarser than fp32 may stand in for the 16 values: each lane of a warp holds one of them in a
register and a code is looked up by a shuffle. That is one shuffle, one shift and one product a weight and half a
rounding (two at a time), with no table in memory to fill or to run into bank conflicts over.

Bytes of `dequantize`: 4.14 bits read and the result written, once; of `quantize_blocks`: the weights read and 4.5 bits
written, once. Neither rounds anything that the plain version does not.
"""

import struct
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nf4 import BLOCK, CODEBOOK, DYNAMIC_MAP, HALF, NF4Tensor
from .words_triton import in_columns

_DEQUANTIZED, _QUANTIZED = 128, 64  # blocks of a program


def _lane_values() -> str:
    """PTX that puts codebook[lane % 16] into a register of the whole function, `nf4_value`.

    The register is named rather than an operand: a tensor made from a scalar would keep Triton from computing the
    decoded weights in the layout in which the tensor cores take them.
    """
    values = [f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}" for value in CODEBOOK.tolist()]
    choose = " ".join(
        f"setp.eq.u32 here, lane, {code}; selp.f32 nf4_value, {value}, nf4_value, here;"
        for code, value in enumerate(values)
    )
    return (
        ".reg .f32 nf4_value; { .reg .b32 lane; .reg .pred here; mov.u32 lane, %laneid; and.b32 lane, lane, 15; "
        f"mov.f32 nf4_value, {values[0]}; {choose} mov.u32 $0, 0; }}"
    )


def _decode_word(packed_type: str) -> str:
    """PTX: $8 four bytes, $9 their absmax -> $0 to $7, the weights of the low nibbles, then those of the high ones.

    Args:
        packed_type: of two weights.
    """
    lines = [".reg .b32 code<8>, pair<4>; .reg .f32 value<8>;"]
    for weight in range(8):
        shift = 8 * weight if weight < 4 else 8 * (weight - 4) + 4
        lines += [
            f"shr.u32 code{weight}, $8, {shift};",  # the shuffle takes the lowest bits; 16 lanes repeat the others
            f"shfl.sync.idx.b32 value{weight}, nf4_value, code{weight}, 0x1f, 0xffffffff;",
            f"mul.rn.f32 value{weight}, value{weight}, $9;",
        ]
    for i in range(4):
        lines.append(f"cvt.rn.{packed_type}.f32 pair{i}, value{2 * i + 1}, value{2 * i};")
        lines.append(f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair{i};")
    return "{ " + " ".join(lines) + " }"


_PREPARE = tl.constexpr(_lane_values())
_MAP = tl.constexpr(".shared .align 16 .b8 nf4_scales[1024]; mov.u32 $0, 0;")  # the map of scale codes, fp32 (256,)
_AT = "{ .reg .b32 at; mov.u32 at, nf4_scales; mad.lo.u32 at, $1, 4, at; "  # where it has scale code $1
_SET_SCALE = tl.constexpr(_AT + "st.shared.f32 [at], $2; mov.u32 $0, 0; }")
_GET_SCALE = tl.constexpr(_AT + "ld.shared.f32 $0, [at]; }")
_DECODE_BF16 = tl.constexpr(_decode_word("bf16x2"))
_DECODE_FP16 = tl.constexpr(_decode_word("f16x2"))
_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,f")
_EIGHT = tl.constexpr((tl.int16,) * 8)


@triton.jit
def prepare_decoding(PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """To be called once in a kernel before it calls `decode`, by every thread."""
    if not PLAIN:
        tl.inline_asm_elementwise(_PREPARE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prepare_scales(tables, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """To be called once in a kernel before it calls `scales_of`, by every thread: copies the map to shared memory.

    Lanes of a warp look up different values there, which takes two to four cycles; in the L1 cache it takes a dozen.
    """
    if not PLAIN:
        tl.inline_asm_elementwise(_MAP, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        code = tl.arange(0, 256)
        value = tl.load(tables + code)
        tl.inline_asm_elementwise(_SET_SCALE, "=r,r,f", [code, value], dtype=tl.int32, is_pure=False, pack=1)
        tl.debug_barrier()


@triton.jit
def scales_of(codes, tables, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """What scale codes, int32 from 0 to 255, loaded since `prepare_scales`, stand for -> fp32 of the same shape.

    By assembly and not a load, so that it is done in the layout that is asked for. Nothing tells the compiler that it
    reads memory; what keeps it behind `prepare_scales` are its codes.
    """
    if PLAIN:
        return tl.load(tables + codes)
    else:
        return tl.inline_asm_elementwise(_GET_SCALE, "=f,r", [codes], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _value(word, absmax, tables, shift: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of the code at that bit of each int32, by the table and not by assembly."""
    return (tl.load(tables + 256 + ((word >> shift) & 15)) * absmax).to(dtype)


@triton.jit
def decode(words, absmax, tables, dtype: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """int32 words of four bytes of codes, and the absmax of each: two shapes that broadcast -> weights of dtype.

    They have three more dimensions of 2: byte b's low nibble is at [..., b % 2, b // 2, 0], its high one at [..., 1].
    A word is one element, so that the layout in which a lane holds its elements does not matter.
    PLAIN: without assembly, for the interpreter and for fp32; `tables` as `decoding_tables` makes it.
    """
    if PLAIN:
        w0, w1 = _value(words, absmax, tables, 0, dtype), _value(words, absmax, tables, 8, dtype)
        w2, w3 = _value(words, absmax, tables, 16, dtype), _value(words, absmax, tables, 24, dtype)
        w4, w5 = _value(words, absmax, tables, 4, dtype), _value(words, absmax, tables, 12, dtype)
        w6, w7 = _value(words, absmax, tables, 20, dtype), _value(words, absmax, tables, 28, dtype)
    elif dtype == tl.bfloat16:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            _DECODE_BF16, _OPERANDS, [words, absmax], dtype=_EIGHT, is_pure=True, pack=1
        )
    else:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            _DECODE_FP16, _OPERANDS, [words, absmax], dtype=_EIGHT, is_pure=True, pack=1
        )
    low, high = tl.join(tl.join(w0, w1), tl.join(w2, w3)), tl.join(tl.join(w4, w5), tl.join(w6, w7))
    return tl.join(low, high).to(dtype, bitcast=not PLAIN)


@cache
def decoding_tables(device: torch.device) -> Tensor:
    """(272,) fp32: the map of the scale codes, then the codebook."""
    return torch.cat((DYNAMIC_MAP, CODEBOOK)).to(device)


@cache
def _midpoints(device: torch.device) -> Tensor:
    """(15,) fp32: a scaled weight above the first n of them has code n."""
    return ((CODEBOOK[:-1] + CODEBOOK[1:]) / 2).to(device)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    words, scale_codes, group_scales, group_start, offset, tables, out, all_blocks, row_blocks, out_stride,
    BLOCKS: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    prepare_decoding(PLAIN)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    block = tl.minimum(block, all_blocks - 1)  # what is beyond writes the last block again
    row = block // row_blocks
    in_row = block - row * row_blocks
    group = (tl.load(group_start + row) + in_row) >> 8
    scale = tl.load(tables + tl.load(scale_codes + block).to(tl.int32)) * tl.load(group_scales + group)
    absmax = (scale + tl.load(offset + row))[:, None]
    packed = tl.load(words + block[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :])
    weight = in_columns(decode(packed, absmax, tables, out.dtype.element_ty, PLAIN))
    first = row.to(tl.int64) * out_stride + in_row * 64
    tl.store(out + first[:, None] + tl.arange(0, 64)[None, :], weight)


@triton.jit
def _quantize_blocks(weight, midpoints, codes, absmax, blocks, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    there = (block < blocks)[:, None]
    byte = tl.arange(0, 32)[None, :]
    column = byte // 16 * 32 + byte // 2 % 2 * 8 + byte // 4 % 4 * 2 + byte % 2  # of its low nibble, see `words`
    low = tl.load(weight + block[:, None] * 64 + column, mask=there, other=0.0).to(tl.float32)
    high = tl.load(weight + block[:, None] * 64 + 16 + column, mask=there, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(low), 1), tl.max(tl.abs(high), 1))
    reciprocal = tl.div_rn(
        tl.full(largest.shape, 1.0, tl.float32), tl.maximum(largest, tl.full(largest.shape, 1e-38, tl.float32))
    )[:, None]
    low, high = low * reciprocal, high * reciprocal
    low_code, high_code = tl.zeros_like(low).to(tl.int32), tl.zeros_like(high).to(tl.int32)
    for level in tl.static_range(4):  # a binary search for how many midpoints lie below
        step = 8 >> level
        low_code += tl.where(low > tl.load(midpoints + low_code + step - 1), step, 0)
        high_code += tl.where(high > tl.load(midpoints + high_code + step - 1), step, 0)
    tl.store(codes + block[:, None] * 32 + byte, (low_code | (high_code << 4)).to(tl.uint8), mask=there)
    tl.store(absmax + block, largest, mask=block < blocks)


def dequantize(nf4: NF4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out, in) in `dtype` (bf16, fp16 or fp32), written to `out` (columns contiguous) where given."""
    if out is None:
        out = torch.empty(nf4.shape, dtype=dtype, device=nf4.device)
    rows, row_blocks = nf4.scale_codes.shape
    if rows:
        _dequantize[(triton.cdiv(rows * row_blocks, _DEQUANTIZED),)](
            nf4.codes.view(torch.int32), *nf4.tensors()[1:], decoding_tables(nf4.device), out,
            rows * row_blocks, row_blocks, out.stride(0),
            BLOCKS=_DEQUANTIZED, PLAIN=not out.is_cuda or dtype == torch.float32, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def quantize_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (n, in), fp32, bf16 or fp16, finite -> codes (n, in / 2) uint8 and absmax (n, in / 64) fp32."""
    rows, in_features = weight.shape
    weight, blocks = weight.contiguous(), rows * (in_features // BLOCK)
    codes = torch.empty(rows, in_features // BLOCK * HALF, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(rows, in_features // BLOCK, dtype=torch.float32, device=weight.device)
    if blocks:
        _quantize_blocks[(triton.cdiv(blocks, _QUANTIZED),)](
            weight, _midpoints(weight.device), codes, absmax, blocks, BLOCKS=_QUANTIZED, num_warps=4
        )
    return codes, absmax
