"""One GRPO step on a 4-bit base, ours against Unsloth's, on the work of step_vs_trl.py in the same run.

    python benchmarks/step_vs_unsloth.py CHECKPOINT --peer-path DIRECTORY

The checkpoint is dense; both sides quantise it as they load it, Unsloth to NF4, ours to each of `--bases`. Unsloth pins
versions of its own: DIRECTORY has it and what it needs beside the installed packages (`pip install --target DIRECTORY
unsloth ...`). Each side runs in a process of its own; the file is written after each of `--bases`.
"""

import os
import subprocess
from pathlib import Path
from statistics import median

from common import Report, parser, run_apart
from step_vs_trl import ONE_PROCESS, STEPS

BAR = 0.55


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--peer-path", type=Path, help="where Unsloth is; without it only ours is measured")
    options.add_argument("--bases", nargs="+", default=["nf4", "fp4"], help="ours, the first of them before Unsloth")
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    arguments = options.parse_args()
    place = arguments.peer_path
    if place and not (place / "unsloth").is_dir():
        options.error(f"--peer-path {place}: there is no package unsloth in it")
    report = Report("step_vs_unsloth", arguments)
    unsloth = None
    for index, base in enumerate(arguments.bases):
        ours = measure_ours(arguments.checkpoint, base, arguments.tokens_per_microbatch)
        if index == 0 and place:
            unsloth = measure_unsloth(arguments.checkpoint, place)
        add_figures(report, base, ours, unsloth)
        print(report.write())


def measure_ours(checkpoint: Path, base: str, tokens_per_microbatch: int) -> dict:
    script = str(Path(__file__).with_name("step_vs_trl.py"))
    budget = ["--tokens-per-microbatch", str(tokens_per_microbatch)]
    return run_apart(f"ours {base}", script, str(checkpoint), "--side", "ours", "--base", base, *budget)


def measure_unsloth(checkpoint: Path, place: Path) -> dict | None:
    """None where it fails: ours alone is reported then."""
    paths = os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])
    environment = ONE_PROCESS | {"UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": paths}
    script = str(Path(__file__).with_name("unsloth_side.py"))
    try:
        return run_apart("unsloth", script, str(checkpoint), environment=environment)
    except subprocess.CalledProcessError as error:
        print(f"Unsloth's side failed with exit code {error.returncode}: ours alone is reported")
        return None


def add_figures(report: Report, base: str, ours: dict, unsloth: dict | None) -> None:
    sides = {"ours": ours} | ({"unsloth": unsloth} if unsloth else {})
    steps = {name: [step["seconds"] for step in side["steps"][1:]] for name, side in sides.items()}
    peaks = {name: max(step["peak_gib"] for step in side["steps"]) for name, side in sides.items()}
    middle = {name: median(seconds) for name, seconds in steps.items()}
    facts = {
        "seconds": {name: round(value, 2) for name, value in middle.items()},
        "peak_gib": {name: round(value, 1) for name, value in peaks.items()},
        "first_step_s": {name: round(side["steps"][0]["seconds"], 1) for name, side in sides.items()},
        "start_s": {name: round(side["start_seconds"], 1) for name, side in sides.items()},
        "repeats": STEPS - 1,
        "logs": ours["logs"],
    }
    if unsloth:
        bar_is = "Unsloth 4-bit (NF4) with standby, same run"
        ratio = middle["ours"] / middle["unsloth"]
        report.add(f"step_vs_unsloth.time.4b.{base}", ratio, "ratio", "lower", bar=BAR, bar_is=bar_is, **facts)
        report.add(f"step_vs_unsloth.peak_memory.4b.{base}", peaks["ours"] / peaks["unsloth"], "ratio", "lower")
    else:
        report.add(f"step_vs_unsloth.ours_seconds.4b.{base}", middle["ours"], "s", "lower", **facts)


if __name__ == "__main__":
    main()
