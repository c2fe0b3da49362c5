"""Learning on the card: a decoder of 34 million parameters, warmed up by a careless teacher, learns to carry with vLLM.

The task of examples/arithmetic with numbers up to 999. Writes learning.png beside the JSON.
"""

import sys
import time
from pathlib import Path
from tempfile import mkdtemp

from common import ROOT, Report, parser
from datasets import Dataset
from peft import LoraConfig

sys.path.insert(0, str(ROOT / "examples" / "arithmetic"))
from colora import GRPOConfig, GRPOTrainer
from model import answer, problems, question, warm_up
from reward import correct
from run import Curve, HeldOut, plot

LARGEST, WIDTH, SEED = 999, 3, 0


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--steps", type=int, default=150)
    options.add_argument("--learning-rate", type=float, default=5e-4)
    arguments = options.parse_args()
    report = Report("learning", arguments)
    started = time.perf_counter()
    model = warm_up(
        Path(mkdtemp()), SEED, largest=LARGEST, hidden=512, layers=8, batch=1024, learning_rate=5e-4,
        until=0.35, device="cuda",
    )  # fmt: skip
    warm_seconds = time.perf_counter() - started
    learn, held_out_problems = problems(SEED, LARGEST)
    config = GRPOConfig(
        mkdtemp(), engine="vllm", per_device_train_batch_size=512, num_generations=16, max_completion_length=6,
        learning_rate=arguments.learning_rate, lr_scheduler_type="cosine", warmup_steps=5,
        max_steps=arguments.steps, logging_steps=1, save_strategy="no", gradient_checkpointing=False, report_to=[],
        seed=SEED, tokens_per_microbatch=16384,
    )  # fmt: skip
    rows = Dataset.from_dict(
        {"prompt": [question(p, WIDTH) for p in learn], "answer": [answer(p, WIDTH) for p in learn]}
    )
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear")
    trainer = GRPOTrainer(str(model), correct, config, rows, peft_config=lora)
    held_out = HeldOut(trainer, held_out_problems, WIDTH)
    curve = Curve(held_out, every=10)
    trainer.add_callback(curve)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    arguments.results.mkdir(parents=True, exist_ok=True)
    plot(
        trainer,
        curve.points,
        arguments.results / "learning.png",
        f"GRPO on sums of two numbers up to {LARGEST}, vLLM, bf16",
    )
    gaps = [entry["parity/mean_abs"] for entry in trainer.state.log_history if "parity/mean_abs" in entry]
    parameters = sum(tensor.numel() for tensor in trainer.policy.weights.tensors.values())
    parameters += sum(
        linear.weight.out_features * linear.weight.in_features for linear in trainer.policy.weights.linears.values()
    )
    before, after = curve.points[0][1], held_out.accuracy()
    facts = {"steps": arguments.steps, "seconds": round(seconds, 1), "warm_up_seconds": round(warm_seconds, 1)}
    facts |= {"parameters": parameters, "curve": [(step, round(value, 4)) for step, value in curve.points]}
    report.add(
        "learning.accuracy_after", after, "share", "higher", bar=0.9, bar_is="from under 0.5", before=before, **facts
    )
    report.add("learning.mean_log_prob_gap", sum(gaps) / len(gaps), "nats", "lower", largest_step_mean=max(gaps))
    print(report.write())


if __name__ == "__main__":
    main()
