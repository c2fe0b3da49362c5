"""Scoring goes on while the engine decodes: in which order things happen, and what is left when something fails."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from colora import GRPOConfig, GRPOTrainer
from colora.rewards.loading import load_reward
from colora.rl.collect import EVALUATION_STEP
from colora.rl.metrics import Metrics
from colora.rollout.engine import RolloutRequest
from colora.rollout.records import read_records
from colora.rollout.trajectory import Trajectory
from datasets import Dataset
from transformers import TrainerState

from ..rewards.test_pool import children
from ..tiny_runs import tiny_checkpoint

PROMPTS = ["12+34=", "5+6=", "70+8=", "99+1="]
GROUP = 4
REWARD = """
import time
from pathlib import Path

def marks(prompts, completions, folder, log_extra):
    log_extra("scored_at", [time.time()] * len(prompts))
    Path(folder[0], prompts[0]).touch()
    return [float(len(text) % 3) for text in completions]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.fixture
def make(model: str, tmp_path: Path) -> Iterator[Callable[..., GRPOTrainer]]:
    trainers: list[GRPOTrainer] = []

    def trainer(reward: Callable | None = None, **options: object) -> GRPOTrainer:
        (tmp_path / "reward.py").write_text(REWARD)
        defaults: dict = {
            "per_device_train_batch_size": GROUP * len(PROMPTS),
            "num_generations": GROUP,
            "max_completion_length": 10,
            "max_steps": 1,
            "report_to": [],
            "save_strategy": "no",
            "device": "cpu",
            "disable_tqdm": True,
            "reward_workers": 2,
        }
        rows = Dataset.from_dict({"prompt": PROMPTS, "folder": [str(tmp_path)] * len(PROMPTS)})
        function = reward or load_reward(f"{tmp_path / 'reward.py'}:marks")
        config = GRPOConfig(str(tmp_path / "run"), **(defaults | options))
        trainers.append(GRPOTrainer(model, function, config, rows))
        return trainers[-1]

    yield trainer
    for each in trainers:
        each.rewards.close()


def collect(trainer: GRPOTrainer) -> list:
    rows = list(enumerate(trainer.train_dataset))
    with trainer.engine_awake():
        return trainer.collector.collect(rows, EVALUATION_STEP, GROUP, Metrics(), TrainerState()).records


def test_first_scores_come_before_the_last_trajectory(make, tmp_path: Path) -> None:
    trainer = make()
    engine_steps, last_came_at = trainer.collector.rollouts, []

    def held_back(requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]:
        """The engine's trajectories, the last one not before three groups have been scored."""
        finished = [trajectory for step in engine_steps(requests) for trajectory in step]
        last = requests[-1].request_id
        yield [trajectory for trajectory in finished if trajectory.request_id != last]
        prompt_of = {tuple(trainer.collector.tokenize(prompt, "")): prompt for prompt in PROMPTS}
        others = [prompt_of[r.prompt_ids] for r in requests if r.prompt_ids != requests[-1].prompt_ids]
        deadline = time.monotonic() + 120
        while not all((tmp_path / prompt).exists() for prompt in others) and time.monotonic() < deadline:
            time.sleep(0.005)
            yield []
        last_came_at.append(time.time())
        yield [trajectory for trajectory in finished if trajectory.request_id == last]

    trainer.collector.rollouts = held_back
    trainer.train()
    records = read_records(tmp_path / "run" / "rollouts")
    assert [r.trajectory.request_id for r in records] == [f"1/{s}/{i}" for s in range(4) for i in range(GROUP)]
    scored_at = [record.extra["scored_at"] for record in records]
    assert max(scored_at[: 3 * GROUP]) < last_came_at[0] < min(scored_at[3 * GROUP :])
    (log,) = [entry for entry in trainer.state.log_history if "time/reward_s" in entry]
    assert log["time/reward_hidden_s"] > 0 and log["time/rollout_s"] > 0


def test_what_goes_wrong_meanwhile_leaves_the_engine_free(make) -> None:
    trainer = make()
    expected = collect(trainer)
    report = trainer.collector.report

    def fails_in_the_middle(phase: str, done: int, total: int) -> None:
        if 0 < done < total:
            raise BrokenPipeError("nobody reads")

    engine_steps = trainer.collector.rollouts

    def one_by_one(requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]:
        for step in engine_steps(requests):
            yield from ([trajectory] for trajectory in step)

    trainer.collector.rollouts, trainer.collector.report = one_by_one, fails_in_the_middle
    with pytest.raises(BrokenPipeError, match="nobody reads"):
        collect(trainer)
    assert trainer.engine.unfinished == 0
    trainer.collector.report = report
    again = collect(trainer)
    assert [(r.trajectory, r.rewards) for r in again] == [(r.trajectory, r.rewards) for r in expected]


def test_an_interrupted_generation_ends_its_workers(make, tmp_path: Path) -> None:
    before = children()
    trainer = make()
    rollouts = trainer.collector.rollouts

    def interrupted(requests: Sequence[RolloutRequest]) -> Iterator[list[Trajectory]]:
        finished = [trajectory for step in rollouts(requests) for trajectory in step]
        yield finished[:-1]
        raise KeyboardInterrupt

    trainer.collector.rollouts = interrupted
    with pytest.raises(KeyboardInterrupt):
        collect(trainer)
    assert children() <= before
    trainer.collector.rollouts = rollouts
    assert all(record.rewards["marks"] is not None for record in collect(trainer))
