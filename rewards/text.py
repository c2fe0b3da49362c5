"""What a completion says: its text, the answer in it, and that text in a form that can be compared."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

Completion = str | Sequence[Mapping[str, Any]]


def completion_text(completion: Completion) -> str:
    """The text of a completion: itself, or the content of the last of its chat messages ("" where it has none)."""
    if isinstance(completion, str):
        return completion
    content = completion[-1].get("content") if completion else ""
    if isinstance(content, str):
        return content
    return "".join(block.get("text", "") for block in content or [])


def extract_answer(completion: Completion) -> str:
    """What stands after the last `<answer>` (up to `</answer>`, if closed) or `####`, whichever is later; else all."""
    text = completion_text(completion)
    tag, marker = text.rfind("<answer>"), text.rfind("####")
    if tag > marker:
        text = text[tag + len("<answer>") :].partition("</answer>")[0]
    elif marker >= 0:
        text = text[marker + len("####") :]
    return text.strip()


def after_thinking(text: str) -> str:
    """What follows the last `</think>`; the whole text where there is none."""
    return text.rpartition("</think>")[2]


def normalise(text: str) -> str:
    """NFKC, case folded, runs of white space made one space, no quotes around it and no full stop at its end."""
    words = unicodedata.normalize("NFKC", text).casefold().split()
    return " ".join(words).rstrip(".").strip("\"'` ")
