"""Between messages and tokens: what a chat template says, without ever encoding again what a model has sampled.

A conversation's tokens only grow: prompt, sampled turn, the environment's reply, sampled turn, ... The template gives
the prompt and, as a suffix, each reply with the start of the next turn. Where the template would write an earlier turn
differently (Qwen3 leaves out the thinking of past turns), the tokens that were sampled stay.
"""

import copy
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import supports_tool_calling

from .call_syntax import CallSyntax, known_syntaxes, prompted_syntax, tool_instructions, tool_output
from .message_parts import MessageParts

Message = dict[str, Any]
Schema = dict[str, Any]
SENTINEL, RESULT = "zq7sentinel7qz", "result7q"  # texts that no template writes
ARGUMENT = "text"
CALL_ID = "abcdefghi"  # nine letters or digits, as Mistral's templates demand
PROBE_TOOL: Schema = {
    "type": "function",
    "function": {
        "name": "probe",
        "description": "A probe.",
        "parameters": {
            "type": "object",
            "properties": {ARGUMENT: {"type": "string", "description": "Some text."}},
            "required": [ARGUMENT],
        },
    },
}


@dataclass(frozen=True)
class ToolRequest:
    """A call the model asked for; `id` is there where templates need one."""

    name: str
    arguments: dict[str, Any]
    id: str


@dataclass(frozen=True)
class Turn:
    """What a sampled turn says.

    Attributes:
        message: by the assistant, with `tool_calls` where there are any.
        requests: those calls.
        problem: why a call that was meant cannot be read, or None; there are no requests then.
    """

    message: Message
    requests: list[ToolRequest]
    problem: str | None = None


