"""Checkpoints that bitsandbytes has quantised: their tensors, put together to `NF4Tensor`s, bit for bit.

A projection X that transformers saves in 4 bits is `X.weight`, two codes a byte, the even column in the high nibble,
and beside it `X.weight.absmax` (scale codes), `.nested_absmax` (group scales), `.quant_map` and `.nested_quant_map`
(the two tables) and `.quant_state.bitsandbytes__nf4`, JSON in bytes: shape, block sizes, offset.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..kernels.nf4 import BLOCK, CODEBOOK, DYNAMIC_MAP, GROUP, NF4Tensor, empty, pack_codes, row_chunks
from .base_format import SUPPORTED, quantization_settings

STATE = "quant_state.bitsandbytes__"
PIECES = ("weight", "absmax", "nested_absmax", "quant_map", "nested_quant_map", "quant_state")


def nf4_projections(names: Iterable[str], config: dict[str, Any]) -> frozenset[str]:
    """The modules that are stored in NF4, by the names of a checkpoint's tensors.

    Raises ValueError for one in another 4-bit format, and where there is none although config.json says NF4.
    """
    found = set()
    for name in names:
        owner, mark, kind = name.partition(f".weight.{STATE}")
        if mark and kind != "nf4":
            raise ValueError(f"{owner}.weight is stored in bitsandbytes' {kind}, which is not supported. {SUPPORTED}")
        if mark:
            found.add(owner)
    if not found and quantization_settings(config):
        raise ValueError(
            "config.json says that the checkpoint is quantised to NF4, but none of its weights is: remove "
            "quantization_config from it, and set base='nf4' to quantise them while they load"
        )
    return frozenset(found)


def assemble(
    tensors: Iterable[tuple[str, Tensor]], stored: Collection[str], device: torch.device | str
) -> Iterator[tuple[str, Tensor | NF4Tensor]]:
    """Pass a checkpoint's tensors on, with those of a quantised weight put together under the weight's name.

    Args:
        tensors: (name, tensor) in any order; of a quantised weight nothing is kept once it is complete.
        stored: what `nf4_projections` found in the names.
        device: where the NF4 tensors go; the others stay where they are.

    Raises:
        ValueError: pieces that are missing, or of a format that cannot be read.
    """
    incomplete: dict[str, dict[str, Tensor]] = {owner: {} for owner in stored}
    for name, tensor in tensors:
        owner, _, piece = name.rpartition(".weight")
        if owner not in stored:
            yield name, tensor
            continue
        kind = "quant_state" if STATE in piece else piece.removeprefix(".") or "weight"
        pieces = incomplete[owner]
        pieces[kind] = tensor
        if "quant_state" in pieces:
            _check_nested(f"{owner}.weight", pieces["quant_state"])
        if pieces.keys() >= set(PIECES):
            yield f"{owner}.weight", _nf4_tensor(f"{owner}.weight", incomplete.pop(owner), device)
    for owner, pieces in incomplete.items():
        missing = ", ".join(piece for piece in PIECES if piece not in pieces)
        raise ValueError(
            f"the checkpoint lacks {missing} of {owner}.weight, which is in NF4; copy or download it again"
        )


def _state(packed: Tensor) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(bytes(packed.cpu().tolist()))
    return content


def _check_nested(name: str, packed: Tensor) -> None:
    state = _state(packed)
    if "nested_offset" not in state:
        raise ValueError(
            f"{name} is stored in NF4 with scales of 32 bits that are not nested, which is not supported. {SUPPORTED}"
        )
    blocks = state.get("blocksize"), state.get("nested_blocksize")
    if blocks != (BLOCK, GROUP):
        raise ValueError(
            f"{name} is stored in NF4 with blocks of {blocks[0]} weights and {blocks[1]} scales, of which only "
            f"{BLOCK} and {GROUP} are supported; quantise it with bitsandbytes' defaults, or load it unquantised"
        )


def _nf4_tensor(name: str, pieces: dict[str, Tensor], device: torch.device | str) -> NF4Tensor:
    state = _state(pieces["quant_state"])
    for kind, table in (("quant_map", CODEBOOK), ("nested_quant_map", DYNAMIC_MAP)):
        if not torch.equal(pieces[kind].cpu().float(), table):
            raise ValueError(
                f"{name}: its {kind} is not bitsandbytes' own, and codes are decoded with that; load it unquantised"
            )
    shape = tuple(state["shape"])
    if len(shape) != 2:
        raise ValueError(f"{name} is stored in NF4 with shape {shape}; only matrices are")
    if shape[1] % BLOCK:
        raise ValueError(
            f"{name} is stored in NF4 with rows of {shape[1]} weights: blocks of {BLOCK} would reach over the end of a "
            "row, and a row must be a whole number of them; load it unquantised"
        )
    found = empty([shape[0]], shape[1], device)
    packed = pieces["weight"].view(torch.uint8).view(shape[0], shape[1] // 2)
    for rows in row_chunks(*shape):
        found.codes[rows] = _our_order(packed[rows].to(device))
    found.scale_codes.copy_(pieces["absmax"].view(found.scale_codes.shape))
    found.group_scales.copy_(pieces["nested_absmax"])
    found.offset.fill_(state["nested_offset"])
    return found


def _our_order(packed: Tensor) -> Tensor:
    """(n, in / 2) bytes of neighbouring columns -> the bytes of `NF4Tensor.codes`."""
    return pack_codes(torch.stack((packed >> 4, packed & 15), dim=2).view(packed.shape[0], -1))
