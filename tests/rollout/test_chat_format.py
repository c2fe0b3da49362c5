"""Chat templates of every family: the stored tokens are the template's, or where they are not, the stored ones win."""

from typing import Any

import pytest
from colora.rollout.agent import Agent
from colora.rollout.chat_format import ChatFormat
from colora.rollout.conversation import Task
from colora.rollout.engine import SamplingParams
from colora.rollout.toolkit import Toolkit

from ..chat_models import families, family_tokenizer
from .scripted import ScriptedEngine

FAMILIES = list(families())


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The one.
        b: The other.
    """
    return a + b


# How each family writes add(12, 34), and add(1, 2) twice in a turn where it may.
CALLS = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 34}}\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b": 34}}\n</tool_call><|im_end|>',
    "llama3.1": '{"name": "add", "parameters": {"a": 12, "b": 34}}<|eot_id|>',
    "llama3.2": '{"name": "add", "parameters": {"a": 12, "b": 34}}<|eot_id|>',
    "mistral-v0.3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 12, "b": 34}, "id": "abc123XYZ"}]</s>',
    "mistral-small": '[TOOL_CALLS]add[ARGS]{"a": 12, "b": 34}</s>',
    "gemma3": '{"name": "add", "parameters": {"a": 12, "b": 34}}<end_of_turn>',
}
TWO = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call><|im_end|>',
    "mistral-v0.3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1, "b": 2}}, '
    '{"name": "add", "arguments": {"a": 3, "b": 4}}]</s>',
    "mistral-small": '[TOOL_CALLS]add[ARGS]{"a": 1, "b": 2}[TOOL_CALLS]add[ARGS]{"a": 3, "b": 4}</s>',
    "llama3.1": '{"name": "add", "parameters": {"a": 1, "b": 2}}; '
    '{"name": "add", "parameters": {"a": 3, "b": 4}}<|eot_id|>',
    "gemma3": '```json\n{"name": "add", "parameters": {"a": 1, "b": 2}}\n```\n'
    '```json\n{"name": "add", "parameters": {"a": 3, "b": 4}}\n```<end_of_turn>',
}
TWO |= {"qwen3": TWO["qwen2.5"], "llama3.2": TWO["llama3.1"]}
MALFORMED = {
    "qwen2.5": '<tool_call>\n{"name": "add", "arguments": {"a": 12, "b"\n</tool_call><|im_end|>',
    "qwen3": '<tool_call>\n["add", 12, 34]\n</tool_call><|im_end|>',
    "llama3.1": '{"name": "add", "parameters": {"a": 12, "b": }}<|eot_id|>',
    "llama3.2": "<|python_tag|>print(12 + 34)<|eom_id|>",
    "mistral-v0.3": '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 12, </s>',
    "mistral-small": "[TOOL_CALLS]add[ARGS]12, 34</s>",
    "gemma3": '{"name": "add", "arguments": {"a": 12, "b": 34}}<end_of_turn>',
}
ANSWER = "The sum is 46."


def chat_of(family: str, **kwargs: Any) -> tuple[Any, ChatFormat]:
    tokenizer = family_tokenizer(family)
    stops = [tokenizer.eos_token_id]
    if family.startswith("llama"):
        stops.append(tokenizer.convert_tokens_to_ids("<|eom_id|>"))
    return tokenizer, ChatFormat(tokenizer, stops, kwargs)


def converse(family: str, turns: list[str], **kwargs: Any):
    """A conversation of which the model's turns are these texts; (tokenizer, conversation, requests)."""
    tokenizer, chat = chat_of(family, **kwargs)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in turns]
    engine = ScriptedEngine(lambda _, turn: ids[turn])
    agent = Agent(engine, chat, Toolkit([add]))
    messages = [{"role": "user", "content": "What is 12 + 34?"}]
    (conversation,) = agent.run([Task("c", messages, {}, SamplingParams(512), lambda turn: turn)])
    return tokenizer, conversation, engine.requests


