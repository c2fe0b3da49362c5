"""One GRPO step of ours against one of TRL's colocated, on the same work in the same run.

64 completions of 1024 tokens (8 prompts of 512, 8 each), bf16, LoRA r=16 on all linears; the weights are random, so
that hardly a completion ends early. Each side runs in a process of its own:
`python benchmarks/step_vs_trl.py CHECKPOINT`.
"""

import argparse
import json
import random
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from common import Report, parser, peak_memory, run_apart
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

STEPS = 4  # the first is left out: it warms up
ONE_PROCESS = {  # what a peer's launcher would set
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}
LORA = {"r": 16, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHARED = {
    "num_generations": 8,
    "max_completion_length": 1024,
    "gradient_checkpointing": True,
    "max_steps": STEPS,
    "logging_steps": 1,
    "report_to": [],
    "save_strategy": "no",
    "learning_rate": 1e-6,
}


def prompts() -> Dataset:
    rng = random.Random(0)
    return Dataset.from_list([{"prompt": "".join(rng.choice("abcdefgh ") for _ in range(512))} for _ in range(256)])


def reward(completions: list[str], **_: object) -> list[float]:
    return [float(len(text) % 7) for text in completions]


class Clock(TrainerCallback):
    """Seconds and peak memory of each step."""

    def __init__(self, peak: list[float]):
        self.peak, self.steps = peak, []

    def on_step_begin(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.peak[0], self.started = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        torch.cuda.synchronize()
        self.steps.append({"seconds": time.perf_counter() - self.started, "peak_gib": self.peak[0]})


def train_ours(checkpoint: Path, clock: Clock, tokens_per_microbatch: int, base: str) -> dict:
    from colora import GRPOConfig, GRPOTrainer

    started = time.perf_counter()
    config = GRPOConfig(
        mkdtemp(), engine="vllm", base=base, per_device_train_batch_size=64, max_context=512 + 1024 + 64,
        tokens_per_microbatch=tokens_per_microbatch, engine_kwargs={"max_num_seqs": 64}, **SHARED,
    )  # fmt: skip
    trainer = GRPOTrainer(str(checkpoint), reward, config, prompts(), peft_config=LoraConfig(**LORA), callbacks=[clock])
    start_seconds = time.perf_counter() - started
    trainer.train()
    names = ("time/rollout_s", "time/train_s", "completions/mean_length", "sampling/sampling_logp_difference/mean")
    logs = [{name: entry.get(name) for name in names} for entry in trainer.state.log_history[1:STEPS]]
    return {"start_seconds": start_seconds, "logs": logs}


def train_trl(checkpoint: Path, clock: Clock, rows_per_microbatch: int) -> dict:
    from trl import GRPOConfig, GRPOTrainer

    started = time.perf_counter()
    config = GRPOConfig(
        mkdtemp(), per_device_train_batch_size=rows_per_microbatch,
        gradient_accumulation_steps=64 // rows_per_microbatch,
        use_vllm=True, vllm_mode="colocate", vllm_gpu_memory_utilization=0.3, vllm_max_model_length=512 + 1024 + 64,
        vllm_enable_sleep_mode=True, bf16=True, beta=0.0, model_init_kwargs={"dtype": "bfloat16"}, **SHARED,
    )  # fmt: skip
    trainer = GRPOTrainer(str(checkpoint), reward, config, prompts(), peft_config=LoraConfig(**LORA), callbacks=[clock])
    start_seconds = time.perf_counter() - started
    trainer.train()
    logs = [
        {"completions/mean_length": entry.get("completions/mean_length")}
        for entry in trainer.state.log_history[1:STEPS]
    ]
    return {"start_seconds": start_seconds, "logs": logs}


def in_a_process(side: str, arguments: argparse.Namespace) -> dict:
    environment = {} if side == "ours" else ONE_PROCESS
    return run_apart(side, __file__, str(arguments.checkpoint), "--side", side, environment=environment)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--side", choices=["ours", "trl"], help="run this one here and print its steps")
    options.add_argument("--base", default="auto", help="of the side `ours`")
    options.add_argument("--tokens-per-microbatch", type=int, default=16384)
    options.add_argument("--rows-per-microbatch", type=int, default=8)
    arguments = options.parse_args()
    if arguments.side:
        run_side(arguments)
    else:
        compare(arguments)


def run_side(arguments: argparse.Namespace) -> None:
    """Train with one side here and print its facts as the last line."""
    with peak_memory() as peak:
        clock = Clock(peak)
        if arguments.side == "ours":
            facts = train_ours(arguments.checkpoint, clock, arguments.tokens_per_microbatch, arguments.base)
        else:
            facts = train_trl(arguments.checkpoint, clock, arguments.rows_per_microbatch)
    print(json.dumps(facts | {"steps": clock.steps}))


def compare(arguments: argparse.Namespace) -> None:
    """Run both sides, one after the other, and write the figures."""
    report = Report("step_vs_trl", arguments)
    ours, trl = in_a_process("ours", arguments), in_a_process("trl", arguments)
    seconds = {
        name: sorted(step["seconds"] for step in side["steps"][1:]) for name, side in (("ours", ours), ("trl", trl))
    }
    peaks = {name: max(step["peak_gib"] for step in side["steps"]) for name, side in (("ours", ours), ("trl", trl))}
    middle = {name: values[len(values) // 2] for name, values in seconds.items()}
    facts = {
        "ours_s": round(middle["ours"], 2),
        "trl_s": round(middle["trl"], 2),
        "ours_gib": round(peaks["ours"], 1),
        "trl_gib": round(peaks["trl"], 1),
    }
    facts |= {
        "repeats": STEPS - 1,
        "first_step_s": round(ours["steps"][0]["seconds"], 1),
        "trl_first_step_s": round(trl["steps"][0]["seconds"], 1),
    }
    facts |= {
        "start_s": round(ours["start_seconds"], 1),
        "trl_start_s": round(trl["start_seconds"], 1),
        "logs": ours["logs"],
    }
    report.add(
        "step_vs_trl.time.4b",
        middle["ours"] / middle["trl"],
        "ratio",
        "lower",
        bar=0.6,
        bar_is="TRL 1.16 colocated, same run",
        **facts,
    )
    report.add(
        "step_vs_trl.peak_memory.4b",
        peaks["ours"] / peaks["trl"],
        "ratio",
        "lower",
        bar=0.5,
        bar_is="TRL 1.16 colocated, same run",
    )
    report.add(
        "step_vs_trl.start_seconds.4b",
        ours["start_seconds"],
        "s",
        "lower",
        peers={"trl": round(trl["start_seconds"], 1)},
    )
    print(report.write())


if __name__ == "__main__":
    main()
