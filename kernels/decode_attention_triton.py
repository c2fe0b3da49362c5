"""The kernels of `DecodeAttention` (decode_attention.py): four that plan a step, and two a layer.

A *segment* is a run of keys that the same queries attend to: the blocks that a group of sequences shares, or what a
sequence has of its own behind them. Segments are cut into *items* of about equal length, one program a key-value head
each; `merge` brings together what a sequence's items give. How many items there are is known to the GPU alone: grids
are as large as they can become, and programs without an item end at once, so that a CUDA graph holds for every step.

Per sequence (rows of `sequences`, int32): its rank in its group, the group's size, its own place in `members`, and the
tokens that the group shares.
Per item (rows of `items`): place of its first member and the sequence that is, rows (members * heads a key-value
head), first and last token + 1, and its first row among the partial results. Per sequence, for `merge`: first row and
how many partial results it has of shared items, by how much the next one's row is larger, and first row and number of
those of its own.
"""

import triton
import triton.language as tl

# Rows of the tables; the widths are the capacities.
RANK, SIZE, PLACE, SHARED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
ITEM_PLACE, ITEM_SEQUENCE, ITEM_ROWS, ITEM_START, ITEM_STOP, ITEM_ROW = (tl.constexpr(i) for i in range(6))
SHARED_ROW, SHARED_COUNT, SHARED_STEP, OWN_ROW, OWN_COUNT = (tl.constexpr(i) for i in range(5))
SEQUENCE_FIELDS, ITEM_FIELDS, MERGE_FIELDS = 4, 6, 5
VARYING = ["count", "table_stride"]  # no kernel is compiled for special values of these


@triton.jit(do_not_specialize=VARYING)
def find_common(table, lengths, common, count, table_stride, BLOCK_SIZE: tl.constexpr, AT_ONCE: tl.constexpr):  # type: ignore[no-untyped-def]
    """common (count, count): full blocks at the beginning of two sequences that are the same; 0 of one with itself."""
    i, j = tl.program_id(0), tl.program_id(1)
    if j > i:
        return
    blocks = tl.minimum(tl.load(lengths + i), tl.load(lengths + j)) // BLOCK_SIZE
    blocks = tl.where(i == j, 0, blocks)
    lanes = tl.arange(0, AT_ONCE)
    first, found = 0, 0
    while first < blocks:
        at = first + lanes
        inside = at < blocks
        a = tl.load(table + i.to(tl.int64) * table_stride + at, mask=inside, other=-1)
        b = tl.load(table + j.to(tl.int64) * table_stride + at, mask=inside, other=-2)
        same = tl.min(tl.where(a == b, AT_ONCE, lanes), 0)
        found += same
        first = tl.where(same == AT_ONCE, first + AT_ONCE, blocks)
    tl.store(common + i * count + j, found)
    tl.store(common + j * count + i, found)


@triton.jit(do_not_specialize=VARYING)
def find_leaders(  # type: ignore[no-untyped-def]
    common, leaders, most_common, count, LEAST: tl.constexpr, SEQUENCES: tl.constexpr
):
    """Of each sequence the first one among those that it shares most blocks with, itself included; at least LEAST.

    That one leads itself: prefixes are a tree, so whoever shares as much with the leader shares as much with those
    that it leads, and would be the first among theirs.
    """
    i = tl.program_id(0)
    lanes = tl.arange(0, SEQUENCES)
    row = tl.load(common + i * count + lanes, mask=lanes < count, other=-1)
    most = tl.max(row, 0)
    first = tl.min(tl.where(row == most, lanes, SEQUENCES), 0)
    tl.store(leaders + i, tl.where(most >= LEAST, tl.minimum(i, first), i))
    tl.store(most_common + i, most)


@triton.jit(do_not_specialize=VARYING)
def find_groups(  # type: ignore[no-untyped-def]
    common, leaders, most_common, sequences, members, count,
    CAPACITY: tl.constexpr, BLOCK_SIZE: tl.constexpr, SEQUENCES: tl.constexpr,
):  # fmt: skip
    """A leader and those that it leads are a group, one behind the other in `members`.

    A group shares what each of them has in common with the leader. So a sequence that has much less in common with it
    than another has stays alone: it may be the last sample of a prompt that only begins as the group's does.
    """
    i = tl.program_id(0)
    lanes = tl.arange(0, SEQUENCES)
    inside = lanes < count
    leader = tl.load(leaders + lanes, mask=inside, other=0)
    most, leaders_most = tl.load(most_common + lanes, mask=inside, other=0), tl.load(most_common + leader)
    leader = tl.where(inside, tl.where(8 * most >= 7 * leaders_most, leader, lanes), SEQUENCES)
    mine = tl.sum(tl.where(lanes == i, leader, 0), 0)
    member = leader == mine
    size = tl.sum(member.to(tl.int32), 0)
    rank = tl.sum((member & (lanes < i)).to(tl.int32), 0)
    place = tl.sum((leader < mine).to(tl.int32), 0) + rank
    led = member & (lanes != mine)
    blocks = tl.min(tl.where(led, tl.load(common + lanes * count + mine, mask=led, other=0), 2**30), 0)
    tl.store(members + place, i)
    tl.store(sequences + RANK * CAPACITY + i, rank)
    tl.store(sequences + SIZE * CAPACITY + i, size)
    tl.store(sequences + PLACE * CAPACITY + i, place)
    tl.store(sequences + SHARED * CAPACITY + i, tl.where(size > 1, blocks * BLOCK_SIZE, 0))


