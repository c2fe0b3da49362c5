"""The reward function of the demo: all that GRPO is told about sums."""


def correct(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 where the completion is the answer, else 0."""
    return [float(completion.strip() == right) for completion, right in zip(completions, answer, strict=True)]
