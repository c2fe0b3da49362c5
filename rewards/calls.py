"""One call of one reward function: which arguments it gets, what it may log, and what it may return.

The contract is TRL's: `func(prompts, completions, completion_ids, trainer_state, log_extra, log_metric, **columns)`,
all by keyword, returning one number or None per completion. Nothing in here depends on where the call runs.
"""

import difflib
import functools
import inspect
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from .call_log import CallLog, shorten

STANDARD_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
# Dataset columns that the contract already carries under another (or the same) name; TRL leaves them out too.
CARRIED_COLUMNS = ("prompt", "completion", "completion_ids")
ENVIRONMENTS = "environments"  # an argument whose values stay in this process
EMPTY: Mapping[str, Any] = MappingProxyType({})
SKIP_REMEDY = "Return a finite number, or None to skip the sample."
CHUNK = 4  # samples a call, more to keep a prompt's completions together: few enough to lose little with a bad one
LARGEST_REWARD = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class RewardBatch:
    """The samples that one call scores: equally long lists, one element per completion."""

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Any]
    columns: dict[str, list]
    trainer_state: Any = None

    def __post_init__(self) -> None:
        reserved = sorted(set(self.columns) & set(STANDARD_ARGUMENTS) - {"completion_ids"})
        if reserved:
            raise ValueError(
                f"dataset column(s) {reserved} have the name of an argument that every reward function gets; "
                "rename them, for example with `dataset.rename_column`"
            )
        lengths = {"prompts": len(self.prompts), "completions": len(self.completions)}
        lengths["completion_ids"] = len(self.completion_ids)
        lengths |= {f"column {name!r}": len(values) for name, values in self.columns.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"a batch to score needs one element per completion everywhere, got lengths {lengths}")

    def __len__(self) -> int:
        return len(self.completions)

    def put(
        self, index: int, completion: Any, completion_ids: Any, prompt: Any = None, columns: Mapping[str, Any] = EMPTY
    ) -> None:
        """Fill a place of a batch that was made with lists; a prompt of None stays as it is."""
        assert isinstance(self.completions, list) and isinstance(self.completion_ids, list)
        self.completions[index], self.completion_ids[index] = completion, completion_ids
        if prompt is not None:
            assert isinstance(self.prompts, list)
            self.prompts[index] = prompt
        for name, value in columns.items():
            self.columns[name][index] = value

    def sample(self, index: int) -> "RewardBatch":
        """The batch that holds only sample `index`."""
        return self.part(range(index, index + 1))

    def part(self, indices: range) -> "RewardBatch":
        """The batch that holds only the samples `indices`."""

        def take(values: Sequence[Any]) -> list:
            return [values[index] for index in indices]

        columns = {name: take(values) for name, values in self.columns.items()}
        parts = take(self.prompts), take(self.completions), take(self.completion_ids)
        return RewardBatch(*parts, columns, self.trainer_state)

    def arguments(self, log: CallLog) -> dict[str, Any]:
        """Every keyword argument of the contract for this batch."""
        # Lists and messages of its own for each call and each sample: a function that sorts, pops or appends in place
        # disturbs no other one, nor the next sample of the same prompt, nor what is recorded.
        columns = {name: _own_list(values) for name, values in self.columns.items() if name not in CARRIED_COLUMNS}
        return columns | {
            "prompts": _own_list(self.prompts),
            "completions": _own_list(self.completions),
            "completion_ids": [list(ids) if isinstance(ids, list) else ids for ids in self.completion_ids],
            "trainer_state": self.trainer_state,
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }


def _own_list(values: Sequence[Any]) -> list[Any]:
    return [_own(value) for value in values]


def _own(value: Any) -> Any:
    """A copy of lists and dicts, such as messages, however deep; other objects, such as environments, as they are."""
    if type(value) is dict:
        return {key: _own(item) for key, item in value.items()}
    return _own_list(value) if type(value) is list else value


REMEDIES = {  # of a call that went over a limit, by the kind of its problem
    "timeout": "Make the function faster, or raise the time limit.",
    "memory": "Make the function use less, or raise the memory limit.",
    "died": "See what the function runs that ends its process.",
}


