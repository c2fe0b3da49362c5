"""Conversations: who waits for whom, which limits end them, and what they note."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from colora.rollout.agent import Agent
from colora.rollout.chat_format import ChatFormat
from colora.rollout.conversation import AgentLimits, Conversation, Task
from colora.rollout.engine import SamplingParams, sample_seed
from colora.rollout.toolkit import EnvironmentFailure, Toolkit

from ..chat_models import family_tokenizer
from .scripted import ScriptedEngine

TOKENIZER = family_tokenizer("qwen2.5")
CHAT = ChatFormat(TOKENIZER, [TOKENIZER.eos_token_id])
HANGS = 60.0  # seconds; never waited for


def call(name: str, **arguments: Any) -> str:
    written = ", ".join(f'"{key}": {value!r}'.replace("'", '"') for key, value in arguments.items())
    return f'<tool_call>\n{{"name": "{name}", "arguments": {{{written}}}}}\n</tool_call>'


def encode(text: str) -> list[int]:
    return TOKENIZER(text + "<|im_end|>", add_special_tokens=False)["input_ids"]


def make_agent(
    script: Callable[[str, int], str], tools: Any = (), environments: Any = None, max_context: int = 4096, **limits: Any
) -> Agent:
    engine = ScriptedEngine(lambda name, turn: encode(script(name, turn)), max_context)
    return Agent(engine, CHAT, Toolkit(tools, environments), AgentLimits(**{"tool_timeout": HANGS} | limits))


def tasks(count: int, max_tokens: int = 1024, **row: Any) -> list[Task]:
    messages = [{"role": "user", "content": "Go."}]
    return [
        Task(
            f"c{index}", messages, row, SamplingParams(max_tokens), lambda turn, i=index: sample_seed(7, 1, 0, i, turn)
        )
        for index in range(count)
    ]


def have(agent: Agent, asked: list[Task]) -> dict[str, Conversation]:
    return {conversation.trajectory.request_id: conversation for conversation in agent.run(asked)}


def contents(conversation: Conversation, role: str = "tool") -> list[str]:
    return [message["content"] for message in conversation.completion if message["role"] == role]


def test_each_conversation_goes_on_when_its_own_tool_returns() -> None:
    """The first one's tool returns only after the second conversation has ended: in lockstep both would hang."""
    second_ended = threading.Event()

    def wait(who: str) -> str:
        """Wait.

        Args:
            who: For whom.
        """
        assert who != "c0" or second_ended.wait(HANGS)
        return "done"

    agent = make_agent(lambda name, turn: call("wait", who=name) if turn < 3 else "End.", [wait])
    ended = []
    for conversation in agent.run(tasks(2)):
        ended.append((conversation.trajectory.request_id, conversation.turns))
        second_ended.set()
    assert ended == [("c1", 4), ("c0", 4)]


def test_calls_of_one_turn_run_at_the_same_time_and_are_answered_in_their_order() -> None:
    meet = threading.Barrier(2)

    def sync_one(last: bool) -> str:
        """Meet.

        Args:
            last: Whether it is the last.
        """
        meet.wait(HANGS)
        return f"sync {last}"

    loop_meet: list[asyncio.Event] = []

    async def async_one(number: int) -> str:
        """Meet.

        Args:
            number: Of this one.
        """
        if not loop_meet:
            loop_meet.append(asyncio.Event())
            await loop_meet[0].wait()
        loop_meet[0].set()
        return f"async {number}"

    turn_one = "\n".join(
        [call("async_one", number=1), call("sync_one", last=1), call("async_one", number=2), call("sync_one", last=0)]
    )
    agent = make_agent(lambda name, turn: "End." if turn else turn_one, [sync_one, async_one])
    (conversation,) = have(agent, tasks(1)).values()
    assert contents(conversation) == ["async 1", "sync 1", "async 2", "sync 0"]
    assert conversation.tool_calls == 4 and conversation.tool_failures == 0


