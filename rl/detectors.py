"""Detectors of what goes wrong with rewards while a run goes: each a metric and, when it begins to hold, one warning.

They look at every generation (all its completions, those that dynamic sampling threw away included) and at every
evaluation, and change nothing. Their history is part of a checkpoint, so that a run that was killed and resumed
logs what it would have logged. When each warns is in `detector_limits`.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..rollout.records import RolloutRecord
from .config import GRPOConfig
from .detector_limits import DetectorLimits
from .detector_signals import Components, Spread, Trend, duplicate_share, totals
from .metrics import Metrics
from .progress import ProgressBar

logger = logging.getLogger(__name__)

SOLVED = 0.05  # of the range of rewards: a group whose mean is so near the best reward seen is solved
FLAT = 0.1  # of the early mean deviation within groups: below it a group has no signal to speak of
OTHERS_VARY = 0.25  # of the groups: a reward dominates only while another one differs in so many; else that one is done
RELEASE = 0.9  # of its limit: below it a detector holds no more, and can warn again
Found = tuple[str, float, float, str]  # a detector's name, its value, its limit, what to say over it
Warn = Callable[[int, str], None]  # step, text


class Detectors:
    """The detectors of one run.

    Args:
        limits: when they warn; None: they are off.
        weights: of each term of the reward, by name; None: how much a term varies is evened out anyway (GDPO).
        warn: called with (step, text) when a detector begins to hold, besides the log.
    """

    def __init__(self, limits: DetectorLimits | None, weights: Mapping[str, float] | None, warn: Warn):
        self.limits, self._weights, self._warn = limits, weights or {}, warn
        self._trends: dict[str, Trend] = {}
        self._range: list[float] = []  # the worst and the best reward seen
        self._holding: set[str] = set()
        self._held_out: dict[str, dict[str, float]] = {}  # by evaluation: its best result, and how often it was below

    def observe(self, records: Sequence[RolloutRecord], size: int, step: int, metrics: Metrics) -> None:
        """Look at a generation of groups of `size` completions, whose `reward` is set, and note metrics."""
        if self.limits is None:
            return
        rewards = totals(records, size)
        scored = rewards[~np.isnan(rewards)].tolist()
        if scored:
            self._range = [min([*self._range[:1], *scored]), max([*self._range[1:], *scored])]
            self._trend("reward").add(float(np.mean(scored)))
        found = self._variance(Spread.of(rewards), self.limits)
        found += self._lengths(records, self.limits)
        found += self._components(Components.of(records, size, self._weights), self.limits)
        found += self._duplicates(records, size, self.limits)
        for name, value, limit, text in found:
            metrics.add(f"detectors/{name}", value)
            self._judge(name, value, limit, step, text)
        metrics.add("detectors/warnings", len(self._holding))

    def evaluated(self, name: str, records: Sequence[RolloutRecord], size: int, step: int) -> dict[str, float]:
        """Look at an evaluation, by name, and return its metrics: how far its reward is below its best so far."""
        if self.limits is None:
            return {}
        means = Spread.of(totals(records, size)).means if size > 1 else totals(records, size)[:, 0]
        means = means[~np.isnan(means)]
        if not len(means):
            return {}
        now, error = float(means.mean()), float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0
        training = self._trend("reward")
        best = self._held_out.get(name)
        if best is None or now >= best["reward"]:
            # Before the first generation there is no training reward yet; it is that of the first ones then.
            level = training.recent if training.count else math.nan
            self._held_out[name] = {"reward": now, "error": error, "training": level, "step": step, "below": 0}
            self._holding.discard(f"{name}_fall")
            return {f"{name}_detectors/held_out_fall": 0.0}
        before = training.early if math.isnan(best["training"]) else best["training"]
        falls = best["reward"] - now > self.limits.held_out_errors * math.hypot(error, best["error"])
        rises = training.recent - before > training.recent_error
        best["below"] = best["below"] + 1 if falls and rises else 0
        text = (
            f"training reward up, held-out reward down: since step {best['step']:.0f} the training reward went from "
            f"{before:.3g} to {training.recent:.3g}, {name}_reward from {best['reward']:.3g} to {now:.3g}. The policy "
            "learns what pays on the training prompts alone, or games the reward: compare completions of both, and "
            f"go back to a checkpoint near step {best['step']:.0f}"
        )
        self._judge(f"{name}_fall", best["below"], self.limits.held_out_evaluations - 0.5, step, text)
        return {f"{name}_detectors/held_out_fall": best["reward"] - now}

    def state(self) -> dict[str, Any]:
        """What has been seen, for a checkpoint; made of JSON's types."""
        return {
            "trends": {name: trend.state() for name, trend in self._trends.items()},
            "range": self._range,
            "holding": sorted(self._holding),
            "held_out": self._held_out,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        if self.limits is None:
            return
        window = self.limits.window
        self._trends = {name: Trend(window, **levels) for name, levels in state["trends"].items()}
        self._range, self._holding = list(state["range"]), set(state["holding"])
        self._held_out = {name: dict(best) for name, best in state["held_out"].items()}

    def _trend(self, name: str) -> Trend:
        assert self.limits is not None
        return self._trends.setdefault(name, Trend(self.limits.window))

    def _judge(self, name: str, value: float, limit: float, step: int, text: str) -> None:
        """Warn where a detector begins to hold. `length_ratio` holds in both directions."""
        value = max(value, 1 / max(value, 1e-9)) if name == "length_ratio" else value
        if value > limit and name not in self._holding:
            self._holding.add(name)
            logger.warning("step %d: %s", step, text)
            self._warn(step, text)
        elif value < RELEASE * limit:
            self._holding.discard(name)

    def _variance(self, spread: Spread, limits: DetectorLimits) -> list[Found]:
        """Groups whose rewards are (nearly) equal, unless they are the best there are."""
        if not len(spread.stds):
            return []
        deviation, flat = self._trend("deviation"), self._trend("flat")
        deviation.add(float(spread.stds[spread.stds > 0].mean()) if (spread.stds > 0).any() else math.nan)
        worst, best = self._range
        solved = (best > worst) & (spread.means >= best - SOLVED * (best - worst))
        flat.add(float(((spread.stds <= FLAT * deviation.early) & ~solved).mean()))
        found: list[Found] = []
        shares = f"{flat.recent:.0%} of the groups have rewards that hardly differ, and not because they are solved"
        advice = (
            "Such groups train nothing. Read their completions: does the policy give one answer that every reward is "
            "content with? See that the verifier works (rewards/failures, its times), and that prompts are neither too "
            "hard nor too easy"
        )
        if flat.compares:
            lost = (flat.recent - flat.early) / (1 - flat.early) if flat.early < 1 else 0.0
            text = f"reward variance collapse: {shares}; at first it was {flat.early:.0%}. {advice}"
            found.append(("variance_lost", lost, limits.variance_lost, text))
        if flat.whole:
            found.append(("no_signal", flat.recent, limits.no_signal, f"no signal: {shares}. {advice}"))
        return found

    def _lengths(self, records: Sequence[RolloutRecord], limits: DetectorLimits) -> list[Found]:
        length, clipped = self._trend("length"), self._trend("clipped")
        length.add(float(np.mean([record.trajectory.num_sampled for record in records])))
        clipped.add(float(np.mean([record.trajectory.finish_reason == "length" for record in records])))
        if not length.compares or not length.early:
            return []
        drift = (
            f"length drift: completions have {length.recent:.0f} tokens, at first {length.early:.0f}. If they grow, "
            "see that the text is still of use and max_completion_length suffices; if they shrink, that no reward (or "
            "the loss's normaliser) pays for brevity alone"
        )
        cut = (
            f"length drift: {clipped.recent:.0%} of the completions end at max_completion_length, at first "
            f"{clipped.early:.0%}. Raise it, use overlong_buffer, or see what they fill the space with"
        )
        return [
            ("length_ratio", length.recent / length.early, limits.length_ratio, drift),
            ("clipped_rise", clipped.recent - clipped.early, limits.clipped_rise, cut),
        ]

    def _components(self, components: Components | None, limits: DetectorLimits) -> list[Found]:
        if components is None:
            return []
        for name, share in components.shares.items():
            self._trend(f"share/{name}").add(share)
            self._trend(f"varying/{name}").add(components.varying[name])
        shares = {name: self._trend(f"share/{name}") for name in components.shares}
        top = max(shares, key=lambda name: shares[name].recent)
        others = [name for name in shares if self._trend(f"varying/{name}").recent >= OTHERS_VARY and name != top]
        if not others or not shares[top].whole:
            return []
        text = (
            f"one reward dominates: {top} makes {shares[top].recent:.0%} of the variance within groups, though "
            f"{', '.join(others)} differ too: what they tell is lost. Change reward_weights, or set "
            "multi_objective_aggregation to normalize_then_sum"
        )
        return [("dominance", shares[top].recent, limits.dominance, text)]

    def _duplicates(self, records: Sequence[RolloutRecord], size: int, limits: DetectorLimits) -> list[Found]:
        copies = self._trend("copies")
        copies.add(duplicate_share(records, size))
        if not copies.whole or self._trend("length").recent < limits.duplicate_tokens:
            return []
        text = (
            f"duplicates: {copies.recent:.0%} of the completions are copies of another one in their group. The policy "
            "has lost its variety: lower the learning rate, raise the temperature, or give the entropy a weight "
            "(entropy_coef)"
        )
        return [("duplicates", copies.recent, limits.duplicates, text)]


def run_detectors(args: GRPOConfig, weights: Mapping[str, float], progress: ProgressBar) -> Detectors:
    """The detectors of a run with these options; `weights` are those of the terms of its reward."""
    return Detectors(
        DetectorLimits.of(args.detector_limits) if args.detectors else None,
        None if args.multi_objective_aggregation == "normalize_then_sum" else weights,
        (lambda step, text: None) if args.disable_tqdm else progress.warn,
    )
