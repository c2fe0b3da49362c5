"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems with a number as the answer."""

import re
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path

from datasets import Dataset, load_dataset

HUB_ID = "openai/gsm8k"
HERE = Path(__file__).parent
INSTRUCTION = "Work it out step by step, then end with a line `#### ` and the answer as a number, as in `#### 42`."
NUMBER = r"\$?(-?\d[\d,]*(?:\.\d+)?)"

Completion = list[dict[str, str]]


def dataset() -> Dataset:
    """The training problems, as `prompt` (messages) and `answer` (a number as text)."""
    return _problems("train")


def held_out() -> Dataset:
    """The test problems, in the same form."""
    return _problems("test")


def _problems(split: str) -> Dataset:
    """From `train.jsonl` or `test.jsonl` beside this file where there is one, else from the hub.

    Both have a `question`, and an `answer` that ends in `#### number`.
    """
    path = HERE / f"{split}.jsonl"
    if path.is_file():
        rows = load_dataset("json", data_files=str(path), split="train")
    else:
        try:
            rows = load_dataset(HUB_ID, "main", split=split)
        except OSError as error:  # no network, or no such name there any more
            raise ValueError(
                f"{HUB_ID} cannot be had from the hub ({error}); put {path.name}, with a `question` and an `answer` "
                f"ending in `#### number` a line, into {HERE}"
            ) from error
    return Dataset.from_dict(
        {
            "prompt": [[{"role": "user", "content": f"{text}\n\n{INSTRUCTION}"}] for text in rows["question"]],
            "answer": [text.rpartition("####")[2].strip() for text in rows["answer"]],
        }
    )


def final_number(text: str) -> Decimal | None:
    """The number after the last `####`, thousands separators and a dollar sign aside; None where there is none."""
    _, marker, tail = text.rpartition("####")
    found = re.match(rf"\s*{NUMBER}(?![\d.,]*[-+*/=^])", tail) if marker else None
    return Decimal(found[1].replace(",", "")) if found else None


def exact_number(completions: Sequence[Completion], answer: Sequence[str], **_: object) -> list[float]:
    """1 where the number after `####` is the answer, else 0."""
    right = [Decimal(text.replace(",", "")) for text in answer]
    given = [final_number(completion[-1]["content"]) for completion in completions]
    return [float(number == wanted) for number, wanted in zip(given, right, strict=True)]


def answer_format(completions: Sequence[Completion], **_: object) -> list[float]:
    """1 where `####` stands once, at the beginning of the last line, followed by a number alone; else 0."""
    texts = [completion[-1]["content"].strip() for completion in completions]
    ends = [re.fullmatch(rf"####\s*{NUMBER}", text.rpartition("\n")[2].strip()) for text in texts]
    return [float(bool(end) and text.count("####") == 1) for end, text in zip(ends, texts, strict=True)]