@dataclass(frozen=True)
class Problem:
    """What was wrong with a call, for one sample or (`sample` None) for the whole of it.

    `kind` is "error", or how its worker process was lost: "timeout", "memory" or "died".
    """

    reason: str
    remedy: str
    sample: int | None = None
    cause: BaseException | None = None
    kind: str = "error"


def raised_reason(error: BaseException | None) -> str:
    """That a function raised it, for a `Problem`; many errors, such as MemoryError, say nothing themselves."""
    return f"it raised {type(error).__name__}" + (f": {error}" if str(error) else "")


@dataclass
class CallOutcome:
    """What came of one call: `values` has one number or None per sample; `raised` is what it raised, if so."""

    values: list[float | None]
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    seconds: float = 0.0
    raised: BaseException | None = None

    def put(self, chunk: range, part: "CallOutcome") -> None:
        """Put what a call on the samples `chunk` gave in their place; what was wrong with all of it is each one's."""
        size = len(self.values)
        for offset, index in enumerate(chunk):
            self.values[index] = part.values[offset]
            for column, values in part.extra.items():
                self.extra.setdefault(column, [None] * size)[index] = values[offset]
        for name, numbers in part.metrics.items():
            self.metrics.setdefault(name, []).extend(numbers)
        for problem in part.problems:
            samples = chunk if problem.sample is None else [chunk[problem.sample]]
            if problem.sample is None and len(chunk) == size > 1:
                self.problems.append(problem)
            else:
                self.problems += [replace(problem, sample=index) for index in samples]
        self.seconds += part.seconds


