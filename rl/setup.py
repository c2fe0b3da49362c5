"""What a run is made of, built from what the user named: tokenizer, stop tokens, policy and engine."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..rollout.engine import RolloutEngine
from ..rollout.transformers_engine import TransformersEngine
from .config import GRPOConfig
from .policy import Policy, load

if TYPE_CHECKING:
    from collections.abc import Sequence

ModelLike = str | Path | Policy | PreTrainedModel
DEFAULT_LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def model_name(model: ModelLike) -> str:
    """A checkpoint's path or hub id; for a model in memory what its config remembers."""
    return str(model) if isinstance(model, (str, Path)) else (getattr(model.config, "name_or_path", "") or "model")


def model_config(model: ModelLike) -> PreTrainedConfig:
    """The Hugging Face config, without loading weights."""
    return model.config if isinstance(model, (Policy, PreTrainedModel)) else AutoConfig.from_pretrained(str(model))


def load_tokenizer(model: ModelLike) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the checkpoint."""
    name = model_name(model)
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no tokenizer found for {name}: pass processing_class, or save the tokenizer beside the model"
        ) from error


def stop_token_ids(model: ModelLike, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Everything that ends a completion: the tokenizer's EOS and those of the checkpoint's generation config."""
    stops = {tokenizer.eos_token_id}
    if isinstance(model, PreTrainedModel):
        generation = model.generation_config
    elif isinstance(model, (str, Path)) and not (
        Path(model).is_dir() and not (Path(model) / "generation_config.json").is_file()
    ):
        generation = GenerationConfig.from_pretrained(str(model))
    else:
        generation = None
    eos = generation.eos_token_id if generation is not None else None
    stops |= set(eos) if isinstance(eos, list) else {eos}
    found = tuple(sorted(stop for stop in stops if stop is not None))
    if not found:
        raise ValueError("the tokenizer has no EOS token: completions would never end; set tokenizer.eos_token")
    return found


def choose_engine(name: str, device: torch.device) -> str:
    """`vllm` or `transformers`: `auto` takes vLLM where it is installed and the device is a GPU."""
    if name != "auto":
        return name
    return "vllm" if device.type == "cuda" and find_spec("vllm") is not None else "transformers"


def build(
    model: ModelLike, args: GRPOConfig, lora: LoraConfig | None, max_context: int
) -> tuple[Policy, RolloutEngine]:
    """The policy with its adapter, and an engine on the same tensors."""
    lora = lora or DEFAULT_LORA
    if isinstance(model, Policy):
        policy = model
        if policy.adapter is None:
            raise ValueError(
                "the Policy has no adapter to train: load it with colora.load(model, lora=LoraConfig(...))"
            )
    else:
        policy = load(model, lora, dtype=args.dtype, device=args.device, seed=args.seed)
    kwargs = args.engine_kwargs or {}
    engine = TransformersEngine(policy.weights, policy.config, max_context=max_context, **kwargs)
    return policy, engine
