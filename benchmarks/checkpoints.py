"""Random checkpoints of well-known shapes, written on the spot: `python benchmarks/checkpoints.py 4b DIRECTORY`."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SHAPES = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "tie_word_embeddings": False},
}
ALL = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936}


def model_config(shape: str) -> Qwen3Config:
    """Qwen3 of `shape`, for up to 128K tokens."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen3Config(**ALL, **SHAPES[shape], max_position_embeddings=131072, rope_parameters=rope)


def write_checkpoint(shape: str, directory: Path, device: str = "cuda") -> Path:
    """Write a Qwen3 of `shape` with random bf16 weights, one shard a layer, and a character tokenizer."""
    if (directory / "complete").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
    config.save_pretrained(directory)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Qwen3ForCausalLM(config).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    files = {}
    for name, size in shapes.items():
        tensor = torch.ones(size) if len(size) == 1 else torch.randn(size, device=device) * 0.02
        shard = f"layer-{name.split('.')[2]}" if ".layers." in name else "rest"
        shards.setdefault(shard, {})[name] = tensor.to("cpu", torch.bfloat16)
        files[name] = f"{shard}.safetensors"
    for shard, tensors in shards.items():
        save_file(tensors, directory / f"{shard}.safetensors", {"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_tokenizer(directory)
    (directory / "complete").touch()
    return directory


def save_tokenizer(directory: Path) -> None:
    """Printable ASCII, one token a character."""
    vocab = {chr(32 + index): index for index in range(95)} | {"<eos>": 95, "<pad>": 96}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<pad>"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>").save_pretrained(directory)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("directory", type=Path)
    arguments = parser.parse_args()
    write_checkpoint(arguments.shape, arguments.directory)
