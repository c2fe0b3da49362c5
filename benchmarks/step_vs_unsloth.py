"""One GRPO step on a 4-bit base, ours against Unsloth's, on the work of step_vs_trl.py in the same run.

    python benchmarks/step_vs_unsloth.py CHECKPOINT --peer-path DIRECTORY

The checkpoint is dense; both sides quantise it to NF4 as they load it. Unsloth pins versions of its own: DIRECTORY has
it and what it needs beside the installed packages (`pip install --target DIRECTORY unsloth ...`). Each side runs in a
process of its own.
"""

import argparse
import json
import os
import subprocess
from pathlib import Path
from statistics import median

from common import Report, parser, peak_memory, run_apart
from step_vs_trl import STEPS, Clock, train_ours

BAR = 0.55
ONE_PROCESS = {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29512",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "UNSLOTH_DISABLE_STATISTICS": "1",
}


def run_ours(arguments: argparse.Namespace) -> None:
    with peak_memory() as peak:
        clock = Clock(peak)
        facts = train_ours(arguments.checkpoint, clock, arguments.tokens_per_microbatch, base="nf4")
    print(json.dumps(facts | {"steps": clock.steps}))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--peer-path", type=Path, help="where Unsloth is; without it only ours is measured")
    options.add_argument("--side", choices=["ours"], help="run this one here and print its steps")
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    arguments = options.parse_args()
    if arguments.side:
        run_ours(arguments)
        return
    report = Report("step_vs_unsloth", arguments)
    checkpoint = str(arguments.checkpoint)
    sides = {"ours": run_apart("ours", __file__, checkpoint, "--side", "ours")}
    if arguments.peer_path:
        paths = os.pathsep.join([str(arguments.peer_path), os.environ.get("PYTHONPATH", "")])
        script = str(Path(__file__).with_name("unsloth_side.py"))
        try:
            sides["unsloth"] = run_apart("unsloth", script, checkpoint, environment=ONE_PROCESS | {"PYTHONPATH": paths})
        except subprocess.CalledProcessError as error:
            print(f"Unsloth's side failed with exit code {error.returncode}: ours alone is reported")
    add_figures(report, sides)
    print(report.write())


def add_figures(report: Report, sides: dict[str, dict]) -> None:
    steps = {name: [step["seconds"] for step in side["steps"][1:]] for name, side in sides.items()}
    peaks = {name: max(step["peak_gib"] for step in side["steps"]) for name, side in sides.items()}
    middle = {name: median(seconds) for name, seconds in steps.items()}
    facts = {
        "seconds": {name: round(value, 2) for name, value in middle.items()},
        "peak_gib": {name: round(value, 1) for name, value in peaks.items()},
        "first_step_s": {name: round(side["steps"][0]["seconds"], 1) for name, side in sides.items()},
        "start_s": {name: round(side["start_seconds"], 1) for name, side in sides.items()},
        "repeats": STEPS - 1,
        "logs": sides["ours"]["logs"],
    }
    if "unsloth" in sides:
        bar_is = "Unsloth 4-bit with standby, same run"
        ratio = middle["ours"] / middle["unsloth"]
        report.add("step_vs_unsloth.time.4b.nf4", ratio, "ratio", "lower", bar=BAR, bar_is=bar_is, **facts)
        report.add("step_vs_unsloth.peak_memory.4b.nf4", peaks["ours"] / peaks["unsloth"], "ratio", "lower")
    else:
        report.add("step_vs_unsloth.ours_seconds.4b.nf4", middle["ours"], "s", "lower", **facts)


if __name__ == "__main__":
    main()
