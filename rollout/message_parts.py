"""Whether a chat template writes what messages hold: contents may be texts, or lists of parts, which many leave out."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

PROBE = "zq7part7qz"  # a text that no template writes


class MessageParts:
    """Looks for contents that a tokenizer's chat template would not write, or not as they are.

    Args:
        tokenizer: whose chat template it is; only looked at where a content is a list of parts.
        template_kwargs: passed to the chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any]):
        self._tokenizer, self._kwargs = tokenizer, template_kwargs

    def check(self, messages: Iterable[Any]) -> None:
        """Raise ValueError for the first content that is None, holds what is no text, or would not be written."""
        for message in messages:
            if not isinstance(message, dict) or "content" not in message:
                continue
            role, content = message.get("role"), message["content"]
            if content is None and role != "assistant":  # whose turns may be nothing but calls of tools
                raise ValueError(f"the content of a message of the role {role!r} is None: give a text")
            if not isinstance(content, list):
                continue
            others = [part for part in content if not isinstance(part, dict) or part.get("type") != "text"]
            if others:
                raise ValueError(f"a message has the part {others[0]!r:.100}: prompts are text only")
            if not self._are_written:
                raise ValueError(
                    "the content of a message is a list of parts, which this chat template does not write: give it as "
                    "a text"
                )

    @cached_property
    def _are_written(self) -> bool:
        """Many templates write nothing of a list of text parts, or Python's repr."""
        probe: list[dict[str, Any]] = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
        try:
            text = str(
                self._tokenizer.apply_chat_template(probe, tokenize=False, add_generation_prompt=True, **self._kwargs)
            )
        except (ValueError, TypeError, KeyError, TemplateError):
            return False
        return PROBE in text and "'text'" not in text and '"text"' not in text
