"""Conversations of a model with tools, many at once over one engine.

There is no lockstep: each conversation goes on as soon as its own tools have returned, while the engine decodes the
others. One thread owns the engine and all conversations; only tools run elsewhere (see `tool_calls`).
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jinja2 import TemplateError

from .chat_format import Chat, Message, ToolRequest, Turn
from .conversation import AgentLimits, AgentStatistics, Conversation, Ended, Task
from .engine import RolloutEngine, RolloutRequest
from .tool_calls import Call, ToolCaller
from .toolkit import REWARD, EnvironmentFailure, Toolbox, Toolkit
from .trajectory import Segment, Trajectory

RESET_ATTEMPTS = 2  # a sandbox may fail to start once
IDLE_SECONDS = 0.05  # whoever iterates is let in so often while all wait for tools
MOST_CHARACTERS_A_TOKEN = 256  # a result with more for each token of room is not even encoded


@dataclass(eq=False)
class _Live:
    """A conversation that goes on."""

    number: int  # among the conversations of a run
    task: Task
    box: Toolbox
    result: Conversation
    started: float
    rounds: int = 0
    attempts: int = 0
    replies: list[Message | None] = field(default_factory=list)  # to the calls of the last turn, in their order
    hung: bool = False  # a call that was cut off may still change the environment
    over: bool = False

    @property
    def tokens(self) -> list[int]:
        return self.result.trajectory.prompt_ids + self.result.trajectory.completion_ids


@dataclass(frozen=True)
class _Asked:
    """Who a call is for: `place` among the calls of a turn; without a request, the environment's reset or reward."""

    live: _Live
    request: ToolRequest | None = None
    place: int = 0

    @property
    def order(self) -> tuple[int, int]:
        return self.live.number, self.place


