"""The policy: one decoder for all families, run over packed rows, on tensors that the rollout engine reads as well."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ..kernels.attention import KeptAttention, kept_attention
from ..kernels.attention_dense import padded_tokens
from ..kernels.block_checkpoint import checkpointed_block
from ..kernels.offload import ActivationOffload, BlockInputs
from ..kernels.ops import OPS, Ops
from ..kernels.rope import QKNorm, rope_table
from ..kernels.row_layout import Layout, is_layout, positions, prolonged, row_tokens
from ..kernels.tiled_mlp import TILE_TOKENS
from ..weightshare.adapter import Adapter
from ..weightshare.base_format import check_quantization
from ..weightshare.bnb_checkpoint import assemble, nf4_projections
from ..weightshare.linear import SharedLinear
from ..weightshare.loading import (
    base_of,
    checkpoint_directory,
    load_weights,
    read_checkpoint,
    read_config,
    tensor_names,
)
from ..weightshare.memory import check_fits
from ..weightshare.weights import SharedWeights
from .families import BlockSpec, block_spec, check_family, decoder_path, model_layout, text_config

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Block:
    """One decoder layer over shared tensors. Not an nn.Module: it owns nothing."""

    def __init__(self, weights: SharedWeights, spec: BlockSpec, index: int):
        prefix = f"model.layers.{index}"
        self.ops: Ops = OPS["auto"]
        self.spec, self.layer = spec, spec.layers[index]
        self.qkv_proj = weights.linears[f"{prefix}.self_attn.qkv_proj"]
        self.o_proj = weights.linears[f"{prefix}.self_attn.o_proj"]
        self.gate_up_proj = weights.linears[f"{prefix}.mlp.gate_up_proj"]
        self.down_proj = weights.linears[f"{prefix}.mlp.down_proj"]
        self.norms = {
            name.removeprefix(f"{prefix}."): tensor
            for name, tensor in weights.tensors.items()
            if name.startswith(f"{prefix}.")
        }
        self.qk_norm: QKNorm | None = None
        if spec.qk_norm:
            q_weight, k_weight = (self.norms[f"self_attn.{part}_norm.weight"] for part in "qk")
            self.qk_norm = QKNorm(q_weight, k_weight, spec.norm_eps, spec.one_plus_weight)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self.ops.rms_norm(x, self.norms[f"{name}.weight"], self.spec.norm_eps, self.spec.one_plus_weight)

    def _add_norm(self, x: Tensor, residual: Tensor, name: str) -> tuple[Tensor, Tensor]:
        """norm(x + residual), x + residual."""
        weight = self.norms[f"{name}.weight"]
        return self.ops.add_rms_norm(x, residual, weight, self.spec.norm_eps, self.spec.one_plus_weight)

    def _attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, kept: KeptAttention | None = None
    ) -> Tensor:
        spec, tokens = self.spec, x.shape[0]
        qkv = self.qkv_proj(x, self.ops.reference)
        q, k, v = self.ops.rotate_qkv(qkv, cos, sin, spec.heads, spec.kv_heads, self.qk_norm)
        out = self.ops.packed_attention(q, k, v, layout, spec.attention_scale, self.layer.window, kept=kept)
        return self.o_proj(out.reshape(tokens, spec.heads * spec.head_dim), self.ops.reference)

    def _mlp(self, x: Tensor) -> Tensor:
        gate_up = self.gate_up_proj(x, self.ops.reference)
        return self.down_proj(self.ops.glu(gate_up, self.spec.activation, overwrite=True), self.ops.reference)

    def attend(
        self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout, kept: KeptAttention | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (tokens, hidden_size) -> the MLP's input and the residual it is added to, both of the same shape."""
        attended = self._attention(self._norm(x, "input_layernorm"), cos, sin, layout, kept)
        if not self.spec.sandwich_norms:
            return self._add_norm(attended, x, "post_attention_layernorm")
        attended = self._norm(attended, "post_attention_layernorm")
        return self._add_norm(attended, x, "pre_feedforward_layernorm")

    def feed_forward(self, normed: Tensor) -> Tensor:
        """(tokens, hidden_size) -> what is added to the residual."""
        out = self._mlp(normed)
        return self._norm(out, "post_feedforward_layernorm") if self.spec.sandwich_norms else out

    def attention_parameters(self) -> list[Tensor]:
        return _masters(self.qkv_proj, self.o_proj)

    def feed_forward_parameters(self) -> list[Tensor]:
        return _masters(self.gate_up_proj, self.down_proj)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout) -> Tensor:
        """x (tokens, hidden_size) -> the same shape."""
        normed, residual = self.attend(x, cos, sin, layout)
        return residual + self.feed_forward(normed)


