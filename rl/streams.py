"""The trained tokens of a micro-batch as flat tensors, and sums over each sequence's part of them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # log-ratios are bounded by +-20 before exp: e^20 is beyond any clip range, and finite in fp32


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy without waiting for what the device still has to do, as a copy from pageable memory would."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


@dataclass(frozen=True)
class TokenStreams:
    """The trained tokens of one micro-batch, sequences one after the other; all (tokens,) of one floating dtype.

    Attributes:
        logprobs: of the policy, with gradient.
        engine_logprobs: of the rollout engine when it sampled the tokens.
        advantages: of each token's completion, or its own.
        shares: each token's part of the step's loss (`Objective.shares`).
        lengths: trained tokens of each sequence, in order; their sum is `tokens`.
        old_logprobs: of the policy that the ratio is taken against. None: the engine's ("bypass": the ratio then is
            the engine's importance ratio as well).
        trainer_logprobs: of the trainer with the weights that sampled, to measure the engine's gap by. None: unknown,
            and no sequence is rejected.
        ref_logprobs: of the reference policy; needed where beta is not 0.
        entropies: of the policy's distributions, with gradient where there is an entropy bonus.
        entropy_share: what one token's entropy weighs in the step's entropy bonus.
        high_entropy: (tokens,) bool, which tokens the policy term acts on (`top_entropy_quantile`). None: on all.
        mask: (tokens,) bool, which tokens exist at all: the others, whatever they hold, are in no sum and get zero
            gradient. None: all. Tokens whose engine log-prob is not finite are masked besides.
    """

    logprobs: Tensor
    engine_logprobs: Tensor
    advantages: Tensor
    shares: Tensor
    lengths: Sequence[int]
    old_logprobs: Tensor | None = None
    trainer_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropies: Tensor | None = None
    entropy_share: float = 0.0
    high_entropy: Tensor | None = None
    mask: Tensor | None = None

    @cached_property
    def sequences(self) -> "Sequences":
        """Which tokens belong together; call it on `cleaned()` streams."""
        assert self.mask is not None, "sums need cleaned() streams"
        return Sequences(self.lengths, self.mask)

    def cleaned(self) -> "TokenStreams":
        """The same with a mask, and zeros for whatever masked tokens held.

        0 * NaN is NaN, in values and in gradients, so a mask must be applied before the first arithmetic.
        """
        mask = torch.isfinite(self.engine_logprobs)
        if self.mask is not None:
            mask &= self.mask
        zeroed: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                zeroed[field.name] = torch.where(mask, value, torch.zeros_like(value))
        return replace(self, **(zeroed | {"mask": mask}))


class Sequences:
    """Sums and means over the unmasked tokens of each sequence.

    Args:
        lengths: tokens of each sequence, in order.
        mask: (tokens,) bool; what masked tokens hold must be 0.
    """

    def __init__(self, lengths: Sequence[int], mask: Tensor):
        counts = torch.tensor(list(lengths), dtype=torch.int64)
        self.mask, self._lengths = mask, to_device(counts, mask.device)
        self._number = to_device(torch.arange(len(counts)).repeat_interleave(counts), mask.device)

    def sums(self, values: Tensor) -> Tensor:
        """(tokens,) -> (sequences,), differentiable, added in the same order every time."""
        if not self._lengths.numel():
            return values.new_zeros(0)
        return torch.segment_reduce(values, "sum", lengths=self._lengths, unsafe=True)

    def counts(self, dtype: torch.dtype) -> Tensor:
        """(sequences,): unmasked tokens of each."""
        return self.sums(self.mask.to(dtype))

    def means(self, values: Tensor) -> Tensor:
        """(tokens,) -> (sequences,): over unmasked tokens; 0 for a sequence without any."""
        return self.sums(values) / self.counts(values.dtype).clamp(min=1)

    def spread(self, values: Tensor) -> Tensor:
        """(sequences,) -> (tokens,): each sequence's value for each of its tokens."""
        return values[self._number]
