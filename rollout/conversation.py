"""What is asked of a conversation with tools, what bounds it, and what has become of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .chat_format import Message
from .engine import SamplingParams
from .trajectory import Trajectory

Ended = Literal["answer", "rounds", "tokens", "context", "time"]


@dataclass(frozen=True)
class AgentLimits:
    """What bounds a conversation, besides the tokens it may sample and the engine's context.

    Attributes:
        max_tool_rounds: times that the model's calls are answered; None: as often as it calls.
        tool_timeout: seconds of one call, of `reset` and `get_reward` too; None: no limit, so that a tool that hangs
            hangs the run.
        conversation_timeout: seconds after which no further turn begins, from the start of the conversation on, the
            engine's queue included. With it, what a run gives depends on the clock.
        max_threads: sync tools that run at once.
        reproducible: the engine waits for every tool. Else what else is in a batch, and with it the rounding of
            log-probs, depends on how long tools take.
    """

    max_tool_rounds: int | None = None
    tool_timeout: float | None = 60.0
    conversation_timeout: float | None = None
    max_threads: int = 64
    reproducible: bool = False

    def __post_init__(self) -> None:
        for name in ("tool_timeout", "conversation_timeout"):
            seconds = getattr(self, name)
            if seconds is not None and seconds <= 0:
                raise ValueError(f"AgentLimits: {name} must be above 0 or None, got {seconds}")
        if self.max_tool_rounds is not None and self.max_tool_rounds < 0:
            raise ValueError(f"AgentLimits: max_tool_rounds must not be negative, got {self.max_tool_rounds}")


@dataclass(frozen=True)
class Task:
    """A conversation asked for.

    Attributes:
        request_id: comes back in the trajectory.
        messages: the prompt.
        row: the dataset's, for the environment.
        sampling: `max_tokens` is what the model may sample in the whole conversation.
        seeds: of each turn, by its number from 0.
        where: names the row in errors.
        prompt_ids: of `messages` with the tools, where they are known already; not used where `reset` adds something.
    """

    request_id: str
    messages: Sequence[Message]
    row: Mapping[str, Any]
    sampling: SamplingParams
    seeds: Callable[[int], int]
    where: str = "a prompt"
    prompt_ids: tuple[int, ...] | None = None

    @property
    def seed(self) -> int:
        """Of the first turn."""
        return self.seeds(0)


@dataclass
class Conversation:
    """A conversation that has ended.

    Attributes:
        trajectory: its tokens. `finish_reason` is `length` where a limit on tokens, context or time ended it.
        prompt: the messages of the prompt, with what `reset` has added.
        completion: what followed: the assistant's messages, with `tool_calls`, and the tools'.
        environment: the instance it was had with; valid until `Agent.release`.
        reward: what the environment's `get_reward` gave; None where there is none, or it was cut off.
        reward_error: what it raised.
        ended: by an `answer` without calls, or by a limit. Calls that a limit left unanswered are the last message.
        turns: that the model had.
        tool_calls: calls, the malformed and those of tools that do not exist included.
        tool_failures: those that gave an error, for whatever reason.
        tool_timeouts: those that were cut off.
        malformed_calls: those that could not be read.
        tool_seconds: that its calls took, added up.
        prompt_tokens: tokens before each turn, added up over the turns.
        cached_tokens: those of them whose keys and values the engine still had, and did not compute again.
    """

    trajectory: Trajectory
    prompt: list[Message]
    completion: list[Message] = field(default_factory=list)
    environment: Any = None
    reward: Any = None
    reward_error: BaseException | None = None
    ended: Ended = "answer"
    turns: int = 0
    tool_calls: int = 0
    tool_failures: int = 0
    tool_timeouts: int = 0
    malformed_calls: int = 0
    tool_seconds: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0


@dataclass
class AgentStatistics:
    """Of the last run of an agent.

    Attributes:
        seconds: wall time.
        idle_seconds: time in which the engine had nothing to do, because all conversations waited for tools.
        abandoned: tools that were cut off and still run.
    """

    seconds: float = 0.0
    idle_seconds: float = 0.0
    abandoned: int = 0

    @property
    def idle_share(self) -> float:
        return self.idle_seconds / self.seconds if self.seconds else 0.0
