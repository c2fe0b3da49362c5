"""Model families: one small function each turns a Hugging Face config into the `BlockSpec` that drives the decoder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ..weightshare.memory import head_dim
from ..weightshare.weights import EMBEDDING, HEAD, LinearLayout, ModelLayout

Config = Any  # PreTrainedConfig, whose fields differ by family
ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}  # Hugging Face's name -> kernels.glu's
SCALED_ROPES = ("linear", "llama3", "yarn")


@dataclass(frozen=True, eq=False)
class RopeTable:
    """(head_dim / 2,) fp32 inverse frequencies, and the factor on cosines and sines (1 but for YaRN)."""

    inverse_frequencies: Tensor
    scaling: float


@dataclass(frozen=True)
class LayerSpec:
    """What differs between layers: the window (tokens, itself included; None: all) and the rope table's key."""

    window: int | None
    rope: str


@dataclass(frozen=True)
class BlockSpec:
    """The decoder of one model: embedding, `layers` blocks, final norm, head.

    Attributes:
        activation: of the gate, as `kernels.glu` names it.
        attention_scale: factor on the attention scores.
        qkv_bias, o_bias, mlp_bias: which linears have biases.
        qk_norm: queries and keys are RMS-normalised per head before the rotation.
        one_plus_weight: norms scale by 1 + weight (Gemma).
        sandwich_norms: attention and MLP outputs are normalised as well (Gemma).
        embedding_scale: factor on the embeddings, rounded to the model's dtype before use; None: 1.
        final_softcap: cap on the logits, or None.
        max_context: positions the model was made for.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeTable]
    activation: str
    norm_eps: float
    attention_scale: float
    tied_head: bool
    max_context: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    one_plus_weight: bool = False
    sandwich_norms: bool = False
    embedding_scale: float | None = None
    final_softcap: float | None = None

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"{self.family}: {self.heads} attention heads are not a multiple of {self.kv_heads} key-value heads"
            )


def _rope_table(config: Config, head_dim: int, layer_type: str | None = None) -> RopeTable:
    parameters = config.rope_parameters if layer_type is None else config.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{config.model_type}: partial_rotary_factor={parameters['partial_rotary_factor']} is not supported, only 1"
        )
    if kind == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return RopeTable(1.0 / (parameters["rope_theta"] ** exponents), 1.0)
    if kind not in SCALED_ROPES:
        raise ValueError(
            f"{config.model_type}: rope type {kind!r} is not supported; known: default, {', '.join(SCALED_ROPES)}"
        )
    arguments = {} if layer_type is None else {"layer_type": layer_type}
    return RopeTable(*ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **arguments))


def _plain_spec(config: Config) -> BlockSpec:
    """What all families share: pre-norm blocks, full attention, one rope table."""
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"{config.model_type}: activation {activation!r} is not supported; known: {', '.join(ACTIVATIONS)}"
        )
    of_head = head_dim(config)
    nested = "full_attention" in config.rope_parameters or "sliding_attention" in config.rope_parameters
    return BlockSpec(
        family=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=of_head,
        layers=(LayerSpec(None, "full_attention"),) * config.num_hidden_layers,
        ropes={"full_attention": _rope_table(config, of_head, "full_attention" if nested else None)},
        activation=ACTIVATIONS[activation],
        norm_eps=config.rms_norm_eps,
        attention_scale=of_head**-0.5,
        tied_head=config.tie_word_embeddings,
        max_context=config.max_position_embeddings,
    )


def _windows(config: Config, own_rope: bool = False) -> tuple[LayerSpec, ...]:
    """The layers of a config with `layer_types`; sliding layers use their own rope table where there are two."""
    layers = []
    for layer_type in config.layer_types:
        if layer_type not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{config.model_type}: layer type {layer_type!r} is not supported; "
                "known: full_attention, sliding_attention"
            )
        sliding = layer_type == "sliding_attention"
        layers.append(
            LayerSpec(config.sliding_window if sliding else None, layer_type if own_rope else "full_attention")
        )
    return tuple(layers)


def _llama(config: Config) -> BlockSpec:
    bias = config.attention_bias
    return replace(_plain_spec(config), qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


def _mistral(config: Config) -> BlockSpec:
    layer = LayerSpec(config.sliding_window, "full_attention")
    return replace(_plain_spec(config), layers=(layer,) * config.num_hidden_layers)


def _qwen2(config: Config) -> BlockSpec:
    return replace(_plain_spec(config), layers=_windows(config), qkv_bias=True)


def _qwen3(config: Config) -> BlockSpec:
    bias = config.attention_bias
    return replace(_plain_spec(config), layers=_windows(config), qkv_bias=bias, o_bias=bias, qk_norm=True)


def _gemma3(config: Config) -> BlockSpec:
    if config.attn_logit_softcapping is not None:
        raise ValueError(
            f"{config.model_type}: attn_logit_softcapping={config.attn_logit_softcapping} is not supported, only null"
        )
    if config.use_bidirectional_attention:
        raise ValueError(
            f"{config.model_type}: use_bidirectional_attention is not supported: only causal models generate"
        )
    spec = _plain_spec(config)
    return replace(
        spec,
        layers=_windows(config, own_rope=True),
        ropes={kind: _rope_table(config, spec.head_dim, kind) for kind in sorted(set(config.layer_types))},
        attention_scale=config.query_pre_attn_scalar**-0.5,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_bias,
        qk_norm=True,
        one_plus_weight=True,
        sandwich_norms=True,
        embedding_scale=config.hidden_size**0.5,
        final_softcap=config.final_logit_softcapping,
    )


FAMILIES: dict[str, Callable[[Config], BlockSpec]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3_text": _gemma3,
    "gemma3": _gemma3,
}


def check_family(model_type: str | None) -> None:
    """Raise ValueError, with the list of the known ones, where `model_type` is not among the families."""
    if model_type not in FAMILIES:
        raise ValueError(f"architecture {model_type!r} is not supported; known model types: {', '.join(FAMILIES)}")


def text_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """The language model's config: the config itself, or its text part where the checkpoint also has a vision tower."""
    check_family(config.model_type)
    return config.get_text_config()


