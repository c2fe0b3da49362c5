"""What a run is made of, built from what the user named: tokenizer, stop tokens, policy and engine."""

import os
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import LoraConfig
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..kernels.offload import ActivationOffload
from ..kernels.tiled_mlp import TILE_TOKENS
from ..rollout.engine import RolloutEngine
from ..rollout.self_test import self_test
from ..rollout.trajectory import Trajectory
from ..rollout.transformers_engine import TransformersEngine, check_limits
from ..weightshare.adapter import check_lora_config, targeted_parts
from ..weightshare.base_format import base_format
from ..weightshare.bnb_checkpoint import nf4_projections
from ..weightshare.guard import ParityGuard
from ..weightshare.loading import base_of, checkpoint_directory, read_config, tensor_names
from ..weightshare.memory import check_fits
from ..weightshare.weights import SharedWeights
from .config import GRPOConfig
from .families import block_spec, decoder_path, model_layout
from .option_values import optimizer_state_bytes
from .policy import Policy, load, resolve_dtype

ModelLike = str | Path | Policy | PreTrainedModel
TRANSFORMERS_ENGINE_KWARGS = {"max_sequences", "prefill_tokens"}
MAX_SEQUENCES = {"cuda": 256, "cpu": 64}  # of vLLM at once, where a generation has that many
DEFAULT_LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def model_name(model: ModelLike) -> str:
    """A checkpoint's path or hub id; for a model in memory what its config remembers."""
    if isinstance(model, (str, Path)):
        return os.path.expanduser(model)
    return getattr(model.config, "name_or_path", "") or "model"


def model_config(model: ModelLike) -> PreTrainedConfig:
    """The Hugging Face config, without loading weights. Raises ValueError where its fields contradict each other."""
    if isinstance(model, (Policy, PreTrainedModel)):
        return model.config
    try:
        return AutoConfig.from_pretrained(model_name(model))
    except StrictDataclassError as error:
        raise ValueError(f"config.json of {model} describes no model: {error.__cause__ or error}") from error


def load_tokenizer(model: ModelLike) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the checkpoint."""
    name = model_name(model)
    missing = f"no tokenizer found for {name}: pass processing_class, or save the tokenizer beside the model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(missing) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # for some families transformers makes up an empty one
        raise ValueError(missing)
    return tokenizer


def stop_token_ids(model: ModelLike, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Everything that ends a completion: the tokenizer's EOS and those of the checkpoint's generation config."""
    generation = model.generation_config if isinstance(model, PreTrainedModel) else _stored_generation_config(model)
    eos = generation.eos_token_id if generation is not None else None
    stops = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])}
    found = tuple(sorted(stop for stop in stops if stop is not None))
    if not found:
        raise ValueError("the tokenizer has no EOS token: completions would never end; set tokenizer.eos_token")
    return found


def _stored_generation_config(model: ModelLike) -> GenerationConfig | None:
    """What lies beside the checkpoint; None where nothing does."""
    try:
        return GenerationConfig.from_pretrained(model_name(model))
    except (OSError, ValueError):
        return None


def choose_engine(name: str, device: torch.device) -> str:
    """`vllm` or `transformers`: `auto` takes vLLM where it is installed and the device is a GPU."""
    if name != "auto":
        return name
    return "vllm" if device.type == "cuda" and find_spec("vllm") is not None else "transformers"


def check_base(config: PreTrainedConfig, base: str) -> None:
    """Raise ValueError where a model of this config cannot be quantised while it loads."""
    if getattr(config, "quantization_config", None) is None:  # else some linears may stay dense
        model_layout(block_spec(config)).check_base(base_format(base, ()))


def check_model(model: ModelLike, lora: LoraConfig | None, base: str = "auto") -> None:
    """Raise ValueError for an architecture, base, LoRA options or targets that cannot be trained; loads no weights."""
    _check_kind(model, lora)
    config = model_config(model)
    check_base(config, base)
    nothing = SharedWeights.empty(model_layout(block_spec(config)), torch.float32, "meta")
    check_lora_config(lora or DEFAULT_LORA)
    targeted_parts(nothing, lora or DEFAULT_LORA, decoder_path(config))


def _check_kind(model: ModelLike, lora: LoraConfig | None) -> None:
    """Raise ValueError for a model that is of another kind, or has an adapter besides the one that is asked for."""
    remedy = "merge it into its base (merge_and_unload), or pass the bare base, and describe the new one by peft_config"
    if isinstance(model, (str, Path)):
        directory = Path(model_name(model))
        if directory.is_dir():
            read_config(directory)
        return
    if not isinstance(model, (Policy, PreTrainedModel)):
        raise ValueError(
            f"model is a {type(model).__name__}: pass a checkpoint's directory, a hub id, a transformers model or a "
            f"Policy. Where it has an adapter of PEFT's, {remedy}"
        )
    if isinstance(model, Policy) and model.adapter is not None and lora is not None:
        raise ValueError(
            "peft_config is given, but the Policy has its adapter already: leave peft_config out, or give it to "
            "colora.load(model, lora=...)"
        )
    if isinstance(model, PreTrainedModel) and any(".base_layer." in name for name, _ in model.named_parameters()):
        raise ValueError(f"model has an adapter of PEFT's in it: {remedy}")