def test_a_tool_that_raises_gives_its_message_to_the_model() -> None:
    def fail(how: str) -> str:
        """Fail.

        Args:
            how: In which way.
        """
        raise {"value": ValueError("no such city"), "exit": SystemExit(3), "empty": RuntimeError()}[how]

    async def fail_later() -> str:
        """Fail."""
        raise OSError("connection refused")

    turns = [call("fail", how="value"), call("fail", how="exit"), call("fail", how="empty"), call("fail_later")]
    turns += [call("fail"), call("flail"), "End."]
    agent = make_agent(lambda name, turn: turns[turn], [fail, fail_later])
    (conversation,) = have(agent, tasks(1)).values()
    expected = ["no such city", "3", "RuntimeError", "connection refused"]
    assert contents(conversation)[:4] == [str({"error": text}) for text in expected]
    assert "missing 1 required positional argument: 'how'" in contents(conversation)[4]
    assert "there is no tool 'flail'; the tools are: fail, fail_later" in contents(conversation)[5]
    assert (conversation.tool_calls, conversation.tool_failures, conversation.tool_timeouts) == (6, 6, 0)
    assert contents(conversation, "assistant")[-1] == "End."


def test_tools_that_hang_are_cut_off_and_hold_nobody_up() -> None:
    release = threading.Event()

    def hang() -> str:
        """Hang."""
        release.wait(HANGS)
        return "too late"

    async def hang_in_the_loop() -> str:
        """Hang."""
        await asyncio.Event().wait()
        return "never"

    def quick() -> str:
        """Be quick."""
        return "here"

    # A busy machine may not come to what is quick within its time: it has four turns to answer once.
    turns = [f"{call('hang')}\n{call('hang_in_the_loop')}\n{call('quick')}", *[call("quick")] * 3, "End."]
    agent = make_agent(lambda name, turn: turns[turn], [hang, hang_in_the_loop, quick], tool_timeout=0.1, max_threads=1)
    started = time.monotonic()
    conversations = have(agent, tasks(3)).values()
    assert time.monotonic() - started < HANGS / 2
    late = str({"error": "it did not answer within 0.1 s"})
    for conversation in conversations:
        assert contents(conversation)[:2] == [late, late] and "here" in contents(conversation)[2:]
        timeouts = contents(conversation).count(late)
        assert (conversation.tool_failures, conversation.tool_timeouts) == (timeouts, timeouts)
        assert 0.2 <= conversation.tool_seconds < HANGS / 2
    assert agent.statistics.abandoned >= 3  # the threads; coroutines can be cancelled
    release.set()
    have(agent, tasks(1))
    deadline = time.monotonic() + HANGS
    while agent.statistics.abandoned > 1 and time.monotonic() < deadline:  # those of before come back
        have(agent, tasks(1))
    assert agent.statistics.abandoned <= 1


def test_a_coroutine_that_blocks_the_loop_does_not_stop_others_for_good() -> None:
    release = threading.Event()

    async def block(first: bool) -> str:
        """Block.

        Args:
            first: Whether to block.
        """
        if first:
            release.wait(HANGS)
        return "free"

    turns = [call("block", first=1), *[call("block", first=0)] * 4, "End."]
    agent = make_agent(lambda name, turn: turns[turn], [block], tool_timeout=0.7)
    (conversation,) = have(agent, tasks(1)).values()
    release.set()
    assert "it did not answer" in contents(conversation)[0]
    assert "free" in contents(conversation)[2:]


def echo(size: int) -> str:
    """Say a word again and again.

    Args:
        size: How often.
    """
    return "word " * size


