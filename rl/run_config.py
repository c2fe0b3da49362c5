"""A run as a YAML file and command-line options describe it: model, data, rewards, LoRA and `GRPOConfig`'s fields."""

import difflib
import os
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from peft import LoraConfig

from .config import DEVICE_HELP, GRPOConfig
from .options import REFUSED
from .setup import DEFAULT_LORA
from .values import Entry, convert, load_yaml, yaml_entries

# What scripts of TRL and Unsloth, and older ones of transformers, call the same thing.
_TRL_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "train_dataset": "dataset",
    "dataset_train_split": "dataset_split",
    "dataset_test_split": "eval_dataset_split",
    "peft_config": "lora",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora_alpha",
    "lora_target_modules": "lora.target_modules",
    "use_rslora": "lora.use_rslora",
    "load_in_4bit": "base (nf4)",
    "max_seq_length": "max_context",
    "warmup_ratio": "warmup_steps (below 1, a share of all steps)",
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that `colora train` needs. The `help` of the fields below is what `colora train --help` shows."""

    model: str = field(metadata={"help": "Directory of a transformers checkpoint, or a hub id."})
    dataset: str = field(
        metadata={
            "help": "A .jsonl, .json, .csv or .parquet file, a directory of Dataset.save_to_disk, a hub id, or "
            "`path.py:function`, a function without arguments that returns a Dataset. It needs a `prompt` column; the "
            "others are passed to the reward functions."
        }
    )
    reward_funcs: list[str] = field(
        metadata={
            "help": "List of reward functions, each `package.module:function` or `path/to/file.py:function`. May be "
            "missing where an environment gives the reward."
        }
    )
    tools: list[str] | None = field(
        default=None,
        metadata={"help": "List of functions that the model may call, named like reward functions (docs/agents.md)."},
    )
    environment_factory: str | None = field(
        default=None, metadata={"help": "A class, or function, that makes an environment, named like reward functions."}
    )
    rollout_func: str | None = field(
        default=None, metadata={"help": "A function that makes the rollouts instead, named like reward functions."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_split: str = field(default="train", metadata={"help": "Split to train on; `train[:1000]` takes a part."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Dataset to evaluate on, in the forms of `dataset`; by default `dataset` itself."},
    )
    eval_dataset_split: str | None = field(
        default=None, metadata={"help": "Split to evaluate on. Without it and `eval_dataset` nothing is evaluated."}
    )
    lora: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Fields of peft.LoraConfig, as a mapping or as --lora.NAME. By default "
            f"r {DEFAULT_LORA.r}, lora_alpha {DEFAULT_LORA.lora_alpha}, target_modules {DEFAULT_LORA.target_modules}."
        },
    )
    resume: bool | str | None = field(
        default=None,
        metadata={
            "help": "true: go on from the newest whole checkpoint of output_dir, if there is one; or a checkpoint."
        },
    )
    device: str | None = field(default=None, metadata={"help": DEVICE_HELP})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": ""})

    def grpo_config(self) -> GRPOConfig:
        """The trainer's options. Raises ValueError as `GRPOConfig` does."""
        return GRPOConfig(device=self.device, **self.options)

    def lora_config(self) -> LoraConfig:
        """The adapter's. Raises ValueError where PEFT takes offence at the combination."""
        defaults = {name: getattr(DEFAULT_LORA, name) for name in ("r", "lora_alpha", "target_modules", "task_type")}
        try:
            return LoraConfig(**(defaults | self.lora))
        except (TypeError, ImportError) as error:
            raise ValueError(f"lora: {error}") from error


def run_fields() -> list[Any]:
    """The dataclass fields that a YAML file has besides those of GRPOConfig."""
    return [entry for entry in fields(RunConfig) if entry.name != "options"]


def read_run_config(path: Path | None, overrides: Sequence[tuple[str, str]] = ()) -> RunConfig:
    """Read a run from a YAML file, then apply `(name, text)` overrides, of which the last of a name counts.

    A dotted name, `lora.r`, sets one entry of a mapping.

    Raises:
        ValueError: the file is missing or no YAML; an unknown name (with the nearest known ones), a value of the wrong
            type (with the line), or a required name that is missing.
    """
    values: dict[str, Any] = {}
    for entry in _read_entries(path):
        _set(values, entry.name, entry.value, f"{path}, line {entry.line}: ")
    for name, text in overrides:
        _set(values, name, text, "command line: ")
    rewarded = bool(values.get("environment_factory"))  # maybe by the environment, which only the trainer can tell
    needed = [
        name for name in ("model", "dataset", "reward_funcs", "output_dir") if name != "reward_funcs" or not rewarded
    ]
    missing = [name for name in needed if not values.get(name)]
    if missing:
        where = f"{path} has" if path else "there is"
        raise ValueError(
            f"{where} no {', no '.join(missing)}: add a line `{missing[0]}: ...` or give --{missing[0]} "
            "(`colora train --help` explains each)"
        )
    values.setdefault("reward_funcs", [])
    if isinstance(values.get("resume"), str):
        values["resume"] = os.path.expanduser(values["resume"])
    own = {entry.name for entry in run_fields()}
    return RunConfig(
        **{name: value for name, value in values.items() if name in own},
        options={name: value for name, value in values.items() if name not in own},
    )


def _read_entries(path: Path | None) -> list[Entry]:
    if path is None:
        return []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not a text in UTF-8"
        raise ValueError(f"cannot read the configuration {path}: {reason}") from None
    try:
        return yaml_entries(text)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None


def _hints() -> dict[str, Any]:
    hints = get_type_hints(GRPOConfig) | get_type_hints(RunConfig)
    return {name: hint for name, hint in hints.items() if not isinstance(hint, InitVar) and name != "options"}


def _set(values: dict[str, Any], name: str, value: Any, where: str) -> None:
    """Put `value`, checked and converted, under `name`, dotted or not."""
    hints = _hints()
    name, dot, inner = name.partition(".")
    if name not in hints:
        hint = _suggestion(name, set(hints) - set(REFUSED), "`colora train --help` lists the options")
        raise ValueError(f"{where}unknown option {name!r}{hint}")
    try:
        if dot:
            value = dict(values.get(name) or {}) | {inner: _entry_of(name, inner, value, hints[name])}
        else:
            value = convert(name, value, hints[name])
            if name == "lora":
                value = {key: _lora_value(key, item) for key, item in value.items()}
    except ValueError as error:
        raise ValueError(f"{where}{error}") from None
    values[name] = "none" if name == "report_to" and value is None else value


def _entry_of(name: str, inner: str, value: Any, hint: Any) -> Any:
    """The value of `name.inner`."""
    if name == "lora":
        return _lora_value(inner, value)
    if dict not in {getattr(member, "__origin__", member) for member in getattr(hint, "__args__", ())}:
        raise ValueError(f"{name} is no mapping, so {name}.{inner} cannot be set")
    try:
        return load_yaml(value)
    except yaml.YAMLError:
        return value


def _lora_value(name: str, value: Any) -> Any:
    hints = get_type_hints(LoraConfig)
    known = [entry.name for entry in fields(LoraConfig)]
    if name not in known:
        hint = _suggestion(name, known, "the usual ones are r, lora_alpha and target_modules")
        raise ValueError(f"peft.LoraConfig has no {name!r}{hint}")
    return convert(f"lora.{name}", value, hints[name])


def _suggestion(name: str, known: Iterable[str], otherwise: str) -> str:
    if name in _TRL_NAMES:
        return f": it is called {_TRL_NAMES[name]} here"
    near = difflib.get_close_matches(name, list(known), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(near)}?" if near else f"; {otherwise}"