def ended(family: str, text: str) -> str:
    return text + families()[family].special[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizers_take_the_texts_apart_and_put_them_together(family: str) -> None:
    """Else the tests below would show nothing."""
    tokenizer, _ = chat_of(family)
    ids = tokenizer(CALLS[family], add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == CALLS[family]
    assert len(ids) < len(CALLS[family]) and ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_tokens_are_what_the_template_gives_for_the_conversation(family: str) -> None:
    spoken = " " + ANSWER if family == "mistral-v0.3" else ANSWER  # that template puts a space before an answer
    tokenizer, conversation, requests = converse(family, [CALLS[family], ended(family, spoken)])
    trajectory = conversation.trajectory
    assert [segment.source for segment in trajectory.segments] == ["model", "environment", "model"]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 12, "b": 34}}}
    assert conversation.completion == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "46"},
        {"role": "assistant", "content": ANSWER},
    ]
    # token in, token out: each request is the last one, what was sampled, and what the environment said
    prompt, sampled, reply = requests[0].prompt_ids, trajectory.segments[0], trajectory.segments[1]
    assert requests[1].prompt_ids == prompt + tuple(sampled.token_ids) + tuple(reply.token_ids)

    stored = trajectory.prompt_ids + trajectory.completion_ids
    if family == "gemma3":
        written = gemma_messages(tokenizer)
        expected = tokenizer.apply_chat_template(written, tokenize=True, return_dict=False)
    else:
        written = [*conversation.prompt, *conversation.completion]
        written[1] = {**written[1], "tool_calls": [call | {"id": "abc123XYZ"}]}
        written[2] = {**written[2], "tool_call_id": "abc123XYZ"}
        schemas = Toolkit([add]).schemas
        expected = tokenizer.apply_chat_template(written, tools=schemas, tokenize=True, return_dict=False)
        if family == "mistral-v0.3":  # it lists the tools before the user's message only while that is the last
            listed = tokenizer.apply_chat_template(written[:1], tools=schemas, tokenize=True, return_dict=False)
            plain = tokenizer.apply_chat_template(written[:1], tokenize=True, return_dict=False)
            assert expected[: len(plain)] == plain
            expected = listed + expected[len(plain) :]
        if family == "qwen3":  # it writes an empty thought into the last turn, which the model has not had
            thought = tokenizer("<think>\n\n</think>\n\n", add_special_tokens=False)["input_ids"]
            at = len(stored) - len(trajectory.segments[2].token_ids)
            assert expected[at : at + len(thought)] == thought
            expected = expected[:at] + expected[at + len(thought) :]
    newline = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert stored == expected or stored + newline == expected


def gemma_messages(tokenizer: Any) -> list[dict[str, str]]:
    """The conversation as Gemma's template can have it, which knows users and models only."""
    from colora.rollout.call_syntax import tool_instructions

    told = tool_instructions(Toolkit([add]).schemas, ChatFormat(tokenizer, [tokenizer.eos_token_id]).syntax)
    return [
        {"role": "user", "content": f"{told}\n\nWhat is 12 + 34?"},
        {"role": "assistant", "content": CALLS["gemma3"].removesuffix("<end_of_turn>")},
        {"role": "user", "content": "```tool_output\n46\n```"},
        {"role": "assistant", "content": ANSWER},
    ]


def test_thinking_that_the_template_would_drop_stays() -> None:
    turns = [f"<think>\nI add.\n</think>\n\n{CALLS['qwen3']}", ended("qwen3", f"<think>\nDone.\n</think>\n\n{ANSWER}")]
    tokenizer, conversation, requests = converse("qwen3", [turns[0], turns[0], turns[1]])
    stored = conversation.trajectory.prompt_ids + conversation.trajectory.completion_ids
    assert tokenizer.decode(stored).count("I add.") == 2
    assert [message.get("reasoning_content") for message in conversation.completion[::2]] == [
        "I add.",
        "I add.",
        "Done.",
    ]
    follow_up = [*conversation.prompt, *conversation.completion, {"role": "user", "content": "Thanks"}]
    assert "I add." not in tokenizer.apply_chat_template(follow_up, tokenize=False)
    for turn, request in enumerate(requests):
        before = [token for segment in conversation.trajectory.segments[: 2 * turn] for token in segment.token_ids]
        assert list(request.prompt_ids) == conversation.trajectory.prompt_ids + before


def test_thinking_switched_off_is_part_of_what_the_template_writes() -> None:
    tokenizer, conversation, requests = converse(
        "qwen3", [CALLS["qwen3"], ended("qwen3", ANSWER)], enable_thinking=False
    )
    for request in requests:
        assert tokenizer.decode(request.prompt_ids).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert [message["content"] for message in conversation.completion] == ["", "46", ANSWER]