def decoder_path(config: PreTrainedConfig) -> str:
    """The module of the Hugging Face model that has the decoder's `layers`."""
    return "model" if text_config(config) is config else "model.language_model"


def block_spec(config: PreTrainedConfig) -> BlockSpec:
    """The decoder that `config` describes.

    Raises:
        ValueError: an unknown architecture, or an option of a known one that is not supported, each by name.
    """
    text = text_config(config)
    return FAMILIES[text.model_type](text)


def model_layout(spec: BlockSpec) -> ModelLayout:
    """Every tensor of the model, linears fused and named as in vLLM, the rest under Hugging Face's names."""
    hidden, q_rows, kv_rows = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    linears: list[LinearLayout] = []
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, hidden)}
    norms = ["input_layernorm", "post_attention_layernorm"]
    if spec.sandwich_norms:
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    qkv = (("q_proj", q_rows), ("k_proj", kv_rows), ("v_proj", kv_rows))
    gate_up = (("gate_proj", spec.intermediate_size), ("up_proj", spec.intermediate_size))
    for index in range(len(spec.layers)):
        prefix = f"model.layers.{index}"
        linears += [
            LinearLayout(f"{prefix}.self_attn.qkv_proj", qkv, hidden, spec.qkv_bias),
            LinearLayout(f"{prefix}.self_attn.o_proj", (("o_proj", hidden),), q_rows, spec.o_bias),
            LinearLayout(f"{prefix}.mlp.gate_up_proj", gate_up, hidden, spec.mlp_bias),
            LinearLayout(f"{prefix}.mlp.down_proj", (("down_proj", hidden),), spec.intermediate_size, spec.mlp_bias),
        ]
        tensors |= {f"{prefix}.{norm}.weight": (hidden,) for norm in norms}
        if spec.qk_norm:
            tensors |= {f"{prefix}.self_attn.{norm}.weight": (spec.head_dim,) for norm in ("q_norm", "k_norm")}
    tensors["model.norm.weight"] = (hidden,)
    if not spec.tied_head:
        tensors[HEAD] = (spec.vocab_size, hidden)
    return ModelLayout(tuple(linears), tensors, spec.tied_head)
