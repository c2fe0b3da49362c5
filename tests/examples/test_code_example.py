"""examples/code: tasks with hidden tests, their verifier in the sandbox, and a run on a model made on the spot."""

import json
import random
import shutil
from pathlib import Path
from types import ModuleType

import pytest
from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardRunner
from colora.rewards.sandbox import layers
from colora.rollout.records import read_records

from .test_examples import load, message

MISSING = {name: reason for name, reason in layers().items() if reason}
needs_sandbox = pytest.mark.skipif(bool(MISSING), reason=f"the sandbox lacks layers here: {MISSING}")


@pytest.fixture
def tasks(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(root / "examples" / "code" / "tasks.py", monkeypatch)


@pytest.fixture
def verifier(root: Path) -> str:
    return str(root / "examples" / "code" / "verifier.py")


def fenced(program: str) -> list[dict[str, str]]:
    return message(f"It is done step by step.\n```python\n{program}\n```")


def test_the_same_seed_makes_the_same_tasks_and_none_is_held_out_and_trained_on(tasks: ModuleType) -> None:
    splits = tasks.problems(60, 20, seed=3)
    assert splits["train"].to_list() == tasks.problems(60, 20, seed=3)["train"].to_list()
    assert splits["train"].to_list() != tasks.problems(60, 20, seed=4)["train"].to_list()
    asked = {
        name: {row["prompt"][0]["content"].split("For example")[0] for row in splits[name]}
        for name in ("train", "test")
    }
    assert len(asked["train"]) == 60 and len(asked["test"]) == 20 and not asked["train"] & asked["test"]
    with pytest.raises(ValueError, match=r"found \d+ different tasks of 1 to 1 operations, 400 are wanted"):
        tasks.problems(400, 0, least=1, most=1)
    with pytest.raises(ValueError, match="1 <= least <= most <= 5, got 3 and 2"):
        tasks.problems(10, 0, least=3, most=2)


def test_tests_are_hidden_and_tell_shortened_solutions_apart(tasks: ModuleType) -> None:
    rng = random.Random(0)
    for task in (tasks.make_task(rng, 1 + number % 5) for number in range(50)):
        (test,) = task.hidden_tests()
        calls, results = ([json.loads(line) for line in test[part].splitlines()] for part in ("input", "output"))
        assert len(calls) == len(results) == tasks.TESTS and [[]] in calls
        assert len({json.dumps(result) for result in results}) >= tasks.LEAST_ANSWERS
        shown = repr(task.inputs[0])
        assert shown in task.statement() and "{" not in task.statement()
        for left_out in range(len(task.chain) - 1):
            shorter = task.chain[:left_out] + task.chain[left_out + 1 :]
            assert [task.result(items, shorter) for (items,) in calls] != results


def test_an_operation_is_what_its_phrase_says(tasks: ModuleType) -> None:
    """By hand, for those that are easily off by one."""
    table = {operation.function.__name__: operation.function
             for kind in tasks.OPERATIONS for operation in (*tasks.OPERATIONS[kind], *tasks.RESULTS[kind])}  # fmt: skip
    assert table["rotate"]([1, 2, 3, 4], 3) == [4, 1, 2, 3] and table["rotate"]([1, 2], 3) == [2, 1]
    assert table["take_every"]([1, 2, 3, 4, 5], 2) == [1, 3, 5]
    assert table["swap_pairs"]([1, 2, 3, 4, 5]) == [2, 1, 4, 3, 5]
    assert table["running_sums"]([3, -1, 4]) == [3, 2, 6] and table["differences"]([3, -1, 4]) == [-4, 5]
    assert table["digit_sums"]([-30, 59]) == [3, 14] and table["remainders"]([-1, 7], 4) == [3, 3]
    assert table["weighted"]([5, 6, 7]) == 20 and table["by_length"](["we", "up", "a"]) == ["a", "up", "we"]
    assert table["longest"](["we", "up"]) == "we" and table["keep_first"]([2, 1, 2]) == [2, 1]
    empty = [function([], *([2] if function.__code__.co_argcount == 2 else [])) for function in table.values()]
    assert all(value in ([], 0, "") for value in empty)


@needs_sandbox
def test_right_solutions_of_every_operation_score_one_and_others_zero(tasks: ModuleType, verifier: str) -> None:
    rng = random.Random(5)
    wanted = {operation for kind in tasks.OPERATIONS for operation in (*tasks.OPERATIONS[kind], *tasks.RESULTS[kind])}
    chosen = []
    while wanted:
        task = tasks.make_task(rng, 3)
        if wanted & {operation for operation, _ in task.chain}:
            chosen.append(task)
            wanted -= {operation for operation, _ in task.chain}
    tests = [task.hidden_tests() for task in chosen]
    passes = load_reward(f"{verifier}:passes_tests")
    assert passes([fenced(task.solution()) for task in chosen], tests=tests) == [1.0] * len(chosen)
    wrong = [fenced("def solve(items):\n    return items"), message("no program"), fenced("def solve(items): retur")]
    wrong += [fenced(chosen[1].solution()), fenced(chosen[0].solution() + "\nprint('done')")]
    assert passes(wrong, tests=[tests[0]] * 5) == [0.0] * 5


CHEATS = {
    "an object that equals everything": "class Any(int):\n    __eq__ = lambda *_: True\nsolve = lambda items: Any(1)",
    "leaving early": "import os\nos._exit(0)",
    "another json": "import json\njson.dumps = lambda value: '*'\nsolve = lambda items: 0",
}
# Each is followed by a right solution: an attack that is not stopped scores 1.
ATTACKS = {
    "the parent's memory": "import os\nopen(f'/proc/{os.getppid()}/mem', 'rb').close()",
    "killing the parent": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)",
    "network": "import socket\nsocket.socket().close()",
    "another process": "import subprocess, sys\nsubprocess.run([sys.executable, '--version'])",
    "writing outside": "open('OUTSIDE', 'w').write('x')",
    "reading outside": "open('OUTSIDE').read()",
    "memory": "block = bytearray(2**31)",
}


