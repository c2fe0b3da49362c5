"""Products with a frozen matrix, dense or in 4 bits; of the latter a tile at a time is made dense, in reused memory.

Forward, y = x W^T: tiles are ranges of W's rows, each of which gives columns of y. Backward, dX = g W: tiles are ranges
of W's columns, each of which gives columns of dX. So no sum is cut in two, every element is rounded once as with the
dense matrix, and nothing of W's size outlives its tile: the backward pass decodes again what the forward had decoded.

Memory: one buffer of TILE_BYTES a device, whatever the number of matrices and their sizes.
Cost of decoding an out x in matrix to a dtype of e bytes: out * in * (0.52 + e) bytes of memory traffic a pass, and
one byte more a weight for ranges of columns of a matrix that does not fit into the buffer, whose codes are copied.
The product takes 2 out * in FLOPs a token: at 8192 tokens in bf16, 700 TFLOP/s and 4.3 TB/s decoding adds 2.5 %.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import fp4, nf4
from .fp4 import FP4Tensor
from .nf4 import NF4Tensor

QuantizedTensor = NF4Tensor | FP4Tensor
FrozenWeight = Tensor | QuantizedTensor
# Room for a 16-bit projection of 4096 x 16384: large enough that every product fills a GPU, small beside its memory.
TILE_BYTES = 2**27
ALIGNED_ROWS = (
    8  # tiles of rows begin at multiples of it, as cuBLAS wants columns of the result at multiples of 16 bytes
)

ALIGNED_COLUMNS = math.lcm(nf4.BLOCK, fp4.CHUNK)  # of tiles of columns: what a storage can be cut at

_scratch: dict[torch.device, Tensor] = {}


def tile_scratch(device: torch.device) -> Tensor:
    """The device's buffer for tiles, (TILE_BYTES,) uint8. Its content holds until the next quantised product.

    Products on one device follow each other on its current stream, so that one buffer serves all.
    """
    if device not in _scratch:
        with torch.inference_mode(False):  # training writes to it as well
            _scratch[device] = torch.empty(TILE_BYTES, dtype=torch.uint8, device=device)
    return _scratch[device]


def dense(weight: QuantizedTensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """A quantised matrix (out, in) decoded to `dtype`, written to `out` (columns contiguous) where given."""
    if isinstance(weight, FP4Tensor):
        return fp4.dequantize(weight, dtype, out)
    return nf4.dequantize(weight, dtype, out)


def row_tiles(weight: FrozenWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(rows, the matrix' dense rows in `dtype`) that cover it; a tile is overwritten when the next is asked for."""
    if isinstance(weight, Tensor):
        yield slice(0, weight.shape[0]), weight
        return
    out_features, in_features = weight.shape
    for rows in _ranges(out_features, in_features * dtype.itemsize, ALIGNED_ROWS):
        tile = _tile(weight.device, dtype, rows.stop - rows.start, in_features)
        yield rows, dense(weight.rows(rows.start, rows.stop), dtype, out=tile)


def column_tiles(weight: FrozenWeight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """(columns, the matrix' dense columns in `dtype`), likewise."""
    if isinstance(weight, Tensor):
        yield slice(0, weight.shape[1]), weight
        return
    out_features, in_features = weight.shape
    for columns in _ranges(in_features, out_features * dtype.itemsize, ALIGNED_COLUMNS):
        tile = _tile(weight.device, dtype, out_features, columns.stop - columns.start)
        yield columns, dense(weight.columns(columns.start, columns.stop), dtype, out=tile)


def add_product_(y: Tensor, x: Tensor, weight: FrozenWeight) -> Tensor:
    """y += x W^T for y (tokens, out), x (tokens, in) and W (out, in), of one dtype; without a graph."""
    for rows, tile in row_tiles(weight, x.dtype):
        y[:, rows].addmm_(x, tile.T)
    return y


def add_input_gradient_(grad_x: Tensor, grad_y: Tensor, weight: FrozenWeight) -> Tensor:
    """grad_x += grad_y W for grad_x (tokens, in), grad_y (tokens, out) and W (out, in), of one dtype."""
    for columns, tile in column_tiles(weight, grad_y.dtype):
        grad_x[:, columns].addmm_(grad_y, tile)
    return grad_x


def frozen_linear(x: Tensor, weight: FrozenWeight, bias: Tensor | None = None) -> Tensor:
    """x (..., in) -> x W^T + bias (..., out), differentiable in x."""
    if isinstance(weight, Tensor):
        return F.linear(x, weight, bias)
    y: Tensor = _QuantizedLinear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return y if x.ndim == 2 else y.view(*x.shape[:-1], weight.shape[0])


class _QuantizedLinear(torch.autograd.Function):
    """x (tokens, in), a quantised matrix and a bias, both frozen."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows, tile in row_tiles(weight, x.dtype):
            y[:, rows] = F.linear(x, tile, None if bias is None else bias[rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None
        weight: QuantizedTensor = ctx.weight
        grad_x = grad_y.new_empty(grad_y.shape[0], weight.shape[1])
        for columns, tile in column_tiles(weight, grad_y.dtype):
            grad_x[:, columns] = grad_y @ tile
        return grad_x, None, None


def _ranges(count: int, bytes_each: int, multiple: int) -> Iterator[slice]:
    """Ranges of `count` rows or columns, in order: as few as fit into the buffer, of one length but for the last."""
    most = max(1, TILE_BYTES // (bytes_each * multiple)) * multiple
    step = -(-count // (-(-count // most) * multiple)) * multiple
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def _tile(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """(rows, columns) of the buffer; in memory of their own where not even the smallest range fits into it."""
    elements = rows * columns
    if elements * dtype.itemsize > TILE_BYTES:
        return torch.empty(rows, columns, dtype=dtype, device=device)
    return tile_scratch(device).view(dtype)[:elements].view(rows, columns)
