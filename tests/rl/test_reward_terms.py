"""What options add to the rewards: the soft length penalty and the KL, in records, metrics and advantages."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from colora import GRPOConfig, GRPOTrainer
from colora.rl.kl_reward import completion_kl
from colora.rl.overlong import overlong_reward, with_overlong
from colora.rl.policy import Policy
from colora.rl.rating import record_advantages
from colora.rollout.records import RolloutRecord, read_records
from colora.rollout.trajectory import Segment, Trajectory
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from ..oracle import grpo as oracle
from ..tiny_runs import tiny_checkpoint

PROMPTS = ["12+34=", "5+6=", "70+8=", "99+1="]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def threes(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """One in eight is not scored."""
    return [None if i % 8 == 5 else 0.25 * sum(t % 3 == 0 for t in ids) for i, ids in enumerate(completion_ids)]


def run(model: str, output: Path, reward=threes, **options: object) -> tuple[GRPOTrainer, list[RolloutRecord]]:
    defaults: dict = {
        "per_device_train_batch_size": 16,
        "num_generations": 4,
        "max_completion_length": 12,
        "learning_rate": 3e-3,
        "max_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "device": "cpu",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    config = GRPOConfig(str(output), **(defaults | options))
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    trainer = GRPOTrainer(model, reward, config, Dataset.from_dict({"prompt": PROMPTS}), peft_config=lora)
    trainer.train()
    return trainer, read_records(output / "rollouts")


def first_log(trainer: GRPOTrainer) -> dict[str, float]:
    return trainer.state.log_history[0]


@pytest.mark.parametrize(
    ("tokens", "expected"), [(1, 0), (80, 0), (81, -0.05), (90, -0.5), (99, -0.95), (100, -1), (130, -1)]
)
def test_the_soft_penalty_falls_over_the_buffer(tokens: int, expected: float) -> None:
    assert overlong_reward(tokens, 100, 20) == pytest.approx(expected)


def test_overlong_is_a_reward_with_a_weight(model: str, tmp_path: Path) -> None:
    trainer, records = run(model, tmp_path / "run", overlong_buffer=8, overlong_penalty=0.5)
    assert len({record.trajectory.num_sampled for record in records}) > 2
    for record in records:
        expected = overlong_reward(record.trajectory.num_sampled, 12, 8)
        if record.rewards["threes"] is None:  # a penalty is no score by itself
            assert record.rewards["overlong"] is record.reward is None and record.advantage == 0
            continue
        assert record.rewards["overlong"] == pytest.approx(expected)
        assert record.reward == pytest.approx(record.rewards["threes"] + 0.5 * expected)
    check_advantages(records, "group", "group")
    scored = [record.rewards["overlong"] for record in records if record.reward is not None]
    assert first_log(trainer)["rewards/overlong/mean"] == pytest.approx(sum(scored) / len(scored))
    assert first_log(trainer)["reward"] == pytest.approx(
        sum(record.reward for record in records if record.reward is not None) / len(scored)
    )


def test_tokens_of_the_environment_are_not_overlong() -> None:
    said, given = Segment([1] * 8, "model", [-1.0] * 8), Segment([2] * 50, "environment")
    trajectory = Trajectory("a", [1], [said, given])
    assert with_overlong({"solved": 1.0}, trajectory, 10, 4) == {"solved": 1.0, "overlong": -0.5}
    assert with_overlong({"solved": 1.0}, trajectory, 10, 0) == {"solved": 1.0}


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_kl_of_each_completion_is_taken_from_its_reward(model: str, tmp_path: Path, estimator: str) -> None:
    options: dict = {"beta": 0.05, "kl_in_reward": True, "kl_estimator": estimator}
    trainer, records = run(
        model, tmp_path / "run", advantage_estimator="rloo", scale_rewards="none", tokens_per_microbatch=40,
        mask_truncated_completions=True, **options,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    scored = []
    for record in records:
        if record.rewards["threes"] is None:
            assert record.rewards["kl"] is record.reward is None
            continue
        prompt, completion = record.trajectory.prompt_ids, record.trajectory.completion_ids
        with torch.no_grad():
            rows, _ = oracle.logprobs(base, [oracle.Completion(prompt, completion, True)], 1.0)
        d = torch.tensor(record.trajectory.logprobs) - rows[0]
        expected = (d if estimator == "k1" else torch.exp(-d) + d - 1).sum().item()
        assert record.rewards["kl"] == pytest.approx(expected, abs=1e-4)
        assert record.reward == pytest.approx(record.rewards["threes"] - 0.05 * expected, abs=1e-5)
        scored.append(record.rewards["kl"])
    assert max(map(abs, scored)) > 1
    check_advantages(records, "rloo", "none")
    assert first_log(trainer)["rewards/kl/mean"] == pytest.approx(sum(scored) / len(scored))
    without_kl = [record.rewards["threes"] for record in records if record.reward is not None]
    assert first_log(trainer)["reward"] == pytest.approx(sum(without_kl) / len(without_kl))
    assert trainer.learner.objective.beta == 0, "it is not in the loss as well"


def test_reinforce_pp_trains_groups_of_equal_rewards(model: str, tmp_path: Path) -> None:
    def by_prompt(prompts: list[str], **_: object) -> list[float]:
        return [float(len(prompt)) for prompt in prompts]

    def moved(name: str, **options: object) -> float:
        trainer, records = run(model, tmp_path / name, by_prompt, scale_rewards="batch", **options)
        check_advantages(records, str(options.get("advantage_estimator", "group")), "batch")
        return first_log(trainer)["grad_norm"]

    assert moved("group") == 0.0
    assert moved("pp", advantage_estimator="reinforce_pp") > 0.0


def test_several_updates_and_a_resume_use_the_recorded_kl(model: str, tmp_path: Path) -> None:
    options: dict = {
        "beta": 0.05, "kl_in_reward": True, "kl_estimator": "k1", "num_iterations": 2, "save_strategy": "steps",
        "save_steps": 1, "advantage_estimator": "reinforce_pp", "scale_rewards": "batch", "overlong_buffer": 4,
    }  # fmt: skip
    trainer, records = run(model, tmp_path / "run", max_steps=1, **options)
    advantages = record_advantages(records, trainer.collector.weights, 4, trainer.args)
    assert advantages.advantages.tolist() == [record.advantage for record in records]
    whole, _ = run(model, tmp_path / "whole", max_steps=4, lr_scheduler_type="constant", **options)
    between_updates = str(tmp_path / "whole" / "checkpoint-1")
    parts, _ = run(
        model, tmp_path / "parts", max_steps=4, lr_scheduler_type="constant", resume_from_checkpoint=between_updates,
        **options,
    )  # fmt: skip
    for name, value in parts.adapter.named_matrices():
        assert torch.equal(value, dict(whole.adapter.named_matrices())[name])


def test_the_kl_of_the_base_to_itself_is_zero(model: str, tmp_path: Path) -> None:
    trainer, records = run(model, tmp_path / "run")
    with trainer.policy.reference():
        own = [replace(record, trajectory=rescored(record.trajectory, trainer.policy)) for record in records]
    for estimator in ("k1", "k2", "k3"):
        assert max(map(abs, completion_kl(trainer.policy, own, estimator, 1.0, 64))) < 1e-5


def rescored(trajectory: Trajectory, policy: Policy) -> Trajectory:
    """The trajectory as if `policy` had sampled it."""
    tokens = torch.tensor(trajectory.prompt_ids + trajectory.completion_ids)
    rows = torch.arange(len(trajectory.prompt_ids), len(tokens))
    logprobs, _ = policy.logprobs(tokens, [len(tokens)], rows - 1, tokens[rows])
    return replace(trajectory, segments=[Segment(trajectory.completion_ids, "model", logprobs.tolist())])


def check_advantages(records: list[RolloutRecord], estimator: str, scale: str) -> None:
    rewards = torch.tensor([[torch.nan if r.reward is None else r.reward] for r in records], dtype=torch.float64)
    options = oracle.Options(num_generations=4, advantage_estimator=estimator, scale_rewards=scale)
    expected = oracle.advantages(rewards, torch.ones(1), options)
    ours = torch.tensor([record.advantage for record in records], dtype=torch.float64)
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [("overlong", {"overlong_buffer": 4}), ("kl", {"kl_in_reward": True, "beta": 0.1})],
)
def test_a_reward_function_of_the_same_name_is_refused(model: str, tmp_path: Path, name: str, options: dict) -> None:
    def reward(completions, **_: object) -> list[float]:
        return [0.0] * len(completions)

    reward.__name__ = name
    with pytest.raises(ValueError, match=f"a reward function is called '{name}'.*rename it"):
        run(model, tmp_path / "run", reward, **options)
    run(model, tmp_path / "fine", reward)