@pytest.mark.parametrize("family", FAMILIES)
def test_several_calls_in_a_turn(family: str) -> None:
    tokenizer, conversation, _ = converse(family, [TWO[family], ended(family, ANSWER)])
    assert [message["content"] for message in conversation.completion[1:]] == ["3", "7", ANSWER]
    assert (conversation.turns, conversation.tool_calls, conversation.tool_failures) == (2, 2, 0)
    reply = tokenizer.decode(conversation.trajectory.segments[1].token_ids)
    assert 0 < reply.index("3") < reply.index("7")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_malformed_call_is_answered_with_what_is_wrong(family: str) -> None:
    tokenizer, conversation, _ = converse(family, [MALFORMED[family], CALLS[family], ended(family, ANSWER)])
    assert [message["role"] for message in conversation.completion] == [
        "assistant",
        "tool",
        "assistant",
        "tool",
        "assistant",
    ]
    assert "tool_calls" not in conversation.completion[0]
    assert "the tool call cannot be read" in conversation.completion[1]["content"]
    assert "the tool call cannot be read" in tokenizer.decode(conversation.trajectory.segments[1].token_ids)
    assert (conversation.tool_calls, conversation.tool_failures, conversation.malformed_calls) == (2, 1, 1)
    assert conversation.completion[-1]["content"] == ANSWER


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mere_answer_ends_the_conversation(family: str) -> None:
    _, conversation, _ = converse(family, [ended(family, ANSWER)])
    assert conversation.completion == [{"role": "assistant", "content": ANSWER}]
    assert conversation.ended == "answer" and conversation.trajectory.finish_reason == "stop"


def test_llama_may_use_its_python_tag() -> None:
    text = CALLS["llama3.1"].replace("<|eot_id|>", "<|eom_id|>")
    _, conversation, _ = converse("llama3.1", [f"<|python_tag|>{text}", ended("llama3.1", ANSWER)])
    assert [message["content"] for message in conversation.completion] == ["", "46", ANSWER]


def test_mistrals_own_id_of_a_call_is_used_and_one_is_made_where_it_gives_none() -> None:
    tokenizer, conversation, _ = converse("mistral-v0.3", [CALLS["mistral-v0.3"], TWO["mistral-v0.3"], "4</s>"])
    replies = [tokenizer.decode(segment.token_ids) for segment in conversation.trajectory.segments[1::2]]
    assert '"call_id": "abc123XYZ"' in replies[0]
    assert '"call_id": "000100000"' in replies[1] and '"call_id": "000100001"' in replies[1]


def test_only_gemma_is_told_of_tools_in_words() -> None:
    assert [family for family in FAMILIES if not chat_of(family)[1].native] == ["gemma3"]


def test_templates_that_cannot_be_used() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "call_of_a_tool>")
    with pytest.raises(ValueError, match=r"how this model writes tool calls is not known.*tokenizer.response_template"):
        ChatFormat(tokenizer, [tokenizer.eos_token_id])
    tokenizer = family_tokenizer("qwen2.5")
    with pytest.raises(ValueError, match="does not end an assistant's turn with a stop token"):
        ChatFormat(tokenizer, [tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match=r"the tokenizer has none; set tokenizer\.chat_template"):
        ChatFormat(tokenizer, [tokenizer.eos_token_id])


def test_a_response_template_of_the_tokenizers_own_is_used() -> None:
    tokenizer = family_tokenizer("qwen2.5")
    tokenizer.chat_template = tokenizer.chat_template.replace("tool_call>", "call_of_a_tool>")
    calls = {"open": "<call_of_a_tool>", "close": "</call_of_a_tool>", "repeats": True, "content": "json"}
    content = {"close": "<|im_end|>", "content": "text"}
    tokenizer.response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|im_start|>assistant\n",
        "fields": {"tool_calls": calls, "content": content},
    }
    chat = ChatFormat(tokenizer, [tokenizer.eos_token_id])
    text = '<call_of_a_tool>{"name": "add", "arguments": {"a": 1, "b": 2}}</call_of_a_tool><|im_end|>'
    turn = chat.read(tokenizer(text)["input_ids"], [], 0)
    assert [(request.name, request.arguments) for request in turn.requests] == [("add", {"a": 1, "b": 2})]


def test_parts_are_refused_where_the_template_leaves_them_out() -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "What is 1 + 2?"}]}]
    _, qwen = chat_of("qwen3")
    with pytest.raises(ValueError, match="list of parts, which this chat template does not write"):
        qwen.prompt_ids(parts, [])
    tokenizer, gemma = chat_of("gemma3")
    assert "What is 1 + 2?" in tokenizer.decode(gemma.prompt_ids(parts, []))
    with pytest.raises(ValueError, match=r"a message has the part \{'type': 'image'\}: prompts are text only"):
        gemma.prompt_ids([{"role": "user", "content": [{"type": "image"}]}], [])
