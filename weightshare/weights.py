"""The set of tensors that trainer and engine share, and the layout it is made from."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base_format import DENSE, BaseFormat
from .fp4_weight import FP4Weight
from .linear import OutputPart, SharedLinear
from .nf4_weight import NF4Weight
from .storage import DenseWeight, WeightStorage

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class LinearLayout:
    """A fused projection: its name, its parts (Hugging Face name, rows) in order, its inputs, whether it has a bias."""

    name: str
    parts: tuple[tuple[str, int], ...]
    in_features: int
    bias: bool = False

    @property
    def out_features(self) -> int:
        return sum(rows for _, rows in self.parts)

    def part_names(self) -> list[str]:
        """Hugging Face's module names of the parts."""
        parent = self.name.rpartition(".")[0]
        return [f"{parent}.{name}" for name, _ in self.parts]

    def output_parts(self) -> tuple[OutputPart, ...]:
        parts, start = [], 0
        for name, rows in self.parts:
            parts.append(OutputPart(name, start, start + rows))
            start += rows
        return tuple(parts)


@dataclass(frozen=True)
class ModelLayout:
    """Every tensor of a model: fused projections; the rest (embedding, head, norms) by Hugging Face name and shape."""

    linears: tuple[LinearLayout, ...]
    tensors: dict[str, tuple[int, ...]]
    tied_head: bool

    def check_base(self, base: BaseFormat) -> None:
        """Raise ValueError, naming the tensor, where a projection cannot be held in this format."""
        base.check((spec.part_names(), spec.in_features) for spec in self.linears)

    def nbytes(self, dtype: torch.dtype, base: BaseFormat) -> int:
        """Bytes of a base with this layout, as `SharedWeights.nbytes` would say of one."""
        return SharedWeights.empty(self, dtype, "meta", base).nbytes


@dataclass
class SharedWeights:
    """One copy of a model's weights.

    Attributes:
        layout: what there is.
        linears: fused projections by name.
        tensors: embedding, norms and (where it is not tied) head, by Hugging Face name.
        dtype: of the dense tensors and of every product.
    """

    layout: ModelLayout
    linears: dict[str, SharedLinear]
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    adapter_on: bool = field(default=True, init=False)

    @classmethod
    def empty(
        cls, layout: ModelLayout, dtype: torch.dtype, device: torch.device | str, base: BaseFormat = DENSE
    ) -> "SharedWeights":
        """Uninitialised storage of the given layout, its projections in the given format.

        Raises ValueError where that format cannot hold a projection.
        """
        layout.check_base(base)
        linears = {}
        for spec in layout.linears:
            weight: WeightStorage
            kind, part_rows = base.of(spec.part_names()), [rows for _, rows in spec.parts]
            if kind == "nf4":
                weight = NF4Weight(part_rows, spec.in_features, dtype, device)
            elif kind == "fp4":
                weight = FP4Weight(part_rows, spec.in_features, dtype, device)
            else:
                weight = DenseWeight.empty(spec.out_features, spec.in_features, dtype, device)
            bias = torch.empty(spec.out_features, dtype=dtype, device=device) if spec.bias else None
            linears[spec.name] = SharedLinear(spec.name, spec.output_parts(), weight, bias)
        tensors = {name: torch.empty(shape, dtype=dtype, device=device) for name, shape in layout.tensors.items()}
        return cls(layout, linears, tensors, dtype)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def embedding(self) -> Tensor:
        """(vocab, hidden_size)."""
        return self.tensors[EMBEDDING]

    @property
    def head(self) -> Tensor:
        """(vocab, hidden_size); the embedding itself where the checkpoint ties them."""
        return self.embedding if self.layout.tied_head else self.tensors[HEAD]

    @property
    def nbytes(self) -> int:
        """Bytes of the shared base, the adapter not counted."""
        biases = sum(linear.bias.nbytes for linear in self.linears.values() if linear.bias is not None)
        return (
            sum(linear.weight.nbytes for linear in self.linears.values())
            + biases
            + sum(t.nbytes for t in self.tensors.values())
        )

    @property
    def base(self) -> str:
        """`nf4` or `fp4` where a projection is held so, else `dense`."""
        kinds = {type(linear.weight) for linear in self.linears.values()}
        return "fp4" if FP4Weight in kinds else "nf4" if NF4Weight in kinds else "dense"

    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """The dense shape of every parameter of the checkpoint, by Hugging Face name."""
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        if self.layout.tied_head:
            shapes[HEAD] = tuple(self.head.shape)
        for linear in self.linears.values():
            shapes |= linear.parameter_shapes()
        return shapes

    def dense_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face parameter name, view of the shared tensor) for every parameter of the checkpoint.

        Of a quantised projection its weights are decoded, for as long as the caller keeps them.
        """
        yield from self.tensors.items()
        if self.layout.tied_head:
            yield HEAD, self.head
        for linear in self.linears.values():
            yield from linear.dense_parameters().items()

    def set_adapter(self, on: bool) -> None:
        """Switch every slot on or off in the trainer's forward (off: the reference policy)."""
        self.adapter_on = on
        for linear in self.linears.values():
            linear.adapter_on = on
