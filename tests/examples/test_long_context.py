"""examples/long_context: documents with planted facts, their verifier, and a run on a model made on the spot."""

import random
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml
from colora.kernels.offload import WORKING_BYTES, WORKING_INPUTS
from colora.rewards.loading import load_reward
from colora.rl.families import block_spec, model_layout
from colora.rollout.records import read_records
from colora.weightshare.base_format import DENSE, NF4
from colora.weightshare.memory import GIB, KVLayout, reserve_bytes
from transformers import AutoTokenizer, Qwen3Config

from ..vllm_engines import VLLM_MARKS
from .test_examples import load, message

FACT = re.compile(r"The (\w+ \w+) unloaded (\d+) crates(?: (more|fewer) than the (\w+ \w+))?\.")


@pytest.fixture
def documents(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(root / "examples" / "long_context" / "documents.py", monkeypatch)


@pytest.fixture
def tokenizer(chat_model: str):
    """One token a character: a prompt's tokens are the characters of its text, and its template's."""
    return AutoTokenizer.from_pretrained(chat_model)


def solve(text: str) -> int | None:
    """The answer by reading the whole prompt; None where it cannot be known."""
    told = {ship: (int(number), sign, other) for ship, number, sign, other in FACT.findall(text)}
    question = text.split("\n\n")[-2]
    asked = re.findall(r"the (\w+ \w+)(?=,| and|\?| unload)", question)
    crates = []
    for ship in asked:
        total, sign = 0, "more"
        while sign:
            if ship not in told:
                return None
            number, sign, ship = told[ship]
            total += -number if sign == "fewer" else number
        crates.append(total)
    if "exceed" in question:
        return max(crates) - min(crates)
    return sum(crates)


def prompt_of(row: dict) -> str:
    return row["prompt"][0]["content"]


def test_the_answer_follows_from_the_needed_facts_and_from_no_fewer(documents: ModuleType, tokenizer) -> None:
    rows = documents.problems(tokenizer, 3000, size=30, held_out=1)["train"]
    assert set(rows["kind"]) == {"sum", "spread", "chain"}
    for row in rows:
        text = prompt_of(row)
        assert solve(text) == int(row["answer"])
        assert [re.search(r"\d+", sentence)[0] for sentence in row["sentences"]] == row["evidence"]
        for sentence in row["sentences"]:
            assert solve(text.replace(sentence, "")) is None


def test_facts_stand_at_the_depths_and_filler_has_no_numbers(documents: ModuleType, tokenizer) -> None:
    question = documents.make_question(random.Random(1), facts=6, needed=4)
    depths = [0.9, 0.0, 0.4, 1.0, 0.6, 0.2]

    def count(messages: list) -> int:
        return len(messages[0]["content"])

    row = documents.problem(question, depths, random.Random(2), 20_000, count)
    text = prompt_of(row).split("\n\n", 1)[1].rsplit("\n\n", 2)[0]
    sentences = [fact.text for fact in question.needed + question.others]
    assert [text.count(sentence) for sentence in sentences] == [1] * 6
    places = [text.index(sentence) / len(text) for sentence in sentences]
    assert places == pytest.approx(depths, abs=0.02)
    assert row["depths"] == places[:4] and row["sentences"] == sentences[:4]
    for sentence in sentences:
        text = text.replace(sentence, "")
    assert not re.search(r"\d|crates|unloaded", text)
    assert len(set(text.split("."))) > 150


@pytest.mark.parametrize("tokens", [1000, 4321])
def test_prompts_fill_the_budget_of_tokens(documents: ModuleType, tokenizer, tokens: int) -> None:
    for row in documents.problems(tokenizer, tokens, size=5, held_out=1, facts=3, needed=2)["train"]:
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tokens - 150 < len(ids) <= tokens  # a sentence has some 100 characters


def test_the_same_seed_makes_the_same_documents(documents: ModuleType, tokenizer) -> None:
    def made(size: int, seed: int) -> list[dict]:
        return documents.problems(tokenizer, 1500, size, held_out=2, seed=seed)["train"].to_list()

    first = made(4, seed=1)
    assert made(6, seed=1)[:4] == first  # more of them leave those before as they are
    assert not {prompt_of(row) for row in made(4, seed=2)} & {prompt_of(row) for row in first}


def test_errors_say_what_to_change(documents: ModuleType, tokenizer) -> None:
    with pytest.raises(ValueError, match=r"300 tokens are too few for a prompt that has \d+ without any filler"):
        documents.problems(tokenizer, 300, 1, 1)
    with pytest.raises(ValueError, match="2 <= needed <= facts.*needed=5, facts=4"):
        documents.problems(tokenizer, 3000, 1, 1, facts=4, needed=5)


def test_the_most_that_fits_is_found_in_a_few_counts(documents: ModuleType) -> None:
    lengths = [random.Random(n).randint(12, 35) for n in range(4000)]
    calls = []

    def count(number: int) -> int:
        calls.append(number)
        return 250 + sum(lengths[:number])

    number = documents.most_within(31_744, count)
    assert count(number) <= 31_744 < count(number + 1) and len(calls) < 15
    assert documents.most_within(250, count) == 0


def test_rewards(root: Path) -> None:
    verifier = root / "examples" / "long_context" / "verifier.py"
    exact = load_reward("colora.rewards.match:exact_match")
    found, form = load_reward(f"{verifier}:found_facts"), load_reward(f"{verifier}:form")
    right = "<facts>It had 431. It had 17 more.</facts><work>431 + 17</work><answer>448</answer>"
    scored = {
        right: (1, 1, 1),
        right.replace("448", "447"): (0, 1, 1),
        right.replace("It had 17 more.", ""): (1, 0.5, 1),
        right.replace("It had 431.", "It had 1, 2, 3, 4, 5, 6, 431."): (1, 0.25, 1),
        right.replace("It had 17 more.", "It had 431. It had 431."): (1, 1 / 3, 1),
        "The answer is <answer>448</answer>": (1, 0, 0),
        "<facts>431 17": (0, 0, 0),
        "": (0, 0, 0),
    }
    completions = [message(text) for text in scored]
    columns = {"answer": ["448"] * len(scored), "evidence": [["431", "17"]] * len(scored)}
    values = [reward(completions, **columns) for reward in (exact, found, form)]
    assert list(zip(*values, strict=True)) == [pytest.approx(wanted) for wanted in scored.values()]


@pytest.fixture
def train(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    shutil.copytree(root / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns(".cache", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    return load(tmp_path / "examples" / "long_context" / "train.py", monkeypatch)


@pytest.mark.slow
def test_it_trains_on_a_cpu_as_its_readme_says(train: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = load(Path("examples/tiny_chat_model.py"), monkeypatch)
    maker.main("runs/tiny-model", "examples/long_context/tiny_says.txt")
    small = ["--size=12", "--held-out=2", "--max_steps=2", "--disable_tqdm"]
    assert train.main(["--config=examples/long_context/tiny.yaml", *small]) == 0
    records = read_records("runs/long_context-tiny/rollouts")
    assert [record.step for record in records] == [1] * 8 + [2] * 8
    assert all(580 < len(record.trajectory.prompt_ids) <= 640 for record in records)
    assert records[0].rewards.keys() == {"exact_match", "found_facts", "XmlSections"}
    assert any(record.advantage for record in records)  # what the model was taught to say differs in form
    assert Path("runs/long_context-tiny/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("engine", [pytest.param("vllm", marks=VLLM_MARKS)])
def test_the_configuration_for_a_gpu_is_a_valid_one(train: ModuleType, chat_model: str, capsys, engine: str) -> None:
    short = ["--size=2", "--held-out=1", "--device=cpu", f"--engine={engine}", "--dry-run"]
    lengths = ["--tokens=1500", "--max_context=2048", "--max_completion_length=512", "--base=auto"]
    assert train.main([f"--model={chat_model}", *lengths, *short]) == 0
    assert "max_num_batched_tokens: 2048" in capsys.readouterr().out
    assert train.main([f"--model={chat_model}", "--facts=1", *short]) == 2
    assert "needed=3, facts=1" in capsys.readouterr().err


def test_the_memory_in_the_readme_is_what_the_package_computes(root: Path) -> None:
    text = (root / "examples" / "long_context" / "README.md").read_text()
    model = Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    layout, kv = model_layout(block_spec(model)), KVLayout.of(model, 2, 16)
    adapter = sum(16 * (linear.in_features + rows) for linear in layout.linears for _, rows in linear.parts)
    answers = 31744 + 8 * 1024  # one document and what is written about it
    sizes = {
        "base": layout.nbytes(torch.bfloat16, NF4),
        "adapter": (2 + 4) * adapter,
        "gradients": 12 * adapter,
        "set aside": reserve_bytes(model, torch.bfloat16, 2048, 16, 0),
        "KV cache": answers * kv.layer_slots * kv.token_bytes,
        "one block": WORKING_INPUTS * answers * model.hidden_size * 2 + WORKING_BYTES,
    }
    config = yaml.safe_load((root / "examples" / "long_context" / "config.yaml").read_text())
    assert config["tokens_per_microbatch"] == answers
    said = dict(re.findall(rf"^\| ({'|'.join(sizes)})[^|]*\| ([\d.]+) \|", text, re.MULTILINE))
    assert said == {name: f"{size / GIB:.1f}" for name, size in sizes.items()}
    assert f"{layout.nbytes(torch.bfloat16, DENSE) / GIB:.1f} GiB in bfloat16" in text
    assert f"{kv.bytes_for(1, 32768) / GIB:.1f} GiB for 32K tokens" in text
