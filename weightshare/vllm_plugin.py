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
from peft import LoraConfig
from torch import Tensor, nn
from vllm.config import ModelConfig, VllmConfig
from vllm.config.load import LoadConfig
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from ..kernels.lora_linear import PartOffsets
from ..kernels.nf4 import NF4Tensor
from .adapter import Adapter
from .base_format import BaseFormat
from .bnb_checkpoint import assemble
from .fp4_weight import FP4Weight
from .linear import SharedLinear
from .loading import HARMLESS, NAMES_SHOWN, dense, destinations, same_values
from .nf4_weight import NF4Weight
from .storage import DenseWeight
from .vllm_linear import FP4LinearMethod, NF4LinearMethod, SharedEmbeddingMethod, SharedLinearMethod
from .weights import HEAD, LinearLayout, ModelLayout, SharedWeights

NAME = "colora"  # of the quantization method and of the load format
LINEAR_METHODS = {"dense": SharedLinearMethod, "nf4": NF4LinearMethod, "fp4": FP4LinearMethod}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@register_quantization_config(NAME)
class SharedConfig(QuantizationConfig):
    """What vLLM asks for a layer's method: its public place for one's own linears, quantised or not."""

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

    @classmethod
    def override_quantization_method(cls, hf_quant_cfg: Any, user_quant: str | None, **_: Any) -> str | None:
        """Ours, also for a checkpoint whose config.json names bitsandbytes."""
        return NAME if user_quant == NAME else None

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            parent, _, own_name = prefix.rpartition(".")
            parts = [f"{parent}.{part}" for part in self.packed_modules_mapping.get(own_name, [own_name])]
            base = _SESSION.get().base
            base.check([(parts, layer.input_size)])
            return LINEAR_METHODS[base.of(parts)]()
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
        base: the format to hold the projections in.
        stored: modules that the checkpoint has in NF4.
        on_loaded: called with vLLM's configuration once weights and slots are allocated, before the KV cache is.
        model, weights, adapter: there once the checkpoint is loaded; `model` is vLLM's module.
    """

    lora: LoraConfig | None
    seed: int
    tied_head: bool
    base: BaseFormat
    stored: frozenset[str]
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
    """Move a dense projection's weight into a matrix with room for its stacked A beneath, and return that room.

    One product with the whole matrix then gives base and x A^T (kernels.lora_up). A quantised projection stays: its A
    has memory of its own.
    """
    if not isinstance(linear.weight, DenseWeight):
        return torch.zeros(shape, dtype=linear.weight.dtype, device=linear.weight.device)
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
        """Every tensor of the checkpoint that vLLM is to load; what is quantised, here or there, is written at once.

        vLLM does not notice missing tensors where a quantization method is in use.
        """
        session, weights = _SESSION.get(), shared_weights(model)
        places = destinations(weights)
        missing = set(places) - ({HEAD} if session.tied_head else set())
        tied_head = None
        for name, tensor in assemble(super().get_all_weights(model_config, model), session.stored, weights.device):
            if name == HEAD and session.tied_head:
                tied_head = tensor
            elif name in missing:
                missing.remove(name)
                if places[name].quantises or isinstance(tensor, NF4Tensor):
                    places[name].write(name, tensor)
                    continue
                places[name].check(name, tensor)
            elif any(part in name for part in HARMLESS):
                continue
            else:
                raise ValueError(
                    f"the checkpoint has {name}, for which vLLM's {type(model).__name__} has no place: config.json "
                    "does not describe it, or vLLM does not know that option; then set engine='transformers'"
                )
            yield name, dense(tensor, weights.dtype)
        if missing:
            some = ", ".join(sorted(missing)[:NAMES_SHOWN])
            raise ValueError(
                f"the checkpoint lacks {len(missing)} tensors that its config.json describes: {some}; "
                "it is incomplete, or the two do not belong together"
            )
        if tied_head is not None and not same_values(weights.embedding, tied_head):
            raise ValueError(
                "config.json ties the head to the embedding, but the checkpoint's differ; set its "
                "tie_word_embeddings to false"
            )

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        session = _SESSION.get()
        model = super().load_model(vllm_config, model_config, prefix)
        session.bind(model)
        _tune_products(session.weights)
        session.on_loaded(session, vllm_config)
        return model


def _tune_products(weights: SharedWeights) -> None:
    """Measure which 4-bit kernel suits this GPU, once for each shape: later they are captured in graphs."""
    if weights.device.type != "cuda":
        return
    from ..kernels import fp4_tuning, nf4_tuning  # where there is a GPU there is Triton

    storages = [linear.weight for linear in weights.linears.values()]
    for kind, tuning in ((NF4Weight, nf4_tuning.TUNING), (FP4Weight, fp4_tuning.TUNING)):
        quantised = [weight for weight in storages if isinstance(weight, kind)]
        shapes = dict.fromkeys((weight.out_features, weight.in_features) for weight in quantised)
        if shapes:
            tuning.tune_unknown(shapes, weights.dtype, weights.device)


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
    weight = module.quant_method.storage(module)
    layout = LinearLayout(name, tuple(zip(names, module.part_rows, strict=True)), weight.in_features)
    return SharedLinear(name, layout.output_parts(), weight, bias)


def _layout(linear: SharedLinear) -> LinearLayout:
    parts = tuple((part.name, part.stop - part.start) for part in linear.parts)
    return LinearLayout(linear.name, parts, linear.weight.in_features, linear.bias is not None)
