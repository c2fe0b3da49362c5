"""Which `Config` the NF4 product of few rows uses; see `few_rows_tuning`. Known GPUs are in `nf4_configs.json`."""

from dataclasses import replace

import torch
import triton

from .few_rows_adapter import Adapter, random_adapter
from .few_rows_tuning import Shape, Speed, Tuning, ranked_splits
from .nf4 import BLOCK, NF4Tensor, empty
from .nf4_few_rows import DTYPES, MAX_ROWS, Config, launch, step_blocks

# Outs, warps, whether together, blocks, buffers and registers of the programs worth measuring, by rows; each is
# compiled where it is.
_KINDS: dict[int, list[tuple[int, int, bool, int, int, int | None]]] = {
    8: [(64, 4, False, 4, 2, None), (128, 4, False, 4, 2, 128), (64, 4, True, 4, 2, 128)],
    16: [(64, 4, True, 4, 2, 128), (64, 4, True, 4, 2, 168)],
    32: [(64, 4, True, 4, 2, 168), (64, 4, True, 4, 1, 168), (64, 4, True, 4, 2, None), (64, 4, True, 2, 2, None)],
    64: [(64, 4, True, 2, 2, 168), (64, 4, True, 2, 1, 128)],
    MAX_ROWS: [(64, 4, True, 1, 2, 168), (64, 4, True, 1, 1, 168), (64, 4, True, 2, 2, 168), (64, 4, True, 2, 1, 168)],
}
_SPLITS = 4  # numbers of splits to measure for each
_SPEED = Speed(weights=20.0, weights_a_warp=2.0, cycles_around=5000)


def candidates(shape: Shape, rows: int, processors: int) -> list[Config]:
    """Of each kind of program the splits with the best estimates."""
    kinds = [Config(*kind, 1) for kind in _KINDS[rows]]
    return [config for kind in kinds for config in _estimated(shape, kind, processors)[:_SPLITS]]


def _estimated(shape: Shape, kind: Config, processors: int) -> list[Config]:
    """The kind with every number of splits that differs, the fastest by a rough estimate first."""
    blocks = step_blocks(shape[1], kind.blocks)
    steps, tiles = max(1, shape[1] // BLOCK // blocks), triton.cdiv(shape[0], kind.outs)
    ranked = ranked_splits(tiles, steps, blocks * BLOCK * kind.outs, kind.warps, processors, _SPEED)
    return [replace(kind, splits=splits) for splits in ranked]


def _random_matrix(shape: Shape, device: torch.device) -> tuple[tuple[NF4Tensor, Adapter], int]:
    nf4 = empty([shape[0]], shape[1], device)
    nf4.codes.random_(0, 256)
    nf4.scale_codes.random_(0, 256)
    nf4.group_scales.fill_(0.01)
    nf4.offset.fill_(0.05)
    return (nf4, random_adapter(*shape, device)), nf4.nbytes


TUNING = Tuning(
    "nf4",
    Config,
    DTYPES,
    list(_KINDS),
    candidates,
    _random_matrix,
    lambda x, given, config: launch(x, given[0], None, given[1], config),
)
