"""Checkpoints in host memory and MLPs in tiles: what they cost in time and leave in memory, on 8B-shaped blocks.

Blocks of Qwen3-8B's shape with random weights and LoRA r=32 on all linears, bf16, one packed row; forward and backward
through the blocks alone. All variants run in turn, round after round; a ratio is the median over rounds.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from checkpoints import HEADS, SHAPES
from colora.kernels.offload import ActivationOffload
from colora.kernels.tiled_mlp import TILE_TOKENS, tiled_gradients
from colora.rl.policy import Policy
from common import GIB, Report, parser
from policies import random_policy
from torch import Tensor
from transformers import Qwen3Config

LENGTHS = {"8k": 8192, "32k": 32768}
UNTILED = 2**31
CHECKED_TOKENS, TOLERANCE = 5001, 0.03  # of a gradient's norm: bf16 products of other shapes, sums in another order
OFFLOAD_BAR, BLOCKS_BAR, TILED_BAR = 1.01, 3.0, 1.10


def make_policy(layers: int) -> Policy:
    shape = SHAPES["8b"] | {"num_hidden_layers": layers}
    config = Qwen3Config(**HEADS, **shape, vocab_size=1024, dtype=torch.bfloat16)
    return random_policy(config)


class Steps:
    """Forward and backward of one row, in variants that give the same gradients."""

    def __init__(self, policy: Policy, tokens: int):
        self.policy = policy
        self.offload = ActivationOffload(policy.device, keep=1)
        generator = torch.Generator("cuda").manual_seed(0)
        self.tokens = torch.randint(0, 1024, (tokens,), generator=generator, device="cuda")
        hidden = policy.config.hidden_size
        self.grad = torch.randn(tokens, hidden, generator=generator, device="cuda", dtype=torch.bfloat16) * 1e-3

    def _step(self, tile: int = TILE_TOKENS, offload: ActivationOffload | None = None, context: Any = None) -> None:
        self.policy.mlp_tile_tokens, self.policy.offload = tile, offload
        with context or nullcontext():
            out = self.policy.hidden_states(self.tokens, [len(self.tokens)])
        out.backward(self.grad)

    def plain(self) -> None:
        self._step()

    def offloaded(self) -> None:
        self._step(offload=self.offload)

    def untiled(self) -> None:
        self._step(tile=UNTILED)

    def save_on_cpu(self) -> None:
        """PyTorch's own way to keep what is saved, here the blocks' inputs, in pinned memory."""
        self._step(context=torch.autograd.graph.save_on_cpu(pin_memory=True))

    def gradients(self, step: Callable[[], None]) -> list[Tensor]:
        self.policy.zero_grad(set_to_none=True)
        step()
        return [parameter.grad.clone() for parameter in self.policy.parameters() if parameter.grad is not None]


def check(policy: Policy) -> float:
    """The greatest relative error of a gradient against the graph with everything kept."""
    steps = Steps(policy, CHECKED_TOKENS)
    policy.gradient_checkpointing = False
    expected = steps.gradients(steps.plain)
    policy.gradient_checkpointing = True
    worst = 0.0
    for step in (steps.plain, steps.offloaded, steps.offloaded, steps.untiled):
        pairs = zip(steps.gradients(step), expected, strict=True)
        error = max(((ours - exact).norm() / exact.norm()).item() for ours, exact in pairs)
        assert error < TOLERANCE, f"{step.__name__}: relative error {error:.4f} of a gradient is over {TOLERANCE}"
        worst = max(worst, error)
    return worst


def seconds(step: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_bytes(step: Callable[[], None]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def ratios(variants: dict[str, Callable[[], None]], rounds: int) -> dict[str, dict[str, float]]:
    """Of each variant: median seconds, its ratio to `plain` in the same round (median) and that ratio's spread."""
    for step in variants.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, step in variants.items():
            times[name].append(seconds(step))
    found = {}
    for name, taken in times.items():
        relative = [mine / plain for mine, plain in zip(taken, times["plain"], strict=True)]
        found[name] = {
            "seconds": statistics.median(taken),
            "ratio": statistics.median(relative),
            "spread": max(relative) - min(relative),
        }
    return found


