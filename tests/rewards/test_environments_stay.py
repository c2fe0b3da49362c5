"""An agent's environments never leave the process: what wants them runs here, workers do without."""

import threading
from typing import Any

from colora.rewards.calls import RewardBatch, RewardFunction
from colora.rewards.pool import PoolLimits
from colora.rewards.pooled import PooledFunctions


def by_environment(environments: list[Any], **columns: Any) -> list[float]:
    return [environment.value for environment in environments]


def by_text(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


class Unpicklable:
    def __init__(self) -> None:
        self.lock, self.value = threading.Lock(), 1.0


def test_functions_that_name_them_are_called_here_and_others_get_everything_else() -> None:
    functions = [RewardFunction(by_environment, "by_environment"), RewardFunction(by_text, "by_text")]
    pooled = PooledFunctions(functions, PoolLimits(1, 10.0, 1.0))
    assert "by_environment" not in pooled and "by_text" in pooled
    columns = {"environments": [Unpicklable()], "answer": ["7"]}
    scoring = pooled.start(functions[1], RewardBatch(["?"], ["four"], [[1]], columns))
    message = scoring._pack(range(1))
    assert b"answer" in message and b"Unpicklable" not in message
    pooled.pool.close()
