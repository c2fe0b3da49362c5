"""One GRPO step on a 4-bit base, ours against Unsloth's, on the work of step_vs_trl.py in the same run.

    python benchmarks/step_vs_unsloth.py CHECKPOINT --peer-path DIRECTORY

The checkpoint is dense; both sides quantise it to NF4 as they load it. Unsloth pins versions of its own: DIRECTORY has
it and what it needs beside the installed packages (`pip install --target DIRECTORY unsloth ...`). Each side runs in a
process of its own.
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
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    arguments = options.parse_args()
    report = Report("step_vs_unsloth", arguments)
    checkpoint = str(arguments.checkpoint)
    here, budget = Path(__file__), str(arguments.tokens_per_microbatch)
    ours = ["--side", "ours", "--base", "nf4", "--tokens-per-microbatch", budget]
    sides = {"ours": run_apart("ours", str(here.with_name("step_vs_trl.py")), checkpoint, *ours)}
    if arguments.peer_path:
        paths = os.pathsep.join([str(arguments.peer_path), os.environ.get("PYTHONPATH", "")])
        environment = ONE_PROCESS | {"UNSLOTH_DISABLE_STATISTICS": "1", "PYTHONPATH": paths}
        try:
            script = str(here.with_name("unsloth_side.py"))
            sides["unsloth"] = run_apart("unsloth", script, checkpoint, environment=environment)
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
