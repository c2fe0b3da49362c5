"""What vLLM calls for each layer: our linears, dense and in 4 bits; an embedding and a head that stay as loaded."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import LinearMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.utils import set_weight_attrs

from ..kernels.fp4_linear import fp4_linear
from ..kernels.lora_linear import lora_linear
from ..kernels.nf4_linear import nf4_linear
from .fp4_weight import FP4Weight
from .guard import SLOT_A, SLOT_B
from .nf4_weight import NF4Weight
from .storage import DenseWeight, WeightStorage


class SharedLinearMethod(LinearMethodBase):
    """A dense linear whose weight is left as it is loaded, and its LoRA slot."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make `layer.weight` (out, in); the attributes tell vLLM's loader where the rows of each part go."""
        weight = nn.Parameter(
            torch.empty(sum(output_partition_sizes), input_size_per_partition, dtype=params_dtype), requires_grad=False
        )
        set_weight_attrs(weight, {"input_dim": 1, "output_dim": 0} | extra_weight_attrs)
        layer.register_parameter("weight", weight)
        layer.part_rows = list(output_partition_sizes)
        layer.lora_offsets = None
        layer.register_buffer("stacked_weight", None, persistent=False)

    def storage(self, layer: Any) -> WeightStorage:
        """The layer's own tensors."""
        return DenseWeight(layer.weight)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out); traced and captured by vLLM."""
        if layer.lora_offsets is None:
            return F.linear(x, layer.weight, bias)
        return lora_linear(
            x, layer.weight, bias, layer.lora_slot_a, layer.lora_slot_b, layer.lora_offsets, layer.stacked_weight
        )


class QuantizedLinearMethod(SharedLinearMethod):
    """A linear in 4 bits and its LoRA slot. Its projections are quantised one by one by our loader, not by vLLM's."""

    storage_type: type[NF4Weight] | type[FP4Weight]

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Make the tensors of a `storage_type` parameters of the layer; on vLLM's current device."""
        device = torch.empty(0).device
        layer.quantized_weight = self.storage_type(
            output_partition_sizes, input_size_per_partition, params_dtype, device
        )
        for name, tensor in layer.quantized_weight.tensors().items():
            layer.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        layer.part_rows = list(output_partition_sizes)
        layer.lora_offsets = None
        for name in (SLOT_A, SLOT_B):
            layer.register_buffer(name, None, persistent=False)

    def storage(self, layer: Any) -> WeightStorage:
        weight: WeightStorage = layer.quantized_weight
        return weight


class NF4LinearMethod(QuantizedLinearMethod):
    """A linear in NF4."""

    storage_type = NF4Weight

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return nf4_linear(
            x,
            layer.nf4_codes,
            layer.nf4_scale_codes,
            layer.nf4_group_scales,
            layer.nf4_group_start,
            layer.nf4_offset,
            bias,
            layer.lora_slot_a,
            layer.lora_slot_b,
            layer.lora_offsets,
        )


class FP4LinearMethod(QuantizedLinearMethod):
    """A linear in FP4."""

    storage_type = FP4Weight

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return fp4_linear(
            x,
            layer.fp4_codes,
            layer.fp4_scale_codes,
            layer.fp4_row_scales,
            bias,
            layer.lora_slot_a,
            layer.lora_slot_b,
            layer.lora_offsets,
        )


class SharedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The embedding and the head as they are loaded: vLLM's CPU build would multiply by a packed copy of the head."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight alone."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., hidden_size) -> logits (..., padded vocabulary)."""
        return F.linear(x, layer.weight, bias)
