"""What two runs left in their output directories, compared bit by bit."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from colora.rl.checkpoint import FINISHED, checkpoints, find_damage

BY_THE_CLOCK = ("time/", "throughput/", "step_time", "runtime", "per_second", "tokens_per_s")


def assert_same_run(one: Path, other: Path) -> None:
    """Rollouts, and of the last checkpoint the adapter, the optimizer and the log but for times, are the same."""
    assert (one / FINISHED).read_text() == (other / FINISHED).read_text()
    rollouts = [sorted(path.name for path in (run / "rollouts").iterdir()) for run in (one, other)]
    assert rollouts[0] == rollouts[1]
    for name in rollouts[0]:
        assert (one / "rollouts" / name).read_bytes() == (other / "rollouts" / name).read_bytes(), name
    last = [checkpoints(run)[-1] for run in (one, other)]
    assert last[0].name == last[1].name
    assert find_damage(last[0]) is None
    adapters = [(checkpoint / "adapter_model.safetensors").read_bytes() for checkpoint in last]
    assert adapters[0] == adapters[1]
    moments, expected = ([*_optimizer(checkpoint)] for checkpoint in last)
    assert len(moments) == len(expected) > 0
    assert all(torch.equal(*pair) for pair in zip(moments, expected, strict=True))
    assert read_log(last[0]) == read_log(last[1])


def _optimizer(checkpoint: Path) -> list[torch.Tensor]:
    return list(tensors_of(torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]))


def tensors_of(state: Any) -> Iterator[torch.Tensor]:
    """What is in a dict of dicts, by their keys; numbers as tensors."""
    if not isinstance(state, dict):
        yield torch.as_tensor(state)
        return
    for name in sorted(state):
        yield from tensors_of(state[name])


def read_log(checkpoint: Path) -> list[dict[str, Any]]:
    """A checkpoint's log without what the clock says."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [{k: v for k, v in entry.items() if not any(part in k for part in BY_THE_CLOCK)} for entry in history]
