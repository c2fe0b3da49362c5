"""Advantages are bit for bit those of TRL's GRPO and RLOO trainers, whatever these generate and score."""

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from colora.rl.advantages import compute_advantages
from datasets import Dataset

from ..tiny_runs import tiny_checkpoint

GROUP = 4


def threes(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    return [None if i % 4 == 1 else 0.1 * sum(t % 3 == 0 for t in ids) for i, ids in enumerate(completion_ids)]


def length(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """The second group has equal rewards, the third a single one."""
    return [0.3 if 4 <= i < 8 else None if i in (8, 9, 10) else len(ids) / 7 for i, ids in enumerate(completion_ids)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def trl_step(kind: str, model: str, output: Path, rewards: list, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """(rewards (completions, functions), advantages) of one step of a trainer of TRL's."""
    config, trainer_class = (trl.GRPOConfig, trl.GRPOTrainer) if kind == "GRPO" else (trl.RLOOConfig, trl.RLOOTrainer)
    args = config(
        str(output), per_device_train_batch_size=4 * GROUP, num_generations=GROUP, max_completion_length=8,
        max_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, disable_tqdm=True, beta=0.0,
        gradient_checkpointing=False, **options,
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["12+34=", "5+6=", "70+8=", "99+1="]})
    trainer = trainer_class(model, reward_funcs=rewards, args=args, train_dataset=rows)
    trainer.train()
    columns = [list(trainer._logs["rewards"][function.__name__]) for function in rewards]
    values = [[torch.nan if value is None else value for value in column] for column in columns]
    return torch.tensor(values).T, torch.tensor(list(trainer._logs["advantages"]))


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_grpo_of_weighted_rewards(model: str, tmp_path: Path, scale: str) -> None:
    values, expected = trl_step(
        "GRPO", model, tmp_path / "run", [threes, length], reward_weights=[1.0, 0.7], scale_rewards=scale
    )
    assert torch.isnan(values).any() and (expected != 0).any()
    assert torch.equal(compute_advantages(values, torch.tensor([1.0, 0.7]), GROUP, scale).advantages, expected)


def test_gdpo(model: str, tmp_path: Path) -> None:
    options = {"reward_weights": [1.0, 0.7], "multi_objective_aggregation": "normalize_then_sum"}
    values, expected = trl_step("GRPO", model, tmp_path / "run", [threes, length], **options)
    ours = compute_advantages(values, torch.tensor([1.0, 0.7]), GROUP, aggregation="normalize_then_sum")
    assert torch.equal(ours.advantages, expected)


@pytest.mark.parametrize(("normalized", "scale"), [(False, "none"), (True, "batch")])
def test_rloo(model: str, tmp_path: Path, normalized: bool, scale: str) -> None:
    values, expected = trl_step("RLOO", model, tmp_path / "run", [threes], normalize_advantages=normalized)
    assert torch.isnan(values).any() and (expected != 0).any()
    assert torch.equal(compute_advantages(values, torch.ones(1), GROUP, scale, estimator="rloo").advantages, expected)
