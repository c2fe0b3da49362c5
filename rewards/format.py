"""Rewards for the form of a completion, whatever it says: a regular expression, or XML sections."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from .text import Completion, completion_text


@dataclass(frozen=True)
class RegexFormat:
    r"""1.0 for each completion that the pattern matches from start to end (white space around it aside), else 0.0.

    Args:
        pattern: a regular expression of Python's `re`; `.` matches line ends too.

    Raises:
        ValueError: the pattern is not a regular expression.
    """

    pattern: str
    _compiled: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "_compiled", re.compile(self.pattern, re.DOTALL))
        except re.error as error:
            raise ValueError(f"RegexFormat: {self.pattern!r} is not a regular expression: {error}") from error

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        texts = (completion_text(completion).strip() for completion in completions)
        return [float(self._compiled.fullmatch(text) is not None) for text in texts]


@dataclass(frozen=True)
class XmlSections:
    """1.0 for each completion that consists of the sections, in order, each once and not empty, else 0.0.

    Between sections and around them only white space may stand, and no tag of a section inside another.

    Args:
        names: the tags, in order.
        first_is_open: the prompt ends with the first section's opening tag, as some chat templates have it, so that
            the completion begins inside the section.

    Raises:
        ValueError: no names, a name twice, or one that is not a word.
    """

    names: Sequence[str] = ("think", "answer")
    first_is_open: bool = False

    def __post_init__(self) -> None:
        words = [name for name in self.names if re.fullmatch(r"[\w-]+", name)]
        if isinstance(self.names, str) or not words or len(set(words)) != len(self.names):
            raise ValueError(f"XmlSections needs a list of different tag names, such as ['think'], got {self.names!r}")

    def __call__(self, completions: Sequence[Completion], **columns: Any) -> list[float]:
        return [float(self._holds(completion_text(completion))) for completion in completions]

    def _holds(self, text: str) -> bool:
        text = f"<{self.names[0]}>{text}" if self.first_is_open else text
        tags = [tag for name in self.names for tag in (f"<{name}>", f"</{name}>")]
        if any(text.count(tag) != 1 for tag in tags):
            return False
        rest = text
        for index, tag in enumerate(tags):
            before, found, rest = rest.partition(tag)
            closing = index % 2 == 1
            # Something has to stand before a closing tag, and nothing before an opening one.
            if not found or bool(before.strip()) != closing:
                return False
        return not rest.strip()


def think_answer_format(completions: Sequence[Completion], **columns: Any) -> list[float]:
    """1.0 for `<think>...</think><answer>...</answer>`, each once and not empty, with nothing outside; else 0.0."""
    return _THINK_ANSWER(completions)


_THINK_ANSWER = XmlSections()
