"""The examples run as they stand, on tiny models and on problems in the format of the real ones."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import pytest
import torch
from colora.rl.cli import main as colora
from colora.rollout.records import read_records

SHORT = [
    "--device=cpu", "--max_steps=2", "--max_completion_length=6", "--num_generations=2",
    "--per_device_train_batch_size=4", "--eval_steps=2", "--save_strategy=no", "--disable_tqdm",
]  # fmt: skip


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module in `path`, which finds its neighbours as a script does."""
    monkeypatch.syspath_prepend(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"example_{path.parent.name}_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def message(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# ---- gsm8k ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def gsm8k(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example with problems of one's own beside it, in the current directory's `examples/`."""
    folder = tmp_path / "examples" / "gsm8k"
    shutil.copytree(root / "examples" / "gsm8k", folder)
    rows = [
        {"question": f"Ann has {n} eggs and buys {n}. How many?", "answer": f"{n}+{n} = {2 * n}\n#### {2 * n:,}"}
        for n in (1, 2, 3, 4, 600)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:2])))
    monkeypatch.chdir(tmp_path)
    return folder


def test_gsm8k_trains_from_its_configuration(gsm8k: Path, chat_model: str) -> None:
    assert colora(["train", str(gsm8k / "config.yaml"), f"--model={chat_model}", *SHORT]) == 0
    records = read_records("runs/gsm8k/rollouts")
    assert [record.step for record in records] == [1] * 4 + [2] * 4
    assert records[0].rewards.keys() == {"exact_number", "answer_format"}
    assert records[0].prompt[0]["content"].startswith("Ann has ") and "####" in records[0].prompt[0]["content"]
    assert Path("runs/gsm8k/adapter_model.safetensors").is_file()


def test_gsm8k_says_what_to_do_without_a_hub(gsm8k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load(gsm8k / "gsm8k.py", monkeypatch)
    assert example.dataset()["answer"][:] == ["2", "4", "6", "8", "1,200"]

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    (gsm8k / "train.jsonl").unlink()
    monkeypatch.setattr(example, "load_dataset", offline)
    with pytest.raises(ValueError, match="no network.*put train.jsonl"):
        example.dataset()


def test_gsm8k_rewards(gsm8k: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = load(gsm8k / "gsm8k.py", monkeypatch)
    numbers = {
        "so #### 42": 42, "#### 41, no:\n#### $1,200.50": Decimal("1200.5"), "#### -3.": -3, "#### 42 eggs": 42,
        "42": None, "####": None, "#### many 42": None, "#### 42/7": None, "#### 1,000/2": None, "#### 2+2": None,
    }  # fmt: skip
    assert {text: example.final_number(text) for text in numbers} == numbers
    answers = ["42", "1,200", "1,200", "42"]
    texts = ["#### 42", "#### 1200.0", "#### 1200.5", "42"]
    assert example.exact_number([message(text) for text in texts], answers) == [1, 1, 0, 0]
    forms = {"a\n#### 42": 1, "#### $1,200\n": 1, "so #### 42": 0, "#### 42 eggs": 0, "#### 1\n#### 2": 0, "42": 0}
    assert example.answer_format([message(text) for text in forms]) == list(forms.values())


# ---- reasoning-gym ---------------------------------------------------------------------------------------------------


@pytest.fixture
def gym(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("reasoning_gym")
    monkeypatch.chdir(tmp_path)
    return load(root / "examples" / "reasoning_gym" / "train.py", monkeypatch)


@pytest.mark.parametrize("task", ["chain_sum", "leg_counting"])
def test_reasoning_gym_trains_on_a_task(gym: ModuleType, chat_model: str, task: str) -> None:
    arguments = [f"--task={task}", "--size=6", "--held-out=2", f"--model={chat_model}", *SHORT]
    assert gym.main(arguments) == 0
    records = read_records(f"runs/reasoning_gym/{task}/rollouts")
    assert len(records) == 8 and records[0].rewards.keys() == {"reasoning_gym_reward"}
    assert "<answer>" in records[0].prompt[0]["content"]


def test_reasoning_gym_holds_problems_out_and_passes_options_on(gym: ModuleType) -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}  # 162 problems at most
    splits = gym.problems("chain_sum", size=80, held_out=40, **options)
    questions = {name: [row["prompt"][0]["content"].partition("\n")[0] for row in splits[name]] for name in splits}
    assert len(questions["train"]) == 80 and 0 < len(questions["test"]) < 40
    assert not set(questions["train"]) & set(questions["test"])
    assert all(len(re.findall(r"\d", question)) == 2 for question in questions["train"] + questions["test"])
    with pytest.raises(ValueError, match="no problems beyond the 5000"):
        gym.problems("chain_sum", size=5000, held_out=10, **options)


def test_reasoning_gym_names_a_wrong_task(gym: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert gym.main(["--task", "chain_sums"]) == 2
    assert "no task 'chain_sums'. Did you mean ['chain_sum'" in capsys.readouterr().err


# ---- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.fixture
def arithmetic(root: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "arithmetic"
    shutil.copytree(root / "examples" / "arithmetic", folder, ignore=shutil.ignore_patterns(".cache"))
    return folder


def test_arithmetic_pieces(arithmetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(arithmetic / "model.py", monkeypatch)
    correct = load(arithmetic / "reward.py", monkeypatch).correct
    learn, held_out = model.problems(seed=1)
    assert len({*learn, *held_out}) == (model.LARGEST + 1) ** 2 and len(held_out) == model.HELD_OUT
    assert model.problems(seed=1)[1] == held_out != model.problems(seed=2)[1]
    problem = (17, 14)
    assert (model.question(problem), model.answer(problem), model.careless_answer(problem)) == ("17+14=", "031", "021")
    assert model.careless_answer((5, 99)) == "094"
    assert correct(["31", " 31", "21", ""], ["31"] * 4) == [1, 1, 0, 0]

    tokenizer = model.make_tokenizer()
    ids, labels = model.encode([problem, (5, 9)], ["031", "014"], tokenizer)
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == ["17+14=031", "05+09=014"]
    assert tokenizer.decode(labels[1][labels[1] != -100]) == "014<eos>"


ACCURACY = re.compile(r"^Held-out accuracy: ([\d.]+)% before, ([\d.]+)% after$", re.MULTILINE)


def run_arithmetic(arithmetic: Path, *options: str) -> str:
    """What the demo prints; it writes to `out` beside its folder."""
    command = [sys.executable, str(arithmetic / "run.py"), "--output", "out", "--engine", "transformers", *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=arithmetic.parent)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_arithmetic_runs(arithmetic: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(arithmetic / "model.py", monkeypatch)
    warm, tokenizer = arithmetic / ".cache" / "seed-0", model.make_tokenizer()
    torch.manual_seed(0)
    model.make_model(tokenizer, hidden=32, layers=1).save_pretrained(warm)
    tokenizer.save_pretrained(warm)
    output = run_arithmetic(arithmetic, "--steps", "3")
    assert ACCURACY.search(output)
    assert output.count("before: ") > 1
    picture = arithmetic.parent / "out" / "seed-0" / "reward_curve.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (picture.parent / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_arithmetic_learns_on_an_nf4_base(arithmetic: Path) -> None:
    """With the demo's own model: within 40 of its 280 steps most of the sums come out right."""
    found = ACCURACY.search(run_arithmetic(arithmetic, "--base", "nf4", "--steps", "40"))
    assert found is not None
    before, after = map(float, found.groups())
    assert before < 50 and after > 70
