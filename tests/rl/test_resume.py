"""A run killed with SIGKILL at random moments ends as the run that was never killed.

Proof: the uninterrupted run and the killed one are compared in every rollout and in every bit of the adapter.
"""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from colora.rl.checkpoint import FINISHED, checkpoints
from colora.rollout.records import read_records
from safetensors.torch import load_file

from ..tiny_runs import tiny_checkpoint

SCRIPT = """
import sys
import torch
from colora import GRPOConfig, GRPOTrainer
from datasets import Dataset
from peft import LoraConfig

torch.set_num_threads(1)
model, output, updates = sys.argv[1], sys.argv[2], int(sys.argv[3])

def threes(completion_ids, **_):
    return [0.25 * sum(token % 3 == 0 for token in ids) for ids in completion_ids]

config = GRPOConfig(
    output, per_device_train_batch_size=8, num_generations=4, max_completion_length=10, learning_rate=3e-3,
    max_steps=12, num_iterations=updates, save_steps=1, save_total_limit=2, report_to=[], device="cpu",
    gradient_checkpointing=False,
)
trainer = GRPOTrainer(model, threes, config, Dataset.from_dict({"prompt": [f"{n}+1=" for n in range(10)]}),
                      peft_config=LoraConfig(r=4, init_lora_weights=False))
print("ready", flush=True)
trainer.train(resume_from_checkpoint=True)
"""


def start(model: Path, output: Path, updates: int) -> subprocess.Popen[str]:
    """A training process that has been set up and is about to train."""
    command = [sys.executable, "-c", SCRIPT, str(model), str(output), str(updates)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line == "ready\n", process.communicate()[1]
    return process


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors


def kill_at_step(process: subprocess.Popen[str], output: Path, step: int, delay: float) -> None:
    """Wait until the rollouts of `step` are there, then `delay` seconds more: it dies somewhere in what follows."""
    while len(list((output / "rollouts").glob("*.parquet"))) < step and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.communicate()


@pytest.mark.parametrize("updates", [1, 2])
def test_killed_and_resumed_equals_never_killed(tmp_path: Path, updates: int) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    finish(start(model, tmp_path / "whole", updates))

    rng, generations = random.Random(updates), 12 // updates
    for step in sorted(rng.sample(range(1, generations - 1), 2)):
        kill_at_step(start(model, tmp_path / "killed", updates), tmp_path / "killed", step, rng.uniform(0, 0.15))
    assert not (tmp_path / "killed" / FINISHED).exists()
    finish(start(model, tmp_path / "killed", updates))

    records, expected = (read_records(tmp_path / name / "rollouts") for name in ("killed", "whole"))
    assert [(r.step, r.trajectory.request_id) for r in records] == [(r.step, r.trajectory.request_id) for r in expected]
    assert [r.trajectory for r in records] == [r.trajectory for r in expected]
    final, reference = (
        load_file(checkpoints(tmp_path / name)[-1] / "adapter_model.safetensors") for name in ("killed", "whole")
    )
    assert final.keys() == reference.keys() and all((final[name] == reference[name]).all() for name in final)
