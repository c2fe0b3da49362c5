"""Any task of reasoning-gym as prompts for a chat model, a part of them held out."""

from typing import Any

from colora.rewards.reasoning_gym import reasoning_gym_dataset
from datasets import Dataset, DatasetDict

INSTRUCTION = (
    "Work the problem out step by step. Write the final answer, and nothing else, between <answer> and </answer>."
)


def problems(task: str, size: int, held_out: int, seed: int = 0, **task_options: Any) -> DatasetDict:
    """`size` problems of `task` to train on and `held_out` others to evaluate on, as the splits `train` and `test`.

    Tasks repeat problems; those of `test` that `train` has as well are left out.

    Raises:
        ValueError: the task has no other problems; or, as ImportError, what
            `colora.rewards.reasoning_gym.reasoning_gym_dataset` raises.
    """
    every = reasoning_gym_dataset(task, size + held_out, seed, **task_options)
    messages = [[{"role": "user", "content": f"{question}\n\n{INSTRUCTION}"}] for question in every["prompt"]]
    chat = Dataset.from_dict({"prompt": messages} | {name: every[name][:] for name in every.column_names[1:]})
    seen = set(every["prompt"][:size])
    unseen = [index for index in range(size, len(every)) if every["prompt"][index] not in seen]
    if not unseen:
        raise ValueError(
            f"task {task!r} has no problems beyond the {size} to train on: lower --size, widen its options"
        )
    return DatasetDict(train=chat.select(range(size)), test=chat.select(unseen))
