"""How families write tool calls, as `response_template`s of transformers, and the way for those that have none."""

import copy
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import add_response_schema

FUNCTION = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THINKING = {"open": "<think>", "close_pattern": r"</think>\s*", "content": "text"}


@dataclass(frozen=True)
class CallSyntax:
    """One way to write a call.

    Attributes:
        template: the `response_template` that reads it.
        meant: a pattern which says that a call was meant: where the content has it, the call is malformed.
        example: what to write, for the model that got it wrong.
    """

    template: dict[str, Any]
    meant: str | None = None
    example: str = ""


def known_syntaxes(tokenizer: PreTrainedTokenizerBase, opening: str, ends: Sequence[str]) -> list[CallSyntax]:
    """The syntaxes to try on a chat template, the likeliest first.

    Args:
        tokenizer: whose own `response_template`, where it has one, is the only candidate.
        opening: what the template writes before the model's turn.
        ends: the texts of the tokens that end a turn.
    """
    own = getattr(tokenizer, "response_template", None)
    if own is not None:
        return [CallSyntax(own)]
    syntaxes = [_hermes(opening, ends), _llama(opening, ends), _mistral(opening, ends), _mistral_list(opening, ends)]
    with suppress(ValueError):  # TRL knows some more templates by their text; it writes into the tokenizer
        syntaxes.append(CallSyntax(add_response_schema(copy.copy(tokenizer)).response_template))
    return syntaxes


def prompted_syntax(opening: str, ends: Sequence[str]) -> CallSyntax:
    """For templates without tools: the calls that `tool_instructions` ask for, also inside a Markdown fence.

    It is what Google documents for Gemma 3 (ai.google.dev/gemma/docs/capabilities/function-calling).
    """
    fields = {
        "tool_calls": {
            "open_pattern": r'(?:```\w*\s*)?\{\s*"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
            "close_pattern": rf"\}}\s*(?:```\s*)?(?=\s*(?:\{{|```|{_any(ends)}))",
            "repeats": True,
            "content": "json",
            "transform": FUNCTION,
        }
    }
    example = '{"name": function name, "parameters": dictionary of argument name and its value}'
    return CallSyntax(_template(opening, ends, fields), r'\A(?:```\w*)?\s*\{\s*"name"', example)


def tool_instructions(schemas: Sequence[dict[str, Any]], syntax: CallSyntax) -> str:
    """What a model whose template has no place for tools is told about them."""
    functions = json.dumps([schema["function"] for schema in schemas], indent=2)
    return (
        "You have access to functions. If you decide to invoke any of the functions, you MUST put it in the format of\n"
        f"{syntax.example}\n\nYou SHOULD NOT include any other text in the response if you call a function\n{functions}"
    )


def tool_output(messages: Sequence[dict[str, Any]]) -> str:
    """The results of calls as a user's message, for templates without a tool's role."""
    return "\n".join(f"```tool_output\n{message['content']}\n```" for message in messages)


def _any(ends: Sequence[str]) -> str:
    return "|".join([*map(re.escape, ends), "$"])


def _template(opening: str, ends: Sequence[str], fields: dict[str, Any]) -> dict[str, Any]:
    """A response template; what follows the start of a turn up to a thinking tag is not part of the message."""
    content = {"close_pattern": rf"(?:{_any(ends)})\s*", "content": "text"}
    anchor = opening.split("<think>")[0] or "\n"  # one is asked for, also where a turn has no start
    return {"defaults": {"role": "assistant"}, "start_anchor": anchor, "fields": {**fields, "content": content}}


def _hermes(opening: str, ends: Sequence[str]) -> CallSyntax:
    """Qwen2.5, Qwen3, Hermes: <tool_call>{"name": ..., "arguments": {...}}</tool_call>, any number of them."""
    calls = {
        "open": "<tool_call>",
        "close_pattern": r"</tool_call>\s*",
        "repeats": True,
        "content": "json",
        "transform": {"type": "function", "function": "{content}"},
    }
    example = '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    fields = {"reasoning_content": THINKING, "tool_calls": calls}
    return CallSyntax(_template(opening, ends, fields), "</?tool_call>", example)


def _llama(opening: str, ends: Sequence[str]) -> CallSyntax:
    """Llama 3.1 and 3.2: {"name": ..., "parameters": {...}}, maybe after <|python_tag|>; more than one after a `;`."""
    calls = {
        "open_pattern": r'(?:<\|python_tag\|>)?\s*\{\s*"name":\s*"(?P<name>[^"]+)",\s*"parameters":\s*',
        "close_pattern": rf"\}}\s*;?(?=\s*(?:\{{|{_any(ends)}))",
        "repeats": True,
        "content": "json",
        "transform": FUNCTION,
    }
    example = '{"name": function name, "parameters": dictionary of argument name and its value}'
    meant = r'<\|python_tag\|>|\A\{\s*"name"'
    return CallSyntax(_template(opening, ends, {"tool_calls": calls}), meant, example)


def _mistral(opening: str, ends: Sequence[str]) -> CallSyntax:
    """Mistral since 2025: [TOOL_CALLS]name[ARGS]{...}, any number of them."""
    calls = {
        "open_pattern": r"\[TOOL_CALLS\]\s*(?P<name>[\w.-]+)\s*(?:\[CALL_ID\]\s*\w+\s*)?(?:\[ARGS\])?\s*(?=\{)",
        "close_pattern": rf"(?=\[TOOL_CALLS\]|{_any(ends)})",
        "repeats": True,
        "content": "json",
        "transform": FUNCTION,
    }
    example = "[TOOL_CALLS]name[ARGS]{arguments}"
    return CallSyntax(_template(opening, ends, {"tool_calls": calls}), r"\[(?:TOOL_CALLS|ARGS)\]", example)


def _mistral_list(opening: str, ends: Sequence[str]) -> CallSyntax:
    """Mistral 7B v0.3 to 2024: [TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]."""
    calls = {"open": "[TOOL_CALLS]", "close_pattern": rf"(?={_any(ends)})", "content": "json"}
    example = '[TOOL_CALLS] [{"name": name, "arguments": {arguments}}]'
    return CallSyntax(_template(opening, ends, {"tool_calls": calls}), r"\[TOOL_CALLS\]", example)
