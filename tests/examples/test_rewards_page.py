"""What docs/rewards.md shows is run as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from colora.rewards.loading import load_reward
from colora.rl.cli import main as colora

MODEL = "Qwen/Qwen3-0.6B"


@pytest.fixture
def page(root: Path) -> str:
    return (root / "docs" / "rewards.md").read_text()


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_page_from_its_top_to_a_trained_model(page: str, tmp_path: Path, chat_model: str, monkeypatch) -> None:
    functions, data, _ = blocks(page, "python")
    (run,) = blocks(page, "yaml")
    (tmp_path / "sums_rewards.py").write_text(functions)
    (tmp_path / "sums.yaml").write_text(run.replace(MODEL, chat_model))
    subprocess.run([sys.executable, "-c", data], cwd=tmp_path, check=True, timeout=60)
    assert len((tmp_path / "sums.jsonl").read_text().splitlines()) == 99
    monkeypatch.chdir(tmp_path)
    short = ["--max_steps", "1", "--max_completion_length", "8", "--device", "cpu", "--report_to", "none"]
    assert colora(["train", "sums.yaml", *short]) == 0
    assert (tmp_path / "runs/sums/adapter_model.safetensors").is_file()
    close = load_reward("sums_rewards.py:close")
    texts = [[{"role": "assistant", "content": text}] for text in ("It is 8.", "9", "?", "8")]
    logged: dict[str, list] = {}
    assert close(texts, ["8", "8", "8", None], logged.__setitem__) == [1.0, 0.5, 0.0, None]
    assert logged == {"found": ["8", "9", "", "8"]}


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
