"""When a detector warns: its limits, and why they are what they are."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class DetectorLimits:
    """The limits of `colora.rl.detectors`; `detector_limits` sets single ones.

    Levels are means over `window` generations: the early level over the first of a run, the recent one over the last.

    Attributes:
        window: generations of a level. 10: a mean reward of one batch is noisy, and a run has a hundred steps or more.
        variance_lost: share of the groups with a signal early on that have none now and are not solved either. Half:
            by then a step costs the same and trains half as much.
        no_signal: share of groups without a signal, whatever it was at first. Nearly all: hard tasks begin with few.
        length_ratio: recent mean length over the early one, or its inverse. 2: reasoning may grow its completions
            several times over and be healthy; such a change is rare by chance and worth reading some of them.
        clipped_rise: rise of the share of completions that hit the length limit. A quarter: their rewards are those of
            unfinished answers.
        dominance: share of one reward in the variance within groups, while another one varies too. 0.95: the other's
            part of the advantages is lost among the noise.
        duplicates: share of completions that are copies of another in their group. Half: a group of 16 tells as much as
            one of 8.
        duplicate_tokens: mean length from which on copies count. 16: shorter answers agree by nature.
        held_out_errors: fall of a held-out reward from its best in standard errors. 2: hardly by chance.
        held_out_evaluations: consecutive evaluations that are so low. 2: what is left of chance.
    """

    window: int = 10
    variance_lost: float = 0.5
    no_signal: float = 0.99
    length_ratio: float = 2.0
    clipped_rise: float = 0.25
    dominance: float = 0.95
    duplicates: float = 0.5
    duplicate_tokens: float = 16.0
    held_out_errors: float = 2.0
    held_out_evaluations: int = 2

    @classmethod
    def of(cls, values: Mapping[str, Any] | None) -> Self:
        """The limits with some of them set. Raises ValueError for an unknown name or what is not a number above 0."""
        known = {entry.name: entry.type for entry in fields(cls)}
        for name, value in (values or {}).items():
            if name not in known:
                raise ValueError(f"detector_limits: unknown {name!r}; the limits are {', '.join(known)}")
            whole = known[name] is int
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value <= 0 or (whole and value != int(value)):
                raise ValueError(
                    f"detector_limits: {name}={value!r} must be a {'whole ' if whole else ''}number above 0"
                )
        return cls(**(values or {}))
