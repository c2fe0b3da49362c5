"""What docs/rewards.md shows is run as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from colora.rewards.loading import load_reward
from colora.rl.cli import main as colora
from colora.rl.detector_limits import DetectorLimits

MODEL = "Qwen/Qwen3-0.6B"


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs" / "rewards.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language; of none for an empty one."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [body for name, body in fenced if name == language]


def commands(text: str) -> list[list[str]]:
    """The arguments of each `colora` command, in order."""
    return [shlex.split(line)[1:] for line in "".join(blocks(text, "")).splitlines() if line.startswith("colora ")]


def timeless(text: str) -> list[str]:
    """What a report says but for how long it took."""
    lines = [line.partition("; scored in ")[0] for line in text.splitlines()]
    return [line for line in lines if not line.startswith("  time ")]


def test_the_page_from_its_top_to_a_trained_model(
    page: str, tmp_path: Path, chat_model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first_try, tries, functions, data, exact, _ = blocks(page, "python")
    (run,), (shown,) = blocks(page, "yaml"), blocks(page, "text")
    run_first, run_again, dry_run, train, replay = commands(page)
    monkeypatch.chdir(tmp_path)
    Path("sums_rewards.py").write_text(first_try)
    subprocess.run([sys.executable, "-c", tries], check=True, timeout=120)
    assert colora(run_first) == 0
    assert timeless(capsys.readouterr().out) == timeless(shown)

    Path("sums_rewards.py").write_text(functions)
    assert colora(run_again) == 0
    scored = [json.loads(line) for line in Path("scored.jsonl").read_text().splitlines()]
    assert [row["rewards"]["close"] for row in scored] == [1, 1, 1, 0]
    assert [row["rewards"]["XmlSections"] for row in scored] == [1, 0, 1, 0]

    subprocess.run([sys.executable, "-c", data], check=True, timeout=120)
    assert len(Path("sums.jsonl").read_text().splitlines()) == 99
    Path("sums.yaml").write_text(run.replace(MODEL, chat_model))
    short = ["--max_steps", "1", "--max_completion_length", "8", "--device", "cpu", "--report_to", "none"]
    assert colora([*dry_run, *short]) == 0
    assert colora([*train, *short]) == 0
    assert Path("runs/sums/adapter_model.safetensors").is_file()

    Path("exact.py").write_text(exact)
    capsys.readouterr()
    assert colora(replay) == 0
    assert "runs/sums: exact in place of close\nstep 1: 8 completions in 1 groups" in capsys.readouterr().out


def test_close_does_what_it_says(page: str, tmp_path: Path) -> None:
    (tmp_path / "sums_rewards.py").write_text(blocks(page, "python")[2])
    close = load_reward(f"{tmp_path}/sums_rewards.py:close")
    texts = [[{"role": "assistant", "content": text}] for text in ("It is 8.", "9", "?", "8")]
    logged: dict[str, list] = {}
    assert close(texts, ["8", "8", "8", None], logged.__setitem__) == [1.0, 0.5, 0.0, None]
    assert logged == {"found": ["8", "9", "", "8"]}


def test_the_detectors_and_their_limits_are_those_of_the_code(page: str, root: Path) -> None:
    section = page.partition("## Detectors")[2].partition("\n## ")[0]
    limits = {name: float(value) for name, value in re.findall(r"`(\w+)`(?: | \()(\d[\d.]*)\)?", section)}
    assert limits == {name: float(value) for name, value in vars(DetectorLimits()).items()}
    code = (root / "rl" / "detectors.py").read_text()
    for name in re.findall(r"^\| `\w*detectors/(\w+)`", section, re.MULTILINE):
        assert f'"{name}"' in code or f"detectors/{name}" in code, name


def test_the_ready_ones_exist_under_their_names(page: str) -> None:
    names = re.findall(r"^\| `(\w+:\w+)` \|", page, re.MULTILINE)
    assert len(names) == 8
    for name in names:
        assert callable(load_reward(f"colora.rewards.{name}"))
    (run,) = blocks(page, "yaml")
    assert len(yaml.safe_load(run)["reward_weights"]) == len(yaml.safe_load(run)["reward_funcs"])


def test_those_with_arguments_do_what_the_page_says(page: str, tmp_path: Path) -> None:
    pytest.importorskip("httpx")
    pytest.importorskip("jsonschema")
    path = tmp_path / "ready.py"
    path.write_text(blocks(page, "python")[-1])

    def rewards(name: str, completion: str, tokens: int = 1) -> float:
        return load_reward(f"{path}:{name}")(completions=[completion], completion_ids=[[0] * tokens])[0]

    assert rewards("boxed", "So \\boxed{4}.") == 1.0 and rewards("boxed", "So 4.") == 0.0
    assert rewards("steps", "a</plan><code>b</code>") == 1.0
    assert rewards("brief", "", tokens=3072) == 0.0 and rewards("brief", "", tokens=4096) == -1.0
    assert rewards("loops", "", tokens=21) == -0.5
    assert rewards("person", json.dumps({"name": "Ada"})) == 1.0 and rewards("person", "{}") == 0.0
    assert load_reward(f"{path}:helpful").url == "http://localhost:8000/v1/chat/completions"
