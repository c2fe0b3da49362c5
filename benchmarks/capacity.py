"""Whole GRPO steps on a smaller card: the longest context at which vLLM and the trainer go through some in a row.

    python benchmarks/capacity.py card24.8b CHECKPOINT --contexts 49152 65536

A ballast (card.py) leaves the card's size free and holds the rest. Each context runs in a process of its own, from the
shortest on, until one fails. A context is a long prompt and completions of up to COMPLETION tokens, as of a question
about a long document: the group shares the prompt's KV cache and, in training, its row, in which every completion sees
the whole context.
"""

import argparse
import json
import random
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from zlib import crc32

import torch
from card import ballast
from common import Report, parser, peak_memory, run_apart
from datasets import Dataset
from peft import LoraConfig
from step_vs_trl import Clock

COMPLETION = 2048
PHASES = ("time/rollout_s", "time/reward_s", "time/train_s", "step_time", "sampling/sampling_logp_difference/mean")


@dataclass(frozen=True)
class Case:
    """A card, a model and a bar."""

    free_gib: float
    shape: str
    rank: int
    generations: int
    steps: int
    bar: int
    published: str


CASES = {
    "card24.8b": Case(24, "8b", 32, 8, 3, 49152, "32K: the longest published for an 8B model on 24 GB"),
    "card24.24b": Case(24, "24b", 16, 4, 3, 20480, "20K: published for a 20B mixture of experts on 24 GB"),
    "card80.8b": Case(80, "8b", 32, 2, 2, 131072, "110K: the longest published for an 8B model on 80 GB"),
}


def documents(count: int, tokens: int) -> Dataset:
    """Prompts of so many characters, a token each."""
    rng = random.Random(0)
    return Dataset.from_list([{"prompt": "".join(rng.choices("abcdefgh ", k=tokens))} for _ in range(count)])


def reward(completions: list[str], **_: object) -> list[float]:
    """Different for every completion, so that all are trained."""
    return [crc32(text.encode()) / 2**32 for text in completions]


def train(case: Case, checkpoint: Path, context: int, base: str) -> dict:
    """What `case.steps` steps took."""
    from colora import GRPOConfig, GRPOTrainer

    resident = torch.cuda.device_memory_used() / 2**30  # the ballast and other processes
    started = time.perf_counter()
    config = GRPOConfig(
        mkdtemp(), engine="vllm", base=base, max_context=context, max_prompt_length=context - COMPLETION,
        max_completion_length=COMPLETION, num_generations=case.generations,
        per_device_train_batch_size=case.generations, activation_offload=True,
        tokens_per_microbatch=context + (case.generations - 1) * COMPLETION, gradient_checkpointing=True,
        optim="adamw_8bit", max_steps=case.steps, logging_steps=1, report_to=[], save_strategy="no",
        learning_rate=1e-6, parity_limit=0.5,  # random weights amplify rounding
        engine_kwargs={"max_num_seqs": case.generations, "max_num_batched_tokens": 2048},
    )  # fmt: skip
    lora = LoraConfig(r=case.rank, lora_alpha=case.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    with peak_memory() as peak:
        clock = Clock(peak)
        trainer = GRPOTrainer(
            str(checkpoint),
            reward,
            config,
            documents(case.steps, context - COMPLETION),
            peft_config=lora,
            callbacks=[clock],
        )
        start_seconds = time.perf_counter() - started
        trainer.train()
    logs = [{name: entry.get(name) for name in PHASES} for entry in trainer.state.log_history[: case.steps]]
    return {
        "start_s": round(start_seconds, 1),
        "steps": logs,
        "peak_gib": [round(step["peak_gib"] - resident, 2) for step in clock.steps],
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("case", choices=CASES)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--contexts", nargs="+", type=int, help="tokens; by default the bar alone")
    options.add_argument("--base", default="nf4")
    options.add_argument("--here", type=int, help=argparse.SUPPRESS)  # a context: train in the memory there is
    arguments = options.parse_args()
    case = CASES[arguments.case]
    if arguments.here:
        print(json.dumps(train(case, arguments.checkpoint, arguments.here, arguments.base)))
        return
    report = Report(f"capacity_{arguments.case.replace('.', '_')}", arguments, script="capacity")
    worked: dict[int, dict] = {}
    failed = None
    with ballast(case.free_gib) as free:
        for context in sorted(arguments.contexts or [case.bar]):
            apart = [arguments.case, str(arguments.checkpoint), "--base", arguments.base, "--here", str(context)]
            try:
                worked[context] = run_apart(f"{context} tokens", __file__, *apart)
            except subprocess.CalledProcessError as error:
                failed = context
                print(f"{context} tokens: failed with exit code {error.returncode}", flush=True)
            report.add(
                f"{arguments.case}.grpo_context.{arguments.base}", max(worked, default=0), "tokens", "higher",
                bar=case.bar, bar_is=case.published, free_gib=round(free, 2), failed_at=failed, runs=worked,
                generations=case.generations, rank=case.rank, completion=COMPLETION, whole_steps=case.steps,
            )  # fmt: skip
            if failed:
                break
    print(report.write())


if __name__ == "__main__":
    main()