class RewardFunction:
    """A reward function with its name and the arguments it takes.

    Raises:
        TypeError: not callable, a bare `nn.Module`, or a parameter that cannot be given by keyword.
    """

    def __init__(self, func: Callable, name: str):
        self.func, self.name = func, name
        if isinstance(func, torch.nn.Module) or not callable(func):
            raise TypeError(
                f"reward function {shorten(func, 80)} is a {type(func).__name__}, not a function. "
                "A reward model goes through `colora.rewards.model.RewardModel(model, tokenizer)`, "
                "a text such as 'my.py:function' through `colora.rewards.loading.load_reward`."
            )
        inner = inner_function(func)
        self.takes_all = bool(getattr(inner, "in_process", False))  # all completions, in one call, in this process
        self.is_async = inspect.iscoroutinefunction(inner) or inspect.iscoroutinefunction(type(inner).__call__)
        self._parameters = self._read_parameters()

    def _read_parameters(self) -> list[inspect.Parameter]:
        try:
            parameters = list(inspect.signature(self.func).parameters.values())
        except ValueError:  # some built-in and extension functions have no signature: they get everything
            return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]
        for parameter in parameters:
            if parameter.kind is parameter.POSITIONAL_ONLY and parameter.default is parameter.empty:
                raise TypeError(
                    f"reward function {self.name!r} takes `{parameter.name}` by position only, but reward functions "
                    "are called with keyword arguments; remove the `/` from its signature"
                )
        by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        return [parameter for parameter in parameters if parameter.kind not in by_position]

    def missing(self, columns: Collection[str]) -> str | None:
        """A message about required parameters that neither the contract nor the dataset's `columns` give, else None."""
        columns = sorted(set(columns) - set(CARRIED_COLUMNS))
        known = [*STANDARD_ARGUMENTS, *columns]
        named = [p for p in self._parameters if p.kind is not p.VAR_KEYWORD and p.default is p.empty]
        missing = [parameter.name for parameter in named if parameter.name not in known]
        if not missing:
            return None
        near = [match for name in missing for match in difflib.get_close_matches(name, known, n=1)]
        return (
            f"reward function {self.name!r} requires {missing}, which the dataset does not have. "
            + (f"Did you mean {near}? " if near else "")
            + f"Its columns are {columns}; besides them there are {list(STANDARD_ARGUMENTS)}. "
            "Add the column, or give the parameter a default."
        )

    def requires(self, name: str) -> bool:
        """Whether the function names an argument, rather than taking what there is."""
        return any(
            parameter.name == name and parameter.kind is not parameter.VAR_KEYWORD for parameter in self._parameters
        )

    def select(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of `arguments` that the function takes: all of them if it has **kwargs, else the ones it names."""
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in self._parameters):
            return arguments
        names = {parameter.name for parameter in self._parameters}
        return {name: value for name, value in arguments.items() if name in names}


def inner_function(func: Callable) -> Callable:
    """What is inside of `functools.partial`."""
    while isinstance(func, functools.partial):
        func = func.func
    return func


def unique_names(functions: Sequence[Callable]) -> list[str]:
    """Display names: `__name__` (through `functools.partial`), else the class name; the second of a name gets `_2`."""
    names: list[str] = []
    for function in functions:
        inner = inner_function(function)
        base = name = getattr(inner, "__name__", type(inner).__name__)
        count = 1
        while name in names:
            count += 1
            name = f"{base}_{count}"
        names.append(name)
    return names


def cut(prompts: Sequence[Any]) -> list[range]:
    """Consecutive samples for a call each, cut only where the prompt changes."""
    starts = [0]
    for index in range(1, len(prompts)):
        if index - starts[-1] >= CHUNK and prompts[index] != prompts[index - 1]:
            starts.append(index)
    return [range(*ends) for ends in zip(starts, [*starts[1:], len(prompts)], strict=True)]


def read_result(returned: Any, log: CallLog, size: int) -> CallOutcome:
    """Check what a function returned and logged for `size` samples. Bad samples become None with a `Problem` each."""
    outcome = CallOutcome([None] * size, metrics=log.metrics)
    for column, values in log.extra.items():
        if len(values) == size:
            outcome.extra[column] = [_plain(value) for value in values]
            outcome.problems += _unwritable(column, outcome.extra[column])
            continue
        reason = f"it logged {len(values)} values for the extra column {column!r} where there are {size} completions"
        outcome.problems.append(Problem(reason, "Give log_extra one value per completion."))
    problem = _container_problem(returned, size)
    if problem is not None:
        outcome.problems.append(problem)
        return outcome
    elements = returned.tolist() if isinstance(returned, torch.Tensor | np.ndarray) else returned
    for index, element in enumerate(elements):
        outcome.values[index], fault = _read_element(element)
        if fault is not None:
            outcome.problems.append(Problem(fault, SKIP_REMEDY, sample=index))
    return outcome


def _plain(value: Any) -> Any:
    """Arrays, tensors and their scalars, however deep, as the lists and numbers that a record can hold."""
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _unwritable(column: str, values: list[Any]) -> list[Problem]:
    """The first value of a logged column that is no JSON, and so cannot be recorded."""
    for index, value in enumerate(values):
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            reason = f"it logged {shorten(value, 80)} for the extra column {column!r}, which is no JSON ({error})"
            return [Problem(reason, "Log texts, numbers, lists and dicts of them.", sample=index)]
    return []


def _container_problem(returned: Any, size: int) -> Problem | None:
    remedy = "Return exactly one number (or None to skip a sample) per completion."
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()  # it will not be awaited: no warning about that on top of the error
        return Problem("it returned a coroutine", "Declare the function itself with `async def`.")
    if isinstance(returned, torch.Tensor | np.ndarray):
        shape = tuple(returned.shape)
        return (
            None if shape == (size,) else Problem(f"it returned an array of shape {shape}, expected {(size,)}", remedy)
        )
    if not isinstance(returned, list | tuple):
        kind = "None" if returned is None else f"a {type(returned).__name__} ({shorten(returned, 80)})"
        return Problem(f"it returned {kind} where a list of {size} rewards was expected", remedy)
    if len(returned) != size:
        return Problem(f"it returned {len(returned)} rewards for {size} completions", remedy)
    return None


def _read_element(element: Any) -> tuple[float | None, str | None]:
    """(the reward or None, what is wrong with it or None)."""
    if element is None:
        return None, None
    if isinstance(element, np.generic) or (isinstance(element, torch.Tensor) and element.ndim == 0):
        element = element.item()
    if isinstance(element, str):
        return None, f"it returned the string {shorten(element, 80)}"
    if not isinstance(element, int | float | Fraction):
        return None, f"it returned a {type(element).__name__} ({shorten(element, 80)})"
    if not -LARGEST_REWARD <= element <= LARGEST_REWARD:  # false for NaN too; exact for integers beyond float
        kind = "an integer" if isinstance(element, int) else str(float(element))
        return None, f"it returned {kind}, which is not a finite float32"
    return float(element), None
