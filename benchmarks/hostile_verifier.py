"""The verifier of `reward_pool.py`. In a file of its own: worker processes import it, and should not import torch."""

import os
import time
from typing import Any


def verify(completions: list[str], **_: Any) -> list[float]:
    """The length of each completion, after 20 ms a sample; what a bad one does it says itself."""
    return [_verify(completion) for completion in completions]


def _verify(text: str) -> float:
    time.sleep(0.02)
    if text == "hang":
        time.sleep(3600)
    if text == "crash":
        os.abort()
    if text == "swell":
        swell(1 << 60)
    if text == "print":
        for _ in range(100):
            print("spam " * 10_000)
    return float(len(text))


def swell(most_bytes: int) -> None:
    """Allocate and write that much."""
    kept = []
    for _ in range(most_bytes >> 22):
        kept.append(bytearray(b"x" * (1 << 22)))
