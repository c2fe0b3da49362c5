"""SharedLinear: a frozen base projection, possibly several fused, and its LoRA slot."""

from dataclasses import dataclass

from torch import Tensor

from ..kernels.lora_add import LoraPart
from ..kernels.lora_training import lora_training, lora_training_reference
from .storage import WeightStorage


@dataclass(frozen=True)
class OutputPart:
    """One of the projections fused into a SharedLinear: its name in the Hugging Face module and its rows."""

    name: str
    start: int
    stop: int

    @property
    def rows(self) -> slice:
        return slice(self.start, self.stop)


@dataclass
class LoraSlot:
    """What both forwards read (a, b: compute dtype) and what the optimizer updates (masters: fp32, same shapes).

    a: (adapted outputs * r, in); b: (adapted rows, r), multiplied by `scale` when it was cast; see kernels.lora_add.
    """

    a: Tensor
    b: Tensor
    master_a: Tensor
    master_b: Tensor
    scale: float
    parts: tuple[LoraPart, ...]


class SharedLinear:
    """y = x W^T + bias (+ the adapter's update), over tensors that trainer and engine share.

    Not an nn.Module: it owns no parameters of its own, and is held by the policy and by the engine's layer alike.

    Attributes:
        name: the fused module's name, e.g. `model.layers.0.self_attn.qkv_proj`.
        parts: the Hugging Face projections in the order of their rows.
        weight: the frozen base.
        bias: (out,) or None.
        slot: the adapter's place, or None where this projection is not adapted.
        adapter_on: False while the bare base is wanted (the reference policy).
    """

    def __init__(self, name: str, parts: tuple[OutputPart, ...], weight: WeightStorage, bias: Tensor | None = None):
        if parts[-1].stop != weight.out_features:
            raise ValueError(f"{name}: parts end at row {parts[-1].stop}, the weight has {weight.out_features}")
        self.name, self.parts, self.weight, self.bias = name, parts, weight, bias
        self.slot: LoraSlot | None = None
        self.adapter_on = True

    def __call__(self, x: Tensor, reference: bool = False) -> Tensor:
        """x (tokens, in) -> (tokens, out), dtype of the base; `reference`: the update in plain torch on a GPU too."""
        if self.slot is None or not self.adapter_on:
            return self.weight.linear(x, self.bias)
        slot = self.slot
        update = (slot.a, slot.b, slot.master_a, slot.master_b, slot.scale, slot.parts)
        compute = lora_training_reference if reference else lora_training
        return compute(x, self.weight.operand, self.bias, *update)

    def part_name(self, part: OutputPart) -> str:
        """Hugging Face's module name of one part, e.g. `model.layers.0.self_attn.q_proj`."""
        return f"{self.name.rsplit('.', 1)[0]}.{part.name}"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Hugging Face's parameter names of this projection's parts -> their dense shapes."""
        shapes: dict[str, tuple[int, ...]] = {}
        for part in self.parts:
            rows = part.stop - part.start
            shapes[f"{self.part_name(part)}.weight"] = (rows, self.weight.in_features)
            if self.bias is not None:
                shapes[f"{self.part_name(part)}.bias"] = (rows,)
        return shapes

    def dense_parameters(self) -> dict[str, Tensor]:
        """The same names -> views of the shared tensors; of a quantised base its weights, decoded."""
        named: dict[str, Tensor] = {}
        for part in self.parts:
            named[f"{self.part_name(part)}.weight"] = self.weight.rows(part.start, part.stop)
            if self.bias is not None:
                named[f"{self.part_name(part)}.bias"] = self.bias[part.start : part.stop]
        return named

    def slot_of(self, part: OutputPart) -> tuple[Tensor, Tensor] | None:
        """Views (A (r, in), scaled B (rows, r)) of one part's slot, or None where it is not adapted."""
        if self.slot is None:
            return None
        for lora_part in self.slot.parts:
            if lora_part.name == part.name:
                return self.slot.a[lora_part.a], self.slot.b[lora_part.b]
        return None
