"""Tools, environments and rollout functions in the trainer, by TRL's contracts."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from colora import GRPOConfig, GRPOTrainer
from colora.rl.cli import main as colora
from colora.rl.findings import Finding
from colora.rl.replay import replay
from colora.rollout.engine import RolloutRequest, SamplingParams, generate, sample_seed
from colora.rollout.records import RolloutRecord, read_records
from colora.weightshare.adapter import ADAPTER_FILE
from datasets import Dataset
from peft import LoraConfig

from ..agent_runs import tool_checkpoint

GROUP = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tool_checkpoint(tmp_path_factory.mktemp("tool-model")))


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


def used_tools(completions: list[list[dict[str, Any]]], **_: Any) -> list[float]:
    """How many answers of tools there are."""
    return [float(sum(message["role"] == "tool" for message in messages)) for messages in completions]


def rows(count: int = 6, **columns: Any) -> Dataset:
    prompts = [[{"role": "user", "content": str(number)}] for number in range(count)]
    return Dataset.from_dict({"prompt": prompts, "number": list(range(count)), **columns})


def make(model: str, output: Path, reward: Any = used_tools, dataset: Any = "rows", **options: Any) -> GRPOTrainer:
    names = ("tools", "environment_factory", "rollout_func")
    given = {name: options.pop(name) for name in names if name in options}
    defaults = {
        "per_device_train_batch_size": 2 * GROUP, "num_generations": GROUP, "max_completion_length": 40, "max_steps": 3,
        "learning_rate": 3e-3, "report_to": [], "device": "cpu", "disable_tqdm": True, "save_strategy": "no",
        "tool_timeout": 60.0,
    }  # fmt: skip
    dataset = rows() if isinstance(dataset, str) else dataset
    config = GRPOConfig(str(output), **(defaults | options))
    lora = LoraConfig(r=4, init_lora_weights=False)
    return GRPOTrainer(model, reward, config, dataset, peft_config=lora, **given)


def records_of(trainer: GRPOTrainer) -> list[RolloutRecord]:
    return read_records(trainer.output_dir / "rollouts")


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def mean(values: Any) -> float:
    values = list(values)
    return sum(values) / len(values)


def test_tools(model: str, tmp_path: Path) -> None:
    seen: list[list[dict[str, Any]]] = []

    def watch(completions: list, completion_ids: list, number: list[int], **columns: Any) -> list[None]:
        assert "environments" not in columns
        seen.extend(completions)
        return [None] * len(completions)

    trainer = make(model, tmp_path, [used_tools, watch], tools=[add, fail], max_tool_calling_iterations=3)
    trainer.train()
    records = records_of(trainer)
    assert [record.completion for record in records] == seen
    replies = [message for record in records for message in record.completion if message["role"] == "tool"]
    kinds = {(message["name"], message["content"]) for message in replies}
    assert {("add", "3"), ("add", "34"), ("fail", str({"error": "nothing here"}))} <= kinds
    assert any(name == "look" and "there is no tool 'look'" in content for name, content in kinds)
    assert any("the tool call cannot be read" in content for _, content in kinds)
    for record in records:
        trajectory, notes = record.trajectory, record.extra["agent"]
        assert len(trajectory.segments) == 2 * notes["turns"] - 1 and notes["turns"] <= 4
        turns = [message for message in record.completion if message["role"] == "assistant"]
        assert len(turns) == notes["turns"]
        calls = sum(len(message.get("tool_calls", [])) for message in turns)
        # What did not fit the context was called, and its answers thrown away.
        unanswered = notes["ended"] in ("rounds", "tokens") and len(turns[-1].get("tool_calls", []))
        assert notes["tool_calls"] == calls - unanswered + notes["malformed_calls"]
        assert trajectory.num_sampled <= 40
        assert record.rewards["used_tools"] == sum(message["role"] == "tool" for message in record.completion)
    for step, part in enumerate([records[start : start + 2 * GROUP] for start in range(0, len(records), 2 * GROUP)]):
        notes = [record.extra["agent"] for record in part]
        calls = sum(note["tool_calls"] for note in notes)
        assert logged(trainer, "tools/call_frequency")[step] == pytest.approx(calls / len(part))
        failures = sum(note["tool_failures"] for note in notes)
        assert logged(trainer, "tools/failure_frequency")[step] == pytest.approx(failures / calls)
        assert logged(trainer, "agents/turns")[step] == pytest.approx(mean(note["turns"] for note in notes))
        lengths = [record.trajectory.num_sampled for record in part]
        assert logged(trainer, "completions/mean_length")[step] == pytest.approx(mean(lengths))
    assert max(logged(trainer, "parity/mean_abs")) < 1e-4  # the trainer's log-probs of what was sampled, and no other
    assert {"rounds", "answer"} <= {record.extra["agent"]["ended"] for record in records}


def test_no_rounds_at_all(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path, tools=[add], max_tool_calling_iterations=0, max_steps=1)
    trainer.train()
    assert {len(record.trajectory.segments) for record in records_of(trainer)} == {1}
    assert logged(trainer, "tools/call_frequency") == [0.0] and logged(trainer, "tools/failure_frequency") == [0.0]


class Counter:
    """An environment that adds up what it is told."""

    made: list["Counter"] = []

    def __init__(self) -> None:
        Counter.made.append(self)
        self.total, self.row = 0, dict[str, Any]()

    def reset(self, **row: Any) -> str:
        self.total, self.row = 0, row
        return "77"

    def add(self, a: int, b: int) -> int:
        """Add to the total.

        Args:
            a: The one.
            b: The other.
        """
        self.total += a + b
        return self.total

    def get_reward(self) -> float:
        return self.total / 100


@pytest.fixture
def counter() -> type[Counter]:
    Counter.made = []
    return Counter


def test_environments(model: str, tmp_path: Path, counter: type[Counter]) -> None:
    totals: list[int] = []

    def told(environments: list[Counter], prompts: list, number: list[int], **_: Any) -> list[float]:
        assert len(set(map(id, environments))) == len(environments)
        for environment, prompt, value in zip(environments, prompts, number, strict=True):
            assert environment.row == {"prompt": [{"role": "user", "content": str(value)}], "number": value}
            assert prompt == [{"role": "user", "content": f"{value}77"}]
        totals.extend(environment.total for environment in environments)
        return [float(environment.total > 0) for environment in environments]

    trainer = make(model, tmp_path, told, environment_factory=counter, reward_weights=[0.5])
    trainer.train()
    records = records_of(trainer)
    assert len(counter.made) == 2 * GROUP  # used again at each step
    assert [record.rewards["Counter"] for record in records] == pytest.approx([total / 100 for total in totals])
    assert any(totals) and [record.rewards["told"] for record in records] == [float(total > 0) for total in totals]
    for record, total in zip(records, totals, strict=True):
        assert record.reward == pytest.approx(0.5 * (total > 0) + total / 100)
        assert record.prompt == [{"role": "user", "content": f"{record.prompt_index}77"}]
        said = trainer.collector.tokenizer.decode(record.trajectory.prompt_ids)
        assert f"<user>{record.prompt_index}77<end>" in said
    assert "rewards/Counter/mean" in trainer.state.log_history[0]


def test_environments_alone_give_reward_and_questions(model: str, tmp_path: Path, counter: type[Counter]) -> None:
    trainer = make(model, tmp_path, None, None, environment_factory=counter)
    trainer.train()
    records = records_of(trainer)
    assert len(records) == 3 * 2 * GROUP and all(record.rewards.keys() == {"Counter"} for record in records)
    assert records[0].prompt == [{"role": "user", "content": "77"}]


def test_a_column_chooses_the_environment(model: str, tmp_path: Path, counter: type[Counter]) -> None:
    class Other:
        def reset(self, number: int) -> None:
            self.number = number

        async def look(self) -> int:
            """Look."""
            return self.number

        async def get_reward(self) -> float:
            return float(self.number)

    dataset = rows(6, environment=["count", "other"] * 3).remove_columns("prompt")
    trainer = make(model, tmp_path, None, dataset, environment_factory={"count": counter, "other": Other})
    trainer.train()
    for record in records_of(trainer):
        other = record.prompt_index % 2
        assert (record.rewards["Counter"] is None) == bool(other)
        assert record.rewards["Other"] == (record.prompt_index if other else None)
        assert record.prompt == [{"role": "user", "content": "" if other else "77"}]
        replies = {message["content"] for message in record.completion if message.get("name") == "look"}
        assert replies <= {str(record.prompt_index)} if other else not replies & set("0123456789")


def test_an_environments_reward_that_raises_stops_the_run_with_its_name(model: str, tmp_path: Path) -> None:
    class Broken(Counter):
        def get_reward(self) -> float:
            raise ZeroDivisionError("no rounds were played")

    with pytest.raises(RuntimeError, match=r"'Broken' failed at step 1.*ZeroDivisionError: no rounds were played"):
        make(model, tmp_path, None, environment_factory=Broken).train()


def test_a_rollout_func_that_fails_leaves_the_engine_idle(model: str, tmp_path: Path) -> None:
    def fails(prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        trainer.engine.submit([RolloutRequest("one", (1, 2), 0, SamplingParams(9))])
        raise ZeroDivisionError

    trainer = make(model, tmp_path, lucky, rollout_func=fails)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert trainer.engine.unfinished == 0
    trainer.engine.sleep()


def adapter_bytes(directory: Path) -> bytes:
    return (directory / ADAPTER_FILE).read_bytes()


OPTIONS: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, "reproducible_tools": True}


def differences(findings: list[Finding]) -> list[str]:
    return [f"{finding.what}: {finding.text}" for finding in findings if finding.status == "different"]


def test_a_run_with_tools_goes_on_exactly_and_can_be_replayed(model: str, tmp_path: Path) -> None:
    whole = make(model, tmp_path / "whole", tools=[add, fail], **OPTIONS)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "half" / "checkpoint-2")
    half = make(model, tmp_path / "half", tools=[add, fail], **OPTIONS)
    half.train(resume_from_checkpoint=True)
    assert adapter_bytes(tmp_path / "half/checkpoint-4") == adapter_bytes(tmp_path / "whole/checkpoint-4")
    again = {(r.step, r.trajectory.request_id): r for r in records_of(half)}
    for record in records_of(whole):
        if record.step > 2:
            assert again[record.step, record.trajectory.request_id] == record

    for generate_again in (False, True):
        trainer = make(model, tmp_path / "whole", tools=[add, fail], **OPTIONS)
        findings = replay(trainer, 3, generate=generate_again)
        assert not differences(findings)
        assert {"prompts", "completions", "rewards", "adapter"} <= {f.what for f in findings if f.status == "same"}


def test_replay_with_environments_has_the_conversations_again(
    model: str, tmp_path: Path, counter: type[Counter]
) -> None:
    make(model, tmp_path, None, environment_factory=counter, **OPTIONS).train()
    findings = replay(make(model, tmp_path, None, environment_factory=counter, **OPTIONS), 2)
    assert not differences(findings)
    (unchecked,) = [finding for finding in findings if finding.what == "rewards"]
    assert unchecked.status == "unchecked" and "--generate" in unchecked.text
    findings = replay(make(model, tmp_path, None, environment_factory=counter, **OPTIONS), 2, generate=True)
    assert not differences(findings)
    assert {"generation", "rewards"} <= {finding.what for finding in findings if finding.status == "same"}


def plain_rollouts(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
    """What the trainer does without one, and two tokens that were not sampled."""
    tokenizer, engine = trainer.collector.tokenizer, trainer.engine
    ids = [
        tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False, tokenize=True)
        for prompt in prompts
    ]
    sampling = SamplingParams(10, 1.0, trainer.collector.stop_token_ids)
    seeds = [sample_seed(0, trainer.state.global_step, 0, index) for index in range(len(ids))]
    requests = [RolloutRequest(str(i), tuple(prompt), seeds[i], sampling) for i, prompt in enumerate(ids)]
    found = {trajectory.request_id: trajectory for trajectory in generate(engine, requests)}
    ordered = [found[str(index)] for index in range(len(ids))]
    return {
        "prompt_ids": ids,
        "completion_ids": [[*trajectory.completion_ids, 3, 4] for trajectory in ordered],
        "logprobs": [[*trajectory.logprobs, 0.0, 0.0] for trajectory in ordered],
        "env_mask": [[1] * len(trajectory.completion_ids) + [0, 0] for trajectory in ordered],
        "luck": [float(len(trajectory.completion_ids) % 2) for trajectory in ordered],
        "same": "for all",
    }


def lucky(luck: list[float], same: list[str], **_: Any) -> list[float]:
    assert set(same) == {"for all"}
    return luck


def test_rollout_func(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path, lucky, rollout_func=plain_rollouts)
    trainer.train()
    records = records_of(trainer)
    assert len(records) == 3 * 2 * GROUP
    for record in records:
        sampled, added = record.trajectory.segments
        assert (sampled.source, added.source, added.token_ids) == ("model", "environment", [3, 4])
        assert record.rewards == {"lucky": float(len(sampled.token_ids) % 2)}
        assert record.completion[0]["role"] == "assistant"
    assert max(logged(trainer, "parity/mean_abs")) < 1e-4
    assert max(logged(trainer, "completions/max_length")) <= 10
    findings = replay(make(model, tmp_path, lucky, rollout_func=plain_rollouts), 1, generate=True)
    assert not differences(findings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda output: output.pop("logprobs"), "rollout_func returned no logprobs; it has to return prompt_ids"),
        (lambda output: output["luck"].pop(), "rollout_func returned 7 luck for 8 prompts"),
        (lambda output: output["logprobs"][1].pop(), r"dataset row \d: rollout_func returned .*'logprobs'"),
        (lambda output: output.update(logprobs=None), "rollout_func returned no logprobs; it has to return prompt_ids"),
        (lambda output: output.update(env_mask=([1],)), "rollout_func returned 1 env_mask for 8 prompts"),
        (
            lambda output: output.update(completion_ids=[1] * 8),
            r"dataset row \d: prompt_ids.* list of numbers for each",
        ),
        (lambda output: output["logprobs"].__setitem__(0, None), r"dataset row \d: prompt_ids.* list of numbers for"),
        (lambda output: output["prompt_ids"][1].append(20), r"row \d: .* token 20, the model has 0 to 19"),
        (
            lambda output: output["prompt_ids"][1].extend([1] * 1024),
            r"row \d: .* tokens, with the prompt, at most 1024",
        ),
    ],
)
def test_what_a_rollout_func_must_return(
    model: str, tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str
) -> None:
    def wrong(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        output = plain_rollouts(prompts, trainer)
        change(output)
        return output

    with pytest.raises(ValueError, match=message):
        make(model, tmp_path, lucky, rollout_func=wrong).train()


def test_a_rollout_func_may_return_tensors_and_leaves_out_what_does_not_count(model: str, tmp_path: Path) -> None:
    def tensors(prompts: list, trainer: GRPOTrainer) -> dict[str, Any]:
        output = plain_rollouts(prompts, trainer)
        for name in ("prompt_ids", "completion_ids"):
            output[name] = [torch.tensor(ids) for ids in output[name]]
        output["logprobs"] = [[*values[:-2], None, None] for values in output["logprobs"]]
        return output | {"env_mask": tuple(map(torch.tensor, output["env_mask"]))}

    made = {}
    for name, function in (("lists", plain_rollouts), ("tensors", tensors)):
        trainer = make(model, tmp_path / name, lucky, rollout_func=function, max_steps=1)
        trainer.train()
        made[name] = records_of(trainer)
    assert made["lists"] == made["tensors"]

    with pytest.raises(ValueError, match="rollout_func returned None; it has to return a dict with prompt_ids"):
        make(model, tmp_path / "none", lucky, rollout_func=lambda prompts, trainer: None).train()


def test_refusals(model: str, tmp_path: Path, counter: type[Counter]) -> None:
    def refused(message: str, *arguments: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            make(model, tmp_path, *arguments, **options)

    text = Dataset.from_dict({"prompt": ["1", "2"]})
    refused(r"train_dataset\[0\]: the prompt is a text; with tools prompts are lists", used_tools, text, tools=[add])
    refused("rollout_func makes the rollouts itself", tools=[add], rollout_func=plain_rollouts)
    refused("nothing gives a reward: pass reward_funcs", None, tools=[add])
    refused("train_dataset is missing", used_tools, None, tools=[add])
    refused("says how long the run is: set max_steps", None, None, environment_factory=counter, max_steps=-1)
    refused("needs a column `environment`", None, None, environment_factory={"count": counter})
    refused("3 reward weights for 2 reward functions", reward_weights=[1.0, 1.0], environment_factory=counter)
    refused("tool_timeout=0.0 must be a number above 0", tools=[add], tool_timeout=0.0)
    refused("max_tool_calling_iterations=-1 must be", tools=[add], max_tool_calling_iterations=-1)
    refused(r"the prompt has \d+ tokens, at most \d+ fit", tools=[add], max_prompt_length=3)
    empty = Dataset.from_dict({"prompt": [[{"role": "user", "content": "1"}], []]})
    refused(r"train_dataset\[1\]: the prompt is \[\]; with tools prompts are lists", used_tools, empty, tools=[add])
    named = {"environment_factory": {"count": counter}}
    refused("train_dataset: there is no environment None in .*the column `environment` chooses", None, rows(), **named)
    wrong = rows(environment=["count"] * 5 + ["chess"])
    refused(r"train_dataset\[5\]: there is no environment 'chess' in .*, only count", None, wrong, **named)
    trainer = make(model, tmp_path, None, rows(environment=["count"] * 6), **named)
    with pytest.raises(ValueError, match=r"eval_dataset\[5\]: there is no environment 'chess' in .*, only count"):
        trainer.evaluate(wrong)


AGENT_FILE = '''
class Counter:
    def reset(self, **row):
        self.total = 0

    def add(self, a: int, b: int) -> int:
        """Add to the total.

        Args:
            a: The one.
            b: The other.
        """
        self.total += a + b
        return self.total

    def get_reward(self):
        return self.total / 100


def look() -> str:
    """Look."""
    return "5"
'''


def test_the_command_line(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "agent.py").write_text(AGENT_FILE)
    (tmp_path / "rows.jsonl").write_text('{"prompt": [{"role": "user", "content": "1"}]}\n' * 4)
    monkeypatch.chdir(tmp_path)
    options = ["--dataset=rows.jsonl", "--output_dir=run", "--max_steps=1", "--max_completion_length=30"]
    options += ["--num_generations=2", "--per_device_train_batch_size=4", "--report_to=none", "--disable_tqdm"]
    options += ["--reproducible_tools", "--tools=agent.py:look", "--environment_factory=agent.py:Counter"]
    assert colora(["train", f"--model={model}", *options, "--dry-run"]) == 0
    assert "# checked: environment_factory: agent.py:Counter" in capsys.readouterr().out
    assert colora(["train", f"--model={model}", *options]) == 0
    records = read_records("run/rollouts")
    assert len(records) == 4 and records[0].rewards.keys() == {"Counter"}
    monkeypatch.chdir("/")
    assert colora(["replay", str(tmp_path / "run"), "--step", "1", "--generate"]) == 0
    printed = capsys.readouterr().out
    assert "no differences" in printed and "generation      as recorded" in printed
    assert colora(["train", f"--model={model}", *options, f"--tools={tmp_path}/agent.py:luck", "--dry-run"]) == 2
    assert "luck" in capsys.readouterr().err
    (tmp_path / "plain.py").write_text("def tool(a: int):\n    return a\n")
    monkeypatch.chdir(tmp_path)
    options += ["--tools=plain.py:tool", "--output_dir=other", "--dry-run"]
    assert colora(["train", f"--model={model}", *options]) == 2
    assert "tool 'tool': Cannot generate JSON schema for tool because it has no docstring" in capsys.readouterr().err


FRAGILE = """
class Fragile:
    def reset(self, number, **row):
        if number == {bad}:
            raise OSError("no sandbox")

    def get_reward(self):
        return 1.0
