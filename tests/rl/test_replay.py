"""Any past step can be done again from what a run kept, and what was changed since is found and named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from colora import GRPOConfig, GRPOTrainer
from colora.rl import checkpoint
from colora.rl.cli import main
from colora.rl.findings import Finding
from colora.rl.replay import replay
from colora.rollout.records import read_records, rollout_path, write_records
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from ..tiny_runs import tiny_checkpoint

STEPS = 7
RUNS = {
    "one_update": {"save_steps": 3},
    "iterations_and_minibatches": {
        "steps_per_generation": 2, "num_iterations": 2, "save_steps": 3, "beta": 0.05, "logging_steps": 2,
    },
    "dynamic_sampling": {"dynamic_sampling": True, "save_steps": 2, "scale_rewards": "batch", "overlong_buffer": 3},
    "kl_in_reward": {"kl_in_reward": True, "beta": 0.1, "save_steps": 4, "num_iterations": 2, "max_grad_norm": 0.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def rare(completion_ids, **_):
    """Zero for most completions, so that some groups have no signal."""
    return [float(ids[0] % 5 == 0) for ids in completion_ids]


def make(model: str, output: Path, reward=rare, stream: bool = False, **options) -> GRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8, "max_steps": STEPS,
        "learning_rate": 3e-3, "report_to": [], "device": "cpu", "disable_tqdm": True,
    }  # fmt: skip
    rows = Dataset.from_dict({"prompt": [f"{n}+1=" for n in range(10)]})
    rows = rows.to_iterable_dataset() if stream else rows
    lora = LoraConfig(r=4, init_lora_weights=False)
    return GRPOTrainer(model, reward, GRPOConfig(str(output), **(defaults | options)), rows, peft_config=lora)


@pytest.fixture(scope="module")
def runs(model: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The output directory of a finished run of RUNS, made once."""
    made: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            make(model, made[name], **RUNS[name]).train()
        return made[name]

    return run


