"""Forward and backward of one packed row, 8B shape, bf16, LoRA r=32 on all linears: share of the roof, tokens/s, peak.

Ours against transformers + PEFT + gradient checkpointing + SDPA, and against the same patched by Liger, and ours on a
base quantised to NF4, one after the other, each in a process of its own: `python benchmarks/train_throughput.py`. The
weights are random; every token is trained. The roof is the rate of a large bf16 matrix product, measured in the same
run; counted are 6 FLOPs a parameter a token and the causal half of attention, forward and twice that backward.
Recomputation is not counted.
"""

import argparse
import json
from functools import partial

import torch
from checkpoints import SHAPES, model_config
from common import Report, best_of, matmul_roof, parser, peak_memory, run_apart
from policies import policy_step, random_policy, transformers_step
from transformers import Qwen3Config

LENGTHS = {"8k": 8192, "32k": 32768, "64k": 65536}
SIDES = ("ours", "nf4", "transformers", "liger")
BAR, NF4_BAR = 0.5, 0.85
Lengths = dict[str, dict[str, float] | None]  # {length: {seconds, spread, peak_gib}}, None where it runs out of memory
Results = dict[str, Lengths]  # of each side


def flops(config: Qwen3Config, tokens: int) -> float:
    """6 a parameter (the head's included, the embedding's not) and token, and attention."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    attention = hidden * config.head_dim * (2 * heads + 2 * kv_heads)
    block = attention + 3 * hidden * config.intermediate_size
    parameters = config.num_hidden_layers * block + hidden * config.vocab_size
    scores = 3 * 2 * tokens**2 * heads * config.head_dim * config.num_hidden_layers
    return 6.0 * parameters * tokens + scores


def measure(side: str, shape: str, lengths: list[str], repeats: int) -> Lengths:
    config = model_config(shape)
    if side in ("ours", "nf4"):
        from colora.kernels.offload import ActivationOffload

        policy = random_policy(config, base="nf4" if side == "nf4" else "auto")
        policy.offload = ActivationOffload(policy.device)  # as in training: on the GPU what fits in half of its memory
        step = policy_step(policy)
    else:
        step = transformers_step(config, side == "liger")
    results: Lengths = {}
    for name in lengths:
        tokens = torch.randint(0, config.vocab_size, (LENGTHS[name],), device="cuda")
        try:
            step(tokens)  # compiles and chooses kernels
            torch.cuda.empty_cache()
            with peak_memory() as peak:
                seconds, spread = best_of(partial(step, tokens), repeats)
            results[name] = {"seconds": seconds, "spread": spread, "peak_gib": peak[0]}
        except torch.OutOfMemoryError:
            results[name] = None
        torch.cuda.empty_cache()
    return results


def in_a_process(side: str, arguments: argparse.Namespace) -> Lengths:
    options = ["--shape", arguments.shape, "--repeats", str(arguments.repeats), "--lengths", *arguments.lengths]
    return run_apart(side, __file__, "--side", side, *options)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="8b")
    options.add_argument("--lengths", nargs="+", choices=list(LENGTHS), default=list(LENGTHS))
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="ours has to be among them")
    options.add_argument("--side", choices=SIDES, help="run this one here and print its times")
    arguments = options.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.shape, arguments.lengths, arguments.repeats)))
        return
    if "ours" not in arguments.sides:
        options.error("--sides: `ours` has to be among them, the figures are ratios to it")
    chosen = [side for side in SIDES if side in arguments.sides]
    # Beside a file with all sides, and not instead of it.
    name = "_".join(["train_throughput", *(chosen if len(chosen) < len(SIDES) else [])])
    report, roof = Report(name, arguments, script="train_throughput"), matmul_roof()
    torch.cuda.empty_cache()
    sides: Results = {}
    for side in chosen:
        sides[side] = in_a_process(side, arguments)
        add_figures(report, arguments, roof, sides)
    print(report.write())


def add_figures(report: Report, arguments: argparse.Namespace, roof: float, sides: Results) -> None:
    """Those of the sides measured so far."""
    config = model_config(arguments.shape)
    for name in arguments.lengths:
        found = {side: results[name] for side, results in sides.items()}
        speeds = {side: round(LENGTHS[name] / result["seconds"]) for side, result in found.items() if result}
        peaks = {side: round(result["peak_gib"], 2) for side, result in found.items() if result}
        shares = {
            side: flops(config, LENGTHS[name]) / result["seconds"] / roof for side, result in found.items() if result
        }
        if "ours" not in shares:
            print(f"{name}: out of memory")
            continue
        report.add(
            f"train_roof_share.{arguments.shape}.{name}",
            shares["ours"],
            "share",
            "higher",
            bar=BAR,
            bar_is=f"{BAR:.0%} of the measured matrix-product roof",
            peers={side: round(shares[side], 4) for side in ("transformers", "liger") if side in shares},
            roof_tflops=round(roof / 1e12),
            tok_s=speeds,
            peak_gib=peaks,
            repeats=arguments.repeats,
            spread=round(found["ours"]["spread"], 3),
        )
        if "nf4" in shares:
            report.add(
                f"nf4.train_speed_over_bf16.{arguments.shape}.{name}",
                shares["nf4"] / shares["ours"],
                "ratio",
                "higher",
                bar=NF4_BAR,
                bar_is="tokens/s on the bf16 base, same run, are 1",
                repeats=arguments.repeats,
                spread=round(found["nf4"]["spread"], 3),
            )


if __name__ == "__main__":
    main()
