"""What a rollout engine is: token ids and seeds in, trajectories out, one by one as they finish."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Protocol

from .trajectory import Trajectory


@dataclass(frozen=True)
class SamplingParams:
    """How completions are sampled.

    Attributes:
        max_tokens: limit on the completion's tokens, at least 1.
        temperature: 0 takes the most likely token; log-probs are then those at temperature 1.
        stop_token_ids: a completion ends with the first of these it samples, which is kept.
    """

    max_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"SamplingParams: max_tokens must be at least 1, got {self.max_tokens}")
        if self.temperature < 0:
            raise ValueError(f"SamplingParams: temperature must not be negative, got {self.temperature}")


@dataclass(frozen=True)
class RolloutRequest:
    """One completion asked for. `request_id` comes back in the trajectory; `seed` alone decides its random numbers."""

    request_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    sampling: SamplingParams


class RolloutEngine(Protocol):
    """Generates completions with the weights the trainer holds.

    Requests may be submitted at any time, also while others decode. What a request yields depends on its prompt, its
    seed and the weights, not on what else is in the batch (up to floating-point rounding).
    """

    max_context: int  # prompt + completion tokens of one sequence

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        """Queue requests. Raises ValueError where prompt + max_tokens is over `max_context` or an id is in use."""
        ...

    def step(self) -> list[Trajectory]:
        """Advance generation and return what has finished, possibly nothing."""
        ...

    @property
    def unfinished(self) -> int:
        """Requests submitted and not yet returned."""
        ...

    def abort(self) -> None:
        """Drop every unfinished request. Whatever has raised in the middle of a step, the engine is idle afterwards."""
        ...

    def adapter_changed(self) -> None:
        """The slots were written: forget what was computed with the old ones. Refused while requests are unfinished."""
        ...

    def sleep(self) -> None:
        """Give back the memory that only generation needs; the weights stay. Refused while requests are unfinished."""
        ...

    def wake(self) -> None:
        """Take it back."""
        ...

    def close(self) -> None:
        """End the engine; the shared weights live on."""
        ...


def generate(engine: RolloutEngine, requests: Sequence[RolloutRequest]) -> Iterator[Trajectory]:
    """Submit `requests` and yield each trajectory the moment it finishes."""
    engine.submit(requests)
    while engine.unfinished:
        yield from engine.step()


def sample_seed(run_seed: int, step: int, prompt: int, sample: int, turn: int = 0) -> int:
    """The seed of one completion: a hash of its coordinates, so that no state has to be kept to draw it again.

    Returns a non-negative integer below 2**63.
    """
    digest = blake2b(repr((run_seed, step, prompt, sample, turn)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
