"""`colora rewards run`: what it says of a function, of every kind of file, and of what is wrong with either."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from colora.rewards.runner import RewardFailure, RewardScores
from colora.rl.cli import main
from colora.rl.reward_lab_report import FunctionReport, describe_run
from datasets import Dataset, load_dataset

from ..tiny_runs import tiny_tokenizer

FUNCTIONS = '''
import os, time

def close(completions, answer, log_extra, **columns):
    """1 for the right number, less the further off; some completions make it fail."""
    log_extra("digits", [sum(map(str.isdigit, text)) for text in completions])
    rewards = []
    for text, wanted in zip(completions, answer):
        if text == "hang":
            time.sleep(60)
        if text == "crash":
            os._exit(3)
        rewards.append(None if text == "skip" else 1 / (1 + abs(int(text) - wanted)))
    return rewards

def even(completions, **columns):
    return [float(text[-1] in "02468") for text in completions]

def length(completion_ids, **columns):
    return [len(ids) for ids in completion_ids]

def content(completions, prompts, **columns):
    return [float(text[-1]["content"] == prompt[-1]["content"]) for text, prompt in zip(completions, prompts)]

async def waits(completions, **columns):
    return [1.0 for _ in completions]
'''


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FUNCTIONS)
    return tmp_path


def write(rows: list[dict], name: str = "data.jsonl") -> str:
    Path(name).write_text("\n".join(map(json.dumps, rows)))
    return name


def sums() -> list[dict]:
    """Three prompts with four answers each: (0 to 3), all right, all wrong in the same way."""
    groups = {1: ["0", "1", "2", "3"], 2: ["2"] * 4, 7: ["5", "9", "5", "9"]}
    return [
        {"prompt": f"{answer} = ", "completion": text, "answer": answer}
        for answer, texts in groups.items()
        for text in texts
    ]


def lab(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["rewards", "run", *arguments])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def section(text: str, name: str) -> list[str]:
    """The lines on one function."""
    return next(part for part in text.split("\n\n") if part.startswith(f"{name}\n")).splitlines()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_values_ties_and_times_are_reported(capsys, workers: str) -> None:
    """By hand: 1/2 1 1/2 1/3, four 1, four 1/3. One pair of 6 is equal in the first group, all 6 in the others."""
    code, out, _ = lab(capsys, "--reward", "mine.py:close", "--data", write(sums()), "--workers", workers)
    assert code == 0
    assert out.startswith("data.jsonl: 12 completions, 3 groups by prompt; scored in ")
    lines = section(out, "close")
    assert lines[1] == "  scored     12 of 12, None 0, failed 0"
    assert lines[2] == "  values     min 0.3333, mean 0.6389, median 0.5, std 0.3106, max 1"
    assert [line.split("|")[0].strip() + line.split("|")[2] for line in lines[3:6]] == ["0.3333 5", "0.5 2", "1 5"]
    assert re.fullmatch(r"  time       p50 .*s, p95 .*s, max .*s a call of 4 completions; .* completions/s", lines[6])
    assert lines[7] == (
        "  ties       2 of 3 groups without a signal (66.7%): their rewards are equal; 72.2% of pairs are equal"
    )


def test_what_hangs_crashes_and_raises_is_counted_with_its_reason(capsys) -> None:
    texts = ["1", "hang", "crash", "no number", "skip"]
    rows = [{"prompt": f"{n}", "completion": text, "answer": 1} for n, text in enumerate(texts)]
    arguments = ["--reward", "mine.py:close", "--data", write(rows), "--timeout", "0.5", "--workers", "2"]
    code, out, err = lab(capsys, *arguments, "--output", "scored.jsonl")
    assert code == 1 and "failure(s)" not in err
    assert "  scored     1 of 5, None 1, failed 3" in out
    assert "failures   1 x timeout: it did not return within 0.5 s" in out and "(first: row 2)" in out
    assert "failures   1 x died: its worker process ended with exit status 3 (first: row 3)" in out
    assert "1 x error: it raised ValueError: invalid literal for int() with base 10: 'no number' (first: row 4)" in out
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [row["reward"] for row in scored] == [1.0, None, None, None, None]
    assert scored[2]["reward_failure"] == "close: its worker process ended with exit status 3"
    assert scored[0]["reward_failure"] is None is scored[4]["reward_failure"]


def test_several_functions_have_a_weighted_sum_and_the_scored_rows_are_written_in_order(capsys) -> None:
    rows = sums()[::2] + sums()[1::2]  # the completions of a prompt do not stand together
    arguments = ["--reward", "mine.py:close", "--reward", "mine.py:even", "--weights", "1", "-0.5"]
    code, out, _ = lab(capsys, *arguments, "--data", write(rows), "--output", "scored.parquet", "--workers", "0")
    assert code == 0 and section(out, "total (weighted sum)")[2].startswith("  values     min 0, mean 0.3889,")
    scored = load_dataset("parquet", data_files="scored.parquet", split="train")
    assert [row["completion"] for row in scored] == [row["completion"] for row in rows]
    for row in scored:
        close, even = 1 / (1 + abs(int(row["completion"]) - row["answer"])), float(int(row["completion"]) % 2 == 0)
        assert row["rewards"] == pytest.approx({"close": close, "even": even})
        assert row["reward"] == pytest.approx(close - 0.5 * even)
        assert row["logged/digits"] == 1


@pytest.mark.parametrize("suffix", ["json", "parquet", "csv"])
def test_other_formats_are_read(capsys, suffix: str) -> None:
    getattr(Dataset.from_list(sums()), f"to_{suffix}")(f"data.{suffix}")
    code, out, _ = lab(
        capsys, "--reward", "mine.py:close", "--data", f"data.{suffix}", "--workers", "0", "--limit", "5"
    )
    assert code == 0 and out.startswith(f"data.{suffix}: 5 completions, 2 groups by prompt")


def test_messages_and_lists_of_completions(capsys) -> None:
    def message(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows = [{"prompt": message("a"), "completions": [message("a"), message("b")]}]
    rows += [{"prompt": message("c"), "completions": [message("c")]}]
    code, out, _ = lab(capsys, "--reward", "mine.py:content", "--data", write(rows), "--workers", "0")
    assert code == 0 and "3 completions, 2 groups by prompt" in out and "mean 0.6667" in out
    assert "0 of 1 groups without a signal (0.0%)" in out


def test_groups_by_a_column_and_without_prompts(capsys) -> None:
    rows = [{"completion": str(n), "task": n % 2} for n in range(6)]
    code, out, _ = lab(
        capsys, "--reward", "mine.py:even", "--data", write(rows), "--group-by", "task", "--workers", "0"
    )
    assert code == 0 and "2 groups by task" in out and "2 of 2 groups without a signal" in out
    code, out, _ = lab(capsys, "--reward", "mine.py:even", "--data", "data.jsonl", "--workers", "0")
    assert "groups by" not in out and "ties       no group has two scored completions to compare" in out


def test_token_ids_come_from_the_file_or_a_tokenizer_or_are_missed(capsys, tmp_path: Path) -> None:
    data = write([{"prompt": "a", "completion": "abc"}, {"prompt": "a", "completion": "a"}])
    code, _, err = lab(capsys, "--reward", "mine.py:length", "--data", data)
    assert code == 2 and "'length' takes completion_ids, which data.jsonl lacks: add the column, or give --tok" in err
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code, out, _ = lab(capsys, "--reward", "mine.py:length", "--data", data, "--tokenizer", "model", "--workers", "0")
    assert code == 0 and "min 1, mean 2, median 2, std 1, max 3" in out
    data = write([{"prompt": "a", "completion": "abc", "completion_ids": [1, 2, 3, 4]}])
    code, out, _ = lab(capsys, "--reward", "mine.py:length", "--data", data, "--workers", "0")
    assert code == 0 and "max 4" in out


def test_async_functions_run_too(capsys) -> None:
    code, out, _ = lab(capsys, "--reward", "mine.py:waits", "--data", write(sums()), "--workers", "3")
    assert code == 0 and "scored     12 of 12" in out


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([{"prompt": "a", "text": "b"}], [], "has no column `completion` or `completions`, only prompt, text: rename"),
        ([{"prompt": "a", "completion": 3}], [], "row 1: a completion is a text or a list of messages, got int"),
        ([{"prompt": "a", "completions": []}], [], "has no completions: the lists in column `completions` are empty"),
        (sums(), ["--group-by", "task"], "--group-by task: data.jsonl has no such column, only prompt, comp"),
        (sums(), ["--output", "out.csv"], "--output out.csv: files of type .csv are not written"),
        (sums(), ["--output", "no/out.jsonl"], "there is no directory"),
        (sums(), ["--output", "./data.jsonl"], "--output data.jsonl: it is the file of --data, which would be lost"),
        (sums(), ["--weights", "1", "2"], "2 reward weights for 1 reward functions"),
        (sums(), ["--timeout", "0"], "positive limits"),
        ([{"prompt": "a", "completion": "b"}], [], "'close' requires ['answer'], which the dataset does not have"),
        ([{"completion": "b", "answer": 1}], ["--reward", "mine.py:content"], "'content' takes prompts, which"),
        (sums(), ["--reward", "mine.py:cloze"], "has no 'cloze'. Did you mean ['close']?"),
        (sums(), ["--data", "none.jsonl"], "dataset 'none.jsonl': there is no such file or directory"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(capsys, rows: list[dict], arguments: list[str], message: str) -> None:
    code, out, err = lab(capsys, "--reward", "mine.py:close", "--data", write(rows), *arguments)
    assert code == 2 and out == "" and message in err


@pytest.mark.parametrize(("text", "message"), [("", "it is empty"), ('{"prompt": "a"}\n{oops', "cannot be read: ")])
def test_files_that_hold_nothing_or_nonsense(capsys, text: str, message: str) -> None:
    Path("data.jsonl").write_text(text)
    code, _, err = lab(capsys, "--reward", "mine.py:close", "--data", "data.jsonl")
    assert code == 2 and f"dataset 'data.jsonl'{':' if not text else ''} {message}" in err


def test_many_values_are_binned_and_many_reasons_cut() -> None:
    values = np.arange(100.0)
    report = FunctionReport("f", values, [10] * 10, [0.001] * 9 + [2.0], [])
    text = describe_run("data", [report], 1.0)
    assert len(re.findall(r"to .* \|#+ *\| 1[23]$", text, re.MULTILINE)) == 8
    assert "max 2.00 s a call of 10 completions" in text


def test_it_starts_without_the_trainer() -> None:
    """Neither TRL nor vLLM nor PEFT is imported, which take many seconds."""
    write(sums())
    program = (
        "import sys\nfrom colora.rl.cli import main\n"
        "main(['rewards', 'run', '--reward', 'mine.py:close', '--data', 'data.jsonl', '--workers', '0'])\n"
        "print([name for name in ('trl', 'peft', 'vllm', 'accelerate') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.endswith("\n[]\n"), result.stderr


def test_a_whole_call_that_fails_counts_each_of_its_completions() -> None:
    scores = [RewardScores(torch.full((2, 1), torch.nan), seconds={"f": 0.1}) for _ in range(2)]
    scores[1].failures.append(RewardFailure("f", None, "it returned 1 rewards for 2 completions"))
    text = describe_run("data", [FunctionReport.of("f", 0, scores, [[1, 2], [3, 3]])], 1.0)
    assert "scored     0 of 4, None 2, failed 2" in text
    assert "failures   2 x error: it returned 1 rewards for 2 completions (first: row 3)" in text
