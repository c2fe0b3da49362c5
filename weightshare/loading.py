"""Checkpoints into shared storage: safetensors, one shard at a time, straight into the rows of fused projections."""

import json
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .weights import EMBEDDING, HEAD, SharedWeights

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]  # weights, configs, tokenizers
HUB_IGNORED = ["consolidated*", "original/*", "onnx/*"]  # the same weights once more, in other formats
TEXT_PREFIXES = ("model.language_model.", "language_model.model.")  # where multimodal checkpoints keep the decoder
HARMLESS = (
    "rotary_emb.inv_freq",
    "vision_tower.",
    "multi_modal_projector.",
)  # parts of names that are not the decoder's
NAMES_SHOWN = 5


def checkpoint_directory(model: str | Path) -> Path:
    """The directory of a checkpoint: `model` itself, or the hub's repository of that id, downloaded where not cached.

    Raises ValueError where it is neither.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"{path} is a file; pass the checkpoint's directory, with config.json and *.safetensors")
    if isinstance(model, Path):
        raise ValueError(f"checkpoint directory {path} does not exist")
    try:
        return Path(snapshot_download(model, allow_patterns=HUB_FILES, ignore_patterns=HUB_IGNORED))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"model {model!r} is neither a directory nor a repository of the Hugging Face hub that can be read from "
            f"here (is the name right, is the network up, does it need `hf auth login`?): {error}"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a checkpoint as it stands.

    Raises ValueError where it is missing, not JSON, or of quantised weights.
    """
    config = _read_json(directory / "config.json", "the directory holds no transformers checkpoint")
    quantization = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown")
        raise ValueError(
            f"{directory}: the checkpoint is quantised ({method}), which is not supported; use the unquantised one"
        )
    return config


def _read_json(path: Path, consequence: str) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing: {consequence}")
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a JSON {type(content).__name__}, not an object; copy or download it again")
    return content


def shard_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint.

    Raises ValueError where there are none or the index names one that is missing.
    """
    if (directory / INDEX_FILE).is_file():
        index = _read_json(directory / INDEX_FILE, "")
        shards = [directory / name for name in sorted(set((index.get("weight_map") or {}).values()))]
        missing = [shard.name for shard in shards if not shard.is_file()]
        if missing:
            raise ValueError(
                f"{directory}: {len(missing)} of {len(shards)} shards are missing ({_some(missing)}); "
                "copy or download them again"
            )
        if shards:
            return shards
    if (directory / SINGLE_FILE).is_file():
        return [directory / SINGLE_FILE]
    if list(directory.glob("*.bin")) or list(directory.glob("*.pt*")):
        raise ValueError(
            f"{directory} has PyTorch pickles but no safetensors; convert it once with "
            "AutoModelForCausalLM.from_pretrained(directory).save_pretrained(new_directory)"
        )
    raise ValueError(f"{directory} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE} is there")


def read_checkpoint(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) for every tensor of a checkpoint; a shard is unmapped before the next is opened.

    Raises ValueError where a shard is missing or is not a complete safetensors file.
    """
    for shard in shard_files(Path(directory)):
        try:
            with safe_open(shard, framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is not iterable)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{shard} is truncated or corrupt ({error}); copy or download it again") from error


def load_weights(weights: SharedWeights, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named tensors of a checkpoint into shared storage, casting to its dtype; each is released before the next.

    Args:
        weights: filled in place, completely.
        tensors: (Hugging Face parameter name, tensor), in any order. The decoder of a multimodal checkpoint is taken
            out of it; vision towers and rotary buffers are passed over.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape or not floating point; a head that differs
            from the embedding it is tied to.
    """
    destinations = _destinations(weights)
    tied = weights.layout.tied_head
    loaded: set[str] = set()
    unexpected: list[str] = []
    tied_head: Tensor | None = None
    for stored_name, tensor in tensors:
        name = _decoder_name(stored_name, destinations)
        if name is not None:
            _copy(destinations[name], name, tensor)
            loaded.add(name)
        elif tied and stored_name in (HEAD, f"language_model.{HEAD}"):
            tied_head = tensor
        elif not any(part in stored_name for part in HARMLESS):
            unexpected.append(stored_name)
    if unexpected:
        raise ValueError(
            f"the checkpoint has {len(unexpected)} tensors that its config.json does not describe: {_some(unexpected)}"
        )
    missing = sorted(destinations.keys() - loaded)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json describes: {_some(missing)}; "
            "it is incomplete, or the two do not belong together"
        )
    if tied_head is not None and not torch.equal(weights.embedding, tied_head.to(weights.embedding)):
        raise ValueError(
            f"config.json ties {HEAD} to {EMBEDDING}, but the checkpoint's differ; set its tie_word_embeddings to false"
        )


@dataclass(frozen=True)
class _Destination:
    shape: tuple[int, ...]
    write: Callable[[Tensor], Any]


def _destinations(weights: SharedWeights) -> dict[str, _Destination]:
    """Where each parameter of the checkpoint goes, by Hugging Face name."""
    found = {name: _Destination(tuple(tensor.shape), tensor.copy_) for name, tensor in weights.tensors.items()}
    for linear in weights.linears.values():
        for part in linear.parts:
            name, rows = linear.part_name(part), part.stop - part.start
            write = partial(linear.weight.load_rows, part.start)
            found[f"{name}.weight"] = _Destination((rows, linear.weight.in_features), write)
            if linear.bias is not None:
                found[f"{name}.bias"] = _Destination((rows,), linear.bias[part.start : part.stop].copy_)
    return found


def _decoder_name(stored_name: str, known: Container[str]) -> str | None:
    """Which of the decoder's parameters a stored name is; None where it is none of them."""
    candidates = [stored_name, f"model.{stored_name}", stored_name.removeprefix("language_model.")]
    candidates += [f"model.{stored_name.removeprefix(prefix)}" for prefix in TEXT_PREFIXES]
    return next((name for name in candidates if name in known), None)


@torch.no_grad()
def _copy(destination: _Destination, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(
            f"{name} is stored as {tensor.dtype}: quantised weights are not supported; use unquantised ones"
        )
    if tuple(tensor.shape) != destination.shape:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} in the checkpoint, its config.json says {destination.shape}"
        )
    destination.write(tensor)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