def test_the_limit_on_tokens_counts_what_the_model_samples_only() -> None:
    turn_tokens = len(encode(call("echo", size=200)))
    limit = 3 * turn_tokens + 5
    agent = make_agent(lambda name, turn: call("echo", size=200), [echo])
    (conversation,) = have(agent, tasks(1, max_tokens=limit)).values()
    trajectory = conversation.trajectory
    assert trajectory.num_sampled == limit and len(trajectory.completion_ids) > 3 * limit
    assert (conversation.ended, trajectory.finish_reason, conversation.turns) == ("tokens", "length", 4)
    assert [segment.source for segment in trajectory.segments] == ["model", "environment"] * 3 + ["model"]
    assert sum(trajectory.completion_mask) == limit
    asked = [request.sampling.max_tokens for request in agent.engine.requests]
    assert asked == [limit, limit - turn_tokens, limit - 2 * turn_tokens, 5]


def test_calls_are_not_run_where_no_token_is_left_for_an_answer() -> None:
    def never() -> str:
        """Never run."""
        raise AssertionError

    agent = make_agent(lambda name, turn: call("never"), [never])
    (conversation,) = have(agent, tasks(1, max_tokens=len(encode(call("never"))))).values()
    assert (conversation.ended, conversation.tool_calls) == ("tokens", 0)
    assert conversation.completion[-1]["tool_calls"]


def test_a_result_that_does_not_fit_the_context_ends_the_conversation() -> None:
    agent = make_agent(
        lambda name, turn: call("echo", size=[5, 5000, 10_000_000][int(name[1:])]), [echo], max_context=900
    )
    prompt = len(CHAT.prompt_ids([{"role": "user", "content": "Go."}], agent.toolkit.schemas))
    found = have(agent, tasks(3, max_tokens=900 - prompt))
    for name, turns in {"c1": 1, "c2": 1}.items():
        conversation = found[name]
        assert (conversation.ended, conversation.trajectory.finish_reason) == ("context", "length")
        assert conversation.turns == turns
        assert [message["role"] for message in conversation.completion] == ["assistant"]
        assert len(conversation.trajectory.segments) == 1
    assert found["c0"].turns > 5 and found["c0"].trajectory.segments[-1].source == "model"
    tokens = found["c0"].trajectory.prompt_ids + found["c0"].trajectory.completion_ids
    assert 700 < len(tokens) <= 900


def test_the_limit_on_rounds() -> None:
    agent = make_agent(lambda name, turn: call("echo", size=1), [echo], max_tool_rounds=2)
    (conversation,) = have(agent, tasks(1)).values()
    assert (conversation.ended, conversation.turns, conversation.tool_calls) == ("rounds", 3, 2)
    assert conversation.trajectory.finish_reason == "stop" and conversation.completion[-1]["tool_calls"]
    agent = make_agent(lambda name, turn: call("echo", size=1), [echo], max_tool_rounds=0)
    (conversation,) = have(agent, tasks(1)).values()
    assert (conversation.ended, conversation.turns, conversation.tool_calls) == ("rounds", 1, 0)


def test_the_limit_on_a_conversations_time() -> None:
    release = threading.Event()

    def hang() -> str:
        """Hang."""
        release.wait(HANGS)
        return "late"

    agent = make_agent(lambda name, turn: call("hang"), [hang], conversation_timeout=0.1)
    (conversation,) = have(agent, tasks(1)).values()
    release.set()
    assert (conversation.ended, conversation.trajectory.finish_reason, conversation.turns) == ("time", "length", 1)
    assert [message["role"] for message in conversation.completion] == ["assistant"]


def test_seeds_are_of_the_turn() -> None:
    agent = make_agent(lambda name, turn: call("echo", size=1) if turn < 2 else "End.", [echo])
    have(agent, tasks(2))
    seeds = {request.request_id: request.seed for request in agent.engine.requests}
    assert seeds == {f"c{i}/{turn}": sample_seed(7, 1, 0, i, turn) for i in range(2) for turn in range(3)}