@pytest.fixture
def copied(runs: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a run to tamper with."""
    shutil.copytree(runs("one_update"), tmp_path / "run")
    return tmp_path / "run"


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def different(findings: list[Finding]) -> list[str]:
    return [finding.what for finding in findings if finding.status == "different"]


def text_of(findings: list[Finding], what: str) -> str:
    return next(finding.text for finding in findings if finding.what == what)


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("generate", [False, True])
def test_every_step_replays_without_a_difference(
    model: str, runs: Callable[[str], Path], name: str, generate: bool
) -> None:
    """The first and the last step, with and without a checkpoint, at each update of a generation."""
    directory = runs(name)
    before = contents(directory)
    for step in range(1, STEPS + 1):
        findings = replay(make(model, directory, **RUNS[name]), step, generate=generate)
        assert not different(findings), (step, list(map(str, findings)))
        same = {finding.what for finding in findings if finding.status == "same"}
        assert same >= {"prompts", "completions", "rewards", "advantages"}
        assert ("generation" in same) == generate
        assert ("adapter" in same) == (directory / f"checkpoint-{step}").exists()
        logged = step % RUNS[name].get("logging_steps", 1) == 0
        assert ("update" in same and "other metrics" in same) == logged
    assert contents(directory) == before


def test_runs_of_several_updates_have_their_old_logprobs_compared(model: str, runs: Callable[[str], Path]) -> None:
    name = "iterations_and_minibatches"
    findings = replay(make(model, runs(name), **RUNS[name]), 2)
    assert "old log-probs" in {finding.what for finding in findings if finding.status == "same"}


def test_dynamic_sampling_was_at_work(runs: Callable[[str], Path]) -> None:
    """Else the test above would show nothing of it."""
    records = read_records(runs("dynamic_sampling") / "rollouts")
    assert any(not record.used for record in records)


def test_the_second_epoch_of_a_stream_replays(model: str, tmp_path: Path) -> None:
    make(model, tmp_path, stream=True, save_strategy="no").train()
    for step in (1, 7):
        findings = replay(make(model, tmp_path, stream=True, save_strategy="no"), step, generate=True)
        assert not different(findings) and text_of(findings, "start") == "initial_adapter"


def test_another_reward_function_shows(model: str, copied: Path) -> None:
    def rare_(completion_ids, **_):
        return [float(ids[0] % 5 == 1) for ids in completion_ids]

    rare_.__name__ = "rare"
    findings = replay(make(model, copied, reward=rare_, **RUNS["one_update"]), 5)
    assert different(findings) == ["rewards"]
    assert "of step 5: rare gave" in text_of(findings, "rewards")


def tamper(directory: Path, step: int, change: Callable) -> None:
    path = rollout_path(directory / "rollouts", step)
    records = read_records(path)
    change(records[1])
    write_records(path, records)


def other_token(record) -> None:
    ids = record.trajectory.segments[0].token_ids
    ids[0] = (ids[0] + 1) % 40


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda record: record.rewards.update(rare=7.0), ["rewards", "advantages"]),
        (lambda record: setattr(record, "advantage", 3.0), ["advantages"]),
        (lambda record: setattr(record, "prompt_index", record.prompt_index + 1), ["prompts"]),
        (lambda record: setattr(record, "completion", "what?"), ["completions"]),
        (lambda record: setattr(record.trajectory, "seed", 1), ["prompts"]),
        (other_token, ["completions"]),
    ],
)
def test_tampered_rollouts_show(model: str, copied: Path, change: Callable, found: list[str]) -> None:
    tamper(copied, 5, change)
    findings = replay(make(model, copied, **RUNS["one_update"]), 5)
    assert different(findings)[: len(found)] == found
    assert "of step 5" in text_of(findings, found[0])


def test_log_probs_that_were_changed_show(model: str, copied: Path) -> None:
    """Within what the parity guard lets pass, the logged values tell; over it, the guard does."""

    def add(gap: float) -> Callable:
        def change(record) -> None:
            record.trajectory.segments[0].logprobs[0] += gap

        return change

    records = {step: read_records(rollout_path(copied / "rollouts", step)) for step in range(1, STEPS + 1)}
    step = next(step for step, group in records.items() if group[1].advantage)  # others are not forwarded
    tamper(copied, step, add(1e-4))
    findings = replay(make(model, copied, **RUNS["one_update"]), step)
    assert "log-probs" in different(findings)
    tamper(copied, step, add(3.0))
    findings = replay(make(model, copied, **RUNS["one_update"]), step)
    assert "parity" in text_of(findings, "update") or "engine" in text_of(findings, "update")


def test_rollouts_of_an_earlier_step_that_were_changed_show_in_what_follows(model: str, copied: Path) -> None:
    tamper(copied, 4, lambda record: setattr(record, "advantage", 2.0))
    findings = replay(make(model, copied, **RUNS["one_update"]), 5)
    assert set(different(findings)) & {"log-probs", "update", "other metrics"}
    assert not set(different(findings)) & {"prompts", "rewards", "advantages"}


def test_a_changed_adapter_shows(model: str, copied: Path) -> None:
    path = copied / "checkpoint-6" / "adapter_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[3]
    tensors[name][0, 0] += 1e-3
    save_file(tensors, path, {"format": "pt"})
    findings = replay(make(model, copied, **RUNS["one_update"]), 6)
    assert different(findings) == ["checkpoint-6", "adapter"]
    assert "was changed after it was written" in text_of(findings, "checkpoint-6")
    assert name in text_of(findings, "adapter") and "0.001" in text_of(findings, "adapter")

    # A tolerance lets it pass where it is small against the value; the hash tells all the same.
    assert different(replay(make(model, copied, **RUNS["one_update"]), 6, tolerance=1e9)) == ["checkpoint-6"]
    # The step after starts from an older checkpoint, and so ends as the run did.
    findings = replay(make(model, copied, **RUNS["one_update"]), 7)
    assert different(findings) == ["checkpoint-6"] and text_of(findings, "start") == "checkpoint-3"


def test_errors_say_what_is_missing(model: str, copied: Path, tmp_path: Path) -> None:
    def fails(step: int, message: str, directory: Path = copied) -> None:
        with pytest.raises(ValueError, match=message):
            replay(make(model, directory, **RUNS["one_update"]), step)

    fails(1, "there is no run in .*nowhere", tmp_path / "nowhere")
    fails(0, "step 0: the run in .* has steps 1 to 7")
    fails(8, "step 8: the run in .* has steps 1 to 7")
    rollout_path(copied / "rollouts", 5).unlink()
    fails(5, "rollouts of step 5 are missing: .*step_00000005.parquet; the newest are step_00000007.parquet")
    fails(6, "rollouts of step 5 are missing")  # on the way from checkpoint-3
    shutil.rmtree(copied / checkpoint.INITIAL)
    fails(2, "nothing to start from: .* no whole checkpoint of a step before 2, and no initial_adapter/")


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a project with a run of `colora train` in `out`."""
    directory = tmp_path_factory.mktemp("project")
    (directory / "reward.py").write_text(
        "def digits(completions, **_):\n    return [0.1 * len(c) for c in completions]\n"
    )
    rows = [{"prompt": f"{n}+1="} for n in range(6)]
    (directory / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    options = {
        "model": model, "dataset": "data.jsonl", "reward_funcs": ["reward.py:digits"], "output_dir": "out",
        "device": "cpu", "num_generations": 2, "per_device_train_batch_size": 4, "max_completion_length": 8,
        "max_steps": 3, "save_steps": 2, "learning_rate": 1e-3, "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    (directory / "run.yaml").write_text(yaml.safe_dump(options))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        assert main(["train", "run.yaml"]) == 0
    return directory


def test_the_command_needs_nothing_but_the_directory(trained: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """From another working directory, after the run was moved."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "out", tmp_path / "moved")
    before = contents(tmp_path / "moved")
    capsys.readouterr()
    assert main(["replay", "moved", "--step", "3", "--generate"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("step 3 of moved\n  start           as recorded: checkpoint-2\n")
    assert "rewards         as recorded: scored again, 4 completions\n" in printed
    assert "generation      as recorded: sampled again, 4 completions\n" in printed
    assert "adapter         as recorded: " in printed and printed.endswith("no differences\n")
    assert contents(tmp_path / "moved") == before


def test_the_command_exits_1_with_differences(trained: Path, monkeypatch, capsys) -> None:
    reward = (trained / "reward.py").read_text()
    (trained / "reward.py").write_text(reward.replace("0.1", "0.2"))
    try:
        assert main(["replay", str(trained / "out"), "--step", "1"]) == 1
        assert "rewards         DIFFERENT: prompt" in (printed := capsys.readouterr().out)
        assert printed.endswith("1 difference\n")
        assert main(["replay", str(trained / "out"), "--step", "1", "--no-rewards"]) == 0
        assert "rewards         not compared: it was asked" in capsys.readouterr().out
        (trained / "reward.py").unlink()
        assert main(["replay", str(trained / "out"), "--step", "1"]) == 0
        assert "rewards         not compared: reward function" in (printed := capsys.readouterr().out)
        assert "there is no file" in printed
    finally:
        (trained / "reward.py").write_text(reward)


def test_the_command_says_what_it_cannot_replay(
    runs: Callable[[str], Path], trained: Path, tmp_path: Path, capsys
) -> None:
    for arguments, message in [
        ([str(tmp_path), "--step", "1"], "there is no run in"),
        ([str(runs("one_update")), "--step", "1"], "was started from Python"),
        ([str(trained / "out"), "--step", "9"], "has steps 1 to 3"),
    ]:
        assert main(["replay", *arguments]) == 2
        assert message in capsys.readouterr().err
