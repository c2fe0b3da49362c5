"""The demo's task (examples/arithmetic) learnt with each preset from the same warmed-up model, for several seeds.

Each run is a process of its own. What is finished stays in --work and is not run again; a run that fails costs no
other. Writes algorithms.json, and algorithms.png with a panel for each preset, in it a curve for each seed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from colora.rl.presets import PRESETS as ALL_PRESETS
from common import ROOT, Report, commit, parser

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))
from model import answer, problems, question, warm_up

DEMO = ROOT / "examples" / "arithmetic"
PRESETS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
BAR = 0.85
EVERY = 20  # steps between two points of a curve
# The presets' values are those of runs with completions of thousands of tokens and steps a hundred times as small.
# What is given here instead, for a task of four tokens, and is noted beside each figure.
SMALL: dict[str, dict[str, Any]] = {}


def main() -> int:
    """Run everything that is not done yet; returns 1 where a run failed."""
    options = parser(__doc__)
    options.add_argument("--presets", nargs="+", default=list(PRESETS), choices=list(ALL_PRESETS))
    options.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options.add_argument("--steps", type=int, default=280)
    options.add_argument("--learning-rate", type=float, default=7e-4)
    options.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    options.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the cores")
    options.add_argument("--work", type=Path, default=ROOT / "runs" / "algorithms", help="where finished runs stay")
    options.add_argument("--again", action="store_true", help="do not reuse finished runs")
    options.add_argument("--one", nargs=2, metavar=("PRESET", "SEED"), help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.one:
        preset, seed = arguments.one
        learn(preset, int(seed), arguments)
        return 0
    for seed in arguments.seeds:
        print(f"warmed-up model of seed {seed} (cached)", flush=True)
        warm_up(DEMO / ".cache" / f"seed-{seed}", seed)
    runs = [(preset, seed) for preset in arguments.presets for seed in arguments.seeds]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda run: finished(*run, arguments), runs))
    results = [result for result in done if result is not None]
    if results:
        write(results, arguments)
    failed = [f"{preset} seed {seed}" for (preset, seed), result in zip(runs, done, strict=True) if result is None]
    if failed:
        print(f"failed: {', '.join(failed)}; the same command runs only these again", file=sys.stderr)
    return bool(failed)


def settings(preset: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """What a run is made of: a finished one with the same settings need not be run again."""
    return {
        "preset": preset,
        "seed": seed,
        "steps": arguments.steps,
        "learning_rate": arguments.learning_rate,
        "engine": arguments.engine,
        "given": SMALL.get(preset, {}),
        "commit": arguments.commit or commit(),
    }


def result_path(preset: str, seed: int, arguments: argparse.Namespace) -> Path:
    """Where a run leaves its result."""
    directory: Path = arguments.work
    return directory / f"{preset}-seed{seed}.json"


def finished(preset: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """The result of a run: of an earlier one with the same settings, or of a new process; None where that fails."""
    path = result_path(preset, seed, arguments)
    if path.is_file() and not arguments.again:
        result: dict[str, Any] = json.loads(path.read_text())
        if result["settings"] == settings(preset, seed, arguments):
            print(f"{preset} seed {seed}: {result['after']:.1%}, finished before", flush=True)
            return result
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    command = [sys.executable, __file__, "--one", preset, str(seed), "--steps", str(arguments.steps)]
    command += ["--learning-rate", str(arguments.learning_rate), "--engine", arguments.engine]
    command += ["--work", str(arguments.work), "--commit", arguments.commit or commit()]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(command, env=environment)
    return json.loads(path.read_text()) if process.returncode == 0 else None


def learn(preset: str, seed: int, arguments: argparse.Namespace) -> None:
    """One run, in this process; writes its result."""
    from colora import GRPOConfig, GRPOTrainer
    from datasets import Dataset
    from peft import LoraConfig
    from reward import correct
    from run import Curve, HeldOut

    class Progress(Curve):
        """The demo's curve, with a line for each of its points."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            known = len(self.points)
            super().on_step_end(args, state, control, **kwargs)
            if len(self.points) > known:
                step, accuracy = self.points[-1]
                seconds = time.perf_counter() - started
                print(
                    f"{preset} seed {seed}: step {step}/{arguments.steps}, {accuracy:.1%}, {seconds:.0f} s", flush=True
                )

    given = SMALL.get(preset, {})
    to_learn, to_hold_out = problems(seed)
    config = GRPOConfig(
        str(arguments.work / f"{preset}-seed{seed}"), algorithm=preset, engine=arguments.engine,
        per_device_train_batch_size=256, num_generations=16, max_completion_length=5,
        learning_rate=arguments.learning_rate, lr_scheduler_type="constant", max_steps=arguments.steps,
        logging_steps=EVERY, save_strategy="no", gradient_checkpointing=False, report_to=[], disable_tqdm=True,
        seed=seed, **given,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": [question(p) for p in to_learn], "answer": [answer(p) for p in to_learn]})
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(str(DEMO / ".cache" / f"seed-{seed}"), correct, config, rows, peft_config=lora)
    curve = Progress(HeldOut(trainer, to_hold_out), EVERY)
    trainer.add_callback(curve)
    started = time.perf_counter()
    trainer.train()
    result = {
        "settings": settings(preset, seed, arguments),
        "before": curve.points[0][1],
        "after": curve.held_out.accuracy(),
        "seconds": round(time.perf_counter() - started, 1),
        "updates_per_generation": config.updates_per_generation,
        "set_by_preset": config.preset,
        "curve": [(step, round(accuracy, 4)) for step, accuracy in curve.points],
    }
    path = result_path(preset, seed, arguments)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    trainer.engine.close()


def write(results: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The figures and the picture."""
    report = Report("algorithms", arguments, on_cpu=True)
    for result in results:
        chosen = result["settings"]
        facts = {
            name: result[name] for name in ("before", "seconds", "updates_per_generation", "set_by_preset", "curve")
        }
        facts |= {name: chosen[name] for name in ("steps", "learning_rate", "engine", "given")}
        report.add(
            f"algorithms.{chosen['preset']}.seed{chosen['seed']}", result["after"], "share", "higher",
            bar=BAR, bar_is="the demo's, held-out accuracy", **facts,
        )  # fmt: skip
    print(report.write())
    plot(results, arguments.results / "algorithms.png")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """A panel for each preset: held-out accuracy against steps, a curve for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    presets = list(dict.fromkeys(result["settings"]["preset"] for result in results))
    figure, panels = pyplot.subplots(
        1, len(presets), figsize=(2.6 * len(presets) + 0.6, 3.2), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, preset in zip(panels[0], presets, strict=True):
        for result in results:
            if result["settings"]["preset"] == preset:
                steps, accuracies = zip(*result["curve"], strict=True)
                seed = result["settings"]["seed"]
                panel.plot(steps, accuracies, color=f"C{seed}", marker="o", markersize=2, label=f"seed {seed}")
        panel.axhline(BAR, color="grey", linestyle="--", linewidth=0.8)
        panel.set(title=preset, xlabel="optimizer step", ylim=(0, 1))
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("held-out accuracy")
    panels[0][-1].legend(loc="lower right", fontsize="small")
    figure.suptitle("Sums of two numbers up to 99, from one warmed-up model a seed")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main())
