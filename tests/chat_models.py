"""The chat families: their templates, and small tokenizers with their special tokens and their way to cut text."""

from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "You are a helpful assistant. You may call one or more functions to assist with the user query.",
    '{"name": "add", "arguments": {"a": 1, "b": 2}}, {"name": "look", "parameters": {"where": "here"}}',
    "What is the sum of 12 and 34? The result of the tool is 46, so the answer is 46.",
]
# As in Mistral-7B-Instruct-v0.3.
MISTRAL_LIST = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'user' %}"
    "{% if tools and loop.last %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "[INST] {{ message.content }}[/INST]"
    "{% elif message.tool_calls is defined %}[TOOL_CALLS] ["
    "{% for call in message.tool_calls %}{% set out = call.function | tojson %}{{ out[:-1] }}"
    "{% if call.id is not defined or call.id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    """{{ ', "id": "' + call.id + '"}' }}{% if not loop.last %}, {% endif %}{% endfor %}]{{ eos_token }}"""
    "{% elif message.role == 'assistant' %} {{ message.content | trim }}{{ eos_token }}"
    "{% elif message.role == 'tool' %}"
    "{% if message.tool_call_id is not defined or message.tool_call_id | length != 9 %}"
    "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
    """[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]"""
    "{% endif %}{% endfor %}"
)
# As in Mistral-Small-3.2 and later.
MISTRAL = (
    "{{ bos_token }}{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    "{% for message in messages %}"
    "{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{{ eos_token }}"
    "{% elif message.role == 'tool' %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]"
    "{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """One family's format: its template, special tokens (the one that ends a turn first) and kind of tokenizer."""

    template: str
    special: tuple[str, ...]
    bos: str | None = None
    sentencepiece: bool = False


def _of_trl(name: str) -> str:
    return (files("trl") / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


QWEN = ("<|im_end|>", "<|im_start|>", "<|endoftext|>", "<think>", "</think>", "<tool_call>", "</tool_call>")
LLAMA = ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>", "<|begin_of_text|>")
BRACKETS = ("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[ARGS]")
MISTRAL_TOKENS = ("</s>", "<s>", *BRACKETS, "[TOOL_RESULTS]", "[/TOOL_RESULTS]")
GEMMA = ("<end_of_turn>", "<bos>", "<start_of_turn>", "<eos>")


@cache
def families() -> dict[str, Family]:
    return {
        "qwen2.5": Family(_of_trl("qwen2_5"), QWEN),
        "qwen3": Family(_of_trl("qwen3"), QWEN),
        "llama3.1": Family(_of_trl("llama3_1"), LLAMA, "<|begin_of_text|>"),
        "llama3.2": Family(_of_trl("llama3_2"), LLAMA, "<|begin_of_text|>"),
        "mistral-v0.3": Family(MISTRAL_LIST, MISTRAL_TOKENS, "<s>", sentencepiece=True),
        "mistral-small": Family(MISTRAL, MISTRAL_TOKENS, "<s>"),
        "gemma3": Family(_of_trl("gemma3"), GEMMA, "<bos>", sentencepiece=True),
    }


@cache
def _backend(family: Family) -> Tokenizer:
    if family.sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        first = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=not text.startswith(("<t", "</t"))) for text in family.special]
    )
    return tokenizer


def family_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the family's template and special tokens; every text can be encoded."""
    family = families()[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_backend(family),
        eos_token=family.special[0],
        bos_token=family.bos,
        pad_token=family.special[-1],
    )
    tokenizer.chat_template = family.template
    return tokenizer
