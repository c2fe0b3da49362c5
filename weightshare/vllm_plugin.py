"""vLLM runs our linear layer: the `colora` quantization method and model loader.

vLLM creates the tensors, loads the checkpoint into them and captures them in its graphs; the trainer's `SharedWeights`
are made of the very same tensors. The adapter's slots are allocated once the weights are loaded and before anything is
captured, so that writing a slot in place is all it takes to hand an adapter to the engine.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.utils import set_weight_attrs

from ..kernels.lora_linear import PartOffsets, lora_linear
from .adapter import Adapter
from .linear import SharedLinear
from .loading import HARMLESS, NAMES_SHOWN
from .storage import DenseWeight
from .weights import HEAD, LinearLayout, ModelLayout, SharedWeights

NAME = "colora"  # of the quantization method and of the load format
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


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

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> (..., out); traced and captured by vLLM."""
        if layer.lora_offsets is None:
            return F.linear(x, layer.weight, bias)
        return lora_linear(
            x, layer.weight, bias, layer.lora_slot_a, layer.lora_slot_b, layer.lora_offsets, layer.stacked_weight
        )


class SharedEmbeddingMethod(UnquantizedEmbeddingMethod):
    """The embedding and the head as they are loaded: vLLM's CPU build would multiply by a packed copy of the head."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Leave the weight alone."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., hidden_size) -> logits (..., padded vocabulary)."""
        return F.linear(x, layer.weight, bias)


@register_quantization_config(NAME)
class SharedConfig(QuantizationConfig):
    """What vLLM asks for a layer's method. Nothing is quantised: this is vLLM's public place for one's own linears."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "SharedConfig":
        return cls()

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return SharedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):  # the head is one as well
            return SharedEmbeddingMethod()
        return None


@dataclass
class SharingSession:
    """What vLLM's loader hands over to the trainer while an engine starts.

    Attributes:
        lora: the adapter to make on the loaded weights, or None for the bare base.
        seed: of the adapter's initialisation.
        tied_head: what the checkpoint's config.json says.
        on_loaded: called with vLLM's configuration once weights and slots are allocated, before the KV cache is.
        model, weights, adapter: there once the checkpoint is loaded; `model` is vLLM's module.
    """

    lora: LoraConfig | None
    seed: int
    tied_head: bool
    on_loaded: Callable[["SharingSession", VllmConfig], None]
    model: nn.Module = field(init=False)
    weights: SharedWeights = field(init=False)
    adapter: Adapter | None = field(default=None, init=False)

    def bind(self, model: nn.Module) -> None:
        """Wrap the tensors of vLLM's `model`, make the adapter, and give every adapted layer its slot."""
        self.model, self.weights = model, shared_weights(model)
        if self.weights.layout.tied_head != self.tied_head:
            raise ValueError(
                f"config.json has tie_word_embeddings={self.tied_head}, but the checkpoint's head and embedding are "
                f"{'the same' if self.weights.layout.tied_head else 'different'} tensors; correct config.json"
            )
        if self.lora is None:
            return
        generator = torch.Generator(self.weights.device).manual_seed(self.seed)
        place_a = partial(_stack_beneath, model) if self.weights.device.type == "cuda" else None
        self.adapter = Adapter(self.weights, self.lora, generator, place_a=place_a)
        for name, linear in self.weights.linears.items():
            if linear.slot is not None:
                layer: Any = model.get_submodule(name)
                layer.register_buffer("lora_slot_a", linear.slot.a, persistent=False)
                layer.register_buffer("lora_slot_b", linear.slot.b, persistent=False)
                layer.lora_offsets = PartOffsets(linear.slot.parts)


def _stack_beneath(model: nn.Module, linear: SharedLinear, shape: tuple[int, int]) -> Tensor:
    """Move a projection's weight into a matrix with room for its stacked A beneath, and return that room.

    One product with the whole matrix then gives base and x A^T (kernels.lora_up).
    """
    layer, rows = model.get_submodule(linear.name), linear.weight.out_features
    weight = layer.get_parameter("weight")
    stacked = weight.new_empty(rows + shape[0], shape[1])
    stacked[:rows].copy_(weight)
    weight.data = stacked[:rows]
    layer.stacked_weight = stacked
    linear.weight = DenseWeight(weight)
    return stacked[rows:]


