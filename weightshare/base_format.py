"""In which format the projections of a base are held: as the checkpoint has them, or quantised as they load."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

from ..kernels import fp4, nf4

BASES = ("auto", "nf4", "fp4")
_CHECKS = {"nf4": nf4.check_in_features, "fp4": fp4.check_in_features}
SUPPORTED = (
    "Supported are unquantised checkpoints, with base='nf4' or 'fp4' to quantise them while they load, and "
    "bitsandbytes' NF4 with nested scales (bnb_4bit_quant_type='nf4', bnb_4bit_use_double_quant=True)"
)


@dataclass(frozen=True)
class BaseFormat:
    """`dense`, `nf4` or `fp4`; embedding, head and norms are dense in both.

    Attributes:
        name: the format.
        only: with nf4, the projections (Hugging Face names) that are held so; None: all. A fused projection is NF4
            where all its parts are.
    """

    name: str
    only: frozenset[str] | None = None

    def of(self, part_names: Iterable[str]) -> str:
        """How the fused projection of these parts is held: `dense`, `nf4` or `fp4`."""
        return self.name if self.only is None or self.only.issuperset(part_names) else DENSE.name

    def check(self, projections: Iterable[tuple[Iterable[str], int]]) -> None:
        """Raise ValueError for a projection (its parts' names, inputs) that cannot be held so."""
        for part_names, in_features in projections:
            names = list(part_names)
            check = _CHECKS.get(self.of(names))
            if check is not None:
                check(in_features, f"{names[0]}.weight")


DENSE = BaseFormat("dense")
NF4 = BaseFormat("nf4")
FP4 = BaseFormat("fp4")


def base_format(base: str, stored: Collection[str]) -> BaseFormat:
    """The format to load into.

    Args:
        base: `auto`: as the checkpoint is; `nf4`: NF4, but for what a quantised checkpoint leaves dense on purpose;
            `fp4`: FP4.
        stored: names of the projections that the checkpoint has in NF4 (`bnb_checkpoint.nf4_projections`).

    Raises:
        ValueError: an unknown `base`; FP4 of a checkpoint that is quantised already.
    """
    if base not in BASES:
        raise ValueError(f"base={base!r}: choose {', '.join(BASES[:-1])} or {BASES[-1]}")
    if stored and base == FP4.name:
        raise ValueError(
            "base='fp4', but the checkpoint is quantised to NF4, and would lose a second time: set base='auto', or "
            "give the unquantised checkpoint"
        )
    if stored:
        return BaseFormat("nf4", frozenset(stored))
    return {"nf4": NF4, "fp4": FP4}.get(base, DENSE)


def quantization_settings(config: dict[str, Any]) -> dict[str, Any] | None:
    """What config.json says of how the weights are quantised, if anything."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def check_quantization(config: dict[str, Any], where: str) -> None:
    """Raise ValueError, naming the format, where config.json describes quantised weights that cannot be read."""
    settings = quantization_settings(config)
    if not settings:
        return
    method = settings.get("quant_method", "unknown")
    if method == "bitsandbytes" or settings.get("load_in_4bit"):
        problem = _bitsandbytes_problem(settings)
        if problem is None:
            return
        method = f"bitsandbytes, {problem}"
    raise ValueError(f"{where}: the checkpoint is quantised ({method}), which is not supported. {SUPPORTED}")


def _bitsandbytes_problem(settings: dict[str, Any]) -> str | None:
    if settings.get("load_in_8bit") or not settings.get("load_in_4bit"):
        return "8 bits"
    if settings.get("bnb_4bit_quant_type", "fp4") != "nf4":
        return f"{settings.get('bnb_4bit_quant_type', 'fp4')} in place of nf4"
    if not settings.get("bnb_4bit_use_double_quant"):
        return "NF4 with scales of 32 bits that are not nested"
    return None
