"""A checkpoint with a character tokenizer, small enough to train in a test."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3Config

CHARACTERS = "0123456789+-*=?:,. abcdefghijklmnopqrstuvwxyz"
EOS, PAD = len(CHARACTERS), len(CHARACTERS) + 1


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character of CHARACTERS."""
    vocab = {character: index for index, character in enumerate(CHARACTERS)} | {"<eos>": EOS, "<pad>": PAD}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")


def tiny_config() -> PreTrainedConfig:
    return Qwen3Config(
        vocab_size=PAD + 1,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,  # vLLM has no CPU attention for smaller ones
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        pad_token_id=PAD,
        initializer_range=0.3,  # distributions far from uniform
    )


def tiny_checkpoint(directory: Path, config: PreTrainedConfig | None = None, seed: int = 0) -> Path:
    """Write a random model and its tokenizer to `directory`."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or tiny_config(), dtype=torch.float32).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory
