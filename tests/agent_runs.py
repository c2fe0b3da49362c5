"""A checkpoint that calls tools without having learned it: whole calls are single tokens of a small vocabulary."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from .tiny_runs import tiny_checkpoint, tiny_config

DIGITS = "0123456789"
SPECIAL = ("<end>", "<user>", "<tool>", "<model>")
TEMPLATE = (
    "{% for tool in tools or [] %}<{{ tool.function.name }}>{% endfor %}"
    "{% for message in messages %}<{{ {'assistant': 'model'}.get(message.role, message.role) }}>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    """<tool_call>{"name": "{{ call.function.name }}", """
    """"arguments": {{ call.function.arguments | tojson }}}</tool_call>"""
    "{% endfor %}<end>{% endfor %}{% if add_generation_prompt %}<model>{% endif %}"
)


def call(name: str, arguments: str = "{}") -> str:
    return f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'


CALLS = (
    call("add", '{"a": 1, "b": 2}'),
    call("add", '{"a": 30, "b": 4}'),
    call("fail"),
    call("look"),
    '<tool_call>{"name": add}</tool_call>',
)


def tool_tokenizer() -> PreTrainedTokenizerFast:
    """Ten digits, an unknown token for all other text, and every one of CALLS as a token."""
    vocab = {text: index for index, text in enumerate([*DIGITS, "?"])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.add_tokens([AddedToken(text, normalized=False) for text in CALLS])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="?")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def tool_checkpoint(directory: Path) -> Path:
    """Write a random model and its tokenizer to `directory`."""
    tokenizer, config = tool_tokenizer(), tiny_config()
    config.vocab_size, config.eos_token_id, config.pad_token_id = len(tokenizer), tokenizer.eos_token_id, 10
    config.max_position_embeddings, config.initializer_range = 1024, 0.1
    tiny_checkpoint(directory, config)
    tokenizer.save_pretrained(directory)
    return directory
