"""Attention of decode steps over vLLM's paged cache, reading the keys and values that sequences share once for all.

The samples of a group have their prompt's blocks in common (prefix caching). Attention that takes sequence by sequence
reads these once a sequence; here they are found in the block table and read once for up to ROWS / (heads / kv_heads)
sequences, whose queries are the rows of one matrix product. What a sequence has of its own is read as ever. The results
of all pieces are merged by their log-sums (flash-decoding: Dao et al. 2023; shared prefixes: Juravsky et al. 2024,
arXiv 2402.05099), so the result is that of each sequence on its own.

Bytes a layer: 4 * kv_heads * head_dim a token in 16 bits, of every shared token once and every other token once; the
pieces' results besides, 4 * head_dim * heads a sequence and piece in fp32, written and read. A group of 8 samples with
48K tokens of prompt and 1K of completions each reads 0.23 GB instead of 1.6 GB in a layer of an 8B model.

Error: scores, sums and the pieces' results are fp32, the probabilities are rounded to the dtype of unit roundoff u
before the product with the values, the result once: |error| <= 2 u max |v|, and rounding of the scores' sums.
NaN comes out as NaN, and stays, as infinities do, in the sequences that see it.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

ROWS = 64  # queries of an item: sequences * heads a key-value head
LEAST_TOKENS = 256  # of an item, but for what is left over
LEAST_SHARED = 256  # tokens from which on reading once is worth an item of its own
DTYPES = (torch.bfloat16, torch.float16)
LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Launch:
    """How `attend_items` is launched.

    Attributes:
        programs: a processor, about: two run at once, more of them come out more even.
        tile: keys at once, for heads of 128 elements.
        stages: of Triton.
    """

    programs: int = 4
    tile: int = 64
    stages: int = 3


@dataclass(frozen=True)
class DecodeShape:
    """What the kernels are compiled for.

    Attributes:
        heads, kv_heads: of queries, and of keys and values.
        head_dim: elements of a head.
        block_size: tokens of a block of the cache.
        dtype: of queries, cache and result.
    """

    heads: int
    kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype

    @property
    def supported(self) -> bool:
        """Whether there are kernels for it."""
        sizes = self.head_dim in (64, 128, 256) and self.block_size % 16 == 0
        return sizes and self.heads % self.kv_heads == 0 and self.group <= ROWS and self.dtype in DTYPES

    @property
    def group(self) -> int:
        """Query heads a key-value head."""
        return self.heads // self.kv_heads


def capacities(
    shape: DecodeShape, max_sequences: int, device: torch.device, launch: Launch = Launch()
) -> tuple[int, int, int]:
    """How many items a step is cut into, about; the most that it can have, and the most rows of partial results."""
    # There are two segments a sequence at most, and each may end in an item that is not full. A sequence has rows in
    # the last item of the segment that it shares and in that of its own; the full items have up to ROWS each.
    on_gpu = device.type == "cuda"
    processors = torch.cuda.get_device_properties(device).multi_processor_count if on_gpu else 2
    target = max(2, processors * launch.programs // shape.kv_heads)
    return target, target + 2 * max_sequences, target * ROWS + 2 * max_sequences * shape.group


def tiles(head_dim: int, launch: Launch = Launch()) -> tuple[int, int]:
    """Keys at once and stages: both fewer for wide heads, as smaller GPUs have 99 KB of shared memory for them."""
    return (launch.tile // 2, 2) if head_dim > 128 else (launch.tile, launch.stages)


def buffer_bytes(shape: DecodeShape, max_sequences: int, device: torch.device) -> int:
    """Bytes of a `DecodeAttention`."""
    _, items, rows = capacities(shape, max_sequences, device)
    integers = max_sequences**2 + 12 * max_sequences + 6 * items + 1
    return 4 * integers + 4 * rows * shape.kv_heads * (shape.head_dim + 1)


class DecodeAttention:
    """Buffers and plan of a step, for all layers of one shape; the addresses stay, for CUDA graphs.

    `plan` is called once a step, outside of graphs, `attend` in every layer. What is launched depends on the number of
    sequences only.

    Args:
        shape: of the layers.
        max_sequences: the most of one step.
        device: a GPU.
        launch: for benchmarks.

    Raises:
        ValueError: a shape that there are no kernels for.
    """

    def __init__(self, shape: DecodeShape, max_sequences: int, device: torch.device, launch: Launch = Launch()):
        from . import decode_attention_triton as kernels  # needs Triton

        if not shape.supported:
            raise ValueError(f"DecodeAttention: there are no kernels for {shape}")
        self.shape, self.max_sequences = shape, max_sequences
        self._tile, self._stages = tiles(shape.head_dim, launch)
        self._target, self._capacity, rows = capacities(shape, max_sequences, device, launch)
        zeros = partial(torch.zeros, dtype=torch.int32, device=device)
        self._common = zeros(max_sequences, max_sequences)
        self._leaders, self._most, self._members = (zeros(max_sequences) for _ in range(3))
        self._sequences = zeros(kernels.SEQUENCE_FIELDS, max_sequences)
        self._merges = zeros(kernels.MERGE_FIELDS, max_sequences)
        self._items = zeros(kernels.ITEM_FIELDS, self._capacity)
        self._item_count = zeros(1)
        self._partial = torch.zeros(rows, shape.kv_heads, shape.head_dim, device=device)
        self._log_sums = torch.zeros(rows, shape.kv_heads, device=device)

    def plan(self, block_table: Tensor, seq_lens: Tensor) -> None:
        """Find what the sequences of a step share, and cut the step into items.

        Args:
            block_table: (sequences, blocks) int32, each row's contiguous: the blocks of each, in order.
            seq_lens: (sequences,) int32: tokens of each, the new one included; 0 for one that is only there as padding.

        Raises:
            ValueError: more sequences than there is room for.
        """
        from . import decode_attention_triton as kernels

        count, shape = seq_lens.shape[0], self.shape
        if count > self.max_sequences:
            raise ValueError(f"DecodeAttention: {count} sequences, but it was made for {self.max_sequences}")
        lanes = 1 << (self.max_sequences - 1).bit_length()
        table_stride = block_table.stride(0)
        kernels.find_common[(count, count)](
            block_table, seq_lens, self._common, count, table_stride, BLOCK_SIZE=shape.block_size, AT_ONCE=1024
        )
        least = -(-LEAST_SHARED // shape.block_size)
        kernels.find_leaders[(count,)](self._common, self._leaders, self._most, count, LEAST=least, SEQUENCES=lanes)
        kernels.find_groups[(count,)](
            self._common, self._leaders, self._most, self._sequences, self._members, count,
            CAPACITY=self.max_sequences, BLOCK_SIZE=shape.block_size, SEQUENCES=lanes,
        )  # fmt: skip
        kernels.plan_items[(2 * count,)](
            seq_lens, self._sequences, self._members, self._items, self._merges, self._item_count, count, self._target,
            CAPACITY=self.max_sequences, ITEMS=self._capacity, HEADS=shape.group, TOGETHER=ROWS // shape.group,
            TILE=self._tile, LEAST_TILES=LEAST_TOKENS // self._tile, SEQUENCES=lanes, AT_ONCE=32,
        )  # fmt: skip

    def attend(self, q: Tensor, kv_cache: Tensor, block_table: Tensor, out: Tensor, scale: float) -> None:
        """softmax(scale * q k^T) v of one token a sequence, over the sequences that were planned last.

        Args:
            q: (sequences, heads, head_dim), the last dimension contiguous.
            kv_cache: (blocks, kv_heads, block_size, 2 * head_dim), keys and then values, the last dimension contiguous.
            block_table: as planned.
            out: like q; written.
            scale: factor on the scores.
        """
        from . import decode_attention_triton as kernels

        shape, count = self.shape, q.shape[0]
        items = self._target + 2 * count
        kernels.attend_items[(shape.kv_heads, items)](
            q, kv_cache, block_table, self._members, self._items, self._item_count, self._partial, self._log_sums,
            scale * LOG2_E, q.stride(0), q.stride(1), kv_cache.stride(0), kv_cache.stride(2),
            kv_cache.stride(1), block_table.stride(0),
            ITEMS=self._capacity, HEADS=shape.group, HEAD_DIM=shape.head_dim, BLOCK_SIZE=shape.block_size,
            ROWS=ROWS, TILE=self._tile, num_warps=4, num_stages=self._stages,
        )  # fmt: skip
        kernels.merge[(count, shape.heads)](
            self._partial, self._log_sums, self._merges, out, out.stride(0), out.stride(1),
            CAPACITY=self.max_sequences, HEADS=shape.group, HEAD_DIM=shape.head_dim, AT_ONCE=32, num_warps=4,
        )  # fmt: skip


def decode_attention_reference(
    q: Tensor, kv_cache: Tensor, block_table: Tensor, seq_lens: Tensor, scale: float
) -> Tensor:
    """`DecodeAttention.attend` in plain torch, sequence by sequence, in fp32 but for the result."""
    out = torch.zeros_like(q)
    group = q.shape[1] // kv_cache.shape[1]
    for i, length in enumerate(seq_lens.tolist()):
        blocks = block_table[i, : -(-length // kv_cache.shape[2])].long()
        tokens = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:length].float()
        k, v = tokens.repeat_interleave(group, dim=1).chunk(2, dim=-1)
        weights = torch.softmax(torch.einsum("hd,nhd->hn", q[i].float() * scale, k), dim=-1)
        out[i] = torch.einsum("hn,nhd->hd", weights, v).to(q.dtype) if length else 0
    return out
