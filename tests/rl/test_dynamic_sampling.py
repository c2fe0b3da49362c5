"""Dynamic sampling on a tiny model: which groups are used, with what advantages, and again after a resume."""

import logging
from pathlib import Path

import pytest
import torch
from colora import GRPOConfig, GRPOTrainer
from colora.rl.advantages import compute_advantages
from colora.rollout.engine import sample_seed
from colora.rollout.records import RolloutRecord, read_records
from datasets import Dataset
from peft import LoraConfig

from ..tiny_runs import tiny_checkpoint

PROMPTS = [f"{n}+{m}=" for n in range(5) for m in range(4)]
GROUP, PROMPTS_A_STEP = 4, 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def solved_by_half(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
    """Prompts of an even first number are always solved; the others as often as a token is divisible by three."""
    return [
        1.0 if int(prompt[0]) % 2 == 0 else 0.25 * sum(token % 3 == 0 for token in ids)
        for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


def make(model: str, output: Path, reward=solved_by_half, dataset=None, **options: object) -> GRPOTrainer:
    defaults: dict = {
        "per_device_train_batch_size": GROUP * PROMPTS_A_STEP,
        "num_generations": GROUP,
        "max_completion_length": 10,
        "learning_rate": 3e-3,
        "max_steps": 4,
        "dynamic_sampling": True,
        "report_to": [],
        "save_strategy": "no",
        "device": "cpu",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    rows = Dataset.from_dict({"prompt": PROMPTS}) if dataset is None else dataset
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    return GRPOTrainer(model, reward, GRPOConfig(str(output), **(defaults | options)), rows, peft_config=lora)


def groups_by_step(output: Path) -> list[list[list[RolloutRecord]]]:
    records = read_records(output / "rollouts")
    steps = sorted({record.step for record in records})
    each = [[record for record in records if record.step == step] for step in steps]
    return [[part[i : i + GROUP] for i in range(0, len(part), GROUP)] for part in each]


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def has_spread(group: list[RolloutRecord]) -> bool:
    return len({record.reward for record in group}) > 1


def test_the_batch_is_filled_with_groups_that_have_a_signal(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path / "run")
    trainer.train()
    steps = groups_by_step(tmp_path / "run")
    assert len(steps) == 4
    thrown_away = 0
    for groups in steps:
        for slot, group in enumerate(groups):
            assert [r.trajectory.request_id for r in group] == [f"{group[0].step}/{slot}/{i}" for i in range(GROUP)]
            assert [r.trajectory.seed for r in group] == [sample_seed(42, group[0].step, slot, i) for i in range(GROUP)]
            assert len({r.prompt_index for r in group}) == len({r.used for r in group}) == 1
        assert len({group[0].prompt_index for group in groups}) == len(groups), "other prompts, not the same ones again"
        used = [group for group in groups if group[0].used]
        assert len(used) == PROMPTS_A_STEP and all(has_spread(group) for group in used)
        unused = [record for group in groups if not group[0].used for record in group]
        assert not any(has_spread(group) for group in groups if not group[0].used)
        assert all(record.advantage == 0 and record.reward is not None for record in unused)
        thrown_away += len(unused) // GROUP
    assert thrown_away > 2
    assert sum(logged(trainer, "dynamic_sampling/groups_thrown_away")) == thrown_away
    assert max(logged(trainer, "dynamic_sampling/rounds")) > 1
    assert logged(trainer, "dynamic_sampling/frac_groups_without_signal")[0] == pytest.approx(
        sum(not group[0].used for group in steps[0]) / len(steps[0])
    )
    assert logged(trainer, "frac_groups_without_signal") == [0.0] * 4
    everything = [record.reward for group in steps[0] for record in group]
    assert logged(trainer, "reward")[0] == pytest.approx(sum(everything) / len(everything))


@pytest.mark.parametrize("options", [{"scale_rewards": "batch"}, {"advantage_estimator": "reinforce_pp_baseline"}])
def test_only_used_groups_enter_the_advantages(model: str, tmp_path: Path, options: dict[str, str]) -> None:
    options = {"scale_rewards": "batch"} | options
    make(model, tmp_path / "run", max_steps=1, **options).train()
    used = [record for group in groups_by_step(tmp_path / "run")[0] for record in group if record.used]
    rewards = torch.tensor([[record.rewards["solved_by_half"]] for record in used])
    expected = compute_advantages(
        rewards, torch.ones(1), GROUP, "batch", estimator=options.get("advantage_estimator", "group")
    )
    assert [record.advantage for record in used] == expected.advantages.tolist()


@pytest.mark.parametrize("updates", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(model: str, tmp_path: Path, updates: int) -> None:
    options: dict = {"num_iterations": updates, "save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole = make(model, tmp_path / "whole", **options)
    whole.train()

    def stops_at_step_5(trainer_state, **columns) -> list[float]:
        if trainer_state.global_step >= 4:
            raise InterruptedError("the machine goes down")
        return solved_by_half(**columns)

    stops_at_step_5.__name__ = solved_by_half.__name__
    with pytest.raises(Exception, match="the machine goes down"):
        make(model, tmp_path / "parts", stops_at_step_5, **options).train()
    resumed = make(model, tmp_path / "parts", **options)
    resumed.train(resume_from_checkpoint=True)
    assert read_records(tmp_path / "parts" / "rollouts") == read_records(tmp_path / "whole" / "rollouts")
    for name, value in resumed.adapter.named_matrices():
        assert torch.equal(value, dict(whole.adapter.named_matrices())[name])


def test_at_the_limit_the_batch_is_what_there_is(model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def one_prompt_has_signal(prompts: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        return [
            float(sum(ids)) if prompt == "1+2=" else 1.0 for prompt, ids in zip(prompts, completion_ids, strict=True)
        ]

    rows = Dataset.from_dict({"prompt": ["0+0=", "0+1=", "0+2=", "1+2=", "0+3="]})
    trainer = make(
        model, tmp_path / "run", one_prompt_has_signal, rows, max_steps=1, dynamic_sampling_max_rounds=3,
        shuffle_dataset=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING):
        trainer.train()
    (groups,) = groups_by_step(tmp_path / "run")
    asked = [group[0].prompt for group in groups]
    # Three, then three more (the two others, and one of them again), then as many as are missing.
    assert len(groups) in (7, 8) and asked[:3] == ["0+0=", "0+1=", "0+2="] and set(asked[3:]) == {"1+2=", "0+3="}
    used = [group[0].prompt for group in groups if group[0].used]
    assert len(used) == 3 and "1+2=" in used
    with_signal = sum(has_spread(group) for group in groups)
    assert f"step 1: dynamic sampling found a signal in {with_signal} of {len(groups)} groups in 3" in caplog.text
    assert "3 were wanted" in caplog.text and "dynamic_sampling_max_rounds" in caplog.text
    assert logged(trainer, "dynamic_sampling/rounds") == [3]
    assert logged(trainer, "frac_groups_without_signal") == [pytest.approx(1 - with_signal / 3)]


def test_completions_that_are_not_trained_give_no_signal(model: str, tmp_path: Path) -> None:
    """All are cut off and masked: a spread in their rewards would fill the batch with nothing to learn from."""
    trainer = make(
        model, tmp_path / "run", max_steps=1, max_completion_length=1, mask_truncated_completions=True,
        dynamic_sampling_max_rounds=2, reward=lambda completions, **_: [float(i) for i, _ in enumerate(completions)],
    )  # fmt: skip
    trainer.train()
    assert logged(trainer, "dynamic_sampling/frac_groups_without_signal")[0] > 0.5


def test_streams_are_refused_before_weights_are_loaded(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "model")
    next(directory.glob("*.safetensors")).unlink()
    stream = Dataset.from_dict({"prompt": PROMPTS}).to_iterable_dataset()
    with pytest.raises(ValueError, match="dynamic_sampling=True needs a dataset.*IterableDataset"):
        make(str(directory), tmp_path / "run", dataset=stream)
