"""Which eight weights of a row share a word of 4-bit codes: the same in both formats, NF4 and FP4.

Of 32 columns, word q of four has columns 2 q and 2 q + 1 and those 8, 16 and 24 further on. In an operand of 32 columns
of the tensor cores (PTX ISA, "Matrix fragments for mma.m16n8k16") these are what lane q of four holds of a row. So a
lane that decodes a word has the weights that it multiplies, and none of them moves.
"""

from torch import Tensor


def in_words(codes: Tensor) -> Tensor:
    """(n, in) -> (n, in / 8, 8): of 32 columns, weight 4 b + 2 a + e of word q is column 16 b + 8 a + 2 q + e."""
    return codes.view(codes.shape[0], -1, 4, 4, 2).transpose(2, 3).reshape(codes.shape[0], -1, 8)


def in_columns(eights: Tensor) -> Tensor:
    """(n, in / 8, 8) -> (n, in), the inverse of `in_words`."""
    return eights.view(eights.shape[0], -1, 4, 4, 2).transpose(2, 3).reshape(eights.shape[0], -1)
