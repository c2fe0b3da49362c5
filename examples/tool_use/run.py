"""Watch a model learn to use a calculator from a reward function: `python examples/tool_use/run.py`."""

import argparse
import json
import shutil
import time
from pathlib import Path

import matplotlib
from colora import GRPOConfig, GRPOTrainer
from colora.rollout.records import read_records, rollout_path
from datasets import Dataset
from model import Problem, answer, problems, question, warm_up
from peft import LoraConfig
from tools import calculator, correct
from transformers import TrainerCallback

HERE = Path(__file__).parent
SHOWN = 4  # sample conversations
CALLS, RIGHT = "tools/call_frequency", "rewards/correct/mean"


class HeldOut(TrainerCallback):
    """Right answers and calls for each of the held-out problems, every few steps."""

    def __init__(self, trainer: GRPOTrainer, every: int):
        self.trainer, self.every, self.points = trainer, every, []
        self.measure(0)

    def measure(self, step: int) -> None:
        found = self.trainer.evaluate()
        self.points.append({"step": step, "right": found[f"eval_{RIGHT}"], "calls": found[f"eval_{CALLS}"]})

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.measure(state.global_step)


def rows(pairs: list[Problem]) -> Dataset:
    return Dataset.from_dict({"prompt": [question(p) for p in pairs], "answer": [answer(p) for p in pairs]})


def plot(trainer: GRPOTrainer, points: list[dict], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = [(entry["step"], entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*log, strict=True), color="tab:blue", alpha=0.4, label="mean reward of the rollouts")
    steps = [point["step"] for point in points]
    axes.plot(steps, [p["right"] for p in points], color="tab:orange", marker="o", label="held out: right answers")
    axes.plot(steps, [p["calls"] for p in points], color="tab:green", marker="s", label="held out: calls a problem")
    axes.set(xlabel="optimizer step", ylim=(0, 1.05), title="GRPO with a calculator")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def show(output: Path, step: int) -> None:
    """Some conversations of a step."""
    print(f"\nFrom step {step}:")
    records = read_records(rollout_path(output / "rollouts", step))
    for record in records[:: max(1, len(records) // SHOWN)][:SHOWN]:
        said = []
        for message in record.completion:
            calls = [call["function"]["arguments"].get("expression") for call in message.get("tool_calls", [])]
            asked = f"calculator({', '.join(map(str, calls))})"
            said.append(asked if calls else f"{message['role']}: {message['content']}")
        print(f"  {record.prompt[0]['content']:>6}   {'  '.join(said)}")


def main() -> dict:
    """Run the demo; returns what is written to results.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto", choices=["auto", "transformers", "vllm"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("runs/tool_use"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    options = parser.parse_args()
    started = time.perf_counter()
    print(f"Making a model and warming it up (cached in {HERE / '.cache'}) ...", flush=True)
    model = warm_up(HERE / ".cache" / f"seed-{options.seed}", options.seed)

    output = options.output / f"seed-{options.seed}"
    shutil.rmtree(output, ignore_errors=True)  # the demo starts afresh each time
    learn, held_out = problems(options.seed)
    config = GRPOConfig(
        str(output),
        engine=options.engine,
        per_device_train_batch_size=256,
        num_generations=16,
        num_generations_eval=1,
        max_completion_length=32,
        max_tool_calling_iterations=2,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        logging_steps=2,
        save_strategy="no",
        gradient_checkpointing=False,
        report_to=[],
        seed=options.seed,
    )
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(
        str(model), correct, config, rows(learn), rows(held_out), peft_config=lora, tools=[calculator]
    )
    measured = HeldOut(trainer, every=10)
    trainer.add_callback(measured)
    trainer.train()
    if measured.points[-1]["step"] < options.steps:
        measured.measure(options.steps)
    trainer.save_model()

    show(output, options.steps)
    first, last = measured.points[0], measured.points[-1]
    plot(trainer, measured.points, output / "tool_use.png")
    seconds = time.perf_counter() - started
    results = {"before": first, "after": last, "points": measured.points, "seconds": round(seconds, 1)}
    (output / "results.json").write_text(json.dumps(results, indent=1))
    print(f"\nHeld-out problems answered right: {first['right']:.1%} before, {last['right']:.1%} after")
    print(f"Calls of the calculator a problem: {first['calls']:.2f} before, {last['calls']:.2f} after")
    print(f"Curves: {output / 'tool_use.png'}, {output / 'results.json'}   adapter: {output}")
    print(f"Everything took {seconds:.0f} s")
    return results


if __name__ == "__main__":
    main()
