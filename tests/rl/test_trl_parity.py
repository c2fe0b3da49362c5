"""One run of ours equals one of trl.GRPOTrainer on the same rollouts.

Proof: our trainer samples and records its rollouts; TRL gets exactly those through its `rollout_func`, the same base,
the same adapter values and the same reward function; then advantages, the loss of every optimizer step, and the
gradient of every adapter matrix that the optimizer sees are compared, for each loss type, with and without KL, with one
and two updates on the same rollouts.
"""

from pathlib import Path

import pytest
import torch
from colora.rl.config import GRPOConfig
from colora.rl.trainer import GRPOTrainer
from colora.rollout.records import RolloutRecord, read_records
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer as TRLTrainer

from ..tiny_runs import tiny_checkpoint

PROMPTS = ["12+34=", "5+6=", "70+8=", "99+1="]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHARED = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 10,
    "learning_rate": 3e-3,
    "shuffle_dataset": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [0.25 * sum(token % 3 == 0 for token in ids) for ids in completion_ids]


class KeepGradients(TrainerCallback):
    """Copies every gradient, by PEFT's names, just before each optimizer step."""

    def __init__(self, named_gradients):
        self.named_gradients, self.steps = named_gradients, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: gradient.clone() for name, gradient in self.named_gradients()})


def run_ours(
    checkpoint: Path, output: Path, adapter: Path, options: dict
) -> tuple[list[RolloutRecord], list[float], list[dict]]:
    config = GRPOConfig(str(output), **SHARED, **options)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOTrainer(
        str(checkpoint), reward, config, dataset, peft_config=LoraConfig(**LORA, init_lora_weights=False)
    )
    trainer.adapter.save(adapter)
    keep = KeepGradients(lambda: trainer.adapter.named_matrices(gradients=True))
    trainer.add_callback(keep)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return read_records(output / "rollouts"), losses, keep.steps


def run_trl(checkpoint: Path, output: Path, adapter: Path, options: dict, records: list[RolloutRecord]):
    def rollout(prompts: list[str], trainer: TRLTrainer) -> dict:
        assert prompts == [record.prompt for record in records]
        return {
            "prompt_ids": [record.trajectory.prompt_ids for record in records],
            "completion_ids": [record.trajectory.completion_ids for record in records],
            "logprobs": [record.trajectory.logprobs for record in records],
        }

    config = TRLConfig(str(output), **SHARED, **options, bf16=False, model_init_kwargs={"dtype": "float32"})
    trainer = TRLTrainer(
        str(checkpoint),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(**LORA),
        rollout_func=rollout,
    )
    trainer.model.load_adapter(str(adapter), "default", is_trainable=True)

    def gradients():
        for name, parameter in trainer.model.named_parameters():
            if "lora_" in name and ".default." in name:
                yield name.replace(".default", ""), parameter.grad

    keep = KeepGradients(gradients)
    trainer.add_callback(keep)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return list(trainer._logs["advantages"]), losses, keep.steps


@pytest.mark.parametrize("num_iterations", [1, 2])
@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_advantages_losses_and_gradients_equal(
    tmp_path: Path, loss_type: str, beta: float, num_iterations: int
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    options = {"loss_type": loss_type, "beta": beta, "num_iterations": num_iterations, "max_steps": num_iterations}
    records, losses, gradients = run_ours(checkpoint, tmp_path / "ours", tmp_path / "adapter", options)
    trl_advantages, trl_losses, trl_gradients = run_trl(
        checkpoint, tmp_path / "trl", tmp_path / "adapter", options, records
    )

    assert [record.advantage for record in records] == trl_advantages
    assert losses == pytest.approx(trl_losses, abs=1e-5)
    assert len(gradients) == len(trl_gradients) == num_iterations
    for ours, theirs in zip(gradients, trl_gradients, strict=True):
        assert ours.keys() == theirs.keys()
        assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
