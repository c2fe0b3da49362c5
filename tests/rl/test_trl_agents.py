"""What reward functions, tools and environments get is what they get from TRL, with the same model and tools."""

from pathlib import Path
from typing import Any

import pytest
import trl
from colora import GRPOConfig, GRPOTrainer
from colora.rollout.chat_format import ChatFormat
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..agent_runs import tool_checkpoint


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The one.
        b: The other.
    """
    return a + b


async def fail() -> str:
    """Fail."""
    raise LookupError("nothing here")


class Room:
    """An environment with a tool and a reward of its own."""

    def reset(self, **row: Any) -> str:
        self.row = row
        return "77"

    def look(self) -> int:
        """Look."""
        return 5

    def get_reward(self) -> float:
        return float(self.row["number"])


class Watch:
    """A reward function that notes what it was given."""

    __name__ = "watch"

    def __init__(self) -> None:
        self.arguments: set[str] = set()
        self.messages: set[tuple[Any, ...]] = set()

    def __call__(self, prompts: list, completions: list, environments: list, **columns: Any) -> list[float]:
        self.arguments |= columns.keys()
        for prompt, messages, environment in zip(prompts, completions, environments, strict=True):
            assert prompt == [{"role": "user", "content": f"{environment.row['number']}77"}]
            assert environment.row["prompt"] == [{"role": "user", "content": str(environment.row["number"])}]
            assert messages[0]["role"] == "assistant"
            for message in messages:
                self.messages.add(self._shape(message))
        return [float(len(messages)) for messages in completions]

    def _shape(self, message: dict[str, Any]) -> tuple[Any, ...]:
        """Which fields it has, and the whole of what a tool that exists has answered."""
        if message["role"] == "tool":
            known = message["name"] in ("add", "fail", "look")
            return ("tool", *sorted(message), message["name"], message["content"] if known else "")
        calls = [
            (sorted(call), sorted(call["function"]), type(call["function"]["arguments"]).__name__)
            for call in message.get("tool_calls", [])
        ]
        return ("assistant", *sorted(message), type(message["content"]).__name__, str(calls[:1]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tool_checkpoint(tmp_path_factory.mktemp("tool-model")))


def test_the_contract_is_trls(model: str, tmp_path: Path) -> None:
    rows = [[{"role": "user", "content": str(number)}] for number in range(6)]
    dataset = Dataset.from_dict({"prompt": rows, "number": list(range(6))})
    options: dict[str, Any] = {
        "per_device_train_batch_size": 12, "num_generations": 4, "max_completion_length": 150, "max_steps": 2,
        "report_to": [], "max_tool_calling_iterations": 3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True,
    }  # fmt: skip
    given: dict[str, Any] = {"tools": [add, fail], "environment_factory": Room, "peft_config": LoraConfig(r=4)}

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.response_template = ChatFormat(tokenizer, [tokenizer.eos_token_id]).syntax.template
    theirs, config = Watch(), trl.GRPOConfig(str(tmp_path / "trl"), bf16=False, **options)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    other = trl.GRPOTrainer(loaded, theirs, config, dataset, processing_class=tokenizer, **given)
    other.train()
    ours = Watch()
    trainer = GRPOTrainer(model, ours, GRPOConfig(str(tmp_path / "colora"), **options), dataset, **given)
    trainer.train()

    assert ours.arguments == theirs.arguments
    tools = {"add", "fail", "look"}
    for name in ("assistant", "tool"):
        answers = [
            {shape for shape in watch.messages if shape[0] == name and (name == "assistant" or shape[-2] in tools)}
            for watch in (ours, theirs)
        ]
        assert answers[0] == answers[1] and len(answers[0]) >= 2
    logged = {key for key in other.state.log_history[0] if key.startswith(("tools/", "rewards/"))}
    assert logged == {key for key in trainer.state.log_history[0] if key in logged} and "rewards/Room/mean" in logged
