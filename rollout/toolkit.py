"""What an agent may use: tools that are plain functions, and environments whose public methods are tools.

The contract is TRL's (`tools` and `environment_factory` of its GRPOTrainer).
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException, get_json_schema

Tool = Callable[..., Any]
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
EnvironmentFactory = Callable[[], Any]
RESET, REWARD, ENVIRONMENT = "reset", "get_reward", "environment"


class EnvironmentFailure(RuntimeError):
    """An environment could not be made or reset. `__cause__` is what it raised, None where it hung."""


@dataclass(eq=False)
class Toolbox:
    """What one conversation may use.

    Attributes:
        schemas: JSON schemas of its tools, as chat templates take them.
        functions: the plain tools by name.
        methods: those of its environment.
        environment: its own instance, or None.
        kind: the environment's name in `environment_factory`.
    """

    schemas: list[dict[str, Any]]
    functions: dict[str, Tool]
    methods: dict[str, Tool] = field(default_factory=dict)
    environment: Any = None
    kind: Any = None

    @property
    def names(self) -> list[str]:
        return [*self.functions, *self.methods]


class Toolkit:
    """The tools and environments of a run.

    Args:
        tools: typed functions with Google-style docstrings, sync or async.
        environment_factory: makes an environment: an object with `reset(**row)`, whose return value (text, blocks of
            text, or None) is appended to the prompt's last message; public methods, typed and documented like tools;
            and maybe `get_reward()`. Or a dict of such factories by name: the dataset's `environment` column chooses.

    Attributes:
        schemas: of every tool, of whatever environment.
        named: whether the dataset chooses among environments.
        reward_types: the environments' classes that have `get_reward`, each once.

    Raises:
        ValueError: a tool without types or documentation, or with arguments that have no name; two tools of one name;
            an environment without `reset`.
        EnvironmentFailure: no environment can be made.
    """

    def __init__(
        self,
        tools: Sequence[Tool] = (),
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
    ):
        if not isinstance(tools, Sequence) or isinstance(tools, str):
            raise ValueError(f"tools is a list of functions, not {tools!r}")
        self._functions = _by_name(tools)
        schemas = [_schema(tool, name) for name, tool in self._functions.items()]
        self._factories: dict[Any, EnvironmentFactory] = {}
        self.named = isinstance(environment_factory, Mapping)
        if isinstance(environment_factory, Mapping):
            self._factories |= environment_factory
        elif environment_factory is not None:
            self._factories[None] = environment_factory
        self._free: defaultdict[Any, list[Any]] = defaultdict(list)
        self._schemas: dict[Any, list[dict[str, Any]]] = {None: schemas}
        self.schemas, self.reward_types = list(schemas), list[type]()
        for name, factory in self._factories.items():
            if not callable(factory):
                raise ValueError(f"environment_factory: {factory!r} cannot be called; give the class, not an instance")
            instance = self._make(name, "the first environment")
            self._free[name].append(instance)
            own = [_schema(method, method_name) for method_name, method in self._methods(instance).items()]
            self._schemas[name] = schemas + own
            self.schemas += own
            if hasattr(type(instance), REWARD) and type(instance) not in self.reward_types:
                self.reward_types.append(type(instance))

    @property
    def common_schemas(self) -> list[dict[str, Any]]:
        """Of the tools that every conversation has."""
        return self._schemas[None]

    @property
    def has_environments(self) -> bool:
        return bool(self._factories)

    def check(self, name: Any, where: str) -> None:
        """Raise ValueError, naming the place `where`, if no environment is called `name`."""
        if name not in self._factories:
            known, column = ", ".join(map(str, self._factories)), f"; the column `{ENVIRONMENT}` chooses one of them"
            raise ValueError(f"{where}: there is no environment {name!r} in environment_factory, only {known}{column}")

    def take(self, row: Mapping[str, Any], where: str, new: bool = False) -> Toolbox:
        """What the conversation of a dataset row may use; its environment is used by no other until it is given back.

        Args:
            row: its `environment` is looked at where `environment_factory` is a dict.
            where: names the row in errors.
            new: let the environment be a new instance.

        Raises:
            ValueError: the row names an environment that does not exist.
            EnvironmentFailure: none can be made.
        """
        if not self._factories:
            return Toolbox(self._schemas[None], self._functions)
        name = row.get(ENVIRONMENT) if self.named else None
        self.check(name, where)
        instance = self._make(name, where) if new or not self._free[name] else self._free[name].pop()
        return Toolbox(self._schemas[name], self._functions, self._methods(instance), instance, name)

    def _make(self, name: Any, where: str) -> Any:
        try:
            return self._factories[name]()
        except Exception as error:
            called = "environment_factory" if name is None else f"environment_factory[{name!r}]"
            raise EnvironmentFailure(
                f"{where}: {called} made no environment, it raised {type(error).__name__}: {error}. Mend it, or what "
                "it needs"
            ) from error

    def give_back(self, box: Toolbox) -> None:
        """Let another conversation have the environment, which is reset then."""
        if box.environment is not None:
            self._free[box.kind].append(box.environment)

    def reset_arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What `reset` gets of a row: all of it, but for the column that chose the environment.

        A copy: it may be changed, and the row is also that of the group's other conversations.
        """
        return {key: copy.deepcopy(value) for key, value in row.items() if not (self.named and key == ENVIRONMENT)}

    def _methods(self, environment: Any) -> dict[str, Tool]:
        """The tools of an environment; listed on the class, since on the instance properties would be evaluated."""
        kind = type(environment)
        if not callable(getattr(kind, RESET, None)):
            raise ValueError(f"environment_factory: {kind.__name__} has no method `{RESET}`; it may take **row")
        names = [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")]
        methods = {name: getattr(environment, name) for name in names if name not in (RESET, REWARD)}
        twice = methods.keys() & self._functions.keys()
        if twice:
            raise ValueError(f"{kind.__name__}.{min(twice)} and a function in `tools` have one name; rename either")
        return methods


def _by_name(tools: Sequence[Tool]) -> dict[str, Tool]:
    named: dict[str, Tool] = {}
    for tool in tools:
        name = getattr(tool, "__name__", None)
        if name is None:
            raise ValueError(f"tools: {tool!r} has no name; give a function or a method")
        if name in named:
            raise ValueError(f"tools: there are two of the name {name!r}; rename one")
        named[name] = tool
    return named


def _schema(tool: Tool, name: str) -> dict[str, Any]:
    for parameter in inspect.signature(tool).parameters.values():
        if parameter.kind not in BY_NAME:
            raise ValueError(
                f"tool {name!r} takes `{parameter}`, which a JSON schema cannot describe: the model gives each "
                "argument by its name. Name them one by one, or take a list"
            )
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException, NameError) as error:
        raise ValueError(
            f"tool {name!r}: {str(error).rstrip('.!')}. A tool needs type hints, and a docstring in Google's style "
            "that says what it does and, under `Args:`, what each argument is; a method that is no tool begins with an "
            "underscore"
        ) from error
