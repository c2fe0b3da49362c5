"""Token-budget micro-batches: whole sequences packed side by side into one row, no padding.

Completions of one prompt share it where that spares enough: it is in the row once, and computed once, forward and
backward (`kernels/attention_shared.py`). Their log-probs and gradients are those of rows of their own.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.row_layout import Entry, Layout
from ..rollout.records import RolloutRecord
from .streams import to_device

# Of the tokens of prompts and completions, that sharing has to spare to be worth attention's further calls: 4B gains
# from 0.15, 8B from 0.1 (benchmarks/shared_prompt.py).
SHARE_FROM = 0.15


@dataclass
class TrainingSample:
    """One completion as the trainer sees it.

    Attributes:
        tokens: prompt and completion.
        targets: positions in `tokens` of the trained tokens (sampled by the model), ascending, none below 1. Those
            whose engine log-prob is not finite are left out: no importance weight is known for them.
        engine_logprobs: the engine's log-probs of the trained tokens.
        advantage: of the completion.
        old_logprobs: of the trainer before the first update; None where they are not recomputed.
        share: what one of its tokens weighs in the step's loss; set for each optimizer step.
        high_entropy: for each trained token whether the policy loss acts on it; set for each optimizer step. None: on
            all.
        prompt: how many of `tokens` are the prompt; 0 where it is not to be shared.
        dropped: how many tokens were left out of `targets`.
    """

    tokens: list[int]
    targets: list[int]
    engine_logprobs: list[float]
    advantage: float
    old_logprobs: list[float] | None = None
    share: float = 0.0
    high_entropy: list[bool] | None = None
    prompt: int = 0
    dropped: int = field(init=False)

    def __post_init__(self) -> None:
        trained = [pair for pair in zip(self.targets, self.engine_logprobs, strict=True) if math.isfinite(pair[1])]
        self.dropped = len(self.targets) - len(trained)
        if self.dropped:
            self.targets, self.engine_logprobs = [pair[0] for pair in trained], [pair[1] for pair in trained]


@dataclass
class MicroBatch:
    """A packed row and the streams of its trained tokens.

    Attributes:
        samples: in the order of the row.
        layout: tokens of each sequence, or of a prompt and its continuations.
        tokens: (T,) int64.
        rows: (n,) int64, the position from which each trained token is predicted.
        targets: (n,) int64, the trained tokens' ids.
        sequence: (n,) int64, which sample a trained token belongs to.
    """

    samples: list[TrainingSample]
    layout: Layout
    tokens: Tensor
    rows: Tensor
    targets: Tensor
    sequence: Tensor

    def per_token(self, values: Sequence[float]) -> Tensor:
        """(n,) fp32: one value a sample, repeated for each of its trained tokens."""
        return to_device(torch.tensor(values, dtype=torch.float32), self.tokens.device)[self.sequence]

    def stream(self, values: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Tensor:
        """(n,): per-token values of each sample, concatenated."""
        flat = [value for sample_values in values for value in sample_values]
        return to_device(torch.tensor(flat, dtype=dtype), self.tokens.device)

    @property
    def trained_lengths(self) -> list[int]:
        """Trained tokens of each sample; their sum is n."""
        return [len(sample.targets) for sample in self.samples]


def pack(
    samples: Sequence[TrainingSample],
    token_budget: int,
    device: torch.device | str = "cpu",
    share_from: float = SHARE_FROM,
) -> list[MicroBatch]:
    """Split samples into micro-batches of at most `token_budget` tokens each.

    Families, samples that share a prompt, one after the other, those with the longest samples first, and of each the
    longest first; each sample into the first micro-batch that has room, where a prompt counts once. A sample longer
    than the budget gets a micro-batch of its own. Samples without trained tokens are left out. Prompts are shared where
    that spares the share `share_from` of a family's tokens.
    """
    bins: list[_Bin] = []
    for family in _families([sample for sample in samples if sample.targets], share_from):
        for sample in family:
            chosen = next((some for some in bins if some.used + some.cost(sample, family) <= token_budget), None)
            if chosen is None:
                chosen = _Bin()
                bins.append(chosen)
            chosen.add(sample, family)
    return [_micro_batch(some.families, device) for some in bins]


def repeated_prompts(samples: Sequence[TrainingSample], micro_batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """(tokens of shared prompts beyond the first time that these rows have them, the budget with which none has)."""
    families = _families([sample for sample in samples if sample.targets])
    once = [
        len(first.tokens) + sum(len(sample.tokens) - sample.prompt for sample in others) for first, *others in families
    ]
    return sum(len(micro.tokens) for micro in micro_batches) - sum(once), max(once, default=0)


class _Bin:
    """A micro-batch that is being filled: its families, each the samples of one that are in it."""

    def __init__(self) -> None:
        self.families: list[list[TrainingSample]] = []
        self.used = 0
        self._last: list[TrainingSample] | None = None  # the family that the last of `families` is of

    def cost(self, sample: TrainingSample, family: list[TrainingSample]) -> int:
        shared = sample.prompt if len(family) > 1 and self._last is family else 0
        return len(sample.tokens) - shared

    def add(self, sample: TrainingSample, family: list[TrainingSample]) -> None:
        self.used += self.cost(sample, family)
        if self._last is not family:
            self.families.append([])
            self._last = family
        self.families[-1].append(sample)


def _families(samples: Sequence[TrainingSample], share_from: float = SHARE_FROM) -> list[list[TrainingSample]]:
    """Samples with the same prompt together where it is worth sharing, others each alone; the longest first."""
    by_prompt: dict[tuple[int, ...], list[TrainingSample]] = {}
    alone: list[list[TrainingSample]] = []
    for sample in samples:
        if 0 < sample.prompt < len(sample.tokens):
            by_prompt.setdefault(tuple(sample.tokens[: sample.prompt]), []).append(sample)
        else:
            alone.append([sample])
    for family in by_prompt.values():
        spared = family[0].prompt * (len(family) - 1)
        if len(family) > 1 and spared >= share_from * sum(len(sample.tokens) for sample in family):
            alone.append(sorted(family, key=lambda sample: -len(sample.tokens)))
        else:
            alone += [[sample] for sample in family]
    return sorted(alone, key=lambda family: -len(family[0].tokens))


def _micro_batch(families: list[list[TrainingSample]], device: torch.device | str) -> MicroBatch:
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    layout: list[Entry] = []
    samples: list[TrainingSample] = []
    for family in families:
        start, prompt = len(tokens), family[0].prompt if len(family) > 1 else 0
        tokens += family[0].tokens[:prompt]
        for sample in family:
            behind = len(tokens) - prompt  # where position 0 of the sample would be if its prompt stood before it
            tokens += sample.tokens[prompt:]
            # The first token of a completion is predicted from the prompt's last.
            rows += [(start if position == prompt else behind) + position - 1 for position in sample.targets]
            targets += [sample.tokens[position] for position in sample.targets]
            sequence += [len(samples)] * len(sample.targets)
            samples.append(sample)
        lengths = [len(sample.tokens) - prompt for sample in family]
        layout.append((prompt, *lengths) if prompt else lengths[0])
    as_tensor = [torch.tensor(values, dtype=torch.int64, device=device) for values in (tokens, rows, targets, sequence)]
    return MicroBatch(samples, layout, *as_tensor)


def training_sample(record: RolloutRecord, mask_truncated: bool) -> TrainingSample:
    """What is trained of a rollout: the tokens the model sampled; none of a truncated one where those are masked."""
    trajectory = record.trajectory
    prompt_length = len(trajectory.prompt_ids)
    masked = mask_truncated and trajectory.finish_reason == "length"
    trained = [] if masked else [i for i, sampled in enumerate(trajectory.completion_mask) if sampled]
    logprobs = trajectory.logprobs
    return TrainingSample(
        tokens=trajectory.prompt_ids + trajectory.completion_ids,
        targets=[prompt_length + i for i in trained],
        engine_logprobs=[logprobs[i] for i in trained],
        advantage=record.advantage,
        old_logprobs=record.old_logprobs,
        prompt=prompt_length,
    )
