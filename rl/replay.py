"""Does a past step of a run again, from its rollouts and the checkpoint before it, and compares with what was kept."""

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..rollout.records import RolloutRecord, read_records, rollout_path
from ..weightshare.adapter import ADAPTER_FILE
from ..weightshare.guard import ParityError
from . import checkpoint
from .findings import Checks, Finding
from .trainer import PENDING_FILE, GRPOTrainer

OPTIMIZER_FILE = "optimizer.pt"
FOLLOWS_EVALUATIONS = ("reduce_lr_on_plateau", "greedy")  # schedulers


def replay(
    trainer: GRPOTrainer, step: int, *, no_rewards: str | None = None, generate: bool = False, tolerance: float = 0.0
) -> list[Finding]:
    """Do `step` of a run again and compare everything that was kept of it. Nothing is written.

    The updates since the newest checkpoint before it are done again with the recorded rollouts. Of the step itself are
    compared: the prompts, the texts, rewards, advantages and old log-probs; after its update the logged values and the
    adapter.

    Args:
        trainer: made with the arguments of the run, `output_dir` among them, and not trained; its adapter, optimizer
            and state are used up.
        step: an optimizer step of the run, from 1.
        no_rewards: why the reward functions are not to be called again. They get what they got in the run, but random
            generators are not put back.
        generate: let the engine sample the step's rollouts again.
        tolerance: the largest relative difference of two numbers that does not count. With 0 they must be equal in
            every bit: that takes the same versions, the same kind of machine, and kernels that are deterministic.

    Returns:
        The findings, in the order in which a step goes; an early difference usually explains those after it.

    Raises:
        ValueError: there is no such run or step, or what it would start from is missing.
    """
    _check_step(trainer, step)
    directory, updates = trainer.output_dir, trainer.args.updates_per_generation
    first = _first_of_generation(step, updates)
    checks = Checks(trainer, _read_records(directory, first), first, tolerance)
    start, findings = _find_start(directory, first if generate else step)
    again = _Again(trainer, start)
    _check_scheduler(trainer, step, again.done, start.name)
    trainer.engine.sleep()
    findings += [checks.prompts(), checks.texts()]
    trainer.state.global_step = first - 1  # what reward functions saw
    score_again = no_rewards is None and trainer.collector.scores_rollouts and generate
    if no_rewards is None and trainer.collector.scores_rollouts:
        no_rewards = "they depend on more than what is recorded: sample the rollouts again (--generate)"
    if not score_again:
        findings.append(checks.rewards() if no_rewards is None else Finding("rewards", "unchecked", no_rewards))
    if trainer.args.kl_in_reward:
        findings.append(checks.kl())
    findings.append(checks.advantages())
    if trainer.learner.recomputes_old and again.done >= first:
        findings.append(Finding("old log-probs", "unchecked", f"they are from before {start.name}"))
    try:
        figures: dict[str, float] = {}
        for number in range(again.done + 1, step + 1):
            again.adopt(number)
            if number == first:
                findings += [checks.generation()] if generate else []
                findings += [checks.rewards()] if score_again else []
                findings += [checks.old_logprobs()] if trainer.learner.recomputes_old else []
            figures = again.update(number)
    except (ParityError, FloatingPointError) as error:
        return [*findings, Finding("update", "different", str(error))]
    findings += checks.log(again.log.get(step), figures)
    findings += checks.adapter(directory / f"{checkpoint.PREFIX}{step}")
    return findings


def _check_step(trainer: GRPOTrainer, step: int) -> None:
    """Raise ValueError where the trainer's output directory has no run, or the run no such step."""
    directory = trainer.output_dir
    if not (directory / checkpoint.ROLLOUTS).is_dir():
        raise ValueError(f"there is no run in {directory}: it has no {checkpoint.ROLLOUTS}/")
    if not 1 <= step <= trainer.total_steps():
        raise ValueError(f"step {step}: the run in {directory} has steps 1 to {trainer.total_steps()}")


def _check_scheduler(trainer: GRPOTrainer, step: int, done: int, start: str) -> None:
    """Raise ValueError where the learning rate of `step` hangs on evaluations after the `done` steps of `start`."""
    kind = trainer.args.lr_scheduler_type
    if kind in FOLLOWS_EVALUATIONS and step - done > 1:
        raise ValueError(
            f"lr_scheduler_type={str(kind)!r} follows the evaluations, which are not done again: step {step} cannot be "
            f"replayed from {start}, only the first after a checkpoint"
        )


