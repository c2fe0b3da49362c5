"""A chat for random models: whatever they sample is a call, until their last turn."""

import zlib
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from colora.rollout.chat_format import Message, ToolRequest, Turn
from colora.rollout.conversation import Conversation
from colora.rollout.trajectory import Trajectory

STOPS = tuple(range(8))  # of a hundred tokens or so: a turn has about a dozen


class Napping:
    """`Chat` in which prompts are given as ids, and each turn but the last calls `nap` with what was sampled.

    Args:
        turns: of each conversation.
        reply_tokens: of each reply of the environment; they depend on what the tool said.
        vocab_size: of the model.
    """

    def __init__(self, turns: int, reply_tokens: int, vocab_size: int):
        self.turns, self.reply_tokens, self.vocab_size = turns, reply_tokens, vocab_size

    def prompt_ids(self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]) -> list[int]:
        return list(messages[0]["content"])

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        first = zlib.crc32(messages[0]["content"].encode())
        return [len(STOPS) + (first + 7 * index) % (self.vocab_size - len(STOPS)) for index in range(self.reply_tokens)]

    def read(self, token_ids: Sequence[int], schemas: Sequence[dict[str, Any]], number: int) -> Turn:
        message = {"role": "assistant", "content": str(list(token_ids))}
        if number == self.turns - 1:
            return Turn(message, [])
        return Turn(message, [ToolRequest("nap", {"heard": sum(token_ids)}, "")])


def check_tokens(conversation: Conversation, sampled: Sequence[Trajectory]) -> None:
    """Each turn saw the tokens of all before it, and what is stored, and trained, is what was sampled in it.

    Args:
        sampled: what the engine returned for this conversation, in order.
    """
    trajectory = conversation.trajectory
    model = [segment for segment in trajectory.segments if segment.source == "model"]
    assert [segment.token_ids for segment in model] == [turn.segments[0].token_ids for turn in sampled]
    assert [segment.logprobs for segment in model] == [turn.segments[0].logprobs for turn in sampled]
    assert trajectory.prompt_ids == sampled[0].prompt_ids
    for before, after in pairwise(sampled):
        seen = before.prompt_ids + before.completion_ids
        assert after.prompt_ids[: len(seen)] == seen and len(after.prompt_ids) > len(seen)
    last = sampled[-1]
    assert trajectory.prompt_ids + trajectory.completion_ids == last.prompt_ids + last.completion_ids