@needs_sandbox
def test_attacks_are_contained_and_score_zero(tasks: ModuleType, verifier: str, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("untouched")
    task = tasks.make_task(random.Random(1), 2)
    attacks = {name: f"{attack}\n\n{task.solution()}" for name, attack in ATTACKS.items()}
    programs = {"none": task.solution()} | CHEATS | attacks
    completions = [fenced(program.replace("OUTSIDE", str(outside))) for program in programs.values()]
    scores = load_reward(f"{verifier}:passes_tests")(completions, tests=[task.hidden_tests()] * len(programs))
    assert dict(zip(programs, scores, strict=True)) == dict.fromkeys(programs, 0.0) | {"none": 1.0}
    assert outside.read_text() == "untouched"


@needs_sandbox
def test_in_workers_an_endless_loop_is_cut_off_and_counted(tasks: ModuleType, verifier: str) -> None:
    task = tasks.make_task(random.Random(1), 2)
    texts = [fenced(task.solution()), fenced("while True:\n    pass"), fenced("def solve(items):\n    return None")]
    functions = [load_reward(f"{verifier}:{name}") for name in ("passes_tests", "one_block")]
    runner = RewardRunner(functions, workers=PoolLimits(workers=2, timeout=60))
    try:
        columns = {"tests": [task.hidden_tests()] * 3}
        scores = runner.score([[]] * 3, texts, [[0]] * 3, columns)
    finally:
        runner.close()
    assert scores.values[:, 0].tolist() == [1.0, 0.0, 0.0] and not scores.failures
    assert scores.values[:, 1].tolist() == [1.0, 1.0, 1.0]
    assert sum(value for name, value in scores.metrics.items() if "limit_" in name) > 0


def test_form(verifier: str) -> None:
    form = load_reward(f"{verifier}:one_block")
    block = "```python\ndef solve(items):\n    return items\n```"
    texts = {f"It is.\n{block}": 1, f"It is.\n{block}\n": 1, block: 0, f"It is.\n{block}\nDone.": 0,
             f"It is.\n{block}\n{block}": 0, "It is.": 0, "It is.\n```python\ndef": 0}  # fmt: skip
    assert form([message(text) for text in texts]) == list(texts.values())


@pytest.fixture
def train(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    shutil.copytree(root / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".cache", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    return load(tmp_path / "examples" / "code" / "train.py", monkeypatch)


@pytest.mark.slow
@needs_sandbox
def test_it_trains_on_a_cpu_as_its_readme_says(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = load(Path("examples/tiny_chat_model.py"), monkeypatch)
    maker.main("runs/tiny-model", "examples/code/tiny_says.txt")
    small = ["--size=12", "--held-out=2", "--max_steps=2", "--disable_tqdm"]
    assert train.main(["--config=examples/code/tiny.yaml", *small]) == 0
    records = read_records("runs/code-tiny/rollouts")
    assert [record.step for record in records] == [1] * 8 + [2] * 8
    assert {record.rewards["passes_tests"] for record in records} <= {0.0, 1.0}  # none is None: all were run
    assert {record.rewards["RegexFormat"] for record in records} == {0.0, 1.0}
    assert any(record.advantage for record in records)
    assert Path("runs/code-tiny/adapter_model.safetensors").is_file()


def test_the_configuration_for_a_gpu_is_a_valid_one(train: ModuleType, chat_model: str, capsys) -> None:
    short = [f"--model={chat_model}", "--size=20", "--held-out=2", "--device=cpu", "--dry-run"]
    assert train.main(short) == 0
    assert "reward_workers: 4" in capsys.readouterr().out
    assert train.main([*short, "--least=4", "--most=3"]) == 2
    assert "got 4 and 3" in capsys.readouterr().err
