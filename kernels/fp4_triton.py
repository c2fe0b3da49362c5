"""FP4 on the GPU: how a kernel decodes a chunk of 64 weights, and the pass over a whole matrix that makes it dense.

A code's sign belongs at bit 15 of a bf16, its exponent and mantissa at bits 8 to 6: that is value * 2^-126, subnormal
where the value is 1/2. A product with scale * 2^126 then gives the weight, exactly. Of the eight codes of a word, two
at a time are both halves of a 32-bit register:
    pair 0: word, pair 1: word rotated right by 3, pair 2: by 6, pair 3: the bits that are left, moved to their places
    by one multiplication with 2^2 + 2^7 + 2^12 (no two of which meet, so nothing is carried),
each under one mask. That is one integer instruction a weight and half a product; rotations alone cannot do it, as no
four translates of {0, 7, 8, 9} modulo 16 are disjoint.

Bytes of `dequantize`: 4.25 bits a weight read and the result written, once. Nothing is rounded but to fp16.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fp4 import CHUNK, FP4Tensor
from .words_triton import in_columns

_CHUNKS = 128  # of a program of `_dequantize`
_PAIRS = 0x81C081C0  # sign, exponent and mantissa of two bf16
_LAST = 0x001B001B  # where pair 3 lies in a word
_SPREAD = 2**2 + 2**7 + 2**12

# $8: a word of codes; $9: its scale as two equal bf16; $0 to $7: eight weights. A word is one element, so that the
# layout in which a lane holds its elements does not matter.
_DECODE = tl.constexpr(
    "{ .reg .b32 pair<4>; .reg .b32 zero; mov.b32 zero, 0x80008000; "
    f"and.b32 pair0, $8, {_PAIRS:#x}; "
    f"shf.r.wrap.b32 pair1, $8, $8, 3; and.b32 pair1, pair1, {_PAIRS:#x}; "
    f"shf.r.wrap.b32 pair2, $8, $8, 6; and.b32 pair2, pair2, {_PAIRS:#x}; "
    f"and.b32 pair3, $8, {_LAST:#x}; mul.lo.u32 pair3, pair3, {_SPREAD}; and.b32 pair3, pair3, {_PAIRS:#x}; "
    + " ".join(
        f"fma.rn.bf16x2 pair{i}, pair{i}, $9, zero; mov.b32 {{${2 * i}, ${2 * i + 1}}}, pair{i};" for i in range(4)
    )
    + " }"
)
_OPERANDS = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")
_EIGHT = tl.constexpr((tl.int16,) * 8)


@triton.jit
def _value(pair, half: tl.constexpr):  # type: ignore[no-untyped-def]
    """What the lower or the upper half of each uint32, a code at the places of bf16, stands for; fp32."""
    magnitude = ((pair >> (16 * half + 6)) & 7).to(tl.int32)
    value = tl.where(magnitude < 4, magnitude * 1.0, ((2 + magnitude % 2) << (magnitude >> 1)) * 0.5) * 0.5
    return tl.where(((pair >> (16 * half + 15)) & 1) == 1, -value, value)


@triton.jit
def decode(words, scales, dtype: tl.constexpr, PLAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    """Words of codes and the scale code of each, both int32 and of one shape -> weights of dtype, as multiples of their
    row's scale, with three more dimensions of 2: weight k of a word is at [..., k % 2, k // 2 % 2, k // 4].

    PLAIN: without assembly, for the interpreter, fp16 and fp32.
    """
    if PLAIN:
        word = words.to(tl.uint32, bitcast=True)
        scale = ((scales + (8 * (127 - 31))) << 20).to(tl.float32, bitcast=True)
        pair1, pair2 = (word >> 3) | (word << 29), (word >> 6) | (word << 26)
        pair3 = (word & 0x001B001B) * ((1 << 2) + (1 << 7) + (1 << 12))
        w0, w1 = (_value(word, 0) * scale).to(dtype), (_value(word, 1) * scale).to(dtype)
        w2, w3 = (_value(pair1, 0) * scale).to(dtype), (_value(pair1, 1) * scale).to(dtype)
        w4, w5 = (_value(pair2, 0) * scale).to(dtype), (_value(pair2, 1) * scale).to(dtype)
        w6, w7 = (_value(pair3, 0) * scale).to(dtype), (_value(pair3, 1) * scale).to(dtype)
    else:
        # The byte is 5 bits of exponent and 3 of mantissa; in bf16, 2^126 times what it stands for, in both halves.
        twice = scales * 0x00100010 + 0x6F006F00
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            _DECODE, _OPERANDS, [words, twice], dtype=_EIGHT, is_pure=True, pack=1
        )
    first, second = tl.join(tl.join(w0, w1), tl.join(w2, w3)), tl.join(tl.join(w4, w5), tl.join(w6, w7))
    return tl.join(first, second).to(dtype, bitcast=not PLAIN)


@triton.jit
def _dequantize(  # type: ignore[no-untyped-def]
    words, scale_pairs, row_scales, out, all_chunks, row_chunks, out_stride, CHUNKS: tl.constexpr, PLAIN: tl.constexpr
):
    chunk = tl.program_id(0) * CHUNKS + tl.arange(0, CHUNKS)
    chunk = tl.minimum(chunk, all_chunks - 1)  # what is beyond writes the last chunk again
    row = chunk // row_chunks
    packed = tl.load(words + chunk[:, None].to(tl.int64) * 8 + tl.arange(0, 8)[None, :])
    scales = (tl.load(scale_pairs + chunk).to(tl.int32)[:, None] >> (tl.arange(0, 8) // 4 * 8)[None, :]) & 255
    exact: tl.constexpr = tl.float32 if PLAIN else tl.bfloat16
    eights = in_columns(decode(packed, scales, exact, PLAIN))
    weight = eights * tl.load(row_scales + row)[:, None].to(exact)
    start = row.to(tl.int64) * out_stride + (chunk - row * row_chunks) * 64
    tl.store(out + start[:, None] + tl.arange(0, 64)[None, :], weight.to(out.dtype.element_ty))


def dequantize(fp4: FP4Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The matrix (out, in) in `dtype` (bf16, fp16 or fp32), written to `out` (columns contiguous) where given."""
    if out is None:
        out = torch.empty(fp4.shape, dtype=dtype, device=fp4.device)
    rows, row_chunks = fp4.shape[0], fp4.shape[1] // CHUNK
    if rows:
        _dequantize[(triton.cdiv(rows * row_chunks, _CHUNKS),)](
            fp4.codes.view(torch.int32), fp4.scale_codes.view(torch.int16), fp4.row_scales, out,
            rows * row_chunks, row_chunks, out.stride(0),
            CHUNKS=_CHUNKS, PLAIN=not out.is_cuda or dtype != torch.bfloat16, num_warps=4,
        )  # fmt: skip
    return out