class _Again:
    """The updates of a run, done again from `start`.

    Attributes:
        done: the last step that was done.
        log: the run's log, the entries of training, by step.
    """

    def __init__(self, trainer: GRPOTrainer, start: Path):
        self.trainer, self.log = trainer, _read_log(trainer.output_dir)
        trainer.adapter.load(start)
        trainer.engine.adapter_changed()
        total = trainer.total_steps()
        trainer.create_optimizer()
        trainer.create_scheduler(num_training_steps=total)
        trainer.policy.train()
        self.done = 0
        trainer.state = TrainerState(max_steps=total)
        if start.name == checkpoint.INITIAL:
            return
        self.done = checkpoint.step_of(start)
        trainer.state = TrainerState.load_from_json(str(start / checkpoint.STATE))
        trainer._load_optimizer_and_scheduler(str(start))
        if (start / PENDING_FILE).is_file():
            trainer.metrics.load_state(json.loads((start / PENDING_FILE).read_text()))

    def adopt(self, step: int) -> None:
        """Make the recorded rollouts of `step` those to be trained on, where they are not."""
        first = _first_of_generation(step, self.trainer.args.updates_per_generation)
        if step in (first, self.done + 1):
            records = _read_records(self.trainer.output_dir, first)
            self.trainer.adopt([record for record in records if record.used])
        self.trainer.state.global_step = step - 1

    def update(self, step: int) -> dict[str, float]:
        """One optimizer step, in the order in which `Trainer` goes. Returns what there was to log."""
        trainer, args = self.trainer, self.trainer.args
        update = step - _first_of_generation(step, args.updates_per_generation)
        loss = trainer.learner.accumulate(trainer.minibatch(update), step, first_update=update == 0)
        trainer.metrics.add("loss", loss.item())
        limit = args.max_grad_norm if args.max_grad_norm > 0 else math.inf
        norm = trainer.accelerator.clip_grad_norm_(trainer.policy.parameters(), limit)
        assert trainer.optimizer is not None and trainer.lr_scheduler is not None and norm is not None
        trainer.optimizer.step()
        figures = {"grad_norm": float(norm), "learning_rate": float(trainer.optimizer.param_groups[0]["lr"])}
        if args.lr_scheduler_type not in FOLLOWS_EVALUATIONS:
            trainer.lr_scheduler.step()
        trainer.policy.zero_grad()
        trainer.state.global_step = step
        # Values are averaged from one entry of the log to the next.
        return figures | trainer.metrics.drain() if step in self.log else figures


def _first_of_generation(step: int, updates: int) -> int:
    return step - (step - 1) % updates


def _read_records(directory: Path, first: int) -> list[RolloutRecord]:
    """The rollouts of the generation that begins at step `first`, those thrown away included."""
    path = rollout_path(directory / checkpoint.ROLLOUTS, first)
    if not path.is_file():
        recorded = sorted(path.parent.glob("step_*.parquet"))
        newest = f"the newest are {recorded[-1].name}" if recorded else "there are none at all"
        raise ValueError(f"the rollouts of step {first} are missing: there is no {path}; {newest}")
    return read_records(path)


def _find_start(directory: Path, before: int) -> tuple[Path, list[Finding]]:
    """The newest whole checkpoint of a step before `before`, else the initial adapter; and damage found on the way."""
    damaged = []
    for path in reversed(checkpoint.checkpoints(directory)):
        if checkpoint.step_of(path) >= before or not (path / checkpoint.MANIFEST).is_file():
            continue
        damage = checkpoint.find_damage(path)
        if damage is not None:
            damaged.append(Finding(path.name, "different", f"{damage}; an older one was taken to start from"))
        elif (path / OPTIMIZER_FILE).is_file():  # not there with save_only_model
            return path, [*damaged, Finding("start", "same", path.name)]
    initial = directory / checkpoint.INITIAL
    if not (initial / ADAPTER_FILE).is_file():
        reasons = "".join(f"; {found.what}: {found.text}" for found in damaged)
        raise ValueError(
            f"nothing to start from: {directory} has no whole checkpoint of a step before {before}, and no "
            f"{checkpoint.INITIAL}/{reasons}"
        )
    return initial, [*damaged, Finding("start", "same", initial.name)]


def _read_log(directory: Path) -> dict[int, dict[str, Any]]:
    """What was logged of training, by step: of the whole run where it has ended, else up to its newest checkpoint."""
    states = [directory / checkpoint.STATE]
    states += [path / checkpoint.STATE for path in reversed(checkpoint.checkpoints(directory))]
    newest = next((path for path in states if path.is_file()), None)
    history = json.loads(newest.read_text())["log_history"] if newest else []
    return {entry["step"]: entry for entry in history if "grad_norm" in entry}
