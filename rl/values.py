"""From the text of a YAML file or a command line to a value of a field's type."""

import types
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

import yaml

_TRUE, _FALSE, _NULL = ("true", "yes", "on"), ("false", "no", "off"), ("null", "~", "")


def convert(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type that `hint` names.

    Text is read by the type it is for, not by YAML's rules: `1e-5` is a number for a float, `no` a word for a choice.

    Args:
        name: of the field, for the message.
        value: text, or a list, dict, number or bool made of YAML already.
        hint: a type, or a union of types.

    Raises:
        ValueError: it is no such value; the message gives the name, the value and what would do.
    """
    members = _members(hint)
    choices = [choice for member in members for choice in _choices(member)]
    converted = _from_text(name, value, members) if isinstance(value, str) else _from_object(name, value, members)
    if converted is _WRONG or (choices and isinstance(value, str) and not _is_choice(converted, choices, members)):
        wanted = " or ".join(map(str, choices)) if choices else " or ".join(_describe(member) for member in members)
        raise ValueError(f"{name}: {value!r} is not {'one of ' if choices else ''}{wanted}")
    return converted


class _Wrong:
    """The type of `_WRONG`, the answer where no member of the union takes the value (None is an answer itself)."""


_WRONG = _Wrong()


def _members(hint: Any) -> list[Any]:
    if get_origin(hint) in (Union, types.UnionType):
        return [inner for member in get_args(hint) for inner in _members(member)]
    return [hint]


def _kinds(members: Sequence[Any]) -> set[Any]:
    return {get_origin(member) or member for member in members}


def _choices(member: Any) -> list[Any]:
    if get_origin(member) is Literal:
        return list(get_args(member))
    return [choice.value for choice in member] if isinstance(member, type) and issubclass(member, Enum) else []


def _is_choice(value: Any, choices: list[Any], members: Sequence[Any]) -> bool:
    # A str beside an Enum is how transformers says that the Enum's text will do; beside a Literal it is any text.
    free = str in members and any(get_origin(member) is Literal for member in members)
    return free or value is None or isinstance(value, bool) or value in choices


def _from_text(name: str, text: str, members: Sequence[Any]) -> Any:
    kinds, word = _kinds(members), text.strip().lower()
    takes_text = bool({str, Literal} & kinds) or any(_choices(member) for member in members)
    if type(None) in kinds and (word in _NULL or (word == "none" and not takes_text)):
        return None
    if bool in kinds and word in _TRUE + _FALSE:
        return word in _TRUE
    if False in (choice for member in members for choice in _choices(member)) and word in _FALSE:
        return False
    for kind in (int, float):
        number = _number(word, kind) if kind in kinds else _WRONG
        if number is not _WRONG:
            return number
    if {list, dict} & kinds and text.lstrip().startswith(("[", "{")):
        try:
            return _from_object(name, load_yaml(text), members)
        except yaml.MarkedYAMLError as error:
            raise ValueError(f"{name}: {text!r} is neither YAML nor JSON: {error.problem}") from None
    if list in kinds and (not takes_text or "," in text):
        return _from_object(name, [item.strip() for item in text.split(",")], members)
    return text if takes_text else _WRONG


def _number(text: str, kind: type) -> Any:
    try:
        number = float(text)
    except ValueError:
        return _WRONG
    if kind is int:
        return int(number) if number.is_integer() else _WRONG  # int("1e6") would fail, and is what people write
    return int(text) if text.lstrip("+-").isdigit() else number  # a float of `1` stays 1, as in Python's defaults


def _from_object(name: str, value: Any, members: Sequence[Any]) -> Any:
    kinds = _kinds(members)
    if isinstance(value, list) and list in kinds:
        item_hints = [get_args(member) for member in members if get_origin(member) is list]
        return [convert(f"{name}[{i}]", item, item_hints[0][0]) if item_hints else item for i, item in enumerate(value)]
    if isinstance(value, bool):
        return value if bool in kinds or Any in kinds else _WRONG
    if isinstance(value, int) and float in kinds:
        return value
    if value is None:
        return None if type(None) in kinds else _WRONG
    return value if Any in kinds or type(value) in kinds else _WRONG


def _describe(member: Any) -> str:
    names = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict: "a mapping",
        type(None): "null",
    }
    if get_origin(member) is list:
        return f"a list ({_describe(get_args(member)[0])} each)"
    return names.get(get_origin(member) or member, str(getattr(member, "__name__", member)))


def load_yaml(text: str) -> Any:
    """The objects of a YAML text, with `1e-5` a number, as YAML 1.2 and JSON have it and PyYAML does not.

    Raises yaml.YAMLError.
    """
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, but for numbers."""


def _construct_text(loader: _Loader, node: yaml.ScalarNode) -> Any:
    text = loader.construct_scalar(node)
    if node.style is None and text[:1] in "+-.0123456789" and _number(text, float) is not _WRONG:
        return float(text)
    return text


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_text)


@dataclass(frozen=True)
class Entry:
    """One `name: value` of a YAML mapping. A scalar is its text; `line` counts from 1."""

    name: str
    value: Any
    line: int


def yaml_entries(text: str) -> list[Entry]:
    """The entries of the mapping that a YAML text is, in order; none where it is empty.

    Raises:
        ValueError: it is no YAML, no mapping, or has a name twice; the message gives the line.
    """
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            raise ValueError(f"line {root.start_mark.line + 1}: expected lines of the form `name: value`")
        entries = [
            Entry(
                name=str(key.value),
                value=value.value if isinstance(value, yaml.ScalarNode) else loader.construct_object(value, deep=True),
                line=key.start_mark.line + 1,
            )
            for key, value in root.value
        ]
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}this is not YAML: {error.problem}") from None
    finally:
        loader.dispose()
    seen: dict[str, int] = {}
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"line {entry.line}: {entry.name} was given in line {seen[entry.name]} already")
        seen[entry.name] = entry.line
    return entries
