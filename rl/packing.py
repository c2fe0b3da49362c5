"""Token-budget micro-batches: whole sequences packed side by side into one row, no padding."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..rollout.records import RolloutRecord
from .streams import to_device


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
        dropped: how many tokens were left out of `targets`.
    """

    tokens: list[int]
    targets: list[int]
    engine_logprobs: list[float]
    advantage: float
    old_logprobs: list[float] | None = None
    share: float = 0.0
    high_entropy: list[bool] | None = None
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
        lengths: tokens of each sequence.
        tokens: (T,) int64.
        rows: (n,) int64, the position from which each trained token is predicted.
        targets: (n,) int64, the trained tokens' ids.
        sequence: (n,) int64, which sample a trained token belongs to.
    """

    samples: list[TrainingSample]
    lengths: list[int]
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


def pack(samples: Sequence[TrainingSample], token_budget: int, device: torch.device | str = "cpu") -> list[MicroBatch]:
    """Split samples into micro-batches of at most `token_budget` tokens each.

    Longest first, each into the first that has room. A sample longer than the budget gets a micro-batch of its own.
    Samples without trained tokens are left out.
    """
    bins: list[tuple[int, list[TrainingSample]]] = []
    for sample in sorted((s for s in samples if s.targets), key=lambda s: -len(s.tokens)):
        size = len(sample.tokens)
        for index, (used, members) in enumerate(bins):
            if used + size <= token_budget:
                members.append(sample)
                bins[index] = (used + size, members)
                break
        else:
            bins.append((size, [sample]))
    return [_micro_batch(members, device) for _, members in bins]


def _micro_batch(samples: list[TrainingSample], device: torch.device | str) -> MicroBatch:
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    for index, sample in enumerate(samples):
        start = len(tokens)
        tokens += sample.tokens
        rows += [start + position - 1 for position in sample.targets]
        targets += [sample.tokens[position] for position in sample.targets]
        sequence += [index] * len(sample.targets)
    as_tensor = [torch.tensor(values, dtype=torch.int64, device=device) for values in (tokens, rows, targets, sequence)]
    return MicroBatch(samples, [len(sample.tokens) for sample in samples], *as_tensor)


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
    )
