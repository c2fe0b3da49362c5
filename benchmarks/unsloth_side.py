"""Unsloth's side of step_vs_unsloth.py, on the work of step_vs_trl.py. Run by that script; prints its steps as JSON."""

import os

os.environ["UNSLOTH_VLLM_STANDBY"] = "1"  # its way to free the KV cache while it trains; read when it is imported

# isort: off
from unsloth import FastLanguageModel  # before anything it patches

import argparse
import json
import time
from pathlib import Path
from tempfile import mkdtemp

import torch
from common import peak_memory
from step_vs_trl import SHARED, STEPS, Clock, prompts, reward
from trl import GRPOConfig, GRPOTrainer
# isort: on

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def train(checkpoint: Path, clock: Clock, rows_per_microbatch: int, utilization: float) -> dict:
    started = time.perf_counter()
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=str(checkpoint), max_seq_length=512 + 1024 + 64, load_in_4bit=True, fast_inference=True,
        max_lora_rank=16, gpu_memory_utilization=utilization, dtype=torch.bfloat16,
    )  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=LINEARS, use_gradient_checkpointing="unsloth", random_state=1
    )
    options = {name: value for name, value in SHARED.items() if name != "gradient_checkpointing"}
    config = GRPOConfig(
        output_dir=mkdtemp(), per_device_train_batch_size=rows_per_microbatch,
        gradient_accumulation_steps=64 // rows_per_microbatch, bf16=True, temperature=1.0, beta=0.0, use_vllm=True,
        **options,
    )  # fmt: skip
    trainer = GRPOTrainer(
        model=model, reward_funcs=[reward], args=config, train_dataset=prompts(), processing_class=tokenizer,
        callbacks=[clock],
    )  # fmt: skip
    start_seconds = time.perf_counter() - started
    trainer.train()
    lengths = [entry.get("completions/mean_length") for entry in trainer.state.log_history[1:STEPS]]
    return {"start_seconds": start_seconds, "mean_lengths": lengths}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--rows-per-microbatch", type=int, default=8)
    options.add_argument("--utilization", type=float, default=0.3, help="vLLM's gpu_memory_utilization")
    arguments = options.parse_args()
    with peak_memory() as peak:
        clock = Clock(peak)
        facts = train(arguments.checkpoint, clock, arguments.rows_per_microbatch, arguments.utilization)
    print(json.dumps(facts | {"steps": clock.steps}))


if __name__ == "__main__":
    main()