"""


def test_a_reset_that_fails_ends_the_command_with_an_error_and_keeps_what_was_done(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fragile.py").write_text(FRAGILE.format(bad=2))
    rows(3).to_json("rows.jsonl")
    options = ["--dataset=rows.jsonl", "--output_dir=run", "--max_steps=3", "--max_completion_length=9"]
    options += ["--num_generations=2", "--per_device_train_batch_size=2", "--report_to=none", "--disable_tqdm"]
    options += ["--shuffle_dataset=false", "--save_steps=1", "--environment_factory=fragile.py:Fragile"]
    assert colora(["train", f"--model={model}", *options]) == 2
    shown, _, message = capsys.readouterr().err.rpartition("error: ")
    assert 'fragile.py", line 5, in reset' in shown and "OSError: no sandbox" in shown
    assert message.startswith("dataset row 2: Fragile.reset failed 2 times, each in a new instance: it raised OSError")
    assert "'number': 2" in message and "Remedy: Let the method handle this row" in message
    assert {record.step for record in read_records("run/rollouts")} == {1, 2}
    (tmp_path / "fragile.py").write_text(FRAGILE.format(bad=-1))
    assert colora(["train", f"--model={model}", *options, "--resume"]) == 0
    assert {record.step for record in read_records("run/rollouts")} == {1, 2, 3}
