"""A frozen matrix in NF4: the projections that are fused in it are quantised one by one, as they are loaded."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from ..kernels.frozen import frozen_linear, tile_scratch
from ..kernels.nf4 import NF4Tensor, dequantize, empty, groups_of, quantize

# The names of its tensors as parameters of a module.
TENSOR_NAMES = ("nf4_codes", "nf4_scale_codes", "nf4_group_scales", "nf4_group_start", "nf4_offset")


class NF4Weight:
    """`WeightStorage` in 4.14 bits a weight; products decode a tile at a time (kernels.frozen).

    Args:
        part_rows: rows of each projection that is fused in it: each is one tensor of a checkpoint, with scales and
            offset of its own.
        in_features: a multiple of 64.
        dtype: of the decoded weights and of the products.

    Attributes:
        nf4: the tensors.

    Raises:
        ValueError: `in_features` that is not a multiple of 64.
    """

    def __init__(
        self, part_rows: Sequence[int], in_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        self.nf4 = empty(part_rows, in_features, device)
        self.dtype = dtype
        self.out_features, self.in_features = self.nf4.shape
        self._part_starts = dict(zip([0, *accumulate(part_rows)], part_rows, strict=False))
        if self.device.type != "meta":
            tile_scratch(self.device)  # now, so that whoever measures what is left counts it

    @property
    def device(self) -> torch.device:
        return self.nf4.device

    @property
    def nbytes(self) -> int:
        return self.nf4.nbytes

    @property
    def operand(self) -> NF4Tensor:
        return self.nf4

    def tensors(self) -> dict[str, Tensor]:
        return dict(zip(TENSOR_NAMES, self.nf4.tensors(), strict=True))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return frozen_linear(x, self.nf4, bias)

    def load_rows(self, start: int, rows: Tensor) -> None:
        """Quantise one projection (n, in), on whatever device it is, a few rows at a time.

        Raises ValueError for rows that are not one of the projections, or values that are not finite.
        """
        quantize(rows, self._part(start, rows.shape[0]))

    def load_nf4(self, start: int, rows: NF4Tensor) -> None:
        part = self._part(start, rows.shape[0])
        for ours, theirs in zip(part.tensors(), rows.tensors(), strict=True):
            if ours is not part.group_start:  # it says where the projection lies in here
                ours.copy_(theirs)

    def rows(self, start: int, stop: int) -> Tensor:
        return dequantize(self.nf4.rows(start, stop), self.dtype)

    def _part(self, start: int, rows: int) -> NF4Tensor:
        """The projection at row `start`: views of its rows and groups, for writing."""
        if self._part_starts.get(start) != rows:
            known = ", ".join(f"{rows} at {start}" for start, rows in self._part_starts.items())
            raise ValueError(
                f"NF4Weight: {rows} rows at row {start} are not one of its projections ({known}): the scales of a "
                "projection are made of all its rows"
            )
        first = sum(groups_of(n, self.in_features) for at, n in self._part_starts.items() if at < start)
        part = self.nf4.rows(start, start + rows)
        group_scales = self.nf4.group_scales[first : first + groups_of(rows, self.in_features)]
        return NF4Tensor(part.codes, part.scale_codes, group_scales, part.group_start, part.offset)
