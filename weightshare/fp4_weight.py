"""A frozen matrix in FP4: rows stand alone, and are quantised as they are loaded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.fp4 import FP4Tensor, empty, quantize
from ..kernels.frozen import dense, frozen_linear, tile_scratch
from ..kernels.nf4 import NF4Tensor

# The names of its tensors as parameters of a module.
TENSOR_NAMES = ("fp4_codes", "fp4_scale_codes", "fp4_row_scales")


class FP4Weight:
    """`WeightStorage` in 4.26 bits a weight; products decode a tile at a time (kernels.frozen).

    Args:
        part_rows: rows of each projection that is fused in it.
        in_features: a multiple of 64.
        dtype: of the decoded weights and of the products.

    Attributes:
        fp4: the tensors.

    Raises:
        ValueError: `in_features` that is not a multiple of 64.
    """

    def __init__(
        self, part_rows: Sequence[int], in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.fp4 = empty(sum(part_rows), in_features, device)
        self.dtype = dtype
        self.out_features, self.in_features = self.fp4.shape
        if self.device.type != "meta":
            tile_scratch(self.device)  # now, so that whoever measures what is left counts it

    @property
    def device(self) -> torch.device:
        return self.fp4.device

    @property
    def nbytes(self) -> int:
        return self.fp4.nbytes

    @property
    def operand(self) -> FP4Tensor:
        return self.fp4

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(TENSOR_NAMES, self.fp4.tensors(), strict=True))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return frozen_linear(x, self.fp4, bias)

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Quantise rows (n, in), on whatever device they are, a few at a time.

        Raises ValueError for values that are not finite.
        """
        quantize(rows, self.fp4.rows(start, start + rows.shape[0]))

    def load_nf4(self, start: int, rows: NF4Tensor) -> None:
        """Raise ValueError: what is quantised to NF4 would lose a second time."""
        raise ValueError("the checkpoint has it in NF4, which is not quantised again: set base='auto'")

    def rows(self, start: int, stop: int) -> Tensor:
        return dense(self.fp4.rows(start, stop), self.dtype)