class Agent:
    """Has conversations.

    Args:
        engine: awake while `run` is iterated.
        chat: the model's format.
        toolkit: what conversations may use.
        limits: see there.
        max_prompt_tokens: longer prompts raise ValueError; the engine's context less one where None.

    Attributes:
        statistics: of the last `run`.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        chat: Chat,
        toolkit: Toolkit,
        limits: AgentLimits | None = None,
        max_prompt_tokens: int | None = None,
    ):
        self.engine, self.chat, self.toolkit, self.limits = engine, chat, toolkit, limits or AgentLimits()
        self.statistics = AgentStatistics()
        self._max_prompt = min(max_prompt_tokens or engine.max_context, engine.max_context - 1)
        self._caller = ToolCaller(self.limits.max_threads)
        self._speaking: dict[str, _Live] = {}  # by the id of the request that is with the engine
        self._requests: list[RolloutRequest] = []  # to be submitted
        self._ended: list[Conversation] = []
        self._back: list[Call] = []  # calls that have come back and are not looked at yet
        self._taken: list[tuple[Toolbox, bool]] = []  # with whether it can be used again

    def run(self, tasks: Sequence[Task]) -> Iterator[Conversation]:
        """Have the conversations and yield each as it ends; see `steps`."""
        for ended in self.steps(tasks):
            yield from ended

    def steps(self, tasks: Sequence[Task]) -> Generator[list[Conversation], None, None]:
        """Have the conversations; what has ended since the last time, again and again, often nothing.

        Raises:
            ValueError: a prompt does not fit, or a row names an environment that does not exist.
            EnvironmentFailure: an environment cannot be made, or its `reset` failed or hung, twice.
        """
        started, self.statistics = time.monotonic(), AgentStatistics()
        try:
            for number, task in enumerate(tasks):
                self._begin(number, task)
            left = len(tasks)
            while left:
                self._submit()
                self._advance()
                self.statistics.abandoned = self._caller.abandoned
                self.statistics.seconds = time.monotonic() - started
                ended, self._ended = self._ended, []
                left -= len(ended)
                yield ended
        except BaseException:  # an interrupt, or nobody iterates any more, too
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Drop what the engine has: with unfinished requests it can neither sleep nor be given an adapter.

        Calls that still run are for conversations that nobody waits for any more.
        """
        self._caller.close()
        self._caller = ToolCaller(self.limits.max_threads)
        self._requests.clear()
        self._back.clear()
        self._speaking.clear()
        self._ended.clear()
        self.engine.abort()

    def release(self) -> None:
        """Make the environments of the conversations that have ended free for others."""
        for box, reusable in self._taken:
            if reusable:
                self.toolkit.give_back(box)
        self._taken.clear()

    def close(self) -> None:
        """End what tools need. The engine is left alone."""
        self._caller.close()

    def _submit(self) -> None:
        if self._requests:
            self.engine.submit(self._requests)
            self._requests = []

    def _advance(self) -> None:
        """Take what tools have returned, and let the engine make a step; where it has nothing to do, wait for tools."""
        hold = self.limits.reproducible and self._caller.busy > 0
        idle = hold or self.engine.unfinished == 0
        before = time.monotonic()
        self._back += self._caller.wait(IDLE_SECONDS if idle else 0.0)
        if idle:
            self.statistics.idle_seconds += time.monotonic() - before
        if hold and self._caller.busy:
            return
        back, self._back = self._back, []
        for call in sorted(back, key=lambda call: call.owner.order) if self.limits.reproducible else back:
            self._take(call)
        if self.engine.unfinished == 0 or (self.limits.reproducible and self._caller.busy):
            return
        self._submit()  # what has come back joins the others at once
        for trajectory in self.engine.step():
            self._hear(self._speaking.pop(trajectory.request_id), trajectory)

    # ---- a conversation's course -------------------------------------------------------------------------------------

    def _begin(self, number: int, task: Task) -> None:
        box = self.toolkit.take(task.row, task.where)
        trajectory = Trajectory(task.request_id, [], seed=task.seed)
        live = _Live(number, task, box, Conversation(trajectory, list(task.messages)), time.monotonic())
        if box.environment is None:
            self._open(live)
        else:
            self._reset(live)

    def _reset(self, live: _Live) -> None:
        live.attempts += 1
        live.result.environment = live.box.environment
        arguments = self.toolkit.reset_arguments(live.task.row)
        self._caller.start(Call(_Asked(live), live.box.environment.reset, arguments, self.limits.tool_timeout))

    def _open(self, live: _Live, observation: Any = None) -> None:
        """Encode the prompt and ask for the first turn."""
        ids = None if live.task.prompt_ids is None else list(live.task.prompt_ids)
        try:
            if observation is not None:
                live.result.prompt, ids = with_observation(live.result.prompt, observation), None
            if ids is None:
                ids = self.chat.prompt_ids(live.result.prompt, live.box.schemas)
        except (ValueError, TypeError, KeyError, TemplateError) as error:
            added = "" if observation is None else f", to which an environment's reset has added {observation!r:.200}"
            raise ValueError(
                f"{live.task.where}: the chat template cannot write the prompt{added}: {error}; texts are what every "
                "template takes, lists of blocks only some"
            ) from error
        if len(ids) > self._max_prompt:
            raise ValueError(
                f"{live.task.where}: the prompt has {len(ids)} tokens with its tools, at most {self._max_prompt} fit; "
                "shorten or drop it, describe fewer tools, lower max_completion_length, or raise max_context"
            )
        live.result.trajectory.prompt_ids = ids
        self._ask(live)

    def _ask(self, live: _Live) -> None:
        """Ask the engine for the next turn."""
        task, tokens = live.task, live.tokens
        budget = task.sampling.max_tokens - live.result.trajectory.num_sampled
        sampling = replace(task.sampling, max_tokens=min(budget, self.engine.max_context - len(tokens)))
        name = f"{task.request_id}/{live.result.turns}"
        self._requests.append(RolloutRequest(name, tuple(tokens), task.seeds(live.result.turns), sampling))
        self._speaking[name] = live

    def _hear(self, live: _Live, spoken: Trajectory) -> None:
        """The model has had a turn: end, or call what it asks for."""
        result, trajectory = live.result, live.result.trajectory
        trajectory.segments += spoken.segments
        result.prompt_tokens += len(spoken.prompt_ids)
        result.cached_tokens += spoken.cached_tokens
        turn = self.chat.read(spoken.completion_ids, live.box.schemas, result.turns)
        result.turns += 1
        result.completion.append(turn.message)
        left = live.task.sampling.max_tokens - trajectory.num_sampled
        if spoken.finish_reason == "length":
            self._end(live, "tokens" if left < 1 else "context")
        elif not turn.requests and turn.problem is None:
            self._end(live, "answer")
        elif live.rounds == self.limits.max_tool_rounds:
            self._end(live, "rounds")
        elif left < 1 or self._out_of_time(live):
            self._end(live, "tokens" if left < 1 else "time")
        else:
            live.rounds += 1
            self._call(live, turn)

    def _call(self, live: _Live, turn: Turn) -> None:
        """Start the calls of a turn: functions at once, what goes to the environment in its order."""
        result, last = live.result, None
        if turn.problem is not None:
            result.tool_calls, result.tool_failures = result.tool_calls + 1, result.tool_failures + 1
            result.malformed_calls += 1
            live.replies = [_error(ToolRequest("unknown", {}, f"{result.turns % 10000:04d}00000"), turn.problem)]
            self._reply(live)
            return
        live.replies = [None] * len(turn.requests)
        starting = []
        for place, request in enumerate(turn.requests):
            result.tool_calls += 1
            name, box = request.name, live.box
            function = box.functions.get(name) or box.methods.get(name)
            if function is None:
                result.tool_failures += 1
                known = f"the tools are: {', '.join(box.names)}" if box.names else "there are no tools"
                live.replies[place] = _error(request, f"there is no tool {name!r}; {known}")
                continue
            call = Call(_Asked(live, request, place), function, request.arguments, self._seconds_left(live))
            call.convert = _text
            if name in box.methods and last is not None:
                last.then = call
            else:
                starting.append(call)
            last = call if name in box.methods else last
        for call in starting:
            self._caller.start(call)
        if not starting:
            self._reply(live)

    def _take(self, call: Call) -> None:
        """Something has returned: the answer to a call, or an environment that is ready."""
        asked: _Asked = call.owner
        live = asked.live
        live.hung |= call.timed_out
        if asked.request is None:
            if live.over:
                self._is_scored(live, call)
            else:
                self._is_reset(live, call)
            return
        result, failed = live.result, call.timed_out or call.error is not None
        result.tool_seconds += call.seconds
        result.tool_failures += failed
        result.tool_timeouts += call.timed_out
        live.replies[asked.place] = (
            _error(asked.request, _reason(call)) if failed else _answer(asked.request, call.result)
        )
        if all(reply is not None for reply in live.replies):
            self._reply(live)

    def _is_reset(self, live: _Live, call: Call) -> None:
        if not call.timed_out and call.error is None:
            self._open(live, call.result)
            return
        if live.attempts >= RESET_ATTEMPTS:
            raised = "" if call.error is None else f"it raised {type(call.error).__name__}: "
            raise EnvironmentFailure(
                f"{live.task.where}: {type(live.box.environment).__name__}.reset failed {RESET_ATTEMPTS} times, each "
                f"in a new instance: {raised}{_reason(call)}\n  row: {dict(live.task.row)!r:.300}\n  Remedy: Let the "
                "method handle this row, or remove it from the dataset, then go on from the last checkpoint."
            ) from call.error
        live.box, live.hung = self.toolkit.take(live.task.row, live.task.where, new=True), False
        self._reset(live)

    def _reply(self, live: _Live) -> None:
        """All calls of the turn are answered: append the answers and ask for the next turn, where they fit."""
        replies = [reply for reply in live.replies if reply is not None]
        trajectory = live.result.trajectory
        room = self.engine.max_context - len(live.tokens) - 1
        if self._out_of_time(live):
            self._end(live, "time")
            return
        ids = None
        if sum(len(reply["content"]) for reply in replies) <= MOST_CHARACTERS_A_TOKEN * room:
            ids = self.chat.reply_ids(replies)
        if ids is None or len(ids) > room:
            self._end(live, "context")
            return
        live.result.completion += [
            {key: value for key, value in reply.items() if key != "tool_call_id"} for reply in replies
        ]
        trajectory.segments.append(Segment(ids, "environment"))
        self._ask(live)

    def _end(self, live: _Live, ended: Ended) -> None:
        """The conversation is over; its environment, where it gives rewards, is asked for this one's."""
        live.result.ended, live.over = ended, True
        live.result.trajectory.finish_reason = "stop" if ended in ("answer", "rounds") else "length"
        get_reward = getattr(live.box.environment, REWARD, None)
        if get_reward is None:
            self._hand_back(live)
        else:
            self._caller.start(Call(_Asked(live), get_reward, {}, self.limits.tool_timeout))

    def _is_scored(self, live: _Live, call: Call) -> None:
        if call.timed_out:
            live.result.tool_timeouts += 1
        live.result.reward, live.result.reward_error = call.result, call.error
        self._hand_back(live)

    def _hand_back(self, live: _Live) -> None:
        self._taken.append((live.box, not live.hung))
        self._ended.append(live.result)

    def _seconds_left(self, live: _Live) -> float | None:
        """What a call may take: its own limit, or what is left of the conversation's."""
        limits = [self.limits.tool_timeout]
        if self.limits.conversation_timeout is not None:
            limits.append(max(0.0, live.started + self.limits.conversation_timeout - time.monotonic()))
        return min((limit for limit in limits if limit is not None), default=None)

    def _out_of_time(self, live: _Live) -> bool:
        limit = self.limits.conversation_timeout
        return limit is not None and time.monotonic() >= live.started + limit


