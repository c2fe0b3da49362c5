"""Watch a model learn to add from a reward function: `make demo`, or `python examples/arithmetic/run.py --help`."""

import argparse
import shutil
import time
from pathlib import Path

import matplotlib
from colora import GRPOConfig, GRPOTrainer
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from colora.weightshare.base_format import BASES
from datasets import Dataset
from model import WIDTH, Problem, answer, problems, question, warm_up
from peft import LoraConfig
from reward import correct
from transformers import TrainerCallback

HERE = Path(__file__).parent
SHOWN = 6  # sample answers


class HeldOut:
    """Greedy answers to the held-out problems by the engine that also makes the rollouts."""

    def __init__(self, trainer: GRPOTrainer, held_out: list[Problem], width: int = WIDTH):
        self.trainer, self.problems, self.width = trainer, held_out, width

    def answers(self) -> list[str]:
        tokenizer, engine = self.trainer.collector.tokenizer, self.trainer.engine
        sampling = SamplingParams(
            max_tokens=self.trainer.args.max_completion_length,
            temperature=0.0,
            stop_token_ids=self.trainer.collector.stop_token_ids,
        )
        requests = [
            RolloutRequest(str(index), tuple(tokenizer(question(problem, self.width))["input_ids"]), 0, sampling)
            for index, problem in enumerate(self.problems)
        ]
        engine.wake()
        found = {t.request_id: t.completion_ids for t in generate(engine, requests)}
        engine.sleep()
        return tokenizer.batch_decode([found[r.request_id] for r in requests], skip_special_tokens=True)

    def accuracy(self, answers: list[str] | None = None) -> float:
        given = answers or self.answers()
        return sum(correct(given, [answer(problem, self.width) for problem in self.problems])) / len(self.problems)


class Curve(TrainerCallback):
    """Held-out accuracy every few steps, for the picture."""

    def __init__(self, held_out: HeldOut, every: int):
        self.held_out, self.every, self.points = held_out, every, [(0, held_out.accuracy())]

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every == 0:
            self.points.append((state.global_step, self.held_out.accuracy()))


def plot(trainer: GRPOTrainer, points: list[tuple[int, float]], path: Path, title: str) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    log = [(entry["step"], entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(*zip(*log, strict=True), color="tab:blue", alpha=0.4, label="mean reward of the rollouts")
    axes.plot(*zip(*points, strict=True), color="tab:orange", marker="o", markersize=3, label="held-out accuracy")
    axes.set(xlabel="optimizer step", ylim=(0, 1), title=title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> float:
    """Run the demo; returns the held-out accuracy at the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", default="auto", choices=["auto", "transformers", "vllm"])
    parser.add_argument("--base", default="auto", choices=BASES, help="how the model that the adapter is for is held")
    parser.add_argument("--steps", type=int, default=280)
    parser.add_argument("--output", type=Path, default=Path("runs/arithmetic"))
    parser.add_argument("--learning-rate", type=float, default=7e-4)
    options = parser.parse_args()
    started = time.perf_counter()
    print(f"Making a model and warming it up (cached in {HERE / '.cache'}) ...", flush=True)
    model = warm_up(HERE / ".cache" / f"seed-{options.seed}", options.seed)

    output = options.output / f"seed-{options.seed}"
    shutil.rmtree(output, ignore_errors=True)  # the demo starts afresh each time
    learn, held_out_problems = problems(options.seed)
    config = GRPOConfig(
        str(output),
        engine=options.engine,
        base=options.base,
        per_device_train_batch_size=256,
        num_generations=16,
        max_completion_length=5,
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_steps=options.steps,
        logging_steps=5,
        save_strategy="no",
        gradient_checkpointing=False,
        report_to=[],
        seed=options.seed,
    )
    rows = Dataset.from_dict({"prompt": [question(p) for p in learn], "answer": [answer(p) for p in learn]})
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(str(model), correct, config, rows, peft_config=lora)
    held_out = HeldOut(trainer, held_out_problems)
    before = held_out.answers()
    curve = Curve(held_out, every=20)
    trainer.add_callback(curve)
    trainer.train()
    trainer.save_model()
    after = held_out.answers()

    print("\nSome held-out problems:")
    for problem, first, last in list(zip(held_out.problems, before, after, strict=True))[:SHOWN]:
        print(f"  {question(problem):>6}   before: {first:<6} after: {last:<6} right: {answer(problem)}")
    plot(trainer, curve.points, output / "reward_curve.png", "GRPO on sums of two numbers up to 99")
    result = held_out.accuracy(after)
    print(f"\nHeld-out accuracy: {held_out.accuracy(before):.1%} before, {result:.1%} after")
    print(f"Reward curve: {output / 'reward_curve.png'}   adapter: {output}")
    print(f"Everything took {time.perf_counter() - started:.0f} s")
    return result


if __name__ == "__main__":
    main()