def check_engine(args: GRPOConfig) -> None:
    """Raise, as `build` does, for an engine that is not installed or options that it does not have; loads no weights.

    Raises:
        ValueError: the options.
        VLLMUnusable: vLLM is missing, or lacks what is used of it.
    """
    kwargs = _engine_kwargs(args)
    if choose_engine(args.engine, args.device) == "vllm":
        from ..rollout.vllm_engine import check_vllm

        check_vllm(args.device, kwargs)
        return
    unknown = kwargs.keys() - TRANSFORMERS_ENGINE_KWARGS
    if unknown:
        raise ValueError(
            f"engine_kwargs: the transformers engine has no {', '.join(sorted(unknown))}; "
            f"it takes {', '.join(sorted(TRANSFORMERS_ENGINE_KWARGS))}"
        )
    check_limits(**kwargs)


def build(
    model: ModelLike, args: GRPOConfig, lora: LoraConfig | None, max_context: int, prompt_tokens: int = 0
) -> tuple[Policy, RolloutEngine]:
    """The policy with its adapter, and an engine on the same tensors; with vLLM they are compared before anything else.

    Args:
        prompt_tokens: of a usual prompt, see VLLMEngine.

    Raises:
        ValueError: what cannot be loaded or trained, or engine options that do not exist.
        ParityError: vLLM and the policy do not compute the same.
    """
    lora = lora or DEFAULT_LORA
    if choose_engine(args.engine, args.device) == "vllm":
        return _build_on_vllm(model, args, lora, max_context, prompt_tokens)
    check_engine(args)
    if isinstance(model, Policy):
        policy = model
        if policy.adapter is None:
            raise ValueError(
                "the Policy has no adapter to train: load it with colora.load(model, lora=LoraConfig(...))"
            )
        if args.base not in ("auto", policy.weights.base):
            raise ValueError(
                f"base={args.base!r}, but the Policy has a {policy.weights.base} base: load it with "
                f"colora.load(model, base={args.base!r}), or leave base out"
            )
        if args.dtype not in ("auto", str(policy.dtype).removeprefix("torch.")):
            raise ValueError(
                f"dtype={args.dtype!r}, but the Policy is in {policy.dtype}: load it with "
                f"colora.load(model, dtype={args.dtype!r}), or leave dtype out"
            )
    else:
        policy = load(model, lora, dtype=args.dtype, device=args.device, seed=args.seed, base=args.base)
    configure(policy, args)
    return policy, TransformersEngine(
        policy.weights, policy.config, max_context=max_context, fp32_head=policy.fp32_head, **_engine_kwargs(args)
    )


def configure(policy: Policy, args: GRPOConfig) -> None:
    """Set how the policy computes, and what it keeps for the backward pass."""
    policy.fp32_head, policy.kernels = args.cast_lm_head_to_fp32, args.kernels
    policy.mlp_tile_tokens = args.mlp_tile_tokens or TILE_TOKENS
    policy.offload = None
    if args.activation_offload != "false" and policy.device.type == "cuda":
        policy.offload = ActivationOffload(policy.device, keep=1 if args.activation_offload == "true" else None)


def _build_on_vllm(
    model: ModelLike, args: GRPOConfig, lora: LoraConfig, max_context: int, prompt_tokens: int
) -> tuple[Policy, RolloutEngine]:
    """vLLM loads the checkpoint; the policy is built on its tensors."""
    from ..rollout.vllm_engine import VLLMEngine

    if not isinstance(model, (str, Path)):
        raise ValueError(
            f"engine='vllm' loads the checkpoint itself: pass its directory or hub id, not a {type(model).__name__}, "
            "or set engine='transformers'"
        )
    config, kwargs = model_config(model), _engine_kwargs(args)
    if not kwargs.keys() & {"max_num_seqs", "max_sequences"}:
        kwargs["max_num_seqs"] = min(MAX_SEQUENCES[args.device.type], args.completions_per_generation)
    dtype, layout = resolve_dtype(args.dtype, config, args.device), model_layout(block_spec(config))
    stored = nf4_projections(tensor_names(checkpoint_directory(model)), config.to_dict())
    check_fits(layout, dtype, base_of(layout, args.base, stored), args.device)
    engine = VLLMEngine(
        model,
        lora,
        dtype=dtype,
        max_context=max_context,
        device=args.device,
        seed=args.seed,
        fp32_head=args.cast_lm_head_to_fp32,
        base=args.base,
        state_bytes=optimizer_state_bytes(args.optim),
        prompt_tokens=prompt_tokens,
        engine_kwargs=kwargs,
    )
    policy = Policy(engine.weights, engine.config, engine.adapter)
    configure(policy, args)
    guard = ParityGuard(args.parity_limit, policy.dtype)
    try:
        self_test(engine, partial(score, policy), guard, engine.weights, engine.adapter)
    except BaseException:
        engine.close()  # the error's traceback holds it, and a process can have one engine open
        raise
    return policy, engine


def score(policy: Policy, trajectories: Sequence[Trajectory]) -> Tensor:
    """The policy's log-probs at temperature 1 of every completion token, concatenated, (tokens,) fp32."""
    sequences = [trajectory.prompt_ids + trajectory.completion_ids for trajectory in trajectories]
    rows: list[int] = []
    start = 0
    for trajectory, sequence in zip(trajectories, sequences, strict=True):
        rows += range(start + len(trajectory.prompt_ids) - 1, start + len(sequence) - 1)
        start += len(sequence)
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    targets = torch.tensor([token for trajectory in trajectories for token in trajectory.completion_ids])
    with torch.no_grad():
        return policy.logprobs(tokens, [len(sequence) for sequence in sequences], torch.tensor(rows), targets)[0]


def _engine_kwargs(args: GRPOConfig) -> dict[str, Any]:
    kwargs = args.engine_kwargs or {}
    assert isinstance(kwargs, dict)  # the config parses JSON
    return dict(kwargs)
