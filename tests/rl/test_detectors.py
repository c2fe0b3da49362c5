"""Each detector warns in a run made to trip it, and none in a run that learns; what they know survives a resume.

The runs train a tiny model for real. Limits are those of every run but for the window: these runs are shorter.
"""

from pathlib import Path
from typing import Any

import pytest
from colora import GRPOConfig, GRPOTrainer
from colora.rl.detector_limits import DetectorLimits
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback

from ..run_files import assert_same_run
from ..tiny_runs import tiny_checkpoint

WINDOW = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def digits(completion_ids, **_):
    """The share of digits among the tokens, to be learned."""
    return [sum(token < 10 for token in ids) / len(ids) for ids in completion_ids]


def rows(sign: float) -> Dataset:
    return Dataset.from_dict({"prompt": [f"{n}+1=" for n in range(7)], "sign": [sign] * 7})


def make(model: str, output: Path, rewards, evaluate_on: Dataset | None = None, callbacks=None, **options: Any):
    defaults = {
        "per_device_train_batch_size": 16, "num_generations": 8, "max_completion_length": 12, "max_steps": 20,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": [],
        "device": "cpu", "detector_limits": {"window": WINDOW},
    }  # fmt: skip
    if evaluate_on is not None:
        defaults |= {"eval_strategy": "steps", "eval_steps": 4, "eval_on_start": True}
    config = GRPOConfig(str(output), **(defaults | options))
    lora = LoraConfig(r=8, lora_alpha=16)
    return GRPOTrainer(model, rewards, config, rows(1.0), evaluate_on, callbacks=callbacks, peft_config=lora)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "colora.rl.detectors"]


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_a_verifier_that_gives_up_is_a_variance_collapse(model: str, tmp_path: Path, caplog, capsys) -> None:
    """As when every call runs into a time limit that the function catches itself: all scores are 0."""

    def gives_up(completion_ids, trainer_state, **_):
        return digits(completion_ids) if trainer_state.global_step < 8 else [0.0] * len(completion_ids)

    trainer = make(model, tmp_path, gives_up)
    trainer.train()
    collapse, signal = warnings(caplog)
    assert "reward variance collapse" in collapse and "at first it was 0%" in collapse
    assert "no signal: 100% of the groups" in signal
    lost = logged(trainer, "detectors/variance_lost")
    assert lost[0] < 0.5 and lost[-1] == 1.0 and logged(trainer, "detectors/warnings")[-1] == 2
    printed = [line for line in capsys.readouterr().out.splitlines() if "warning: " in line]
    assert [line.partition("  warning: ")[2][:6] for line in printed] == ["reward", "no sig"]  # said once, each


def test_a_reward_for_brevity_is_a_length_drift(model: str, tmp_path: Path, caplog) -> None:
    def brief(completion_ids, **_):
        return [-len(ids) for ids in completion_ids]

    trainer = make(model, tmp_path, brief, max_completion_length=24, max_steps=30)
    trainer.train()
    assert any("length drift: completions have" in text for text in warnings(caplog))
    assert logged(trainer, "detectors/length_ratio")[-1] < 0.5


def test_a_reward_for_length_ends_at_the_limit(model: str, tmp_path: Path, caplog) -> None:
    def wordy(completion_ids, **_):
        return [len(ids) for ids in completion_ids]

    trainer = make(model, tmp_path, wordy, max_completion_length=24, max_steps=30)
    trainer.train()
    assert any("end at max_completion_length, at first" in text for text in warnings(caplog))
    assert logged(trainer, "detectors/clipped_rise")[-1] > 0.25


@pytest.mark.parametrize("weights", [[1.0, 100.0], [1.0, 1.0]])
def test_one_reward_that_drowns_another_dominates(model: str, tmp_path: Path, caplog, weights: list[float]) -> None:
    def even(completion_ids, **_):
        return [sum(token % 2 == 0 for token in ids) / len(ids) for ids in completion_ids]

    trainer = make(model, tmp_path, [digits, even], reward_weights=weights, max_steps=WINDOW + 1)
    trainer.train()
    drowned = weights == [1.0, 100.0]
    said = [text.partition(": ")[2].partition(" of")[0] for text in warnings(caplog)]
    assert said == ["one reward dominates: even makes 100%"] * drowned
    assert (logged(trainer, "detectors/dominance")[-1] > 0.95) == drowned


def test_copies_in_a_group_are_duplicates(model: str, tmp_path: Path, caplog) -> None:
    """A policy that samples nearly always the same."""
    trainer = make(model, tmp_path, digits, temperature=0.02, max_completion_length=24, max_steps=WINDOW + 1)
    trainer.train()
    assert any("are copies of another one in their group" in text for text in warnings(caplog))
    assert logged(trainer, "detectors/duplicates")[-1] > 0.5


def test_a_reward_that_does_not_hold_on_held_out_prompts(model: str, tmp_path: Path, caplog) -> None:
    """What is good for the training prompts is bad for the others."""

    def signed(completion_ids, sign, **_):
        return [share * each for share, each in zip(digits(completion_ids), sign, strict=True)]

    trainer = make(model, tmp_path, signed, rows(-1.0))
    trainer.train()
    (text,) = warnings(caplog)
    assert "training reward up, held-out reward down: since step 0 the training reward" in text
    falls = logged(trainer, "eval_detectors/held_out_fall")
    assert falls[0] == 0.0 and falls[-1] > 0.1


def test_a_run_that_learns_is_left_alone(model: str, tmp_path: Path, caplog) -> None:
    trainer = make(model, tmp_path, digits, rows(1.0), max_steps=30)
    trainer.train()
    rewards = logged(trainer, "reward")
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 1
    assert warnings(caplog) == [] and set(logged(trainer, "detectors/warnings")) == {0}
    names = {name for entry in trainer.state.log_history for name in entry if "detectors/" in name}
    assert names >= {"detectors/variance_lost", "detectors/length_ratio", "eval_detectors/held_out_fall"}


def test_they_can_be_switched_off(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path, lambda completions, **_: [0.0] * len(completions), rows(1.0), detectors=False)
    trainer.train()
    assert not [name for entry in trainer.state.log_history for name in entry if "detectors/" in name]


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 13:
            raise Stopped


def test_a_resumed_run_knows_what_it_has_seen_and_said(model: str, tmp_path: Path, caplog) -> None:
    """Bit by bit the same log, although levels reach back over the whole run, and no warning twice."""

    def brief(completion_ids, trainer_state, **_):
        return [(trainer_state.global_step < 7) * len(ids) / 10 for ids in completion_ids]

    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 24, "num_iterations": 2}
    make(model, tmp_path / "whole", brief, rows(-1.0), **options).train()
    said = warnings(caplog)
    assert len(said) > 0
    caplog.clear()
    with pytest.raises(Stopped):
        make(model, tmp_path / "stopped", brief, rows(-1.0), [StopAfter()], **options).train()
    make(model, tmp_path / "stopped", brief, rows(-1.0), **options).train(resume_from_checkpoint=True)
    assert warnings(caplog) == said
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


def test_limits_are_checked() -> None:
    assert DetectorLimits.of({"window": 3, "length_ratio": 4}) == DetectorLimits(window=3, length_ratio=4)
    for values, message in (
        ({"windows": 3}, "unknown 'windows'; the limits are window, variance_lost"),
        ({"window": 2.5}, "window=2.5 must be a whole number above 0"),
        ({"dominance": "high"}, "dominance='high' must be a number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            DetectorLimits.of(values)
