"""What models, tools and environments may come up with: none of it stops a run that could go on."""

import asyncio
import threading
import time
from typing import Any

import pytest
from colora.rollout.toolkit import EnvironmentFailure, Toolkit

from .test_agent import HANGS, call, contents, have, make_agent, tasks
from .test_chat_format import CALLS, converse, ended


def raw(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words for it")


def test_results_that_cannot_be_written_are_errors_or_mended() -> None:
    def give(what: str) -> Any:
        """Give something.

        Args:
            what: What to give.
        """
        if what == "error":
            raise Unspeakable
        return {"number": 10**5000, "object": Unspeakable(), "name": "a\udc80\u00e9\0", "nothing": None}[what]

    async def give_later() -> Any:
        """Give something."""
        return Unspeakable()

    turns = [call("give", what=what) for what in ("number", "object", "name", "nothing", "error")]
    agent = make_agent(lambda name, turn: [*turns, call("give_later"), "End."][turn], [give, give_later])
    (conversation,) = have(agent, tasks(1)).values()
    number, *others = contents(conversation)
    assert "Exceeds the limit (4300 digits)" in number
    unspeakable = str({"error": "no words for it"})
    assert others == [unspeakable, "a?\u00e9\0", "None", str({"error": "Unspeakable"}), unspeakable]
    assert conversation.tool_failures == 4 and conversation.ended == "answer"


def echo(text: Any) -> str:
    """Say it again.

    Args:
        text: What to say.
    """
    return str(text)


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (raw("echo", '{"text": "\\ud83d"}'), "surrogates not allowed"),
        (raw("\\ud83d", "{}"), "surrogates not allowed"),
        (raw("echo", '{"text": ' + "[" * 700 + "]" * 700 + "}"), "maximum recursion depth"),
        (raw("echo", '{"text": ' + "[" * 2000), ""),  # its parser's words differ between versions of transformers
        (raw("echo", '{"text": ' + "9" * 5000 + "}"), "Exceeds the limit"),
    ],
    ids=["surrogate", "surrogate-name", "deep", "deeper", "long-number"],
)
def test_calls_that_parse_but_cannot_be_used_are_malformed(written: str, reason: str) -> None:
    agent = make_agent(lambda name, turn: [written, "End."][turn], [echo], max_context=50_000)
    (conversation,) = have(agent, tasks(1, max_tokens=20_000)).values()
    (told,) = contents(conversation)
    assert "the tool call cannot be read" in told and reason in told
    assert conversation.malformed_calls == 1 and conversation.ended == "answer"


def test_an_id_that_the_template_refuses_makes_a_call_malformed() -> None:
    """Mistral's template raises for an id that has not nine letters or digits."""
    family = "mistral-v0.3"
    wrong = CALLS[family].replace("abc123XYZ", "abc")
    _, conversation, _ = converse(family, [wrong, CALLS[family], ended(family, "46")])
    assert "IDs should be alphanumeric strings with length 9" in conversation.completion[1]["content"]
    assert conversation.completion[3]["content"] == "46" and conversation.malformed_calls == 1


def test_a_tool_that_changes_its_arguments_does_not_change_what_the_model_has_said() -> None:
    def order(values: list[int]) -> list[int]:
        """Sort.

        Args:
            values: Some numbers.
        """
        values.sort()
        return values

    agent = make_agent(lambda name, turn: "End." if turn else call("order", values=[3, 1, 2]), [order])
    (conversation,) = have(agent, tasks(1)).values()
    assert contents(conversation) == ["[1, 2, 3]"]
    assert conversation.completion[0]["tool_calls"][0]["function"]["arguments"] == {"values": [3, 1, 2]}


class Board:
    def reset(self, board: list[int]) -> str:
        self.board = board
        self.board.append(1)
        return str(self.board)


def test_an_environment_may_change_its_row_which_is_that_of_others_too() -> None:
    board = [0]
    found = have(make_agent(lambda name, turn: "End.", environments=Board), tasks(3, board=board))
    assert [conversation.prompt[0]["content"] for conversation in found.values()] == ["Go.[0, 1]"] * 3
    assert board == [0]


@pytest.mark.parametrize("observation", [5, [{"type": "text", "text": "blocks"}], "\udc80"])
def test_what_reset_returns_and_the_template_cannot_write_is_named(observation: Any) -> None:
    class Odd:
        def reset(self, **row: Any) -> Any:
            return observation

    with pytest.raises(ValueError, match="a prompt: the chat template cannot write the prompt, to which .*reset"):
        have(make_agent(lambda name, turn: "End.", environments=Odd), tasks(1))


