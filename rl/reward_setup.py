"""The reward functions of a trainer, from what its constructor was given."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..rewards.model import RewardModel
from ..rewards.pool import PoolLimits
from ..rewards.runner import RewardRunner
from .agents import Agents
from .config import GRPOConfig

RewardFunction = Callable[..., Any] | str | nn.Module


def reward_runner(given: Sequence[Callable[..., Any]], args: GRPOConfig, agents: Agents | None) -> RewardRunner:
    """Of the reward functions, and of the rewards that environments give, which have the weight 1."""
    functions, weights, workers = list(given), args.reward_weights, None
    if agents is not None:
        functions += agents.rewards()
        weights = None if weights is None else [*weights, *[1.0] * (len(functions) - len(given))]
    if not functions:
        raise ValueError(
            "nothing gives a reward: pass reward_funcs, or an environment_factory whose environments have get_reward()"
        )
    if args.reward_workers:
        workers = PoolLimits(args.reward_workers, args.reward_timeout, args.reward_memory_gib)
    return RewardRunner(
        functions,
        weights,
        args.reward_errors,
        workers,
        args.reward_failure_share,
        args.reward_concurrency,
        args.reward_timeout,
    )


def reward_functions(
    reward_funcs: RewardFunction | Sequence[RewardFunction] | None,
    tokenizers: Sequence[PreTrainedTokenizerBase | None] | None,
) -> list[Callable[..., Any]]:
    """Functions as they are; models wrapped so that they can be called alike.

    Raises ValueError for the name of a function, and for tokenizers that are not as many.
    """
    functions: list[RewardFunction] = []
    if reward_funcs is None:
        reward_funcs = []
    if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str):
        functions += reward_funcs
    else:
        functions.append(reward_funcs)
    for function in functions:
        if isinstance(function, str) and ":" in function and not Path(function).exists():
            raise ValueError(
                f"reward_funcs: {function!r} names a function, while a text is the checkpoint of a reward model here: "
                "load it with `colora.rewards.loading.load_reward`"
            )
    each = tokenizers or [None] * len(functions)
    if len(each) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(each)} entries, reward_funcs has {len(functions)}: give one for each "
            "(None for functions)"
        )
    return [
        RewardModel(function, tokenizer) if isinstance(function, (str, nn.Module)) else function
        for function, tokenizer in zip(functions, each, strict=True)
    ]
