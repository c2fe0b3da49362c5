"""How far the engine's log-probs are from the trainer's, on a base in 4 bits and on the same in bf16, in one run.

    python benchmarks/logprob_gap.py CHECKPOINT

The work is that of step_vs_trl.py: 64 completions of 1024 tokens a step. The gap is the mean over their tokens of
|log-prob of vLLM - log-prob of the trainer|, nats, before the step's update. Each base runs in a process of its own;
nothing is timed, so some may run side by side (`--at-once`).

A base in 4 bits is also another policy, whose log-probs may take roundings better or worse. So its peer is the policy
of exactly its values in bf16: what is between these two is the 4-bit kernels' doing.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shutil import copytree, ignore_patterns
from statistics import mean
from tempfile import TemporaryDirectory

import torch
from colora.kernels import fp4, nf4
from common import Report, parser
from safetensors.torch import load_file, save_file
from step_vs_unsloth import measure_ours

Measured = Callable[[str], list[float]]  # a base -> its gap at every step
GAP = "sampling/sampling_logp_difference/mean"


def values_in_bf16(checkpoint: Path, base: str, directory: Path, device: str = "cuda") -> Path:
    """Write a dense checkpoint's policy as `base` holds it, in bf16: matrices of layers are rounded, others are not."""
    of_base = {"nf4": nf4, "fp4": fp4}[base]
    copytree(checkpoint, directory, ignore=ignore_patterns("*.safetensors"))
    for shard in checkpoint.glob("*.safetensors"):
        tensors = load_file(shard)
        for name, tensor in tensors.items():
            if ".layers." in name and tensor.ndim == 2:
                tensors[name] = of_base.dequantize(of_base.quantize(tensor.to(device)), torch.bfloat16).cpu()
        save_file(tensors, directory / shard.name, {"format": "pt"})
    return directory


def add_figures(report: Report, gaps: dict[str, list[float]], peers: dict[str, list[float]]) -> None:
    """The mean over the steps, of bf16 (`auto`) first: it is the others' bar. `peers`: with their values in bf16."""
    for base, steps in gaps.items():
        name, more = "bf16" if base == "auto" else base, {}
        if base != "auto":
            more |= {"bar": round(mean(gaps["auto"]), 5), "bar_is": "the gap on the base in bf16, same run"}
        if base in peers:
            more["peers"] = {f"{base}'s values in bf16": round(mean(peers[base]), 5)}
        spread = round(max(steps) / min(steps) - 1, 3)
        report.add(f"{name}.logprob_gap.4b", mean(steps), "nats", "lower", spread=spread, repeats=len(steps), **more)


def measure(report: Report, bases: list[str], gap: Measured, gap_of_values: Measured, at_once: int) -> None:
    """The figures of bf16, of `bases` and of their values in bf16; a run that is cut off keeps what it has measured."""
    gaps, peers = {}, {}
    with ThreadPoolExecutor(at_once) as pool:
        runs = [(gaps, base, pool.submit(gap, base)) for base in ("auto", *bases)]
        runs += [(peers, base, pool.submit(gap_of_values, base)) for base in bases]
        for found, base, run in runs:
            found[base] = run.result()
            add_figures(report, gaps, peers)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--bases", nargs="+", choices=["nf4", "fp4"], default=["nf4", "fp4"])
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    options.add_argument("--at-once", type=int, default=1, help="processes that share the card")
    arguments = options.parse_args()
    report = Report("logprob_gap", arguments)

    def gap(base: str, checkpoint: Path = arguments.checkpoint) -> list[float]:
        return [step[GAP] for step in measure_ours(checkpoint, base, arguments.tokens_per_microbatch)["logs"]]

    def gap_of_values(base: str) -> list[float]:
        with TemporaryDirectory() as directory:
            return gap("auto", values_in_bf16(arguments.checkpoint, base, Path(directory, base)))

    measure(report, arguments.bases, gap, gap_of_values, arguments.at_once)
    print(report.write())


if __name__ == "__main__":
    main()
