"""Random checkpoints of well-known shapes, written on the spot: `python benchmarks/checkpoints.py 4b DIRECTORY`.

`--format nf4` writes what transformers saves of a model that bitsandbytes quantised, nested scales and all: a quarter
of the bytes, and a checkpoint larger than the card in 16 bits.
"""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedConfig, PreTrainedTokenizerFast, Qwen3Config

SHAPES: dict[str, dict[str, Any]] = {
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "tie_word_embeddings": False},
    "24b": {"hidden_size": 5120, "intermediate_size": 32768, "num_hidden_layers": 40, "tie_word_embeddings": False},
}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 131072}
VOCABULARIES = {"4b": 151936, "8b": 151936, "24b": 131072}
STANDARD_DEVIATION = 0.02
BLOCK, GROUP = 64, 256  # bitsandbytes': weights of a scale, scales of a scale of scales


def model_config(shape: str) -> PreTrainedConfig:
    """Qwen3 of 4B and 8B, Mistral Small of 24B, for up to 128K tokens."""
    kind = MistralConfig if shape == "24b" else Qwen3Config
    rope = {"rope_type": "default", "rope_theta": 1e6}
    more = {"sliding_window": None} if shape == "24b" else {}
    return kind(**HEADS, **SHAPES[shape], vocab_size=VOCABULARIES[shape], rope_parameters=rope, **more)


def write_checkpoint(shape: str, directory: Path, device: str = "cuda", nf4: bool = False) -> Path:
    """Write a model of `shape` with random weights, one shard a layer, and a character tokenizer."""
    if (directory / "complete").exists():
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    config = model_config(shape)
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    config.architectures = [type(model).__name__]
    tables = _tables() if nf4 else None
    if nf4:
        config.quantization_config = QUANTIZATION
    config.save_pretrained(directory)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    shards: dict[str, list[str]] = {}
    for name in shapes:
        shards.setdefault(f"layer-{name.split('.')[2]}" if ".layers." in name else "rest", []).append(name)
    files = {}
    for shard, names in shards.items():
        tensors = {key: value for name in names for key, value in _random(name, shapes[name], device, tables)}
        save_file(tensors, directory / f"{shard}.safetensors", {"format": "pt"})
        files |= dict.fromkeys(tensors, f"{shard}.safetensors")
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    save_tokenizer(directory)
    (directory / "complete").touch()
    return directory


QUANTIZATION = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8",
    "llm_int8_skip_modules": None,
}


def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' values of the 4-bit codes and of the scales' 8-bit codes."""
    from bitsandbytes import functional

    return functional.get_4bit_type("nf4", device="cpu"), functional.create_dynamic_map()


def _random(
    name: str, shape: tuple[int, ...], device: str, tables: tuple[torch.Tensor, torch.Tensor] | None
) -> Iterator[tuple[str, torch.Tensor]]:
    if len(shape) == 1:
        yield name, torch.ones(shape, dtype=torch.bfloat16)
    elif tables is None or ".layers." not in name:
        yield name, (torch.randn(shape, device=device) * STANDARD_DEVIATION).to("cpu", torch.bfloat16)
    else:
        yield from _random_nf4(name, shape, device, *tables)


def _random_nf4(
    name: str, shape: tuple[int, ...], device: str, codebook: torch.Tensor, dynamic_map: torch.Tensor
) -> Iterator[tuple[str, torch.Tensor]]:
    """Random codes; scales around the largest of 64 normally distributed weights."""
    count = math.prod(shape)
    blocks = count // BLOCK
    yield name, torch.randint(0, 256, (count // 2, 1), dtype=torch.uint8, device=device).cpu()
    yield f"{name}.absmax", torch.randint(64, 192, (blocks,), dtype=torch.uint8, device=device).cpu()
    yield f"{name}.nested_absmax", torch.full((-(-blocks // GROUP),), STANDARD_DEVIATION / 4)
    yield f"{name}.quant_map", codebook.clone()
    yield f"{name}.nested_quant_map", dynamic_map.clone()
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": list(shape),
        "nested_blocksize": GROUP,
        "nested_dtype": "float32",
        "nested_offset": 2 * STANDARD_DEVIATION,
    }
    packed = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    yield f"{name}.quant_state.bitsandbytes__nf4", packed


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
    parser.add_argument("--format", choices=["bf16", "nf4"], default="bf16")
    arguments = parser.parse_args()
    write_checkpoint(arguments.shape, arguments.directory, nf4=arguments.format == "nf4")