def measure_offload(policy: Policy, layers: int, rounds: int, error: float, report: Report) -> None:
    steps = Steps(policy, LENGTHS["32k"])
    variants = {"plain": steps.plain, "offloaded": steps.offloaded, "save_on_cpu": steps.save_on_cpu}
    found = ratios(variants, rounds)
    ours = found["offloaded"]
    report.add(
        "offload.step_time_ratio.32k",
        ours["ratio"],
        "ratio",
        "lower",
        bar=OFFLOAD_BAR,
        bar_is="the same step with every block's input on the GPU, same rounds",
        peers={"torch_save_on_cpu": round(found["save_on_cpu"]["ratio"], 4)},
        seconds={name: round(figures["seconds"], 4) for name, figures in found.items()},
        layers=layers,
        repeats=rounds,
        spread=round(ours["spread"], 4),
        relative_error=round(error, 5),
    )
    one = steps.grad.nbytes  # of a block's input
    saved = peak_bytes(steps.plain) - peak_bytes(steps.offloaded)
    report.add(
        "offload.checkpoint_memory_blocks",
        layers - saved / one,
        "blocks",
        "lower",
        bar=BLOCKS_BAR,
        bar_is="of the inputs of all blocks, what is left of them at the peak",
        of_blocks=layers,
        block_gib=round(one / GIB, 3),
        host_gib=round(steps.offload.host_bytes / GIB, 3),
    )


def measure_tiles(policy: Policy, rounds: int, report: Report) -> None:
    for name, tokens in LENGTHS.items():
        steps = Steps(policy, tokens)
        found = ratios({"plain": steps.untiled, "tiled": steps.plain}, rounds)
        tiled = found["tiled"]
        report.add(
            "tiled_mlp.step_time_ratio" + ("" if name == "32k" else f".{name}"),
            tiled["ratio"],
            "ratio",
            "lower",
            bar=TILED_BAR,
            bar_is="the same step with the MLP in one piece, same rounds",
            seconds={"tiled": round(tiled["seconds"], 4), "untiled": round(found["plain"]["seconds"], 4)},
            tile_tokens=TILE_TOKENS,
            repeats=rounds,
            spread=round(tiled["spread"], 4),
        )


def mlp_gib(policy: Policy, tokens: int, tile: int) -> float:
    """GiB of the first block's MLP between its input and the gradients, which are not counted."""
    block = policy._blocks[0]
    parameters = block.feed_forward_parameters()
    x = torch.randn(tokens, policy.config.hidden_size, device="cuda", dtype=torch.bfloat16).requires_grad_()
    grad = torch.randn_like(x)
    results = x.nbytes + sum(parameter.nbytes for parameter in parameters)
    return (peak_bytes(lambda: tiled_gradients(x, grad, block.feed_forward, parameters, tile)) - results) / GIB


def measure_tile_memory(policy: Policy, report: Report) -> None:
    tiled = {name: mlp_gib(policy, tokens, TILE_TOKENS) for name, tokens in LENGTHS.items()}
    for name, tokens in LENGTHS.items():
        report.add(
            f"tiled_mlp.activation_gib.{name}",
            tiled[name],
            "GiB",
            "lower",
            bar=round(1.01 * tiled["8k"], 4),
            bar_is="that of 8K tokens: independent of the length",
            peers={"untiled": round(mlp_gib(policy, tokens, UNTILED), 3)},
            tile_tokens=TILE_TOKENS,
        )


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"\n{'figure':40}{'ours':>10}{'bar':>10}  peers")
    for row in rows:
        met = "" if row["value"] <= row["bar"] else "  MISSED"
        print(f"{row['figure']:40}{row['value']:10.4f}{row['bar']:10.4f}  {row.get('peers', '')}{met}")


def options() -> argparse.Namespace:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=8)
    arguments.add_argument("--rounds", type=int, default=5)
    return arguments.parse_args()


def main() -> None:
    arguments = options()
    report = Report("train_memory", arguments)
    policy = make_policy(arguments.layers)
    error = check(policy)
    print(f"gradients agree: worst relative error {error:.5f}", flush=True)
    measure_offload(policy, arguments.layers, arguments.rounds, error, report)
    measure_tiles(policy, arguments.rounds, report)
    measure_tile_memory(policy, report)
    print_table(report.rows)
    print(report.write())


if __name__ == "__main__":
    main()
