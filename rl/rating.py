"""From the rewards that records hold to what they were, or are to be, trained with."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..rollout.records import RolloutRecord
from .advantages import Advantages, compute_advantages
from .config import GRPOConfig
from .kl_reward import KL
from .overlong import OVERLONG


def reward_weights(functions: Mapping[str, float], args: GRPOConfig) -> dict[str, float]:
    """The weight of every term of the reward, by name: the reward functions', then those that options add.

    Raises:
        ValueError: a reward function has the name of a term that an option adds.
    """
    added: dict[str, float] = {}
    if args.overlong_buffer:
        added[OVERLONG] = args.overlong_penalty
    if args.kl_in_reward:
        added[KL] = -args.beta
    for name in added.keys() & functions.keys():
        option = "overlong_buffer" if name == OVERLONG else "kl_in_reward"
        raise ValueError(f"a reward function is called {name!r}, as is the reward that {option} adds: rename it")
    return {**functions, **added}


def record_advantages(
    records: Sequence[RolloutRecord], weights: Mapping[str, float], num_generations: int, args: GRPOConfig
) -> Advantages:
    """The advantages that follow from the rewards in `records` and nothing else.

    Args:
        records: used ones (`record.used`), each group's completions consecutive.
        weights: of `reward_weights`. A term that a record lacks counts as not scored.

    Returns:
        fp32, as the rewards were scored.
    """
    return compute_advantages(
        reward_values(records, weights),
        torch.tensor(list(weights.values())),
        num_generations,
        str(args.scale_rewards),
        args.multi_objective_aggregation,
        args.advantage_estimator,
    )


def reward_values(records: Sequence[RolloutRecord], names: Iterable[str]) -> Tensor:
    """(records, names) fp32: the named rewards, NaN where a record lacks one."""
    names = list(names)
    values = [record.rewards.get(name) for record in records for name in names]
    flat = torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float32)
    return flat.view(len(records), len(names))
