"""A run that was stopped and resumed is the run that was never stopped: what is state, option by option.

Proof: rollouts, adapter, optimizer and log are compared bit by bit. `test_kill.py` does so with processes killed at
random moments; here runs stop right after a checkpoint, which is the most that a resume can start from.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from colora import GRPOConfig, GRPOTrainer
from colora.rl.checkpoint import FINISHED, checkpoints
from colora.rollout.records import read_records
from datasets import Dataset
from peft import LoraConfig
from transformers import EarlyStoppingCallback, TrainerCallback

from ..run_files import assert_same_run, read_log
from ..tiny_runs import tiny_checkpoint

STEPS = 12
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 3}
# name: options, and the step after which the run stops
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "between_generations": ({"num_iterations": 2}, 4),
    "between_iterations": ({"num_iterations": 2}, 5),
    "between_minibatches": ({"steps_per_generation": 3, "beta": 0.05}, 4),
    "end_of_an_epoch": ({}, 3),
    "between_logs": ({"logging_steps": 5}, 7),
    "evaluations": ({**EVALUATING, "eval_on_start": True}, 7),
    "plateau": ({**EVALUATING, "lr_scheduler_type": "reduce_lr_on_plateau"}, 7),
    "scheduler": ({"lr_scheduler_type": "cosine", "warmup_steps": 3}, 2),
    "dynamic_sampling": ({"dynamic_sampling": True, "num_iterations": 2}, 5),
    "kl_in_reward": ({"kl_in_reward": True, "beta": 0.1, "num_iterations": 2}, 5),
    "sequence_ratios": ({"importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}, 5),
}


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def noisy(completion_ids, trainer_state, log_metric, **_):
    """Draws from every generator of random numbers, and looks at the step."""
    noise = random.random() + torch.rand(()).item() + trainer_state.global_step
    log_metric("noise", noise)
    return [float(ids[0] % 3 == 0) + noise * (ids[0] % 3 == 0) for ids in completion_ids]


def make(model: str, output: Path, callbacks=None, stream: bool = False, **options: Any) -> GRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 6, "num_generations": 3, "max_completion_length": 8, "max_steps": STEPS,
        "learning_rate": 3e-3, "save_steps": 1, "report_to": [], "device": "cpu", "disable_tqdm": True,
    }  # fmt: skip
    rows = Dataset.from_dict({"prompt": [f"{n}+1=" for n in range(7)]})
    return GRPOTrainer(
        model,
        noisy,
        GRPOConfig(str(output), **(defaults | options)),
        rows.to_iterable_dataset() if stream else rows,
        Dataset.from_dict({"prompt": ["8+1=", "9+1="]}),
        callbacks=callbacks,
        peft_config=LoraConfig(r=4, init_lora_weights=False),
    )


def run_and_stop(model: str, output: Path, step: int, **options: Any) -> None:
    with pytest.raises(Stopped):
        make(model, output, [StopAfter(step)], **options).train()
    assert not (output / FINISHED).exists()


@pytest.mark.parametrize("case", CASES)
def test_resumed_equals_never_stopped(model: str, tmp_path: Path, case: str) -> None:
    options, step = CASES[case]
    make(model, tmp_path / "whole", **options).train()
    run_and_stop(model, tmp_path / "stopped", step, **options)
    make(model, tmp_path / "stopped", **options).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_stream_goes_on_where_it_was_in_a_later_epoch(model: str, tmp_path: Path, shuffle: bool) -> None:
    """Seven prompts, two a step: the run sees the stream four times."""
    options = {"stream": True, "shuffle_dataset": shuffle}
    make(model, tmp_path / "whole", **options).train()
    run_and_stop(model, tmp_path / "stopped", 8, **options)
    make(model, tmp_path / "stopped", **options).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_the_patience_of_early_stopping_is_kept(model: str, tmp_path: Path) -> None:
    """Evaluations at steps 1, 2, ... that do not improve by 1000 end the run after the fourth, stopped or not."""
    options = {
        "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward",
    }  # fmt: skip

    def patience() -> EarlyStoppingCallback:
        return EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=1000.0)

    whole = make(model, tmp_path / "whole", [patience()], **options)
    whole.train()
    with pytest.raises(Stopped):
        make(model, tmp_path / "stopped", [patience(), StopAfter(3)], **options).train()
    resumed = make(model, tmp_path / "stopped", [patience()], **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 4
    logs = [read_log(checkpoints(tmp_path / name)[-1]) for name in ("stopped", "whole")]
    assert logs[0] == logs[1]


def test_killed_after_its_last_checkpoint_makes_no_further_step(model: str, tmp_path: Path) -> None:
    """The epochs end in the middle here, so that there is a prompt left to go on with."""
    trainer = make(model, tmp_path, max_steps=5)
    trainer.train()
    kept = json.loads((tmp_path / FINISHED).read_text())
    (tmp_path / FINISHED).unlink()
    resumed = make(model, tmp_path, max_steps=5)
    assert resumed.train(resume_from_checkpoint=True).global_step == 5
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-5"
    assert json.loads((tmp_path / FINISHED).read_text()) == kept
    for (name, one), (_, other) in zip(trainer.adapter.named_matrices(), resumed.adapter.named_matrices(), strict=True):
        assert torch.equal(one, other), name
    with pytest.raises(ValueError, match="finished run"):
        make(model, tmp_path, max_steps=5).train(resume_from_checkpoint=True)


def test_a_finished_run_can_be_given_more_steps(model: str, tmp_path: Path) -> None:
    make(model, tmp_path, max_steps=3, lr_scheduler_type="constant").train()
    longer = make(model, tmp_path, max_steps=5, lr_scheduler_type="constant")
    assert longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3")).global_step == 5


def test_going_on_from_an_older_checkpoint_puts_the_newer_ones_aside(model: str, tmp_path: Path) -> None:
    """They belong to what was abandoned: neither resumed from, nor counted when old checkpoints are deleted."""
    make(model, tmp_path, max_steps=6).train()
    options = {"max_steps": 6, "save_total_limit": 2}
    with pytest.raises(Stopped):
        make(model, tmp_path, [StopAfter(4)], **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    aside = sorted(path.name for path in tmp_path.glob("abandoned-*"))
    assert aside == [f"abandoned-checkpoint-{step}" for step in (3, 4, 5, 6)]
    make(model, tmp_path, **options).train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-5", "checkpoint-6"]
    assert [record.step for record in read_records(tmp_path / "rollouts")][::6] == [1, 2, 3, 4, 5, 6]
