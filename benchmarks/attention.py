"""Attention over packed rows, forward and backward: TFLOP/s of visible pairs, and what rows of new lengths cost.

First every path is checked against plain torch in fp32. `flash` and `loop` are torch's attention called for each
sequence (FlashAttention-2; cuDNN, flash where it has no kernel), `flex` is FlexAttention for the whole row. Queries,
keys and values lie as in the policy: in one row of heads for each token.
"""

import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from colora.kernels.attention import DENSE_BACKENDS, DENSE_FROM, packed_attention, packed_attention_reference
from colora.kernels.attention_flex import flex_packed_attention
from common import Report, matmul_roof, parser
from plots import Panels, plot_panels
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

Attention = Callable[[Tensor, Tensor, Tensor, tuple[int, ...], float, int | None], Tensor]
Heads = tuple[int, int, int]  # of queries, of keys, their dimension
QWEN3_8B, GEMMA3_4B = (32, 8, 128), (8, 4, 256)
TOLERANCE = 1e-2  # relative, of norms: probabilities and their gradients are bf16 in every kernel
CAUSAL_BAR, SHARE_BAR, NEW_LENGTH_BAR = 500, 0.9, 50
GRPO_ROW = (2048, 1991, 1534, 1203, 2048, 988, 761, 1777, 1320, 640, 412, 1662)  # 16384 tokens of 12 completions
UNEVEN_4K = (4096, 3500, 4500, 3000, 5000, 4096, 4321, 4255)
LONG_AND_SHORT = (12000, 700, 9000, 900, 411, 6000, 1000, 1200, 1557)


def loop(backends: list[SDPBackend]) -> Attention:
    def run(*arguments: Any) -> Tensor:
        with sdpa_kernel(backends, set_priority=True):
            return packed_attention_reference(*arguments)

    return run


PEERS: dict[str, Attention] = {
    "flash": loop([SDPBackend.FLASH_ATTENTION]),
    "loop": loop(DENSE_BACKENDS),
    "flex": flex_packed_attention,
}


@dataclass(frozen=True)
class Row:
    """A packed row and the peers that can take it in reasonable time."""

    figure: str
    lengths: tuple[int, ...]
    heads: Heads = QWEN3_8B
    window: int | None = None
    peers: tuple[str, ...] = ("flash", "loop", "flex")

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
    Row("equal", (1024, 1024)),
    Row("packed", (700, 300, 24, 512, 512)),
    Row("window", (1500, 548), window=200),
    Row("long and short", (4200, 100, 52)),
]
ROWS = [
    Row("packed_8x4k_tflops", (4096,) * 8),
    Row("packed_8x4k_uneven_tflops", UNEVEN_4K),
    Row("packed_64x1536_tflops", (1536,) * 64),
    Row("grpo_16k_tflops", GRPO_ROW),
    Row("long_and_short_tflops", LONG_AND_SHORT),
    Row("window1024_qwen_tflops", (8192,), window=1024, peers=("flex",)),
]
GEMMA = [
    Row("window1024_gemma_tflops", (8192,), GEMMA3_4B, 1024, peers=("flex",)),
    Row("causal_8k_gemma_tflops", (8192,), GEMMA3_4B, peers=("flash", "loop")),
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
    kinds = {
        "second_length_ms": [GRPO_ROW, (1536, 1400, 1160), (2000, 3000, 1096, 48), (300, 84, 129, 127)],
        "second_length_dense_ms": [(6144,), (5000,), (7680,), (3333,)],
    }
    for figure, rows in kinds.items():
        first = seconds(Row("", rows[0]))
        before = counters["stats"]["unique_graphs"]
        times = [seconds(Row("", lengths)) * 1e3 for lengths in rows[1:]]
        report.add(
            f"attention.{figure}",
            max(times),
            "ms",
            "lower",
            bar=NEW_LENGTH_BAR if figure == "second_length_ms" else None,
            bar_is="target" if figure == "second_length_ms" else None,
            each=[round(ms, 2) for ms in times],
            first_seconds=round(first, 2),
            recompiled=counters["stats"]["unique_graphs"] - before,
        )


def threshold(report: Report) -> None:
    """From which length on calls of their own beat one FlexAttention: uneven sequences, 32K tokens altogether."""
    for length in (1024, 2048, 4096, 8192):
        lengths = (length - 128, length + 128) * (16384 // length)
        row = Row(f"uneven_{length}_dense_tflops", lengths)
        dense = row.tflops(lambda *arguments: packed_attention(*arguments, dense_from=1))[0]
        peers = {"flex": round(row.tflops(flex_packed_attention)[0], 1)}
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


def options() -> Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--skip-gemma", action="store_true", help="heads of 256: one more compilation")
    return arguments.parse_args()


def main() -> None:
    arguments = options()
    report = Report("attention", arguments)
    new_lengths(report)
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
    for row in [] if arguments.skip_gemma else GEMMA:
        measure(row, report)
    print_table(report.rows)
    print(report.write())


if __name__ == "__main__":
    main()
