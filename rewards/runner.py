"""Calls reward functions on a batch of completions, checks what they return, and says precisely what went wrong."""

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

from .calls import RewardBatch, RewardFunction, shorten, unique_names
from .in_process import InProcessFunctions
from .pool import PoolLimits
from .pooled import PooledFunctions
from .scoring import FailureRules, FunctionScoring, RewardError, RewardFailure, RewardScores, Scoring

__all__ = ["RewardError", "RewardFailure", "RewardRunner", "RewardScores", "Scoring"]
logger = logging.getLogger(__name__)


class RewardRunner:
    """Runs reward functions, while completions still come in where it can.

    - With `workers`, sync functions run in worker processes where they can (see `PooledFunctions`). A sample on which a
      worker hangs, dies or takes too much memory, twice, is scored NaN with a `RewardFailure`, whatever `on_error` is.
    - Other sync functions run in this process, one after the other on the whole batch, when all of it is there.
    - Async functions run in this process, on the event loop of a thread.

    Workers and async functions get a few samples a call, the completions of a prompt together, as soon as these are
    there. A function with a true attribute `in_process` gets the whole batch in one call, in this process.

    A function that raises on the batch is called again with one sample at a time to find the culprit, so reward
    functions should be free of side effects. `KeyboardInterrupt` and `SystemExit` pass through.

    Args:
        reward_funcs: callables by TRL's contract (see `calls`); at least one.
        weights: one finite number per function; 1.0 each by default. Only kept here: aggregation is the trainer's.
        on_error: "stop" raises `RewardError`; "none" gives the failing samples NaN, records a `RewardFailure` and
            logs a warning. A whole-batch failure (such as a wrong length) makes all samples NaN for that function.
        workers: limits of the worker processes; None runs everything in this process, without limits.
        failure_share: `RewardError` is raised when a function fails on more than this share of a batch, from 0 to 1.
        concurrency: calls of async functions that are under way at once, of all of them together; at least 1.
        async_timeout: seconds of such a call, after which its samples are scored NaN with a `RewardFailure`; None: no
            limit.

    Raises:
        ValueError, TypeError: no functions, weights that do not fit them, or something that is not a reward function.
    """

    def __init__(
        self,
        reward_funcs: Sequence[Callable],
        weights: Sequence[float] | None = None,
        on_error: Literal["stop", "none"] = "stop",
        workers: PoolLimits | None = None,
        failure_share: float = 0.5,
        concurrency: int = 32,
        async_timeout: float | None = None,
    ):
        if not reward_funcs:
            raise ValueError("no reward functions given: `reward_funcs` needs at least one")
        if on_error not in ("stop", "none"):
            raise ValueError(f'on_error must be "stop" or "none", got {on_error!r}')
        self.names = unique_names(reward_funcs)
        self.weights = [1.0] * len(reward_funcs) if weights is None else [float(weight) for weight in weights]
        if len(self.weights) != len(reward_funcs):
            raise ValueError(
                f"{len(self.weights)} reward weights for {len(reward_funcs)} reward functions {self.names}"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward weights must be finite numbers, got {self.weights}")
        self.on_error = on_error
        self._functions = [RewardFunction(func, name) for func, name in zip(reward_funcs, self.names, strict=True)]
        if not 0 <= failure_share <= 1:
            raise ValueError(f"failure_share={failure_share!r} must be a share of the samples, from 0 to 1")
        self._rules = FailureRules(on_error == "stop", failure_share)
        self._pooled = PooledFunctions(self._functions, workers) if workers is not None else None
        self._here = InProcessFunctions(on_error == "stop", concurrency, async_timeout)
        self._warned_all_none = False

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise `ValueError` if a function requires a parameter that a dataset with these columns does not supply."""
        columns = set(columns)
        messages = [message for function in self._functions if (message := function.missing(columns))]
        if messages:
            raise ValueError("\n".join(messages))

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Any],
        columns: dict[str, list],
        trainer_state: Any = None,
        step: int = 0,
    ) -> RewardScores:
        """Score n completions.

        Args:
            prompts, completions: n texts, or n lists of chat messages.
            completion_ids: n lists of token ids.
            columns: the dataset's other columns, n values each ("prompt", "completion", "completion_ids" are left out).
            trainer_state: passed on to the functions.
            step: the training step, for messages.

        Raises:
            ValueError: lists of different lengths, a column with a reserved name, a parameter that nothing supplies.
            RewardError: a function failed and `on_error` is "stop".
        """
        RewardBatch(prompts, completions, completion_ids, columns)  # refuses lists of different lengths
        scoring = self.start(prompts, columns, trainer_state, step)
        try:
            for index, (completion, ids) in enumerate(zip(completions, completion_ids, strict=True)):
                scoring.add(index, completion, ids)
        except BaseException:
            scoring.cancel()
            raise
        return scoring.finish()

    def start(
        self, prompts: Sequence[Any], columns: dict[str, list], trainer_state: Any = None, step: int = 0
    ) -> Scoring:
        """Begin to score n completions that are to come, by `Scoring.add`; the arguments are those of `score`.

        Raises:
            ValueError: a column with a reserved name or the wrong length, a parameter that nothing supplies.
        """
        batch = RewardBatch(prompts, [None] * len(prompts), [None] * len(prompts), columns, trainer_state)
        self.check_columns(columns)
        functions: dict[str, FunctionScoring] = {}
        for function in self._functions:
            if self._pooled is not None and function.name in self._pooled:
                functions[function.name] = self._pooled.start(function, batch)
            else:
                functions[function.name] = self._here.start(function, batch)
        return Scoring(functions, batch, step, self._rules, self._poll, self._warn)

    def _poll(self) -> None:
        if self._pooled is not None:
            self._pooled.pool.poll()

    def close(self) -> None:
        """End the worker processes and the thread of the async functions. Scoring again starts new ones."""
        if self._pooled is not None:
            self._pooled.pool.close()
        self._here.close()

    def _warn(self, scores: RewardScores, batch: RewardBatch, step: int) -> None:
        for name in self.names:
            failures = [failure for failure in scores.failures if failure.function == name]
            if failures:
                logger.warning(
                    "reward function %r: %d failure(s) on %d completions at step %d, scored as None; the first one: %s",
                    *(name, len(failures), len(batch), step, failures[0].reason),
                )
        unscored = scores.values.isnan().all(dim=1).nonzero().flatten().tolist()
        if unscored and not self._warned_all_none:
            self._warned_all_none = True  # a task may skip rows on purpose: say it once, not every step
            row = batch.sample(unscored[0])
            logger.warning(
                "all reward functions returned None for %d of %d completions at step %d, the first is sample %d "
                "(prompt: %s, completion: %s, columns: %s); such samples carry no signal. This is said once.",
                *(len(unscored), len(batch), step, unscored[0], shorten(row.prompts[0]), shorten(row.completions[0])),
                shorten({name: values[0] for name, values in row.columns.items()}),
            )
