"""Rewards for an answer that matches a reference: the same text, the right letter, JSON that fits a schema.

The answer is what stands after the last `<answer>` or `####` of a completion, or all of it after the thinking.
"""

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .text import Completion, after_thinking, extract_answer, normalise

# The first that occurs counts: what is boxed, what is called the answer, or a letter that stands alone on a line.
_LETTER = r"\(?\b([A-Z])\b\)?"
_LETTER_PATTERNS = (
    re.compile(rf"\\boxed\{{\s*(?:\\text\{{)?\s*{_LETTER}"),
    re.compile(rf"(?i:\b(?:answer|choice|option)\b(?:\s+is)?)\s*:?\s*[*_]*{_LETTER}"),
    re.compile(rf"^\W*{_LETTER}(?:[.):]\s.*|\W*)$", re.MULTILINE),
)
_FENCE = re.compile(r"^```(?:json)?\s*\n(.*)\n```$", re.DOTALL)


def exact_match(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the answer is the reference in column `answer`, else 0.0; None for rows without a reference.

    Compared without regard to case, white space, the form of Unicode characters, quotes around, a full stop at the end.
    """
    return [
        None if reference is None else float(normalise(_answer(completion)) == normalise(str(reference)))
        for completion, reference in zip(completions, answer, strict=True)
    ]


def multiple_choice(completions: Sequence[Completion], answer: Sequence[Any], **columns: Any) -> list[float | None]:
    """1.0 where the chosen letter is that in column `answer`, else 0.0; None for rows without a letter A to Z there.

    The letter is the last one that is boxed; else the last after "answer", "choice" or "option"; else the last that
    stands alone or begins a line as in "B) Paris". A completion that names none scores 0.
    """
    rewards: list[float | None] = []
    for completion, reference in zip(completions, answer, strict=True):
        letter = str(reference).strip("() .").upper()
        is_letter = len(letter) == 1 and "A" <= letter <= "Z"
        rewards.append(float(chosen_letter(_answer(completion)) == letter) if is_letter else None)
    return rewards


def chosen_letter(text: str) -> str | None:
    """The capital letter that a text settles on, or None (see `multiple_choice`)."""
    if re.fullmatch(r"\W*[a-zA-Z]\W*", text):
        return re.sub(r"\W", "", text).upper()
    for pattern in _LETTER_PATTERNS:
        letters = pattern.findall(text)
        if letters:
            return letters[-1]
    return None


@dataclass(frozen=True)
class JsonSchema:
    """1.0 where the answer, in a ```json fence or not, is JSON that fits the schema, else 0.0.

    Args:
        schema: a JSON schema, as Python's dict of it.

    Raises:
        ImportError: jsonschema is not installed.
        ValueError: the schema is not a valid one.
    """

    schema: Mapping[str, Any]

    def __post_init__(self) -> None:
        _validator(json.dumps(self.schema))

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        text = json.dumps(self.schema)
        return [_fits(completion, text) for completion in completions]


def json_schema(completions: Sequence[Completion], schema: Sequence[Any], **columns: Any) -> list[float | None]:
    """As `JsonSchema`, with the schema of each row in column `schema`: JSON text, or None (scored None).

    Raises:
        ImportError: jsonschema is not installed.
        ValueError: a schema that is not JSON text, or not a valid schema.
    """
    return [
        None if text is None else _fits(completion, text if isinstance(text, str) else json.dumps(text))
        for completion, text in zip(completions, schema, strict=True)
    ]


def _answer(completion: Completion) -> str:
    return after_thinking(extract_answer(completion)).strip()


def _fits(completion: Completion, schema: str) -> float:
    text = _answer(completion)
    fenced = _FENCE.match(text)
    validator = _validator(schema)
    try:
        return float(validator.is_valid(json.loads(fenced[1] if fenced else text)))
    except (ValueError, RecursionError):  # not JSON, an integer of too many digits, or nested too deeply
        return 0.0


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    try:
        from jsonschema import SchemaError
        from jsonschema.validators import validator_for
    except ImportError as error:
        raise ImportError("JSON schemas need the package jsonschema: `pip install colora[schema]`") from error
    try:
        parsed = json.loads(schema)
        kind = validator_for(parsed)
        kind.check_schema(parsed)
    except json.JSONDecodeError as error:
        raise ValueError(f"a JSON schema is not JSON: {error}: {schema[:200]!r}") from error
    except SchemaError as error:
        raise ValueError(f"{schema[:200]!r} is not a valid JSON schema: {error.message}") from error
    return kind(parsed)
