"""Rollouts made by a function of the user's, by TRL's contract."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
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

    def _steps(self, tasks: Sequence[Task]) -> Generator[list[Trajectory], None, None]:
        if any(task.request_id not in self._made for task in tasks):
            self._make(tasks)
        yield [self._made[task.request_id] for task in tasks]

    def _make(self, tasks: Sequence[Task]) -> None:
        """Call the function, and keep what it returns."""
        output = self.rollout_func([task.messages for task in tasks], self.trainer)
        if not isinstance(output, Mapping):
            raise ValueError(
                f"rollout_func returned {output!r:.100}; it has to return a dict with {', '.join(REQUIRED)}"
            )
        missing = [name for name in REQUIRED if output.get(name) is None]
        if missing:
            raise ValueError(
                f"rollout_func returned no {', no '.join(missing)}; it has to return {', '.join(REQUIRED)}"
            )
        for name, values in output.items():
            each = isinstance(values, list) or (name in (*REQUIRED, MASK) and values is not None)
            if each and len(values) != len(tasks):
                raise ValueError(
                    f"rollout_func returned {len(values)} {name} for {len(tasks)} prompts; it gets each prompt "
                    "num_generations times and returns one of each for every one of them"
                )
        masks = [None] * len(tasks) if output.get(MASK) is None else output[MASK]
        self._names = [name for name in output if name not in (*REQUIRED, MASK)]
        self._made.clear()
        self._late.clear()
        for place, task in enumerate(tasks):
            try:
                prompt_ids, completion_ids, logprobs = (_plain(output[name][place]) for name in REQUIRED)
                mask = [1] * len(completion_ids) if masks[place] is None else _plain(masks[place])
                self._made[task.request_id] = self._trajectory(task, prompt_ids, completion_ids, logprobs, mask)
            except (TypeError, IndexError) as error:
                raise ValueError(
                    f"{task.where}: {', '.join((*REQUIRED, MASK))} of rollout_func are lists with a list of numbers "
                    f"for each completion: {error}"
                ) from error
            values = {name: output[name] for name in self._names}
            self._late[task.request_id] = {n: v[place] if isinstance(v, list) else v for n, v in values.items()}

    def _trajectory(
        self,
        task: Task,
        prompt_ids: list[int],
        completion_ids: list[int],
        logprobs: list[Any],
        mask: list[Any],
    ) -> Trajectory:
        lengths = {"completion_ids": len(completion_ids), "logprobs": len(logprobs), MASK: len(mask)}
        if len(set(lengths.values())) > 1 or not completion_ids or not prompt_ids:
            raise ValueError(
                f"{task.where}: rollout_func returned {len(prompt_ids)} prompt_ids and {lengths}: there has to be a "
                "prompt, and a completion with a log-prob for each of its tokens (0.0 for those not sampled)"
            )
        tokens, most = len(prompt_ids) + len(completion_ids), self.engine.max_context
        if tokens > most:
            raise ValueError(
                f"{task.where}: rollout_func returned {tokens} tokens, with the prompt, at most {most} fit; let it "
                "make shorter ones, or raise max_context"
            )
        vocabulary = self.trainer.policy.config.vocab_size
        unknown = [token for token in (*prompt_ids, *completion_ids) if not 0 <= token < vocabulary]
        if unknown:
            raise ValueError(
                f"{task.where}: rollout_func returned the token {unknown[0]!r}, the model has 0 to {vocabulary - 1}"
            )
        segments = []
        for sampled, group in groupby(range(len(completion_ids)), key=lambda index: bool(mask[index])):
            places = list(group)
            ids = [int(completion_ids[index]) for index in places]
            if sampled:
                segments.append(Segment(ids, "model", [_first(logprobs[index]) for index in places]))
            else:
                segments.append(Segment(ids, "environment"))
        ended: FinishReason = "stop" if completion_ids[-1] in self.stop_token_ids else "length"
        return Trajectory(task.request_id, prompt_ids, segments, ended, task.seed)

    def _columns(self, rows: list[Row]) -> dict[str, list[Any]]:
        return super()._columns(rows) | {name: [None] * len(rows) for name in self._names}

    def late_columns(self, trajectory: Trajectory) -> dict[str, Any]:
        """What the function returned besides the tokens."""
        return self._late[trajectory.request_id]


def _plain(values: Any) -> list[Any]:
    """A list, also of a tensor or an array."""
    return list(values.tolist() if hasattr(values, "tolist") else values)


def _first(logprob: Any) -> float:
    """A token's log-prob, as a number or, as vLLM's clients give it, first in a list of those of likely tokens."""
    return float(logprob[0] if isinstance(logprob, Sequence) else logprob)
