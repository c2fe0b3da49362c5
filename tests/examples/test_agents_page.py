"""What docs/agents.md shows is run as it stands there."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from colora.rollout.records import read_records
from colora.rollout.toolkit import Toolkit

from ..agent_runs import tool_checkpoint

MODEL = "Qwen/Qwen3-0.6B"
SHORT = 'max_steps=1, device="cpu", report_to=[], num_generations=2, per_device_train_batch_size=4'


@pytest.fixture
def blocks(root: Path) -> list[str]:
    page = (root / "docs" / "agents.md").read_text()
    return re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)


def test_the_page_from_its_top_to_trained_agents(blocks: list[str], tmp_path: Path) -> None:
    model = str(tool_checkpoint(tmp_path / "model"))
    script = "".join(blocks).replace(MODEL, model).replace("max_steps=50", SHORT) + "trainer.train()\n"
    # The second run has a directory of its own, as the page's reader would give it.
    script = script.replace("numbers = Dataset", 'config.output_dir = "runs/guess"\nnumbers = Dataset')
    (tmp_path / "agent.py").write_text(script.replace("max_completion_length=512", "max_completion_length=24"))
    subprocess.run([sys.executable, "agent.py"], cwd=tmp_path, check=True, timeout=120)
    records = read_records(tmp_path / "runs/agent/rollouts")
    assert len(records) == 4 and records[0].rewards.keys() == {"right"}
    assert records[0].extra["agent"]["turns"] >= 1
    guesses = read_records(tmp_path / "runs/guess/rollouts")
    assert guesses[0].rewards.keys() == {"Guess"}
    assert guesses[0].prompt == [{"role": "user", "content": " Find my number from 1 to 100."}]


def test_its_tools_do_what_it_says(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = blocks[0].partition("questions =")[0] + blocks[1].partition("numbers =")[0]
    (tmp_path / "agents_page.py").write_text(functions)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = importlib.import_module("agents_page")
    Toolkit([page.search], page.Guess)
    assert "5150 km" in page.search("titan diameter")
    with pytest.raises(LookupError, match="only about Ganymede"):
        page.search("Europa")
    game = page.Guess()
    game.reset(number=7, prompt="")
    assert [game.guess(value) for value in (50, 3, 7)] == ["lower", "higher", "right"]
    assert game.get_reward() == pytest.approx(1 / 3)
