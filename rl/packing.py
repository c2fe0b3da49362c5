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
# As much again for every so many tokens of the average completion: over long sequences attention to the prompt and to
# the completion apart has 0.6 of the speed of cuDNN's attention to both (benchmarks/attention.py, peers of causal_*).
# Shared all the same, a step of a 4B model with a prompt of 4096 tokens and 8 completions of 16384 took 9 % longer
# (benchmarks/shared_prompt.py).
LONG_COMPLETION = 8192


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

    Samples that share a prompt, a family, stay in one micro-batch where it can hold them all, and are otherwise cut
    into as few parts as fit. The largest part first, each goes into the first micro-batch that has room. A sample
    longer than the budget gets a micro-batch of its own. Samples without trained tokens are left out.

    Args:
        samples: what is trained.
        token_budget: most tokens in a row, where a prompt that is shared counts once.
        device: of the micro-batches' tensors.
        share_from: prompts are shared where that spares this share of a family's tokens, and more of long completions
            (`LONG_COMPLETION`); 0: always.
    """
    families = _families([sample for sample in samples if sample.targets], share_from)
    parts = [part for family in families for part in _parts(family, token_budget)]
    parts.sort(key=_tokens, reverse=True)
    rows = _first_fit([_tokens(part) for part in parts], token_budget)
    return [_micro_batch([parts[index] for index in row], device) for row in rows]


def repeated_prompts(samples: Sequence[TrainingSample], micro_batches: Sequence[MicroBatch]) -> tuple[int, int]:
    """How often micro-batches, those that `pack` makes of the samples, have the same shared prompt again.

    Returns:
        The tokens of shared prompts beyond the first time that a row has them, and the least budget with which there
        are none; 0 where no prompt is shared.
    """
    families = _families([sample for sample in samples if sample.targets])
    repeated = sum(len(micro.tokens) for micro in micro_batches) - sum(map(_tokens, families))
    return repeated, max((_tokens(family) for family in families if len(family) > 1), default=0)


def _shared_prompt(part: Sequence[TrainingSample]) -> int:
    """Tokens of the prompt that the samples of a family that are in one row share; 0 of one alone."""
    return part[0].prompt if len(part) > 1 else 0


def _tokens(part: Sequence[TrainingSample]) -> int:
    """What such samples take of a row."""
    prompt = _shared_prompt(part)
    return prompt + sum(len(sample.tokens) - prompt for sample in part)


def _parts(family: list[TrainingSample], token_budget: int) -> list[list[TrainingSample]]:
    """The family, or where it takes more than the budget, the parts of it for several micro-batches."""
    prompt = _shared_prompt(family)
    groups = _first_fit([len(sample.tokens) - prompt for sample in family], token_budget - prompt)
    return [[family[index] for index in group] for group in groups]


def _first_fit(sizes: Sequence[int], room: int) -> list[list[int]]:
    """Indices of `sizes` in groups: each joins the first group that has room for it, or begins one."""
    groups: list[list[int]] = []
    taken: list[int] = []
    for index, size in enumerate(sizes):
        chosen = next((number for number, used in enumerate(taken) if used + size <= room), len(groups))
        if chosen == len(groups):
            groups.append([])
            taken.append(0)
        groups[chosen].append(index)
        taken[chosen] += size
    return groups


def _families(samples: Sequence[TrainingSample], share_from: float = SHARE_FROM) -> list[list[TrainingSample]]:
    """Samples with the same prompt together where it is worth sharing, the longest first, and others each alone."""
    by_prompt: dict[tuple[int, ...], list[TrainingSample]] = {}
    families: list[list[TrainingSample]] = []
    for sample in samples:
        if 0 < sample.prompt < len(sample.tokens):
            by_prompt.setdefault(tuple(sample.tokens[: sample.prompt]), []).append(sample)
        else:
            families.append([sample])
    for family in by_prompt.values():
        prompt, tokens = family[0].prompt, sum(len(sample.tokens) for sample in family)
        least = share_from * (1 + (tokens / len(family) - prompt) / LONG_COMPLETION)
        if len(family) > 1 and prompt * (len(family) - 1) >= least * tokens:
            families.append(sorted(family, key=lambda sample: -len(sample.tokens)))
        else:
            families += [[sample] for sample in family]
    return families


def _micro_batch(parts: list[list[TrainingSample]], device: torch.device | str) -> MicroBatch:
    tokens: list[int] = []
    rows: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    layout: list[Entry] = []
    samples: list[TrainingSample] = []
    for part in parts:
        start, prompt = len(tokens), _shared_prompt(part)
        tokens += part[0].tokens[:prompt]
        for sample in part:
            behind = len(tokens) - prompt  # where position 0 of the sample would be if its prompt stood before it
            tokens += sample.tokens[prompt:]
            # The first token of a completion is predicted from the prompt's last.
            rows += [(start if position <= prompt else behind) + position - 1 for position in sample.targets]
            targets += [sample.tokens[position] for position in sample.targets]
            sequence += [len(samples)] * len(sample.targets)
            samples.append(sample)
        lengths = [len(sample.tokens) - prompt for sample in part]
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
