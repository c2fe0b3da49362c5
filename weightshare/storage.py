"""How a frozen weight matrix is held in memory. Trainer and engine hold the same object, never a copy."""

from typing import Protocol

import torch
from torch import Tensor

from ..kernels.frozen import FrozenWeight, frozen_linear
from ..kernels.nf4 import NF4Tensor, dequantize


class WeightStorage(Protocol):
    """A frozen matrix (out_features, in_features) that can be applied, whatever its bytes look like."""

    out_features: int
    in_features: int

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the products, which for a quantised storage is not that of the bytes."""
        ...

    @property
    def nbytes(self) -> int: ...

    @property
    def operand(self) -> FrozenWeight:
        """The matrix as kernels take it: the very tensors that are stored."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by the name that a module gives to it; to compare who holds the same memory."""
        ...

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (..., in) -> x @ W.T + bias (..., out), differentiable in x."""
        ...

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Write `rows` (n, in) at row `start`; a quantised storage quantises here, and takes whole projections."""
        ...

    def load_nf4(self, start: int, rows: NF4Tensor) -> None:
        """Write one projection that is quantised already at row `start`; a dense storage decodes it."""
        ...

    def rows(self, start: int, stop: int) -> Tensor:
        """The dense rows [start, stop): a view where the storage is dense, else decoded into new memory."""
        ...


class DenseWeight:
    """A matrix stored as it is: bf16, fp16 or fp32, row-major, rows of fused projections stacked."""

    def __init__(self, tensor: Tensor):
        if tensor.ndim != 2 or not tensor.is_contiguous():
            raise ValueError(
                f"DenseWeight: needs a contiguous matrix, got shape {tuple(tensor.shape)} strides {tensor.stride()}"
            )
        self.tensor = tensor.detach()
        self.out_features, self.in_features = tensor.shape

    @classmethod
    def empty(
        cls, out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> "DenseWeight":
        return cls(torch.empty(out_features, in_features, dtype=dtype, device=device))

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    @property
    def operand(self) -> Tensor:
        return self.tensor

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.tensor}

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return frozen_linear(x, self.tensor, bias)

    def load_rows(self, start: int, rows: Tensor) -> None:
        self.tensor[start : start + rows.shape[0]].copy_(rows)

    def load_nf4(self, start: int, rows: NF4Tensor) -> None:
        dequantize(rows, self.dtype, out=self.tensor[start : start + rows.shape[0]])

    def rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]