def with_observation(messages: Sequence[Message], observation: Any) -> list[Message]:
    """`messages` with what an environment's `reset` returned, text or blocks, at the end of the last one."""
    content = messages[-1]["content"]
    if isinstance(observation, list) and isinstance(content, str):
        content = [{"type": "text", "text": content}]
    elif isinstance(observation, str) and isinstance(content, list):
        observation = [{"type": "text", "text": observation}]
    if not isinstance(observation, str | list):
        raise ValueError(f"an environment's reset returns text, a list of blocks or None, not {observation!r}")
    return [*messages[:-1], {**messages[-1], "content": content + observation}]


def _text(value: Any) -> str:
    """What the model is told. Lone surrogates (of file names, say), which no tokenizer takes, become question marks."""
    return str(value).encode("utf-8", "replace").decode()


def _answer(request: ToolRequest, text: str) -> Message:
    return {"role": "tool", "name": request.name, "tool_call_id": request.id, "content": text}


def _error(request: ToolRequest, reason: str) -> Message:
    return _answer(request, _text({"error": reason}))


def _reason(call: Call) -> str:
    if call.timed_out:
        return f"it did not answer within {call.timeout:g} s"
    try:
        text = str(call.error)
    except Exception:  # an exception's text is a tool's code too
        text = ""
    return text or type(call.error).__name__
