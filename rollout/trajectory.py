"""The token ledger: what the model saw and what it said, stored as the token ids themselves.

A trajectory is the prompt and then segments, each by the model (with the log-prob of every sampled token) or by the
environment. What the model saw is always the concatenation of what is stored; nothing is decoded and encoded again.
"""

from dataclasses import dataclass, field
from typing import Literal

Source = Literal["model", "environment"]
FinishReason = Literal["stop", "length"]


@dataclass
class Segment:
    """Consecutive completion tokens of one author. `logprobs` (nats) are there for the model's tokens only."""

    token_ids: list[int]
    source: Source = "model"
    logprobs: list[float] | None = None

    def __post_init__(self) -> None:
        if self.source == "model" and (self.logprobs is None or len(self.logprobs) != len(self.token_ids)):
            count = "none" if self.logprobs is None else str(len(self.logprobs))
            raise ValueError(f"Segment: {len(self.token_ids)} sampled tokens need as many log-probs, got {count}")
        if self.source == "environment" and self.logprobs is not None:
            raise ValueError("Segment: environment tokens were not sampled and have no log-probs")


@dataclass
class Trajectory:
    """One rollout.

    Attributes:
        request_id: the id it was asked for under.
        prompt_ids: the prompt's token ids.
        segments: what followed, in order.
        finish_reason: `stop` (a stop token was sampled and is the last token) or `length` (a limit ended it).
        seed: the seed of its (first) sampling.
        cached_tokens: tokens before the last segment whose keys and values the engine still had.
    """

    request_id: str
    prompt_ids: list[int]
    segments: list[Segment] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    seed: int = 0
    cached_tokens: int = field(default=0, compare=False)

    @property
    def completion_ids(self) -> list[int]:
        """Everything after the prompt, environment tokens included."""
        return [token for segment in self.segments for token in segment.token_ids]

    @property
    def completion_mask(self) -> list[int]:
        """1 for each completion token the model sampled (those are trained), 0 for the environment's."""
        return [int(segment.source == "model") for segment in self.segments for _ in segment.token_ids]

    @property
    def logprobs(self) -> list[float]:
        """The engine's log-prob of each completion token; 0.0 for environment tokens."""
        return [value for segment in self.segments for value in (segment.logprobs or [0.0] * len(segment.token_ids))]

    @property
    def num_sampled(self) -> int:
        """Tokens the model sampled."""
        return sum(len(segment.token_ids) for segment in self.segments if segment.source == "model")
