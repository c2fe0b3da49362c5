"""Attention over packed rows, forward and backward: TFLOP/s of visible pairs, and what rows of new lengths cost.

First every path is checked against plain torch in fp32. The peers are torch's, called in another way: `flash` and
`loop` for each sequence (FlashAttention-2; cuDNN, flash where it has no kernel), `varlen` for the whole row
(FlashAttention-2), and `flex`, FlexAttention for the whole row, compiled for its very length, in the rows that it would
be taken for. Queries, keys and values lie as in the policy: in one row of heads for each token.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from colora.kernels.attention import packed_attention, packed_attention_reference
from colora.kernels.attention_dense import dense_bucket
from colora.kernels.attention_plan import DENSE_FROM
from colora.kernels.attention_varlen import varlen
from common import Report, matmul_roof, parser
from plots import Panels, plot_panels
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from triton.testing import do_bench

Attention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], float, int | None], Tensor]
Heads = tuple[int, int, int]  # of queries, of keys, their dimension
QWEN3_8B, QWEN3_2B, GEMMA3_4B = (32, 8, 128), (16, 8, 128), (8, 4, 256)
TOLERANCE = 1e-2  # relative, of norms: probabilities and their gradients are bf16 in every kernel
CAUSAL_BAR, SHARE_BAR, NEW_LENGTH_BAR = 500, 0.9, 50
# 16384 tokens of 12 completions, the longest first, as packing lays them
GRPO_ROW = (2048, 2048, 1991, 1777, 1662, 1534, 1320, 1203, 988, 761, 640, 412)
UNEVEN_4K = (4096, 3500, 4500, 3000, 5000, 4096, 4321, 4255)
LONG_AND_SHORT = (12000, 700, 9000, 900, 411, 6000, 1000, 1200, 1557)


def loop(backends: list[SDPBackend]) -> Attention:
    def run(*arguments: Any) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return packed_attention_reference(*arguments)

    return run


def varlen_row(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    return varlen(q, k, v, lengths, lengths, scale, window=window)[0]  # its operator has a gradient of its own


def flex(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float, window: int | None) -> Tensor:
    q_b, k_b, v_b = (x.unsqueeze(0).transpose(1, 2) for x in (q, k, v))
    mask = sequences_mask(lengths, window)
    return compiled_flex(q_b, k_b, v_b, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)


compiled_flex = torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=1)
def sequences_mask(lengths: tuple[int, ...], window: int | None) -> BlockMask:
    """Causal, within each sequence and the window."""
    tokens = sum(lengths)
    owner = torch.repeat_interleave(torch.tensor(lengths, device="cuda"))

    def visible(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (query - key < (window or tokens)) & (owner[query] == owner[key])

    return create_block_mask(visible, None, None, tokens, tokens, device="cuda")


PEERS: dict[str, Attention] = {
    "flash": loop([SDPBackend.FLASH_ATTENTION]),
    "loop": loop([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]),
    "varlen": varlen_row,
    "flex": flex,
}


@dataclass(frozen=True)
class Row:
    """A packed row and the peers that can take it in reasonable time."""

    figure: str
    lengths: tuple[int, ...]
    heads: Heads = QWEN3_8B
    window: int | None = None
    peers: tuple[str, ...] = ("flash", "loop", "varlen")

    @property
    def flops(self) -> float:
        """Forward and backward, of visible pairs of query and key alone."""
        pairs = sum(_pairs(length, min(length, self.window or length)) for length in self.lengths)
        return 14.0 * pairs * self.heads[0] * self.heads[2]

    def inputs(self) -> tuple[list[Tensor], Tensor]:
        """q, k, v as views of one row of heads, and the gradient of the output."""
        heads, kv_heads, head_dim = self.heads
        tokens = sum(self.lengths)
        fused = torch.randn(tokens, heads + 2 * kv_heads, head_dim, device="cuda", dtype=torch.bfloat16)
        parts = [part.detach().requires_grad_() for part in fused.split((heads, kv_heads, kv_heads), dim=1)]
        return parts, torch.randn(tokens, heads, head_dim, device="cuda", dtype=torch.bfloat16)

    def step(self, attention: Attention, inputs: Sequence[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        """The output and the gradients of `inputs`."""
        out = attention(*inputs, self.lengths, self.heads[2] ** -0.5, self.window)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    def tflops(self, attention: Attention) -> tuple[float, float]:
        """(TFLOP/s, spread: the middle three fifths of the times over the median)."""
        inputs, grad = self.inputs()
        median, low, high = do_bench(
            lambda: self.step(attention, inputs, grad), warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8]
        )
        return self.flops / median / 1e9, (high - low) / median


def _pairs(length: int, window: int) -> int:
    return window * (window + 1) // 2 + (length - window) * window


CHECKED = [
    Row("one", (2048,)),
    Row("one in a bucket", (2500,)),
    Row("equal", (1024, 1024)),
    Row("short", (700, 300, 24, 512, 512)),
    Row("window", (1500, 548), window=200),
    Row("window, heads of 256", (1500, 548), GEMMA3_4B, 200),
    Row("long and short", (4200, 100, 52)),
]
ROWS = [
    Row("packed_8x4k_tflops", (4096,) * 8),
    Row("packed_8x4k_uneven_tflops", UNEVEN_4K),
    Row("packed_64x1536_tflops", (1536,) * 64),
    Row("grpo_16k_tflops", GRPO_ROW, peers=("flash", "loop", "varlen", "flex")),
    Row("long_and_short_tflops", LONG_AND_SHORT),
    Row("window1024_qwen_tflops", (8192,), window=1024, peers=("flex",)),
    Row("window1024_gemma_tflops", (8192,), GEMMA3_4B, 1024, peers=("flex",)),
    Row("causal_8k_gemma_tflops", (8192,), GEMMA3_4B),
]


def check(row: Row) -> float:
    """The greatest relative error of the output or a gradient against plain torch in fp32."""
    inputs, grad = row.inputs()
    exact = [x.detach().float().requires_grad_() for x in inputs]
    pairs = zip(
        row.step(packed_attention, inputs, grad),
        row.step(packed_attention_reference, exact, grad.float()),
        strict=True,
    )
    error = max(((ours.float() - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs)
    assert error < TOLERANCE, f"{row.figure}: relative error {error:.5f} is over {TOLERANCE}"
    return error


def measure(row: Row, report: Report, bar: int | None = None) -> float:
    value, spread = row.tflops(packed_attention)
    more = {} if bar is None else {"bar": bar, "bar_is": "target"}
    peers = {name: round(row.tflops(PEERS[name])[0], 1) for name in row.peers}
    more |= {"peers": peers, "milliseconds": round(row.flops / value / 1e9, 3), "spread": round(spread, 3)}
    report.add(f"attention.{row.figure}", value, "TFLOP/s", "higher", **more)
    return value


def seconds(row: Row) -> float:
    """Wall-clock time of one forward and backward pass."""
    inputs, grad = row.inputs()
    torch.cuda.synchronize()
    started = time.perf_counter()
    row.step(packed_attention, inputs, grad)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def new_lengths(report: Report) -> None:
    """What the first row costs, and the slowest of the next three, whose lengths and totals are all new."""
    known, new = {"bar": NEW_LENGTH_BAR, "bar_is": "target"}, {"bar": None, "bar_is": None}
    kinds = {
        "second_length_ms": ([GRPO_ROW, (1536, 1400, 1160), (2000, 1900, 1096, 48), (300, 84, 129, 127)], known),
        # All in the first one's bucket.
        "second_length_in_bucket_ms": ([(6100,), (5900,), (6143,), (6001,)], known),
        # Each in a bucket of its own: what a plan costs.
        "second_length_dense_ms": ([(6144,), (5000,), (7680,), (3333,)], new),
    }
    for figure, (rows, bar) in kinds.items():
        first = seconds(Row("", rows[0]))
        times = [seconds(Row("", lengths)) * 1e3 for lengths in rows[1:]]
        each = {"each": [round(ms, 2) for ms in times], "first_seconds": round(first, 2)}
        report.add(f"attention.{figure}", max(times), "ms", "lower", **bar, **each)


def new_lengths_of_a_run(report: Report, count: int = 300, longest: int = 8192) -> None:
    """What a sequence that may well have a new length costs on the average, more than the same one once more."""
    draw = random.Random(0)
    # With heads as nowhere else in this script, so that all plans are new.
    rows = [Row("", (draw.randint(256, longest),), QWEN3_2B) for _ in range(count)]
    first, again = (sum(seconds(row) for row in rows) for _ in range(2))
    dense = [length for row in rows for length in row.lengths if length >= DENSE_FROM]
    more = {"lengths": len({*rows}), "buckets": len({dense_bucket(length) for length in dense})}
    bar = {"bar": NEW_LENGTH_BAR, "bar_is": "target"}
    report.add("attention.new_length_mean_ms", (first - again) / count * 1e3, "ms", "lower", **bar, **more)


def threshold(report: Report) -> None:
    """From which length on calls of their own beat one for the row: uneven sequences, 32K tokens altogether."""
    for length in (1024, 2048, 4096, 8192):
        lengths = (length - 128, length + 128) * (16384 // length)
        row = Row(f"uneven_{length}_dense_tflops", lengths)
        dense = row.tflops(lambda *arguments: packed_attention(*arguments, dense_from=1))[0]
        peers = {"varlen": round(row.tflops(varlen_row)[0], 1)}
        report.add(f"attention.{row.figure}", dense, "TFLOP/s", "higher", peers=peers, dense_from_now=DENSE_FROM)


def panels(rows: Sequence[dict[str, Any]]) -> Panels:
    """The causal rows so far."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["unit"] == "TFLOP/s":
            tokens = 1024 * int(row["figure"].split("_")[1].removesuffix("k"))
            for who, value in ({"ours": row["value"]} | row["peers"]).items():
                lines.setdefault(who, []).append((tokens, value))
    return {"attention, one causal sequence, fwd + bwd": lines}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    names = [*PEERS]
    print(f"\n{'':44}{'ours':>10}{'unit':>9}{'bar':>7}" + "".join(f"{name:>9}" for name in names))
    for row in rows:
        peers = "".join(f"{row.get('peers', {}).get(name, float('nan')):9.1f}" for name in names)
        print(f"{row['figure']:44}{row['value']:10.2f}{row['unit']:>9}{row.get('bar') or '':>7}{peers}")


def main() -> None:
    arguments = parser(__doc__).parse_args()
    report = Report("attention", arguments)
    new_lengths(report)
    new_lengths_of_a_run(report)
    for row in CHECKED:
        print(f"{row.figure}: relative error {check(row):.5f}", flush=True)
    causal = measure(Row("causal_32k_tflops", (32768,)), report, CAUSAL_BAR)
    for thousand in (2, 4, 8, 16):
        measure(Row(f"causal_{thousand}k_tflops", (thousand * 1024,)), report)
    plot_panels(arguments.results / "attention.png", panels(report.rows), "TFLOP/s", matmul_roof() / 1e12, "matmul")
    values = {row.figure: measure(row, report) for row in ROWS}
    for name in ("packed_8x4k", "packed_8x4k_uneven"):
        more = {"bar": SHARE_BAR, "bar_is": "of TFLOP/s of one causal sequence of 32K, same run"}
        report.add(f"attention.{name}_share", values[f"{name}_tflops"] / causal, "ratio", "higher", **more)
    threshold(report)
    print_table(report.rows)
    print(report.write())


if __name__ == "__main__":
    main()