def test_waiting_for_tools_costs_no_cpu_and_is_counted_as_idle() -> None:
    def nap() -> str:
        """Sleep until most of the time was spent in waiting."""
        while agent.statistics.idle_seconds < 0.3 or agent.statistics.idle_share <= 0.5:
            time.sleep(0.02)
        return "awake"

    agent = make_agent(lambda name, turn: "End." if turn else call("nap"), [nap])
    before = time.thread_time()
    found = have(agent, tasks(8))
    assert time.thread_time() - before < 0.3
    assert [contents(conversation) for conversation in found.values()] == [["awake"]] * 8
    assert agent.statistics.idle_share == agent.statistics.idle_seconds / agent.statistics.seconds


def test_reproducible_conversations_do_not_depend_on_how_long_tools_take() -> None:
    """The engine makes no step while a tool runs, and gets what goes on in an order of the conversations' own."""

    def course(naps: dict[int, float]) -> list[str]:
        steps: list[str] = []

        def nap(number: int) -> str:
            """Sleep.

            Args:
                number: Of the conversation.
            """
            before = len(steps)
            time.sleep(naps[number])
            return "held" if len(steps) == before else "not held"

        def script(name: str, turn: int) -> str:
            steps.append(f"{name}/{turn}")
            return "End." if turn == 3 else call("nap", number=int(name[1:]))

        agent = make_agent(script, [nap], reproducible=True)
        replies = [text for c in have(agent, tasks(3)).values() for text in contents(c)]
        assert set(replies) == {"held"}
        return steps

    slow_first, slow_last = {0: 0.06, 1: 0.03, 2: 0.0}, {0: 0.0, 1: 0.03, 2: 0.06}
    assert course(slow_first) == course(slow_last)


def test_what_environments_give_as_reward_comes_with_the_conversation() -> None:
    class Judged:
        def reset(self, verdict: str) -> None:
            self.verdict = verdict

        async def get_reward(self) -> float:
            if self.verdict == "hangs":
                await asyncio.Event().wait()
            return {"good": 1.0}[self.verdict]

    for verdict in ("good", "bad", "hangs"):
        limit = 1.0 if verdict == "hangs" else HANGS
        agent = make_agent(lambda name, turn: "End.", environments=Judged, tool_timeout=limit)
        (conversation,) = have(agent, tasks(1, verdict=verdict)).values()
        assert conversation.reward == (1.0 if verdict == "good" else None)
        assert isinstance(conversation.reward_error, KeyError) == (verdict == "bad")
        assert conversation.tool_timeouts == (verdict == "hangs")


class Counter:
    """An environment that counts."""

    made = 0

    def __init__(self) -> None:
        type(self).made += 1
        self.number, self.value, self.log = type(self).made, 0, list[str]()

    def reset(self, start: int, **row: Any) -> str:
        self.value, self.log = start, []
        return f" It starts at {start}."

    def up(self, by: int) -> int:
        """Count up.

        Args:
            by: How far.
        """
        self.value += by
        self.log.append(f"+{by}")
        return self.value

    async def double(self) -> int:
        """Double the value."""
        before = self.value
        await asyncio.sleep(0.01)
        self.value = 2 * before
        self.log.append("x2")
        return self.value

    def get_reward(self) -> float:
        return float(self.value)

    def _hidden(self) -> None: ...


@pytest.fixture
def counter() -> Iterator[type[Counter]]:
    Counter.made = 0
    yield Counter


def test_environments_are_told_the_row_and_asked_in_the_order_of_the_calls(counter: type[Counter]) -> None:
    turn_one = "\n".join([call("up", by=1), call("double"), call("up", by=3), call("double")])
    agent = make_agent(lambda name, turn: "End." if turn else turn_one, environments=counter)
    found = have(agent, tasks(3, start=10))
    for conversation in found.values():
        assert contents(conversation) == ["11", "22", "25", "50"]
        assert conversation.environment.log == ["+1", "x2", "+3", "x2"]
        assert conversation.environment.get_reward() == 50.0
        assert conversation.prompt == [{"role": "user", "content": "Go. It starts at 10."}]
        prompt = TOKENIZER.decode(conversation.trajectory.prompt_ids)
        assert "Go. It starts at 10.<|im_end|>" in prompt
        assert '"name": "up"' in prompt and "get_reward" not in prompt and "_hidden" not in prompt
    assert len({id(conversation.environment) for conversation in found.values()}) == 3


