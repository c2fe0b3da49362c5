"""The calculator example: its parts fit together, and it runs from end to end on a model that knows nothing."""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from colora.rollout.chat_format import ChatFormat
from colora.rollout.toolkit import Toolkit

from .test_examples import load


@pytest.fixture
def folder(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the example, whose cache is its own; its modules are found as for a script."""
    copy = tmp_path / "tool_use"
    shutil.copytree(root / "examples" / "tool_use", copy, ignore=shutil.ignore_patterns(".cache", "__pycache__"))
    for name in ("model", "tools"):  # other examples have modules of these names
        monkeypatch.delitem(sys.modules, name, raising=False)
    return copy


def test_the_pupils_lessons_are_the_conversations_that_the_trainer_has(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tools = load(folder / "model.py", monkeypatch), load(folder / "tools.py", monkeypatch)
    tokenizer = model.make_tokenizer()
    chat, schemas = ChatFormat(tokenizer, [tokenizer.eos_token_id]), Toolkit([tools.calculator]).schemas
    monkeypatch.setattr(model, "ASKS", 1.0)
    asked, call, result, said = [text for text, _ in model.lesson((12, 34), random.Random(0))]
    assert chat.prompt_ids(model.question((12, 34)), schemas) == tokenizer(asked)["input_ids"]
    (request,) = chat.read(tokenizer(call)["input_ids"], schemas, 0).requests
    assert request.name == "calculator"
    number = tools.calculator(**request.arguments)
    assert (
        chat.reply_ids([{"role": "tool", "name": "calculator", "content": str(number)}])
        == (tokenizer(result)["input_ids"])
    )
    completion = [{"role": "assistant", "content": said.removesuffix("<end>")}]
    assert tools.correct([completion, completion], [said[:-5], "1"]) == [1.0, 0.0]
    ids, labels = model.encode([model.lesson((12, 34), random.Random(0))], tokenizer)
    own = "".join(tokenizer.convert_ids_to_tokens(ids[0][labels[0] != -100]))
    assert own == call + said


def test_it_runs_and_writes_what_it_found(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder / "model.py", monkeypatch)
    model.warm_up(folder / ".cache" / "seed-0", 0, hidden=32, layers=1, steps=3)
    monkeypatch.setattr(sys, "argv", ["run.py", "--steps=1", f"--output={tmp_path / 'runs'}", "--engine=transformers"])
    results = load(folder / "run.py", monkeypatch).main()
    written = json.loads((tmp_path / "runs/seed-0/results.json").read_text())
    assert written == results and (results["before"]["step"], results["after"]["step"]) == (0, 1)
    assert 0.0 <= results["after"]["right"] <= 1.0 and results["after"]["calls"] >= 0.0
    assert (tmp_path / "runs/seed-0/tool_use.png").stat().st_size > 10_000
    assert (tmp_path / "runs/seed-0/adapter_model.safetensors").is_file()
