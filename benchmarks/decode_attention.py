"""Attention of decode steps (kernels/decode_attention.py) in a layer of an 8B model, beside vLLM's FlashAttention-3.

Groups of 8 samples that share a prompt, and sequences that share nothing. Times are of CUDA graphs over caches that are
together larger than the L2 cache, the median of their replays; results are checked against FlashAttention's first. The
floor is what has to be read, at the bandwidth of a copy in the same run. `--sweep` measures launches instead.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product

import torch
from bandwidth import copy_gbs
from colora.kernels.decode_attention import DecodeAttention, DecodeShape, Launch
from common import Report, parser
from four_bit import timed
from torch import Tensor

BLOCK, SCALE = 16, 128**-0.5
SHAPE = DecodeShape(heads=32, kv_heads=8, head_dim=128, block_size=BLOCK, dtype=torch.bfloat16)
SWEPT = [Launch(programs, tile, stages) for programs, tile, stages in product((2, 3, 4, 6), (32, 64), (2, 3, 4))]
L2_BYTES = 60e6
BOUND = 0.02  # of the largest difference to FlashAttention, over the largest value


@dataclass(frozen=True)
class Workload:
    """A decode step: `groups` prompts with `samples` completions each, in tokens."""

    name: str
    groups: int
    samples: int
    prompt: int
    completion: int

    @property
    def least_tokens(self) -> int:
        """Tokens whose keys and values have to be read."""
        return self.groups * (self.prompt + self.samples * self.completion)


WORKLOADS = [
    Workload("48k_x8", 1, 8, 48 * 1024, 1024),
    Workload("8k_x8", 1, 8, 8 * 1024, 1024),
    Workload("8k_4_x8", 4, 8, 8 * 1024, 1024),
    Workload("1k_16_x8", 16, 8, 1024, 1024),
    Workload("nothing_shared_8k_8", 8, 1, 8 * 1024, 0),
    Workload("nothing_shared_2k_64", 64, 1, 2 * 1024, 0),
]


class Step:
    """A workload's tensors; completions differ by up to a block, as they do in a run."""

    def __init__(self, work: Workload):
        lengths = [work.prompt + work.completion - i % 13 for i in range(work.groups * work.samples)]
        own, common = -(-work.completion // BLOCK), work.prompt // BLOCK
        blocks = torch.randperm(work.groups * (common + work.samples * own)).int()
        shared, private = blocks[: work.groups * common].view(work.groups, common), blocks[work.groups * common :]
        repeated = shared.repeat_interleave(work.samples, dim=0)
        self.table = torch.cat([repeated, private.view(len(lengths), own)], dim=1).contiguous().cuda()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        nbytes = blocks.numel() * BLOCK * 4 * SHAPE.kv_heads * SHAPE.head_dim
        copies = max(1, -(-int(4 * L2_BYTES) // nbytes))
        self.caches = [
            torch.randn(blocks.numel(), BLOCK, SHAPE.kv_heads, 2 * SHAPE.head_dim, device="cuda").to(SHAPE.dtype)
            for _ in range(copies)
        ]
        self.q = torch.randn(len(lengths), SHAPE.heads, SHAPE.head_dim, device="cuda").to(SHAPE.dtype)
        self.out = torch.empty_like(self.q)


def ours(step: Step, launch: Launch) -> tuple[DecodeAttention, Callable[[Tensor], None]]:
    """What plans a step, and attention over a cache."""
    attention = DecodeAttention(SHAPE, len(step.lengths), torch.device("cuda"), launch)
    attention.plan(step.table, step.lengths)
    return attention, lambda cache: attention.attend(step.q, cache.transpose(1, 2), step.table, step.out, SCALE)


def flash_attention(step: Step) -> Callable[[Tensor], None]:
    """FlashAttention-3 with vLLM's arguments for decode steps in a CUDA graph."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata

    count, longest, splits = len(step.lengths), int(step.lengths.max()), 32
    starts = torch.arange(count + 1, dtype=torch.int32, device="cuda")
    metadata = get_scheduler_metadata(
        batch_size=count, max_seqlen_q=1, max_seqlen_k=longest, num_heads_q=SHAPE.heads, num_heads_kv=SHAPE.kv_heads,
        headdim=SHAPE.head_dim, cache_seqlens=step.lengths, qkv_dtype=SHAPE.dtype, cu_seqlens_q=starts,
        page_size=BLOCK, causal=True, num_splits=splits,
    )  # fmt: skip

    def run(cache: Tensor) -> None:
        keys, values = cache.split(SHAPE.head_dim, dim=-1)
        flash_attn_varlen_func(
            q=step.q, k=keys, v=values, out=step.out, cu_seqlens_q=starts, max_seqlen_q=1, seqused_k=step.lengths,
            max_seqlen_k=longest, softmax_scale=SCALE, causal=True, block_table=step.table,
            scheduler_metadata=metadata, fa_version=3, num_splits=splits,
        )  # fmt: skip

    return run


def difference(step: Step, attend: Callable[[Tensor], None], peer: Callable[[Tensor], None]) -> float:
    """The largest, over the largest value of a result."""
    peer(step.caches[0])
    expected = step.out.float()
    step.out.zero_()
    attend(step.caches[0])
    return float((step.out.float() - expected).abs().max() / expected.abs().max())


def measure(work: Workload, gbs: float, report: Report) -> None:
    step = Step(work)
    attention, attend = ours(step, Launch())
    peer = flash_attention(step)
    error = difference(step, attend, peer)
    if not error < BOUND:
        raise SystemExit(f"{work.name}: differs from FlashAttention by {error}")
    microseconds, spread = timed(attend, step.caches)
    flash, _ = timed(peer, step.caches)
    planned, _ = timed(lambda _: attention.plan(step.table, step.lengths), [None])
    floor = work.least_tokens * 4 * SHAPE.kv_heads * SHAPE.head_dim / gbs / 1e3
    more = {"floor_us": round(floor, 2), "plan_us_a_step": round(planned, 2), "difference": round(error, 5)}
    peers = {"flash_attention_3": round(flash, 2)}
    name = f"decode_attention.{work.name}"
    report.add(name, microseconds, "us a layer", "lower", peers=peers, spread=round(spread, 3), **more)


def sweep(launches: Sequence[Launch]) -> None:
    """Print the microseconds of every launch, a line each."""
    steps = [Step(work) for work in WORKLOADS]
    for launch in launches:
        times = [round(timed(ours(step, launch)[1], step.caches)[0], 1) for step in steps]
        print(json.dumps(asdict(launch)), *times, flush=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--sweep", action="store_true", help="time every launch of SWEPT; nothing is written")
    arguments = options.parse_args()
    torch.manual_seed(0)
    report = Report("decode_attention", arguments)
    if arguments.sweep:
        sweep(SWEPT)
        return
    gbs = copy_gbs()
    report.add("decode_attention.copy", gbs, "GB/s", "higher")
    for work in WORKLOADS:
        measure(work, gbs, report)
    print(report.write())


if __name__ == "__main__":
    main()