def test_instances_are_used_again_once_they_are_released(counter: type[Counter]) -> None:
    agent = make_agent(lambda name, turn: "End.", environments=counter)
    have(agent, tasks(3, start=0))
    assert counter.made == 3  # the one that was looked at in the beginning among them
    have(agent, tasks(2, start=0))
    assert counter.made == 5
    agent.release()
    assert {conversation.environment.number for conversation in have(agent, tasks(5, start=0)).values()} == set(
        range(1, 6)
    )


def test_an_environment_that_hung_is_not_used_again(counter: type[Counter]) -> None:
    release = threading.Event()

    class Hanging(counter):  # type: ignore[misc, valid-type]
        def hang(self) -> str:
            """Hang."""
            release.wait(HANGS)
            return "late"

    turns = [call("hang"), "End."]
    agent = make_agent(lambda name, turn: turns[turn], environments=Hanging, tool_timeout=0.5)
    (conversation,) = have(agent, tasks(1, start=0)).values()
    agent.release()
    (other,) = have(agent, tasks(1, start=0)).values()
    release.set()
    assert conversation.environment is not other.environment


def test_a_row_chooses_among_named_environments(counter: type[Counter]) -> None:
    class Other:
        def reset(self, **row: Any) -> None:
            assert "environment" not in row

        def look(self) -> str:
            """Look around."""
            return "nothing"

    agent = make_agent(
        lambda name, turn: "End." if turn else call("look"), environments={"count": counter, "other": Other}
    )
    (other,) = have(agent, tasks(1, environment="other")).values()
    assert contents(other) == ["nothing"] and other.prompt == [{"role": "user", "content": "Go."}]
    assert '"name": "up"' not in TOKENIZER.decode(other.trajectory.prompt_ids)
    (count,) = have(agent, tasks(1, environment="count", start=1)).values()
    assert "there is no tool 'look'; the tools are: double, up" in contents(count)[0]
    with pytest.raises(
        ValueError, match="a prompt: there is no environment 'third' in environment_factory, only count"
    ):
        have(agent, tasks(1, environment="third"))


def test_a_reset_that_fails_is_tried_once_more_in_a_new_instance() -> None:
    class Shaky:
        made = 0

        def __init__(self) -> None:
            type(self).made += 1
            self.number = type(self).made

        def reset(self, works: int, **row: Any) -> None:
            if self.number < works:
                raise OSError("no sandbox to be had")

    agent = make_agent(lambda name, turn: "End.", environments=Shaky)
    (conversation,) = have(agent, tasks(1, works=2)).values()
    assert conversation.environment.number == 2
    message = (
        r"a prompt: Shaky\.reset failed 2 times.*raised OSError: no sandbox to be had\n  row: \{'works': 9\}\n  Remedy"
    )
    with pytest.raises(EnvironmentFailure, match=message) as failed:
        have(make_agent(lambda name, turn: "End.", environments=Shaky), tasks(1, works=9))
    assert isinstance(failed.value.__cause__, OSError)


def test_a_prompt_that_does_not_fit_is_named() -> None:
    agent = make_agent(lambda name, turn: "End.", [echo], max_context=100)
    with pytest.raises(ValueError, match=r"a prompt: the prompt has \d+ tokens with its tools, at most 99 fit"):
        have(agent, tasks(1, max_tokens=10))


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"tool_timeout": 0.0}, "tool_timeout must be above 0"),
        ({"conversation_timeout": -1.0}, "conversation_timeout must be above 0"),
        ({"max_tool_rounds": -1}, "max_tool_rounds must not be negative"),
        ({"max_threads": 0}, "max_threads must be at least 1"),
    ],
)
def test_bad_limits(limits: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_agent(lambda name, turn: "End.", [echo], **limits)
