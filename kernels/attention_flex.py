"""FlexAttention (Dong et al. 2024, arXiv 2412.05496) over a packed row, causal, with or without a sliding window.

What a query sees of a packed row is one interval of keys, from `first_visible` to itself, and the interval's start only
moves forward along the row. So one tensor of (tokens,) says everything about sequences and windows, the mask is two
comparisons, the same for all layers, and which blocks of 128 x 128 are empty, partly or wholly visible follows from the
intervals of each block's first and last query: nothing of (tokens, tokens) is ever made.

The attention is compiled once for all lengths (`dynamic`): what changes with the row are sizes and contents of tensors.
The row is padded to whole blocks, at least two (a dimension of 1 would be compiled apart), with tokens that see
themselves alone; padded rows are copies, rows of whole blocks are not. Masks of the last few rows are kept: the layers
of one forward pass and the recomputation in the backward pass share them.

Attention sinks (gpt-oss) belong in `_attend`: FlexAttention returns the log-sum-exp on request, with which the output
is rescaled as if one more key without a value had been there.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import config as dynamo_config
from torch.fx.experimental import _config as fx_config
from torch.nn.attention.flex_attention import BlockMask, flex_attention

BLOCK = 128  # FlexAttention's block of queries and of keys
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
COMPILED_KINDS = 64
KEPT_MASKS = 8  # two of each row with windows in some layers; a mask of 128K tokens is 16 MiB


def flex_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None
) -> Tensor:
    """`packed_attention` by FlexAttention: compiled on a GPU, and as it comes elsewhere (slow, forward only).

    Args and returns: those of `packed_attention`, which checks them.
    """
    tokens = q.shape[0]
    mask = packed_block_mask(lengths, window, q.device)
    padding = mask.seq_lengths[0] - tokens
    if padding:
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    if not q.is_cuda:
        return _attend_with(scale)(q, k, v, mask)[:tokens]
    for x in (q, k, v):
        torch._dynamo.mark_static(x, 1)
        torch._dynamo.mark_static(x, 2)
    # Else sizes that happen to be equal in the first row (tokens and a stride, blocks and heads) are compiled as equal.
    one_for_all = fx_config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    # Each scale, dtype, number of heads, layout (padded or not) and mode (with gradients or not) is compiled apart.
    with one_for_all, dynamo_config.patch(recompile_limit=COMPILED_KINDS):
        return _compiled(scale)(q, k, v, mask)[:tokens]


@lru_cache(maxsize=KEPT_MASKS)
def packed_block_mask(lengths: tuple[int, ...], window: int | None, device: torch.device) -> BlockMask:
    """The mask of a row, padded to whole blocks and at least two of them.

    Args:
        lengths: tokens of each sequence.
        window: tokens that a token sees, itself included; None for all.
        device: of the mask's tensors; nothing waits for it.
    """
    padded = max(2, -(-sum(lengths) // BLOCK)) * BLOCK
    first = first_visible(lengths, window, padded).to(device, non_blocking=True)
    block = torch.arange(padded // BLOCK, dtype=torch.int32, device=device)
    # Of the blocks of keys 0, 1, ...: those before `seen` are empty for a block of queries, those from `whole` up to
    # its own are wholly visible, those between and its own (the triangle) partly.
    seen = first[::BLOCK] // BLOCK
    whole = torch.minimum((first[BLOCK - 1 :: BLOCK] + BLOCK - 1) // BLOCK, block)
    nth = seen[:, None] + block
    partly = torch.where(nth < whole[:, None], nth, block[:, None])
    wholly = (whole[:, None] + block).clamp(max=len(block) - 1)  # behind the counted ones any index will do
    return BlockMask.from_kv_blocks(
        (whole - seen + 1)[None, None],
        partly[None, None],
        (block - whole)[None, None],
        wholly[None, None],
        BLOCK_SIZE=BLOCK,
        mask_mod=_interval_mask(first),
        seq_lengths=(padded, padded),
    )


def first_visible(lengths: tuple[int, ...], window: int | None, padded: int) -> Tensor:
    """(padded,) int32: the first token that each token of the row sees; tokens of the padding see themselves."""
    position = torch.arange(padded, dtype=torch.int32)
    sizes = torch.tensor(lengths)
    starts = torch.repeat_interleave((sizes.cumsum(0) - sizes).int(), sizes)
    first = torch.cat((starts, position[len(starts) :]))
    return first if window is None else torch.maximum(first, position - (window - 1))


def _interval_mask(first: Tensor) -> MaskMod:
    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= first[query])

    return visible


def _attend_with(scale: float) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    written = repr(scale)  # as a float it would become an input of the compiled graph; the kernels need a constant

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Tensor:
        q, k, v = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
        out = flex_attention(q, k, v, block_mask=mask, scale=float(written), enable_gqa=True)
        assert isinstance(out, Tensor)  # a tuple only where auxiliary outputs are asked for
        # Never so; it tells the compiler, whose kernels then check no bounds. Behind the call: only there does it know
        # that these are also the lengths of the mask.
        if q.shape[2] % BLOCK or k.shape[2] % BLOCK:
            raise ValueError("the row is not whole blocks")
        return out.squeeze(0).transpose(0, 1)

    return attend


@lru_cache
def _compiled(scale: float) -> Callable[[Tensor, Tensor, Tensor, BlockMask], Tensor]:
    """Compiled for all lengths; for each scale, which is a constant of the kernels, once."""
    return torch.compile(_attend_with(scale), dynamic=True, fullgraph=True)
