"""What the README and docs/ show is run as it stands there."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from colora.rl.cli import main as colora
from colora.rl.options import HONOURED, INERT, REFUSED
from colora.rl.presets import PRESETS
from colora.rl.run_config import read_run_config, run_fields

MODEL = "Qwen/Qwen3-0.6B"


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(code: str, directory: Path) -> str:
    script = directory / "script.py"
    script.write_text(code)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=250, cwd=directory)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_example_trains_and_its_rollouts_can_be_read(root: Path, tmp_path: Path, chat_model: str) -> None:
    """The README's example, and on what it leaves behind the snippets of docs/how-it-works.md."""
    (code,) = blocks((root / "README.md").read_text(), "python")
    assert MODEL in code and len([line for line in code.splitlines() if line]) <= 15
    short = code.replace(MODEL, chat_model).replace("max_steps=50", "max_steps=2").replace("=64)", "=6)")
    run(short, tmp_path)
    assert (tmp_path / "runs/sums/adapter_model.safetensors").is_file()
    snippets = blocks((root / "docs/how-it-works.md").read_text(), "python")
    assert snippets
    printed = run("\n".join(snippets), tmp_path)
    assert "What is " in printed and "right" in printed


def test_the_configuration_is_one(root: Path, tmp_path: Path, chat_model: str, monkeypatch, capsys) -> None:
    (text,) = blocks((root / "README.md").read_text(), "yaml")
    (code,) = blocks((root / "README.md").read_text(), "python")
    functions = code[code.index("def right") : code.index("config =")]
    (tmp_path / "rewards.py").write_text(functions)
    rows = [{"prompt": [{"role": "user", "content": f"{n} + {n}"}], "answer": str(2 * n)} for n in range(9)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(text.replace(MODEL, chat_model))
    monkeypatch.chdir(tmp_path)
    assert colora(["train", "sums.yaml", "--dry-run", "--learning_rate", "2e-5", "--device", "cpu"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["lora"] == {"r": 32, "lora_alpha": 32} and printed["learning_rate"] == 2e-5


@pytest.mark.parametrize(
    "name", ["agents", "algorithms", "configuration", "how-it-works", "rewards", "troubleshooting"]
)
def test_links_and_files_that_are_named_exist(root: Path, name: str) -> None:
    for page in (root / "README.md", root / "docs" / f"{name}.md"):
        text = page.read_text()
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert target.startswith("https:") or (page.parent / target).exists(), f"{page.name} links to {target}"
        for path in re.findall(r"`((?:kernels|weightshare|rollout|rewards|rl|examples|benchmarks)/[\w./-]+)`", text):
            assert (root / path).exists(), f"{page.name} names {path}"


def test_the_options_named_in_the_configuration_page_are_what_it_says(root: Path, tmp_path: Path) -> None:
    text = (root / "docs" / "configuration.md").read_text()
    accepted, _, refused = text.partition("## What is refused")
    known = HONOURED | INERT.keys() | {entry.name for entry in run_fields()}
    ours = set(re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", accepted, re.MULTILINE))
    names = {name for cell in ours for name in re.findall(r"`(\w+)`", cell)}
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: d\nreward_funcs: [a:f]\noutput_dir: out\n")
    config = read_run_config(path).grpo_config()
    assert len(names) > 40
    assert not {name for name in names - known if not hasattr(config, name)}
    assert not names & REFUSED.keys()
    table = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (.*?) \|", refused, re.MULTILINE))))
    assert len(table) > 20 and table <= REFUSED.keys()


def test_the_defaults_in_the_configuration_page_are_the_defaults(root: Path, tmp_path: Path) -> None:
    import trl
    from colora import GRPOConfig

    text = (root / "docs" / "configuration.md").read_text()
    section = text.partition("## Defaults that differ from TRL's")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| `?([^|`]+)`? \| `?([^|`]+)`? \|", section, re.MULTILINE)
    ours, theirs = GRPOConfig(str(tmp_path)), trl.GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    options = (HONOURED | INERT.keys() | REFUSED.keys()) - {"use_cpu", "bf16", "output_dir"}  # two have no default here
    differing = {name for name in options if hasattr(theirs, name) and getattr(ours, name) != getattr(theirs, name)}
    named = {name: (str(getattr(ours, name)), str(getattr(theirs, name))) for name in sorted(differing)}
    assert {name: (here.strip(), there.strip()) for name, here, there in rows} == named


def test_the_presets_in_the_algorithms_page_are_the_presets(root: Path) -> None:
    """Each row names the values that set a preset apart from the ones below the table, and its minibatches."""
    text = (root / "docs" / "algorithms.md").read_text()
    usual = {"importance_sampling_level": "token", "advantage_estimator": "group", "scale_rewards": "group", "beta": 0}
    below = re.search(r"^Not in a row: (.*)\.$", text, re.MULTILINE)
    assert below and below[1] == ", ".join(f"{name} {value}" for name, value in usual.items())
    rows = re.findall(r"^\| `(\w+)` \| (loss_type .*?) \| (\d+) \| ", text, re.MULTILINE)
    assert [name for name, _, _ in rows] == list(PRESETS)
    for name, values, minibatches in rows:
        preset = PRESETS[name]
        wanted = {option: str(value).lower() for option, value in preset.values.items() if usual.get(option) != value}
        wanted |= {"overlong_buffer": "a"} if preset.overlong_share else {}  # "a fifth of ..."
        said = {option: value for option, value in re.findall(r"(\w+) ([\w.]+)", values) if option in wanted}
        assert said == wanted and int(minibatches) == preset.minibatches, name
        assert "a fifth of max_completion_length" in values or not preset.overlong_share
        assert preset.overlong_share in (0, 1 / 5)


def test_every_message_in_the_troubleshooting_page_is_in_the_code(root: Path) -> None:
    """The quoted part of each row stands in some source file, so that a message cannot be changed without the page."""
    text = (root / "docs" / "troubleshooting.md").read_text()
    folders = ("kernels", "weightshare", "rollout", "rewards", "rl")
    source = "\n".join(path.read_text() for folder in folders for path in sorted((root / folder).glob("*.py")))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)  # implicit concatenation of string parts
    quotes = re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)
    assert len(quotes) > 20
    for quote in quotes:
        parts = [part.strip() for part in quote.split("...") if part.strip()]
        missing = [part for part in parts if part not in joined]
        assert not missing, f"no message has {missing}"
