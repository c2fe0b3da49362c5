"""The tool, and the reward function: all that GRPO is told about products."""

from typing import Any


def calculator(expression: str) -> int:
    """Multiply two whole numbers.

    Args:
        expression: Both numbers with a * between them, such as 12*34.
    """
    one, other = expression.split("*")
    return int(one) * int(other)


def correct(completions: list[list[dict[str, Any]]], answer: list[str], **_: object) -> list[float]:
    """1 where the last message is the answer, else 0."""
    return [float(messages[-1]["content"] == right) for messages, right in zip(completions, answer, strict=True)]
