"""An attention backend for vLLM: FlashAttention, but decode steps read the keys and values of a shared prompt once.

vLLM imports the backend by its dotted name, in the process of the trainer. It is chosen for layers that attend to
everything (`vllm_options.shared_prompt_shape`); prefills, and layers with anything that the kernel does not have, are
FlashAttention's. The cache and the way it is written are FlashAttention's throughout.

A step is planned when vLLM builds its metadata, outside of CUDA graphs and into buffers that stay; what a graph holds
is `DecodeAttention.attend`, which is launched alike for every step of so many sequences.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import envs
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec

from ..kernels.decode_attention import DecodeAttention, DecodeShape

UNQUANTISED = ("auto", "bfloat16", "float16")


class SharedPromptBackend(FlashAttentionBackend):
    """What vLLM asks for classes, shapes of the cache, and what is supported."""

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's `AttentionBackendEnum` that it is registered as; vLLM looks it up there."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["SharedPromptImpl"]:
        return SharedPromptImpl

    @staticmethod
    def get_builder_cls() -> type["SharedPromptBuilder"]:
        return SharedPromptBuilder


@dataclass
class SharedPromptMetadata(FlashAttentionMetadata):
    """Of a step in which every sequence decodes one token.

    Attributes:
        decode: planned for this step.
    """

    decode: DecodeAttention | None = None  # as all of FlashAttention's last fields it needs a default


class SharedPromptBuilder(FlashAttentionMetadataBuilder):
    """Plans decode steps, of layers whose cache has one block table."""

    supports_update_block_table = False  # a plan holds for the block table it was made from

    def __init__(self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: Any):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self._shape = _shape_of(kv_cache_spec, layer_names, vllm_config)
        self._max_sequences = vllm_config.scheduler_config.max_num_seqs
        self._decode: DecodeAttention | None = None

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlashAttentionMetadata:
        """FlashAttention's metadata; that of a decode step with the plan, and without FlashAttention's own."""
        if not self._decodes(common_attn_metadata):
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        if self._decode is None:  # not in __init__: memory that vLLM allocates then loses its contents in sleep
            assert self._shape is not None
            self._decode = DecodeAttention(self._shape, self._max_sequences, torch.device(self.device))
        # Fast: no schedule for FlashAttention's kernel. Those of later steps will have no window, as layers are plain.
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build=True)
        self._decode.plan(metadata.block_table, metadata.seq_lens)
        return SharedPromptMetadata(**vars(metadata), decode=self._decode)

    def _decodes(self, step: CommonAttentionMetadata) -> bool:
        """Whether the kernel computes the step. The same for a graph's capture and all of its replays: what is asked
        of a step is its padded size alone."""
        one_token_each = step.max_query_len == 1 and step.num_reqs == step.num_actual_tokens
        return self._shape is not None and one_token_each and step.num_reqs <= self._max_sequences

    def use_cascade_attention(self, *args: Any, **kwargs: Any) -> bool:
        """vLLM's own way to read a prefix once, which needs one that all sequences of the step have in common."""
        return False


class SharedPromptImpl(FlashAttentionImpl):
    """A layer's attention.

    Attributes:
        plain: whether the kernel has everything that the layer needs.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        varied = self.alibi_slopes is not None or self.sinks is not None or self.logits_soft_cap
        self.plain = (
            self.attn_type == AttentionType.DECODER
            and self.sliding_window == (-1, -1)
            and not varied
            and self.kv_sharing_target_layer_name is None
            and self.kv_cache_dtype in UNQUANTISED
            and not envs.VLLM_BATCH_INVARIANT  # sums are cut by what else is in the step
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: FlashAttentionMetadata,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """`FlashAttentionImpl.forward`: query and output (tokens, heads, head_dim), the cache (blocks, kv_heads,
        block_size, 2 * head_dim) with the step's keys and values in it."""
        planned = isinstance(attn_metadata, SharedPromptMetadata) and attn_metadata.decode is not None
        if not (planned and output_scale is None and output_block_scale is None):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        count = attn_metadata.num_actual_tokens
        attn_metadata.decode.attend(query[:count], kv_cache, attn_metadata.block_table, output[:count], self.scale)
        return output


def _shape_of(spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig) -> DecodeShape | None:
    """What the kernel is compiled for; None where one of the layers is not plain, or there is no kernel for them.

    Args:
        spec: of the cache, its blocks those of the block table.
    """
    impls = [layer.impl for layer in get_layers_from_vllm_config(vllm_config, Attention, layer_names).values()]
    if len(impls) < len(layer_names) or not all(isinstance(impl, SharedPromptImpl) and impl.plain for impl in impls):
        return None
    if spec.dtype != vllm_config.model_config.dtype:
        return None
    shape = DecodeShape(impls[0].num_heads, spec.num_kv_heads, spec.head_size, spec.block_size, spec.dtype)
    return shape if shape.supported else None
