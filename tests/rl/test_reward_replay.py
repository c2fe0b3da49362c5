"""`colora rewards replay`: what another reward function would have changed in a run, known by construction."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from colora.rl.cli import main
from colora.rl.reward_replay_report import correlations
from colora.rollout.records import read_records
from datasets import load_dataset

from ..tiny_runs import tiny_checkpoint

FUNCTIONS = """
def digits(completions, answer, **columns):
    return [(sum(map(str.isdigit, text)) + wanted) / 10 for text, wanted in zip(completions, answer)]

def short(completion_ids, **columns):
    return [-len(ids) / 10 for ids in completion_ids]

def opposite(completions, answer, **columns):
    return [-reward for reward in digits(completions, answer)]

def step(completions, trainer_state, **columns):
    return [float(trainer_state.global_step)] * len(completions)

def some(completions, answer, **columns):
    if any("7" in text for text in completions):
        raise ValueError("no sevens")
    return digits(completions, answer)
"""
RUN = {
    "dataset": "data.jsonl", "reward_funcs": ["mine.py:digits", "mine.py:short"], "reward_weights": [1.0, 0.5],
    "output_dir": "run", "device": "cpu", "num_generations": 4, "per_device_train_batch_size": 8, "max_steps": 5,
    "max_completion_length": 12, "overlong_buffer": 6, "dynamic_sampling": True, "report_to": "none",
    "save_strategy": "no", "detectors": False, "disable_tqdm": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of `colora train`."""
    folder = tmp_path_factory.mktemp("folder")
    tiny_checkpoint(folder / "model")
    (folder / "mine.py").write_text(FUNCTIONS)
    rows = [{"prompt": f"{n}+1=", "answer": n % 3} for n in range(9)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "run.yaml").write_text(yaml.safe_dump({"model": str(folder / "model")} | RUN))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "run.yaml"]) == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current directory; run.yaml names the first one's dataset."""
    shutil.copytree(made, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def replay(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert main(["rewards", "replay", "run", "--workers", "0", *arguments]) == code
    printed = capsys.readouterr()
    return printed.out if code < 2 else printed.err


def test_the_functions_of_the_run_change_nothing(folder: Path, capsys) -> None:
    before = {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}
    arguments = ["--reward", "mine.py:digits", "--reward", "mine.py:short", "--weights", "1", "0.5"]
    out = replay(capsys, *arguments)
    records = read_records("run/rollouts")
    assert any(not record.used for record in records) or len(records) == 40
    assert f"steps 1 to 5: {len(records)} completions in {len(records) // 4} groups" in out and "note:" not in out
    assert "run: digits, short in place of digits, short" in out
    assert "rewards     Pearson 1.000, Spearman 1.000" in out
    assert "advantages  0 of 40 (0.0%) change their sign, 0 become 0, 0 are 0 no more" in out
    assert ", 0 lose it, 0 gain it, " in out
    assert before == {path: path.stat().st_mtime_ns for path in (folder / "run").rglob("*")}


def test_the_opposite_flips_what_it_decides(folder: Path, capsys) -> None:
    """In the place of `digits`, which the others of the total outweigh at times; and of it alone."""
    out = replay(capsys, "--reward", "mine.py:opposite", "--against", "digits", "--output", "out.parquet")
    assert "opposite in place of digits" in out and "rewards     Pearson -1.000, Spearman -1.000" in out
    rows = load_dataset("parquet", data_files="out.parquet", split="train").to_pandas()
    used = rows[rows["used"]]
    flipped = int((used["old_advantage"] * used["new_advantage"] < 0).sum())
    assert f"advantages  {flipped} of 40 " in out and 0 < flipped <= 40
    records = read_records("run/rollouts")
    for record, row in zip(records, rows.to_dict("records"), strict=True):
        assert row["old_reward"] == record.rewards["digits"] and row["new_reward"] == -record.rewards["digits"]
        assert not record.used or row["old_advantage"] == pytest.approx(record.advantage, abs=1e-6)
    first = used[used["step"] == 1].iloc[:4]  # by hand, from the recorded parts of the group
    group = [r for r in records if r.step == 1 and r.used][:4]
    totals = np.array([-r.rewards["digits"] + 0.5 * r.rewards["short"] + r.rewards["overlong"] for r in group])
    expected = (totals - totals.mean()) / (totals.std(ddof=1) + 1e-4)
    assert first["new_advantage"].to_numpy() == pytest.approx(expected, abs=1e-4)


def test_the_largest_disagreements_are_shown(folder: Path, capsys) -> None:
    arguments = ["--reward", "mine.py:opposite", "--output", "out.jsonl"]
    out = replay(capsys, *arguments, "--examples", "2")
    examples = re.findall(
        r"^step (\d+), prompt (\d+), sample (\d): reward (\S+) -> (\S+), advantage", out, re.MULTILINE
    )
    assert len(examples) == 2
    rows = load_dataset("json", data_files="out.jsonl", split="train").to_pandas()
    used = rows[rows["used"]]
    gap = (
        used["old_advantage"] / used["old_advantage"].std() - used["new_advantage"] / used["new_advantage"].std()
    ).abs()
    largest = used.loc[gap.idxmax()]
    assert tuple(map(int, examples[0][:3])) == (largest["step"], largest["prompt_index"], largest["sample"])
    assert f"  prompt:     {largest['prompt']}\n  completion: " in out
    assert "step 1, prompt" not in replay(capsys, *arguments, "--examples", "0")


def test_single_steps_and_the_step_that_functions_see(folder: Path, capsys) -> None:
    out = replay(capsys, "--reward", "mine.py:step", "--against", "digits", "--steps", "2:3")
    assert "steps 2 to 3" in out and "no correlation" not in out
    table = [line.split() for line in out.splitlines() if re.match(r" +[23] ", line)]
    assert [(row[0], row[3]) for row in table] == [("2", "1"), ("3", "2")]  # steps that were done before
    assert "step 4: " in replay(capsys, "--reward", "mine.py:step", "--steps", "4")
    assert "has rollouts of steps 1 to 5, none of those asked for" in replay(
        capsys, "--reward", "mine.py:step", "--steps", "9:", code=2
    )


def test_failures_are_counted_and_scored_as_none(folder: Path, capsys) -> None:
    sevens = sum("7" in record.completion for record in read_records("run/rollouts"))
    out = replay(capsys, "--reward", "mine.py:some", "--against", "digits", code=1 if sevens else 0)
    found = re.search(r"failures    (\d+) completions are not scored; the first: error: it raised ValueError", out)
    assert sevens > 0 and found and int(found[1]) == sevens
    assert f"{sevens} completions are scored by only one of the two" in out


def test_columns_come_from_data_that_is_given_in_another_order(folder: Path, capsys) -> None:
    rows = Path("data.jsonl").read_text().splitlines()[::-1]
    Path("other.jsonl").write_text("\n".join(rows))
    arguments = ["--reward", "mine.py:digits", "--against", "digits"]
    assert "Pearson 1.000" in replay(capsys, *arguments, "--data", "other.jsonl")
    Path("other.jsonl").write_text("\n".join(rows[:2]))
    assert "no row of other.jsonl has the prompt of step" in replay(capsys, *arguments, "--data", "other.jsonl", code=2)


def test_a_run_from_python_or_whose_dataset_is_gone(folder: Path, capsys) -> None:
    arguments = ["--reward", "mine.py:digits", "--against", "digits"]
    values = yaml.safe_load(Path("run/run.yaml").read_text())
    Path("run/run.yaml").write_text(yaml.safe_dump(values | {"dataset": "/gone.jsonl"}))
    err = replay(capsys, *arguments, code=2)
    assert "'digits' requires ['answer']" in err and "--data names another: dataset '/gone.jsonl'" in err
    Path("run/run.yaml").unlink()  # grpo_config.json, which is beside the adapter, has the options
    assert "the run does not name; --data names it" in replay(capsys, *arguments, code=2)
    assert "note:" not in replay(capsys, *arguments, "--data", "data.jsonl")
    Path("run/grpo_config.json").unlink()
    out = replay(capsys, *arguments, "--data", "data.jsonl")
    assert "note: run has neither run.yaml nor grpo_config.json" in out
    assert "note: the recorded advantages differ by up to" in out  # the weights were not 1 each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--reward", "mine.py:digits", "--against", "long"],
            "--against long: the run recorded the rewards digits, sh",
        ),
        (["--reward", "mine.py:digits", "--reward", "mine.py:short", "--against", "short"], "short: give one --reward"),
        (["--reward", "mine.py:digits", "--output", "o.txt"], "files of type .txt are not written"),
    ],
)
def test_errors_say_what_to_do(folder: Path, capsys, arguments: list[str], message: str) -> None:
    assert message in replay(capsys, *arguments, code=2)
    assert main(["rewards", "replay", "nowhere", "--reward", "mine.py:step"]) == 2
    assert "there are no rollouts of a run in nowhere" in capsys.readouterr().err


def test_correlations_are_those_of_pandas() -> None:
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, 4, 50).astype(float), rng.normal(size=50)
    new += old
    old[3] = new[7] = np.nan
    both = pd.DataFrame({"old": old, "new": new}).dropna()
    ranks = both.rank()
    expected = both["old"].corr(both["new"]), ranks["old"].corr(ranks["new"])
    assert correlations(old, new) == pytest.approx(expected)
    assert correlations(np.ones(3), np.arange(3.0)) is None


def test_rewards_without_a_weight_of_their_own_are_those_of_environments(folder: Path, capsys) -> None:
    path = Path("run/run.yaml")
    values = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(values | {"reward_weights": [1.0]}))
    assert "recorded advantages" in replay(capsys, "--reward", "mine.py:short", "--against", "short")
    path.write_text(yaml.safe_dump(values | {"reward_weights": [1.0, 1.0, 1.0]}))
    assert "reward_weights has 3 entries" in replay(capsys, "--reward", "mine.py:short", code=2)
