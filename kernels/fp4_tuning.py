"""Which `Config` the FP4 product of few rows uses; see `few_rows_tuning`."""

from dataclasses import replace

import torch
import triton

from .few_rows_adapter import Adapter, random_adapter
from .few_rows_tuning import Shape, Speed, Tuning, ranked_splits
from .fp4 import CHUNK, FP4Tensor, empty
from .fp4_few_rows import DTYPES, MAX_ROWS, Config, launch, step_chunks

# Outs, warps, whether together, chunks, buffers and registers of the programs worth measuring, by rows; each is
# compiled where it is.
_KINDS: dict[int, list[tuple[int, int, bool, int, int, int | None]]] = {
    8: [(64, 4, False, 4, 2, None), (64, 4, True, 4, 2, None), (128, 4, False, 4, 2, None)],
    16: [(64, 4, True, 4, 2, None), (64, 4, True, 2, 3, None), (64, 4, False, 4, 2, None)],
    32: [(64, 4, True, 4, 2, None), (64, 4, True, 2, 2, None), (128, 4, False, 2, 2, None)],
    64: [(64, 4, True, 2, 2, None), (64, 4, True, 1, 3, None), (128, 4, False, 1, 2, None)],
    MAX_ROWS: [(64, 4, True, 1, 3, 168), (64, 4, True, 1, 2, 128), (64, 4, True, 2, 2, None)],
}
_SPLITS = 4  # numbers of splits to measure for each
_SPEED = Speed(weights=30.0, weights_a_warp=3.0, cycles_around=3000)


def candidates(shape: Shape, rows: int, processors: int) -> list[Config]:
    """Of each kind of program the splits with the best estimates."""
    kinds = [Config(*kind, 1) for kind in _KINDS[rows]]
    return [config for kind in kinds for config in _estimated(shape, kind, processors)[:_SPLITS]]


def _estimated(shape: Shape, kind: Config, processors: int) -> list[Config]:
    """The kind with every number of splits that differs, the fastest by a rough estimate first."""
    chunks = step_chunks(shape[1], kind.chunks)
    steps, tiles = max(1, shape[1] // CHUNK // chunks), triton.cdiv(shape[0], kind.outs)
    ranked = ranked_splits(tiles, steps, chunks * CHUNK * kind.outs, kind.warps, processors, _SPEED)
    return [replace(kind, splits=splits) for splits in ranked]


def _random_matrix(shape: Shape, device: torch.device) -> tuple[tuple[FP4Tensor, Adapter], int]:
    fp4 = empty(*shape, device)
    fp4.codes.random_(0, 256)
    fp4.scale_codes.random_(200, 256)
    fp4.row_scales.fill_(2.0**-8)
    return (fp4, random_adapter(*shape, device)), fp4.nbytes


TUNING = Tuning(
    "fp4",
    Config,
    DTYPES,
    list(_KINDS),
    candidates,
    _random_matrix,
    lambda x, given, config: launch(x, given[0], None, given[1], config),
)