@triton.jit
def _write_items(  # type: ignore[no-untyped-def]
    items, parts, place, sequence, rows, start, stop, first_row, item_tokens,
    ITEMS: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """A segment's, `item_tokens` long each but for the last."""
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        at, there = items + part, part < parts
        begins = start + part * item_tokens
        tl.store(at + ITEM_PLACE * ITEMS, tl.zeros_like(part) + place, mask=there)
        tl.store(at + ITEM_SEQUENCE * ITEMS, tl.zeros_like(part) + sequence, mask=there)
        tl.store(at + ITEM_ROWS * ITEMS, tl.zeros_like(part) + rows, mask=there)
        tl.store(at + ITEM_START * ITEMS, begins, mask=there)
        tl.store(at + ITEM_STOP * ITEMS, tl.minimum(begins + item_tokens, stop), mask=there)
        tl.store(at + ITEM_ROW * ITEMS, first_row + part * rows, mask=there)


@triton.jit(do_not_specialize=[*VARYING, "target"])
def plan_items(  # type: ignore[no-untyped-def]
    lengths, sequences, members, items, merges, item_count, count, target,
    CAPACITY: tl.constexpr, ITEMS: tl.constexpr, HEADS: tl.constexpr, TOGETHER: tl.constexpr, TILE: tl.constexpr,
    LEAST_TILES: tl.constexpr, SEQUENCES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program s < count writes the items of what the group of sequence s shares, program count + s those of its own.

    HEADS: query heads a key-value head. TOGETHER: members of a group that an item takes, as many as its rows allow.
    """
    program = tl.program_id(0)
    i = program % count
    lanes = tl.arange(0, SEQUENCES)
    inside = lanes < count
    length = tl.load(lengths + lanes, mask=inside, other=0)
    rank = tl.load(sequences + RANK * CAPACITY + lanes, mask=inside, other=1)
    size = tl.load(sequences + SIZE * CAPACITY + lanes, mask=inside, other=0)
    shared = tl.load(sequences + SHARED * CAPACITY + lanes, mask=inside, other=0)
    tiles = tl.where(rank % TOGETHER == 0, tl.cdiv(shared, TILE), 0)
    own_tiles = tl.cdiv(tl.maximum(length - shared, 0), TILE)
    segments = tl.sum((tiles > 0).to(tl.int32) + (own_tiles > 0).to(tl.int32), 0)
    # About `target` items, those included by which segments do not come out even.
    work = tl.sum(tiles + own_tiles, 0)
    item_tiles = tl.maximum(tl.cdiv(work, tl.maximum(target - segments, target // 2)), LEAST_TILES)
    parts, own_parts = tl.cdiv(tiles, item_tiles), tl.cdiv(own_tiles, item_tiles)
    rows = tl.minimum(size - rank, TOGETHER) * HEADS
    all_parts, all_rows = tl.sum(parts, 0), tl.sum(parts * rows, 0)
    if program == 0:
        tl.store(item_count, all_parts + tl.sum(own_parts, 0))

    place = tl.load(sequences + PLACE * CAPACITY + i)
    my_shared = tl.load(sequences + SHARED * CAPACITY + i)
    own_before = tl.sum(tl.where(lanes < i, own_parts, 0), 0)
    own_row = all_rows + own_before * HEADS
    if program < count:
        first_item = tl.sum(tl.where(lanes < i, parts, 0), 0)
        first_row = tl.sum(tl.where(lanes < i, parts * rows, 0), 0)
        my_parts = tl.sum(tl.where(lanes == i, parts, 0), 0)
        my_rows = tl.sum(tl.where(lanes == i, rows, 0), 0)
        start, stop = 0, my_shared
    else:
        first_item, first_row = all_parts + own_before, own_row
        my_parts = tl.sum(tl.where(lanes == i, own_parts, 0), 0)
        my_rows = HEADS
        start, stop = my_shared, tl.load(lengths + i)
        among = tl.load(sequences + RANK * CAPACITY + i) % TOGETHER
        owner = tl.load(members + place - among)
        owners_row = tl.sum(tl.where(lanes < owner, parts * rows, 0), 0)
        tl.store(merges + SHARED_ROW * CAPACITY + i, owners_row + among * HEADS)
        tl.store(merges + SHARED_COUNT * CAPACITY + i, tl.sum(tl.where(lanes == owner, parts, 0), 0))
        tl.store(merges + SHARED_STEP * CAPACITY + i, tl.sum(tl.where(lanes == owner, rows, 0), 0))
        tl.store(merges + OWN_ROW * CAPACITY + i, own_row)
        tl.store(merges + OWN_COUNT * CAPACITY + i, my_parts)
    _write_items(
        items + first_item, my_parts, place, i, my_rows, start, stop, first_row, item_tiles * TILE, ITEMS, AT_ONCE
    )


@triton.jit(do_not_specialize=["table_stride"])
def attend_items(  # type: ignore[no-untyped-def]
    q, cache, table, members, items, item_count, partial, log_sums, scale,
    q_stride, q_head_stride, cache_block_stride, cache_token_stride, cache_head_stride, table_stride,
    ITEMS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """An item's attention of one key-value head, to `partial`, and the logarithm (to 2) of its sum to `log_sums`."""
    head, item = tl.program_id(0), tl.program_id(1)
    items_there = tl.load(item_count)
    place, rows = tl.load(items + ITEM_PLACE * ITEMS + item), tl.load(items + ITEM_ROWS * ITEMS + item)
    start, stop = tl.load(items + ITEM_START * ITEMS + item), tl.load(items + ITEM_STOP * ITEMS + item)
    blocks = table + tl.load(items + ITEM_SEQUENCE * ITEMS + item).to(tl.int64) * table_stride
    if item >= items_there:
        return
    row, d = tl.arange(0, ROWS), tl.arange(0, HEAD_DIM)
    there = row < rows
    member = tl.load(members + place + row // HEADS, mask=there, other=0).to(tl.int64)
    at = member * q_stride + (head * HEADS + row % HEADS) * q_head_stride
    queries = tl.load(q + at[:, None] + d[None, :], mask=there[:, None], other=0.0)
    keys = cache + head.to(tl.int64) * cache_head_stride

    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    out = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    token = start + tl.arange(0, TILE)
    # Blocks are looked up a tile ahead: loads whose address comes from a load in the same round are not kept in flight.
    block = tl.load(blocks + token // BLOCK_SIZE, mask=token < stop, other=0)
    for _ in range(start, stop, TILE):
        seen = token < stop
        key = keys + block.to(tl.int64) * cache_block_stride + token % BLOCK_SIZE * cache_token_stride
        k = tl.load(key[:, None] + d[None, :], mask=seen[:, None], other=0.0)
        v = tl.load(key[:, None] + (HEAD_DIM + d)[None, :], mask=seen[:, None], other=0.0)
        token += TILE
        block = tl.load(blocks + token // BLOCK_SIZE, mask=token < stop, other=0)
        scores = tl.where(seen[None, :], tl.dot(queries, tl.trans(k), input_precision="ieee") * scale, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
        top = new_top
    to = (tl.load(items + ITEM_ROW * ITEMS + item) + row).to(tl.int64) * tl.num_programs(0) + head
    tl.store(partial + to[:, None] * HEAD_DIM + d[None, :], out / total[:, None], mask=there[:, None])
    tl.store(log_sums + to, top + tl.log2(total), mask=there)


@triton.jit
def merge(  # type: ignore[no-untyped-def]
    partial, log_sums, merges, out, out_stride, out_head_stride,
    CAPACITY: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One head of one sequence of all that its items gave; 0 of a sequence without tokens."""
    i, head = tl.program_id(0), tl.program_id(1)
    kv_head, kv_heads = head // HEADS, tl.num_programs(1) // HEADS
    d = tl.arange(0, HEAD_DIM)
    shared_row, shared_step = tl.load(merges + SHARED_ROW * CAPACITY + i), tl.load(merges + SHARED_STEP * CAPACITY + i)
    shared, own_row = tl.load(merges + SHARED_COUNT * CAPACITY + i), tl.load(merges + OWN_ROW * CAPACITY + i)
    parts = shared + tl.load(merges + OWN_COUNT * CAPACITY + i)
    top, total, result = float("-inf"), 0.0, tl.zeros((HEAD_DIM,), tl.float32)
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        there = part < parts
        row = tl.where(part < shared, shared_row + part * shared_step, own_row + (part - shared) * HEADS)
        at = (row + head % HEADS).to(tl.int64) * kv_heads + kv_head
        log_sum = tl.load(log_sums + at, mask=there, other=float("-inf"))
        some = tl.load(partial + at[:, None] * HEAD_DIM + d[None, :], mask=there[:, None], other=0.0)
        new_top = tl.maximum(top, tl.max(log_sum, 0))
        weight, shrink = tl.exp2(log_sum - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, 0)
        result = result * shrink + tl.sum(weight[:, None] * some, 0)
        top = new_top
    result = result / tl.where(parts > 0, total, 1.0)
    tl.store(out + i.to(tl.int64) * out_stride + head * out_head_stride + d, result.to(out.dtype.element_ty))
