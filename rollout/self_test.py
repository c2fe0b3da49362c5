"""The self-test of a run's start: engine and trainer on the same few tokens, with an adapter that is not zero."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..weightshare.adapter import Adapter
from ..weightshare.guard import ParityGuard, ParityReport
from ..weightshare.weights import SharedWeights
from .engine import RolloutEngine, RolloutRequest, SamplingParams, generate
from .trajectory import Trajectory

PROMPT_LENGTHS = (3, 17, 40)
MAX_TOKENS = 8
SLOT_STD = 0.02  # moves the log-probs by far more than rounding, and leaves the model one


def self_test(
    engine: RolloutEngine,
    score: Callable[[Sequence[Trajectory]], Tensor],
    guard: ParityGuard,
    weights: SharedWeights,
    adapter: Adapter | None,
) -> ParityReport:
    """Generate for fixed random prompts, score with the trainer, compare. The slots are random meanwhile.

    A new adapter's B is zero: with it an engine that reads no slot at all would agree.

    Args:
        engine: awake and idle; it is left so, having forgotten what it computed.
        score: trajectories -> the trainer's log-probs at temperature 1 of all completion tokens, one after the other,
            (tokens,).
        guard: whose limit applies.
        weights, adapter: the policy's; the slots are published again from the masters at the end.

    Raises:
        ParityError: engine and trainer disagree.
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = weights.embedding.shape[0]
    requests = [
        RolloutRequest(
            f"self-test-{index}",
            tuple(
                torch.randint(vocab_size, (min(length, engine.max_context - MAX_TOKENS),), generator=generator).tolist()
            ),
            index,
            SamplingParams(MAX_TOKENS),
        )
        for index, length in enumerate(PROMPT_LENGTHS)
    ]
    try:
        for linear in weights.linears.values():
            if linear.slot is not None:
                noise = torch.randn(linear.slot.b.shape, generator=generator) * SLOT_STD
                linear.slot.b.copy_(noise)
        engine.adapter_changed()
        trajectories = sorted(generate(engine, requests), key=lambda trajectory: trajectory.request_id)
        trainer_logprobs = score(trajectories)
    finally:
        if adapter is not None:
            adapter.publish()
    engine.adapter_changed()
    engine_logprobs = torch.tensor([value for trajectory in trajectories for value in trajectory.logprobs])
    return guard.observe(0, engine_logprobs, trainer_logprobs)
