"""Decoded words in a kernel: their weights in the order of the columns. See `words`."""

import triton
import triton.language as tl


@triton.jit
def in_columns(eights):  # type: ignore[no-untyped-def]
    """(n, words, 2, 2, 2), weight 4 b + 2 a + e of a word at [..., e, a, b] -> (n, 8 * words)."""
    n: tl.constexpr = eights.shape[0]
    words: tl.constexpr = eights.shape[1]
    eights = tl.reshape(eights, (n, words // 4, 4, 2, 2, 2))  # q, e, a, b
    return tl.reshape(tl.permute(eights, (0, 1, 5, 4, 2, 3)), (n, 8 * words))
