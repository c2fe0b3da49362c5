"""How far the engine's log-probs are from the trainer's, on a base in 4 bits and on the same in bf16, in one run.

    python benchmarks/logprob_gap.py CHECKPOINT

The work is that of step_vs_trl.py: 64 completions of 1024 tokens a step. The gap is the mean over their tokens of
|log-prob of vLLM - log-prob of the trainer|, nats, before the step's update. Each base runs in a process of its own.
"""

from pathlib import Path
from statistics import mean

from common import Report, parser
from step_vs_unsloth import measure_ours

GAP = "sampling/sampling_logp_difference/mean"


def add_figures(report: Report, gaps: dict[str, list[float]]) -> None:
    """The mean over the steps, of bf16 (`auto`) first: it is the others' bar."""
    for base, steps in gaps.items():
        name = "bf16" if base == "auto" else base
        bar = {} if base == "auto" else {"bar": round(mean(gaps["auto"]), 5), "bar_is": "bf16's gap, same run"}
        spread = round(max(steps) / min(steps) - 1, 3)
        report.add(f"{name}.logprob_gap.4b", mean(steps), "nats", "lower", spread=spread, repeats=len(steps), **bar)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--bases", nargs="+", choices=["nf4", "fp4"], default=["nf4", "fp4"])
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    arguments = options.parse_args()
    report, gaps = Report("logprob_gap", arguments), {}
    for base in ("auto", *arguments.bases):
        logs = measure_ours(arguments.checkpoint, base, arguments.tokens_per_microbatch)["logs"]
        gaps[base] = [step[GAP] for step in logs]
        add_figures(report, gaps)
    print(report.write())


if __name__ == "__main__":
    main()
