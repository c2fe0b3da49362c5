"""Checkpoints into shared storage: safetensors, one shard at a time, straight into the rows of fused projections."""

import json
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..kernels.nf4 import NF4Tensor, dequantize
from .base_format import SUPPORTED, BaseFormat, base_format, check_quantization
from .storage import DenseWeight
from .weights import EMBEDDING, HEAD, ModelLayout, SharedWeights

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
Stored = Tensor | NF4Tensor


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

    Raises ValueError where it is missing, not JSON, or of weights in a quantised format that cannot be read.
    """
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        raise ValueError(
            f"{directory} holds a PEFT adapter, not a model: merge it into its base once (PeftModel.merge_and_unload, "
            "then save_pretrained of model and tokenizer) and give that directory"
        )
    config = _read_json(directory / "config.json", "the directory holds no transformers checkpoint")
    check_quantization(config, str(directory))
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


def tensor_names(directory: str | Path) -> list[str]:
    """The names of every tensor of a checkpoint, from the heads of its files. Raises as `read_checkpoint` does."""
    names: list[str] = []
    for shard in shard_files(Path(directory)):
        with _open_shard(shard) as tensors:
            names += tensors.keys()
    return names


def read_checkpoint(directory: str | Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor) for every tensor of a checkpoint; a shard is unmapped before the next is opened.

    Raises ValueError where a shard is missing or is not a complete safetensors file.
    """
    for shard in shard_files(Path(directory)):
        with _open_shard(shard) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is not iterable)
                yield name, tensors.get_tensor(name)


@contextmanager
def _open_shard(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt", device="cpu") as tensors:
            yield tensors
    except SafetensorError as error:
        raise ValueError(f"{shard} is truncated or corrupt ({error}); copy or download it again") from error


def load_weights(weights: SharedWeights, tensors: Iterable[tuple[str, Stored]]) -> None:
    """Copy named tensors of a checkpoint into shared storage, in its format; each is released before the next.

    Args:
        weights: filled in place, completely.
        tensors: (Hugging Face parameter name, tensor), in any order; quantised ones as `bnb_checkpoint.assemble` gives
            them. The decoder of a multimodal checkpoint is taken out of it; vision towers and rotary buffers are passed
            over.

    Raises:
        ValueError: tensors that are missing, unexpected, of another shape or not floating point; a head that differs
            from the embedding it is tied to.
    """
    places = destinations(weights)
    tied = weights.layout.tied_head
    loaded: set[str] = set()
    unexpected: list[str] = []
    tied_head: Stored | None = None
    for stored_name, tensor in tensors:
        name = _decoder_name(stored_name, places)
        if name is not None:
            places[name].write(name, tensor)
            loaded.add(name)
        elif tied and stored_name in (HEAD, f"language_model.{HEAD}"):
            tied_head = tensor
        elif not any(part in stored_name for part in HARMLESS):
            unexpected.append(stored_name)
    if unexpected:
        raise ValueError(
            f"the checkpoint has {len(unexpected)} tensors that its config.json does not describe: {_some(unexpected)}"
        )
    missing = sorted(places.keys() - loaded)
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json describes: {_some(missing)}; "
            "it is incomplete, or the two do not belong together"
        )
    if tied_head is not None and not same_values(weights.embedding, tied_head):
        raise ValueError(
            f"config.json ties {HEAD} to {EMBEDDING}, but the checkpoint's differ; set its tie_word_embeddings to false"
        )


@dataclass(frozen=True)
class Destination:
    """Where a parameter of the checkpoint goes.

    Attributes:
        shape: its dense shape.
        write_dense, write_nf4: write it there; NF4 into a vector: None.
        quantises: whether it is in 4 bits there.
    """

    shape: tuple[int, ...]
    write_dense: Callable[[Tensor], Any]
    write_nf4: Callable[[NF4Tensor], Any] | None
    quantises: bool = False

    def check(self, name: str, stored: Stored) -> None:
        """Raise ValueError, naming the tensor, where it does not fit."""
        if isinstance(stored, Tensor) and (not stored.is_floating_point() or stored.element_size() < 2):
            raise ValueError(f"{name} is stored as {stored.dtype}, a quantised format that is not known. {SUPPORTED}")
        if tuple(stored.shape) != self.shape:
            raise ValueError(
                f"{name} has shape {tuple(stored.shape)} in the checkpoint, its config.json says {self.shape}"
            )

    @torch.no_grad()
    def write(self, name: str, stored: Stored) -> None:
        """Check and write it."""
        self.check(name, stored)
        if isinstance(stored, NF4Tensor):
            assert self.write_nf4 is not None  # NF4 tensors are matrices, and so is what they fit
            self.write_nf4(stored)
            return
        try:
            self.write_dense(stored)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def destinations(weights: SharedWeights) -> dict[str, Destination]:
    """Where each parameter of the checkpoint goes, by Hugging Face name."""
    found = {name: _of_tensor(tensor) for name, tensor in weights.tensors.items()}
    for linear in weights.linears.values():
        for part in linear.parts:
            name, rows = linear.part_name(part), part.stop - part.start
            found[f"{name}.weight"] = Destination(
                (rows, linear.weight.in_features),
                partial(linear.weight.load_rows, part.start),
                partial(linear.weight.load_nf4, part.start),
                quantises=not isinstance(linear.weight, DenseWeight),
            )
            if linear.bias is not None:
                found[f"{name}.bias"] = _of_tensor(linear.bias[part.start : part.stop])
    return found


def _of_tensor(tensor: Tensor) -> Destination:
    decode = partial(dequantize, dtype=tensor.dtype, out=tensor) if tensor.ndim == 2 else None
    return Destination(tuple(tensor.shape), tensor.copy_, decode)


def same_values(tensor: Tensor, stored: Stored) -> bool:
    """Whether a tensor is what writing `stored` to it would make of it."""
    return torch.equal(tensor, dense(stored, tensor.dtype).to(tensor))


def dense(stored: Stored, dtype: torch.dtype) -> Tensor:
    """A quantised tensor decoded to `dtype`; another as it is."""
    return dequantize(stored, dtype) if isinstance(stored, NF4Tensor) else stored


def base_of(layout: ModelLayout, base: str, stored: Iterable[str]) -> BaseFormat:
    """`base_format` for a checkpoint that has the modules `stored` in NF4, under names of its own."""
    parts = {f"{part}.weight" for spec in layout.linears for part in spec.part_names()}
    names = (_decoder_name(f"{module}.weight", parts) for module in stored)
    return base_format(base, {name.removesuffix(".weight") for name in names if name is not None})


def _decoder_name(stored_name: str, known: Container[str]) -> str | None:
    """Which of the decoder's parameters a stored name is; None where it is none of them."""
    candidates = [stored_name, f"model.{stored_name}", stored_name.removeprefix("language_model.")]
    candidates += [f"model.{stored_name.removeprefix(prefix)}" for prefix in TEXT_PREFIXES]
    return next((name for name in candidates if name in known), None)


def _some(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