_SESSION: ContextVar[SharingSession] = ContextVar("colora_sharing_session")


@contextmanager
def sharing(session: SharingSession) -> Iterator[SharingSession]:
    """Within it an engine of this process that starts with the `colora` load format fills `session`."""
    token = _SESSION.set(session)
    try:
        yield session
    finally:
        _SESSION.reset(token)


@register_model_loader(NAME)
class SharedModelLoader(DefaultModelLoader):
    """vLLM's own safetensors loader; it checks the checkpoint against the model and then fills the session."""

    def __init__(self, load_config: LoadConfig):
        super().__init__(replace(load_config, load_format="safetensors"))

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> Generator[tuple[str, Tensor], None, None]:
        """Every tensor of the checkpoint. vLLM does not notice missing ones where a quantization method is in use."""
        session, weights = _SESSION.get(), shared_weights(model)
        missing = {name: tuple(tensor.shape) for name, tensor in weights.dense_parameters()}
        tied_head = None
        if session.tied_head:
            missing.pop(HEAD, None)
        for name, tensor in super().get_all_weights(model_config, model):
            if name == HEAD and session.tied_head:
                tied_head = tensor
            elif name in missing:
                _check_stored(name, tensor, missing.pop(name))
            elif not any(part in name for part in HARMLESS):
                raise ValueError(
                    f"the checkpoint has {name}, for which vLLM's {type(model).__name__} has no place: config.json "
                    "does not describe it, or vLLM does not know that option; then set engine='transformers'"
                )
            yield name, tensor
        if missing:
            some = ", ".join(sorted(missing)[:NAMES_SHOWN])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors that its config.json describes: {some}; "
                "it is incomplete, or the two do not belong together"
            )
        if tied_head is not None and not torch.equal(weights.embedding, tied_head.to(weights.embedding)):
            raise ValueError("config.json ties the head to the embedding, but the checkpoint's differ; correct it")

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        session = _SESSION.get()
        model = super().load_model(vllm_config, model_config, prefix)
        session.bind(model)
        session.on_loaded(session, vllm_config)
        return model


def shared_weights(model: nn.Module) -> SharedWeights:
    """vLLM's tensors as shared weights: the same storage, under the policy's names.

    Args:
        model: vLLM's module, its linears made by `SharedLinearMethod`.

    Raises:
        ValueError: tensors of different dtypes.
    """
    fused: Mapping[str, list[str]] = getattr(model, "packed_modules_mapping", {})  # which modules vLLM stacks in one
    linears: dict[str, SharedLinear] = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, "quant_method", None), SharedLinearMethod):
            linears[name] = _shared_linear(name, module, fused)
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():  # a tied head appears once, as the embedding
        owner, _, kind = name.rpartition(".")
        if owner not in linears:
            module = model.get_submodule(owner)
            rows = module.org_vocab_size if isinstance(module, VocabParallelEmbedding) else None
            tensors[name] = parameter.detach()[:rows]  # vLLM pads the vocabulary
    dtypes = {tensor.dtype for tensor in tensors.values()} | {linear.weight.dtype for linear in linears.values()}
    if len(dtypes) != 1:
        raise ValueError(
            f"vLLM holds this model in several dtypes ({', '.join(map(str, dtypes))}); only one is supported"
        )
    layout = ModelLayout(
        tuple(_layout(linear) for linear in linears.values()),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        tied_head=HEAD not in tensors,
    )
    return SharedWeights(layout, linears, tensors, dtypes.pop())


def _shared_linear(name: str, module: Any, fused: Mapping[str, list[str]]) -> SharedLinear:
    own_name = name.rpartition(".")[2]
    names = fused.get(own_name, [own_name])
    bias = module.bias.detach() if module.bias is not None else None
    layout = LinearLayout(name, tuple(zip(names, module.part_rows, strict=True)), module.weight.shape[1])
    return SharedLinear(name, layout.output_parts(), DenseWeight(module.weight), bias)


def _layout(linear: SharedLinear) -> LinearLayout:
    parts = tuple((part.name, part.stop - part.start) for part in linear.parts)
    return LinearLayout(linear.name, parts, linear.weight.in_features, linear.bias is not None)


def _check_stored(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        raise ValueError(
            f"{name} is stored as {tensor.dtype}: quantised weights are not supported; use unquantised ones"
        )
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)} in the checkpoint, its config.json says {shape}")
