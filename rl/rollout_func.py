"""Rollouts made by a function of the user's, by TRL's contract."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

from transformers import TrainerState

from ..rollout.conversation import Task
from ..rollout.engine import SamplingParams, sample_seed
from ..rollout.trajectory import FinishReason, Segment, Trajectory
from .collect import Collector, Round
from .data import Row

if TYPE_CHECKING:
    from .trainer import GRPOTrainer

RolloutFunction = Callable[[list[Any], "GRPOTrainer"], Mapping[str, Any]]
REQUIRED = ("prompt_ids", "completion_ids", "logprobs")
MASK = "env_mask"


class RolloutFuncCollector(Collector):
    """A collector whose rollouts are made by `rollout_func(prompts, trainer) -> dict`.

    The function gets the prompts as the dataset has them, each `num_generations` times, and returns lists with an
    element for each: `prompt_ids`, `completion_ids` and `logprobs` (a number a token; those of tokens that were not
    sampled do not count), and maybe `env_mask` (1 for each token the model sampled, 0 for others, which are not
    trained). Everything else it returns goes to the reward functions as columns. `trainer.engine` is the
    `RolloutEngine`, awake; `rollout.engine.generate` is its plain use.

    Args:
        base: what it collects with otherwise.
        rollout_func: the function.
        trainer: passed to it.
    """

    scores_rollouts = True  # of which nobody knows what they depend on

    def __init__(self, base: Collector, rollout_func: RolloutFunction, trainer: "GRPOTrainer"):
        super().__init__(
            base.engine, base.tokenizer, base.tokenize, base.rewards, base.config, base.stop_token_ids, base.report
        )
        self.rollout_func, self.trainer = rollout_func, trainer
        self.rollouts = self._steps
        self._made: dict[str, Trajectory] = {}  # by request id
        self._late: dict[str, dict[str, Any]] = {}  # what else was returned, by request id
        self._names: list[str] = []  # of that

    def _round(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int, state: TrainerState
    ) -> Round:
        # Called first: the columns that it returns have to be known before anything can be scored.
        started = time.perf_counter()
        self._make(self.requests(rows, first_slot, step, num_generations))
        seconds = time.perf_counter() - started
        finished = super()._round(rows, first_slot, step, num_generations, state)
        finished.rollout_seconds += seconds
        return finished

    def requests(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int
    ) -> Sequence[Task]:
        """What the function is asked for: each row's prompt `num_generations` times."""
        sampling = SamplingParams(self.config.completion_limit, self.config.temperature, self.stop_token_ids)
        return [
            Task(
                request_id=f"{step}/{slot}/{sample}",
                messages=row["prompt"],
                row=row,
                sampling=sampling,
                seeds=partial(sample_seed, self.config.seed, step, slot, sample),
                where=f"dataset row {index}",
            )
            for slot, (index, row) in enumerate(rows, start=first_slot)
            for sample in range(num_generations)
        ]

    def _steps(self, tasks: Sequence[Task]) -> Iterator[list[Trajectory]]:
        if any(task.request_id not in self._made for task in tasks):
            self._make(tasks)
        yield [self._made[task.request_id] for task in tasks]

    def _make(self, tasks: Sequence[Task]) -> None:
        """Call the function, and keep what it returns."""
        output = self.rollout_func([task.messages for task in tasks], self.trainer)
        missing = [name for name in REQUIRED if name not in output]
        if missing:
            raise ValueError(
                f"rollout_func returned no {', no '.join(missing)}; it has to return {', '.join(REQUIRED)}"
            )
        for name, values in output.items():
            if isinstance(values, list) and len(values) != len(tasks):
                raise ValueError(
                    f"rollout_func returned {len(values)} {name} for {len(tasks)} prompts; it gets each prompt "
                    "num_generations times and returns one of each for every one of them"
                )
        masks = output.get(MASK) or [None] * len(tasks)
        self._names = [name for name in output if name not in (*REQUIRED, MASK)]
        self._made.clear()
        self._late.clear()
        for place, task in enumerate(tasks):
            prompt_ids, completion_ids, logprobs = (output[name][place] for name in REQUIRED)
            self._made[task.request_id] = self._trajectory(task, prompt_ids, completion_ids, logprobs, masks[place])
            values = {name: output[name] for name in self._names}
            self._late[task.request_id] = {n: v[place] if isinstance(v, list) else v for n, v in values.items()}

    def _trajectory(
        self,
        task: Task,
        prompt_ids: Sequence[int],
        completion_ids: Sequence[int],
        logprobs: Sequence[Any],
        mask: Sequence[int] | None,
    ) -> Trajectory:
        mask = [1] * len(completion_ids) if mask is None else mask
        lengths = {"completion_ids": len(completion_ids), "logprobs": len(logprobs), MASK: len(mask)}
        if len(set(lengths.values())) > 1 or not completion_ids or not prompt_ids:
            raise ValueError(
                f"{task.where}: rollout_func returned {len(prompt_ids)} prompt_ids and {lengths}: there has to be a "
                "prompt, and a completion with a log-prob for each of its tokens (0.0 for those not sampled)"
            )
        segments = []
        for sampled, group in groupby(range(len(completion_ids)), key=lambda index: bool(mask[index])):
            places = list(group)
            ids = [int(completion_ids[index]) for index in places]
            values = [_first(logprobs[index]) for index in places]
            segments.append(Segment(ids, "model", values) if sampled else Segment(ids, "environment"))
        ended: FinishReason = "stop" if completion_ids[-1] in self.stop_token_ids else "length"
        return Trajectory(task.request_id, list(prompt_ids), segments, ended, task.seed)

    def _columns(self, rows: list[Row]) -> dict[str, list[Any]]:
        return super()._columns(rows) | {name: [None] * len(rows) for name in self._names}

    def late_columns(self, trajectory: Trajectory) -> dict[str, Any]:
        """What the function returned besides the tokens."""
        return self._late[trajectory.request_id]


def _first(logprob: Any) -> float:
    """A token's log-prob, as a number or, as vLLM's clients give it, first in a list of those of likely tokens."""
    return float(logprob[0] if isinstance(logprob, Sequence) else logprob)