def test_calls_of_a_run_that_failed_do_not_come_back_in_the_next() -> None:
    class Late:
        def reset(self, seconds: float | None) -> None:
            if seconds is None:
                raise OSError("no sandbox")
            self.seconds = seconds
            time.sleep(seconds)

    agent = make_agent(lambda name, turn: "End.", environments=Late)
    with pytest.raises(RuntimeError, match="no sandbox"):
        have(agent, [*tasks(3, seconds=0.05), *tasks(1, seconds=None)])
    found = list(agent.run(tasks(4, seconds=0.2)))
    assert sorted(conversation.trajectory.request_id for conversation in found) == ["c0", "c1", "c2", "c3"]
    assert all(conversation.environment.seconds == 0.2 for conversation in found)


def test_an_environment_that_cannot_be_made_is_named() -> None:
    class Scarce:
        left = 2

        def __init__(self) -> None:
            type(self).left -= 1
            if self.left < 0:
                raise OSError("no sandbox")

        def reset(self, **row: Any) -> None: ...

    with pytest.raises(EnvironmentFailure, match="a prompt: environment_factory made no .* OSError: no sandbox. Mend"):
        have(make_agent(lambda name, turn: "End.", environments=Scarce), tasks(3))


@pytest.mark.parametrize("leave", ["interrupt", "stop"])
def test_whoever_leaves_in_the_middle_leaves_an_idle_engine(leave: str, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = make_agent(lambda name, turn: "End.")
    step, steps = agent.engine.step, iter([None, KeyboardInterrupt])

    def interrupted() -> Any:
        problem = next(steps, None)
        if problem is not None and leave == "interrupt":
            raise problem
        return step()

    monkeypatch.setattr(agent.engine, "step", interrupted)
    running = agent.run(tasks(3))
    assert next(running).ended == "answer"
    if leave == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            next(running)
    running.close()
    assert agent.engine.unfinished == 0
    assert sorted(have(agent, tasks(3))) == ["c0", "c1", "c2"]


def test_threads_of_coroutines_do_not_wait_for_each_other_and_not_at_the_end() -> None:
    release = threading.Event()

    async def work(hangs: bool) -> str:
        """Work.

        Args:
            hangs: Whether it hangs.
        """
        if hangs:
            await asyncio.to_thread(release.wait, HANGS)
        return str(await asyncio.to_thread(lambda: threading.current_thread().daemon))

    hung = "\n".join(call("work", hangs=1) for _ in range(40))  # more than a default executor has threads
    turns = [hung, *[call("work", hangs=0)] * 3, "End."]  # one of three is in time on a busy machine too
    agent = make_agent(lambda name, turn: turns[turn], [work], tool_timeout=1.0)
    (conversation,) = have(agent, tasks(1, max_tokens=4096)).values()
    release.set()
    assert all("it did not answer" in text for text in contents(conversation)[:40])
    assert "True" in contents(conversation)[40:]


def test_what_cannot_be_a_toolkit_is_refused() -> None:
    def forward(a: "Missing") -> None:  # type: ignore[name-defined]  # noqa: F821
        """Do.

        Args:
            a: Something.
        """

    with pytest.raises(ValueError, match="tools is a list of functions, not <function echo"):
        Toolkit(echo)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="environment_factory: .*Board object.* cannot be called; give the class"):
        Toolkit((), Board())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"tool 'forward': name 'Missing' is not defined\. A tool needs type hints"):
        Toolkit([forward])


def test_tools_that_cannot_be_described_are_refused() -> None:
    def untyped(a) -> int:  # type: ignore[no-untyped-def]
        """Do.

        Args:
            a: Something.
        """
        return a

    def undocumented(a: int) -> int:
        return a

    class NoReset:
        def look(self) -> str:
            """Look."""
            return ""

    def several(*numbers: int) -> int:
        """Add.

        Args:
            numbers: What to add.
        """
        return sum(numbers)

    def anything(a: int, **others: str) -> int:
        """Do.

        Args:
            a: Something.
            others: More.
        """
        return a

    def unnamed(a: int, /) -> int:
        """Do.

        Args:
            a: Something.
        """
        return a

    for tool, message in (
        (untyped, "tool 'untyped'.*type hint"),
        (undocumented, "tool 'undocumented'.*docstring"),
        (several, r"tool 'several' takes `\*numbers: int`, which a JSON schema cannot describe.*or take a list"),
        (anything, r"tool 'anything' takes `\*\*others: str`"),
        (unnamed, "tool 'unnamed' takes `a: int`.* by its name"),
    ):
        with pytest.raises(ValueError, match=message):
            Toolkit([tool])
    with pytest.raises(ValueError, match="there are two of the name 'echo'"):
        Toolkit([echo, echo])
    with pytest.raises(ValueError, match="NoReset has no method `reset`"):
        Toolkit((), NoReset)