class Chat(Protocol):
    """What a conversation needs to know of a model's format."""

    def prompt_ids(self, messages: Sequence[Message], schemas: Sequence[Schema]) -> list[int]:
        """The tokens up to where the model's first turn starts."""
        ...

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens between the end of a sampled turn and the start of the next, for the results of its calls."""
        ...

    def read(self, token_ids: Sequence[int], schemas: Sequence[Schema], number: int) -> Turn:
        """What a sampled turn says, the `number`-th of its conversation."""
        ...


class ChatFormat:
    """`Chat` by a tokenizer's chat template.

    How its model writes calls is found out at the start: a call that the template writes must be read back the same.
    A template that has no tools (Gemma 3) gets them described in the first message, and results as a user's message.

    Args:
        tokenizer: with a chat template; a `response_template` of its own is used, else the known ones are tried.
        stop_token_ids: what ends a turn.
        template_kwargs: passed to the chat template.

    Attributes:
        native: whether the template itself has tools.
        syntax: how calls are written.

    Raises:
        ValueError: there is no chat template, it does not end turns with a stop token, or its calls cannot be read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        template_kwargs: dict[str, Any] | None = None,
    ):
        if not tokenizer.chat_template:
            raise ValueError("tools need a chat template, and the tokenizer has none; set tokenizer.chat_template")
        self._tokenizer, self._kwargs = tokenizer, dict(template_kwargs or {})
        self._parts = MessageParts(tokenizer, self._kwargs)
        self._ends = [str(tokenizer.convert_ids_to_tokens(token)) for token in stop_token_ids]
        self.native = supports_tool_calling(tokenizer) or self._renders_tools()
        question = [{"role": "user", "content": "?"}]
        self._opening = self._render(question, start=True)[len(self._render(question)) :]
        self.syntax = self._find_syntax() if self.native else prompted_syntax(self._opening, self._ends)
        reply = [_probe_reply("probe")]
        if self._split(reply)[1] != self._split(reply, [PROBE_TOOL])[1]:
            raise ValueError(
                "the chat template writes a tool's result differently where tools are listed, so that it cannot be "
                "appended to what the model has sampled; change tokenizer.chat_template"
            )
        self.reply_ids(reply)

    def prompt_ids(self, messages: Sequence[Message], schemas: Sequence[Schema]) -> list[int]:
        """The tokens up to where the model's first turn starts, with the tools described."""
        self._parts.check(messages)
        if schemas and not self.native:
            first = messages[0]
            told = tool_instructions(schemas, self.syntax) + "\n\n"
            content = first["content"]
            content = told + content if isinstance(content, str) else [{"type": "text", "text": told}, *content]
            messages, schemas = [{**first, "content": content}, *messages[1:]], []
        return self._encode(self._render(messages, schemas, start=True))

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens that follow a sampled turn: the results of its calls and the start of the next turn.

        Args:
            messages: of the role `tool`, with `name`, `tool_call_id` and `content`.
        """
        said, reply = self._split(messages)
        head, whole = self._encode(said), self._encode(said + reply)
        if whole[: len(head)] != head:
            raise ValueError(
                "the tokenizer joins the end of a turn with what follows it, so that a reply cannot be appended to "
                f"sampled tokens; is one of {', '.join(self._ends)} a special token of it?"
            )
        return whole[len(head) :]

    def read(self, token_ids: Sequence[int], schemas: Sequence[Schema], number: int) -> Turn:
        """What a sampled turn says. A call that cannot be read is a `problem` to be told to the model."""
        text = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=False))
        try:
            message = self._parse(text, self.syntax, schemas)
            requests = [_request(call, number, index) for index, call in enumerate(_calls(message))]
            if not requests and self.syntax.meant and re.search(self.syntax.meant, message["content"]):
                raise ValueError("it is not in the right form")
            if requests:
                self._split([_probe_reply(request.name, request.id) for request in requests])  # may it be answered?
            # Copies: a tool may change what it is given, and what the model has said is recorded.
            said = [
                {"type": "function", "function": {"name": request.name, "arguments": copy.deepcopy(request.arguments)}}
                for request in requests
            ]
        except (ValueError, TypeError, KeyError, TemplateError, RecursionError) as error:
            # TemplateError: an id that the template refuses; RecursionError: brackets within brackets within ...
            plain = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = f"; write {self.syntax.example}" if self.syntax.example else ""
            return Turn({"role": "assistant", "content": plain}, [], f"the tool call cannot be read: {reason}{hint}")
        if requests:
            message["tool_calls"] = said
        else:
            message.pop("tool_calls", None)
        return Turn(message, requests)

    # ---- the template ------------------------------------------------------------------------------------------------

    def _render(self, messages: Sequence[Message], schemas: Sequence[Schema] = (), start: bool = False) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                list(messages),
                tools=list(schemas) or None,
                add_generation_prompt=start,
                tokenize=False,
                **self._kwargs,
            )
        )

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _renders_tools(self) -> bool:
        """Whether calls and results appear where calls have an id, without which some templates refuse them."""
        try:
            text = self._render([*_probe_call("probe"), _probe_reply("probe")])
        except (TemplateError, TypeError, KeyError):
            return False
        return all(part in text for part in ("probe", SENTINEL, RESULT))

    def _split(self, messages: Sequence[Message], schemas: Sequence[Schema] = ()) -> tuple[str, str]:
        """A small conversation up to the end of the assistant's turn, and `messages` as they go on from there."""
        if self.native:
            text = self._render([*_probe_call(messages[0]["name"]), *messages], schemas, start=True)
        else:
            said = {"role": "assistant", "content": SENTINEL}
            results = {"role": "user", "content": tool_output(messages)}
            text = self._render([{"role": "user", "content": "?"}, said, results], start=True)
        start = text.find(SENTINEL)
        ends = [(text.find(end, start), len(end)) for end in self._ends if text.find(end, start) >= 0]
        if start < 0 or not ends:
            raise ValueError(
                f"the chat template does not end an assistant's turn with a stop token ({', '.join(self._ends)}); "
                "set the tokenizer's eos_token, or the generation config's eos_token_id, to the one it uses"
            )
        end = sum(min(ends))
        return text[:end], text[end:]

    def _find_syntax(self) -> CallSyntax:
        """The first syntax that reads what the template writes."""
        question, call = _probe_call("probe")
        asked, whole = self._render([question], start=True), self._render([question, call])
        for syntax in known_syntaxes(self._tokenizer, self._opening, self._ends):
            if whole.startswith(asked) and self._reads_back(whole[len(asked) :], syntax):
                return syntax
        raise ValueError(
            "how this model writes tool calls is not known: no known syntax reads the call that its chat template "
            "writes. Set tokenizer.response_template (transformers documents it under response parsing)"
        )

    def _reads_back(self, text: str, syntax: CallSyntax) -> bool:
        try:
            calls = _calls(self._parse(text, syntax, [PROBE_TOOL]))
            requests = [_request(call, 0, index) for index, call in enumerate(calls)]
        except (ValueError, TypeError, KeyError):
            return False
        return [(request.name, request.arguments) for request in requests] == [("probe", {ARGUMENT: SENTINEL})]

    def _parse(self, text: str, syntax: CallSyntax, schemas: Sequence[Schema]) -> Message:
        message: Message = self._tokenizer.parse_response(
            text, syntax.template, prefix=self._opening, tools=list(schemas)
        )
        message["content"] = message.get("content") or ""
        return message


def _probe_call(name: str) -> list[Message]:
    """A question, and an assistant's turn that calls a tool with the sentinel among its arguments."""
    function = {"name": name, "arguments": {ARGUMENT: SENTINEL}}
    call = {"type": "function", "id": CALL_ID, "function": function}
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]


def _probe_reply(name: str, call_id: str = CALL_ID) -> Message:
    return {"role": "tool", "name": name, "tool_call_id": call_id, "content": RESULT}


def _calls(message: Message) -> list[Any]:
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise ValueError("the calls are not a list")
    return calls


def _request(call: Any, turn: int, index: int) -> ToolRequest:
    """A call as parsed, nested in `function` or not, checked."""
    if not isinstance(call, dict):
        raise ValueError(f"a call is an object with name and arguments, not {call!r}")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError("a call has no name")
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, dict | None):
        raise ValueError("the arguments are not an object")
    json.dumps([function["name"], arguments], ensure_ascii=False).encode()  # raises where "\\ud800" stands alone
    given = call.get("id")
    return ToolRequest(
        function["name"],
        arguments or {},
        given if isinstance(given, str) else f"{turn % 10000:04d}{index % 100000:05d}",
    )