def _masters(*linears: SharedLinear) -> list[Tensor]:
    """The masters that the outputs of `linears` depend on as things stand."""
    slots = [linear.slot for linear in linears if linear.slot is not None and linear.adapter_on]
    return [master for slot in slots for master in (slot.master_a, slot.master_b) if master.requires_grad]


class Policy(nn.Module):
    """A decoder over `weights`, which it does not own: only the adapter's masters are parameters.

    Attributes:
        config: the Hugging Face config of the (text) model.
        spec: the decoder derived from it.
        weights: the base weights, shared with the rollout engine.
        adapter: the LoRA adapter, or None.
        gradient_checkpointing: keep only each block's input for the backward pass and compute the block again, its MLP
            in tiles.
        mlp_tile_tokens: tokens of such a tile, at most.
        offload: keeps those inputs in host memory; None: they stay where they are.
        fp32_head: logits in fp32 whatever the dtype (kernels.head_logits); the engine's have to agree.
    """

    def __init__(self, weights: SharedWeights, config: PreTrainedConfig, adapter: Adapter | None = None):
        super().__init__()
        self.config = text_config(config)
        self.spec = block_spec(config)
        if weights.layout != model_layout(self.spec):
            raise ValueError(f"the shared weights do not have the layout that the {self.spec.family} config describes")
        self.weights, self.adapter = weights, adapter
        self.gradient_checkpointing = False
        self.mlp_tile_tokens = TILE_TOKENS
        self.offload: ActivationOffload | None = None
        self.fp32_head = True
        self._blocks = [_Block(weights, self.spec, index) for index in range(len(self.spec.layers))]
        self.kernels = "auto"
        self._inverse_frequencies = {
            key: table.inverse_frequencies.to(weights.device) for key, table in self.spec.ropes.items()
        }
        self._embedding_scale: float | None = None
        if (
            self.spec.embedding_scale is not None
        ):  # rounded to the dtype first, as transformers does: sqrt(3072) is 55.5 in bf16
            self._embedding_scale = torch.tensor(self.spec.embedding_scale).to(weights.dtype).item()

    @property
    def device(self) -> torch.device:
        return self.weights.device

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; the masters are fp32 whatever it is."""
        return self.weights.dtype

    @property
    def kernels(self) -> str:
        """`auto`: the kernels of each op where it has some for the device; `reference`: plain torch everywhere.

        Set it to choose; ValueError where it is neither.
        """
        return next(name for name, ops in OPS.items() if ops is self._ops)

    @kernels.setter
    def kernels(self, name: str) -> None:
        if name not in OPS:
            raise ValueError(f"kernels={name!r}: choose {' or '.join(OPS)}")
        self._ops = OPS[name]
        for block in self._blocks:
            block.ops = self._ops

    @property
    def max_context(self) -> int:
        """Tokens of one sequence that the model was made for."""
        return self.spec.max_context

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Policy":
        """Refuse what `.to()`, `.cuda()`, `.half()` and the like would change; where they change nothing, do nothing.

        The masters are views of one buffer and the base is shared with the engine: a moved copy would be neither.
        """
        probe = torch.empty(0, dtype=torch.float32, device=self.device)
        moved = fn(probe)
        if moved.device != probe.device or moved.dtype != probe.dtype:
            raise RuntimeError(
                "the policy shares its weights with the rollout engine and cannot be moved or cast "
                f"(from {probe.dtype} masters on {probe.device} to {moved.dtype} on {moved.device}); "
                "pass `device` and `dtype` when it is loaded"
            )
        return self

    def hidden_states(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Run one packed row: sequences side by side, positions restarting at 0, no attention across.

        Continuations may share a prompt that is in the row once; they see it, and not each other.

        Args:
            tokens: (T,) int64 token ids, moved to the policy's device.
            layout: tokens of each sequence, or of a prompt and its continuations, in order, each at least 1; together
                they are T (`kernels/row_layout.py`).

        Returns:
            (T, hidden_size) in the compute dtype, after the final norm.

        Raises:
            ValueError: a layout that does not fit the row.
        """
        if tokens.ndim != 1 or not is_layout(layout) or row_tokens(layout) != tokens.shape[0]:
            raise ValueError(
                f"Policy: lengths {list(layout)} do not split a row of shape {tuple(tokens.shape)} into sequences"
            )
        count = tokens.shape[0]
        if self.device.type == "cuda":  # the last sequence is prolonged: causal, so nothing before its end changes
            padding = padded_tokens(count) - count
            tokens, layout = F.pad(tokens, (0, padding)), prolonged(layout, padding)
        places = positions(layout).to(self.device)
        tables = {
            key: rope_table(places, frequencies, self.spec.ropes[key].scaling, self.dtype)
            for key, frequencies in self._inverse_frequencies.items()
        }
        x = F.embedding(tokens.to(self.device), self.weights.embedding)
        if self._embedding_scale is not None:
            x = x * self._embedding_scale
        inputs: BlockInputs | None = None
        if self.offload is not None and self.gradient_checkpointing and torch.is_grad_enabled():
            left = () if self._ops.reference else kept_attention(x, self.spec.heads, self.spec.head_dim)
            inputs = self.offload.begin(x, len(self._blocks), left)
        for index, block in enumerate(self._blocks):
            cos, sin = tables[block.layer.rope]
            if self.gradient_checkpointing:
                x = checkpointed_block(block, x, (cos, sin, layout), self.mlp_tile_tokens, inputs, index)
            else:
                x = block(x, cos, sin, layout)
        weight, spec = self.weights.tensors["model.norm.weight"], self.spec
        return self._ops.rms_norm(x[:count], weight, spec.norm_eps, spec.one_plus_weight)

    def logprobs(
        self,
        tokens: Tensor,
        layout: Layout,
        rows: Tensor,
        targets: Tensor,
        temperature: float = 1.0,
        entropy: bool = False,
        entropy_gradient: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Log-probabilities of given tokens, each predicted from a position of a packed row.

        Args:
            tokens, layout: the row, as for `hidden_states`.
            rows: (n,) int64 positions in the row; the logits at position rows[i] ...
            targets: (n,) int64 ... predict token targets[i].
            temperature: the logits are divided by it, above 0.
            entropy: also return the entropies of the distributions.
            entropy_gradient: and let them be differentiable.

        Returns:
            log-probs (n,) fp32, differentiable in the adapter's masters, and entropies (n,) fp32 or None.
        """
        hidden = self.hidden_states(tokens, layout)[rows.to(self.device)]
        return self._ops.linear_logprob(
            hidden,
            self.weights.head,
            targets.to(self.device),
            temperature,
            self.spec.final_softcap,
            entropy,
            entropy_gradient,
            self.fp32_head,
        )

    forward = logprobs

    def gradient_checkpointing_enable(self, **_options: Any) -> None:
        """What transformers.Trainer calls where `gradient_checkpointing` is set; its options do not apply here."""
        self.gradient_checkpointing = True

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the policy is the bare base, without gradients: the reference policy of a KL penalty."""
        before = self.weights.adapter_on
        self.weights.set_adapter(False)
        try:
            with torch.no_grad():
                yield
        finally:
            self.weights.set_adapter(before)


def build(
    weights: SharedWeights, config: PreTrainedConfig, lora: LoraConfig | None = None, seed: int | None = None
) -> Policy:
    """A policy on weights that are there already.

    Args:
        weights: with the layout of `config`; a new adapter takes their slots.
        config: of a known family.
        lora: makes an adapter; None: the bare base.
        seed: of the adapter's initialisation; torch's default generator where None.

    Raises:
        ValueError: an unknown architecture, another layout, LoRA options or targets that are not supported.
    """
    adapter = None
    if lora is not None:
        generator = None if seed is None else torch.Generator(weights.device).manual_seed(seed)
        adapter = Adapter(weights, lora, generator, decoder_path(config))
    return Policy(weights, config, adapter)


def load(
    model: str | Path | PreTrainedModel,
    lora: LoraConfig | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    seed: int | None = None,
    base: str = "auto",
) -> Policy:
    """Load a checkpoint, or copy a model that is in memory, into shared storage and build a policy on it.

    Args:
        model: a directory, a hub id, or a `transformers` model of a known family.
        lora: as for `build`.
        dtype: float32, bfloat16 or float16. "auto": float32 on the CPU; on a GPU the checkpoint's, bfloat16 where
            that is float32.
        device: the first GPU, else the CPU, where None.
        seed: as for `build`.
        base: "nf4", "fp4": the projections are quantised to it while they load. "auto": they stay as the checkpoint has
            them, 16 or 32 bits or bitsandbytes' NF4.

    Raises:
        ValueError: a checkpoint that is missing, incomplete, corrupt, of an unknown architecture or quantised in a
            format other than NF4; projections that the base cannot hold; weights that do not fit into the GPU's memory;
            LoRA options or targets that are not supported.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    config, names, tensors = _open(model)
    layout, compute_dtype = model_layout(block_spec(config)), resolve_dtype(dtype, config, place)
    stored = nf4_projections(names, config.to_dict())
    wanted = base_of(layout, base, stored)
    check_fits(layout, compute_dtype, wanted, place)
    weights = SharedWeights.empty(layout, compute_dtype, place, wanted)
    load_weights(weights, assemble(tensors, stored, place))
    return build(weights, config, lora, seed)


def _open(model: str | Path | PreTrainedModel) -> tuple[PreTrainedConfig, list[str], Iterator[tuple[str, Tensor]]]:
    """A checkpoint's or model's config, the names of its tensors, and these one after the other."""
    if isinstance(model, PreTrainedModel):
        check_family(model.config.model_type)
        check_quantization(model.config.to_dict(), "the model")
        state = model.state_dict()
        return model.config, list(state), iter(state.items())
    if not isinstance(model, str | Path):
        raise TypeError(f"model must be a directory, a hub id or a transformers model, got {type(model).__name__}")
    directory = checkpoint_directory(model)
    check_family(read_config(directory).get("model_type"))
    return AutoConfig.from_pretrained(directory), tensor_names(directory), read_checkpoint(directory)


def resolve_dtype(dtype: torch.dtype | str, config: Any, device: torch.device) -> torch.dtype:
    """The dtype of base and products; see `load`."""
    if dtype == "auto":
        stored = config.dtype or config.get_text_config().dtype
        if device.type == "cpu":
            return torch.float32
        return stored if stored in (torch.bfloat16, torch.float16) else torch.bfloat16
    resolved = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved is None or resolved not in DTYPES.values():
        raise ValueError(f"dtype {dtype!r} is not supported; known: auto, {', '.join(DTYPES)}")
    return resolved
