"""Opens what a name stands for: a file, a saved dataset, a dataset of the hub, or a function that makes one.

Imports no torch, transformers or TRL, so that commands which need only data start at once.
"""

import importlib.util
from pathlib import Path

from datasets import Dataset, DatasetDict, IterableDataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import HFValidationError

FILE_FORMATS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
TEXTS = ("prompt", "completion", "prompts", "completions")  # columns that stay text in a .csv: 007 is no number there


def open_dataset(name: str, config: str | None = None, split: str = "train") -> Dataset | IterableDataset:
    """Open a dataset for training: `open_rows`, with a `prompt` column.

    Raises:
        ValueError: as `open_rows`, or there is no `prompt` column.
    """
    dataset = open_rows(name, config, split)
    columns = dataset.column_names or []  # a stream may not know them before it is read
    if columns and "prompt" not in columns:
        raise ValueError(f"dataset {name!r} has no `prompt` column, only {', '.join(columns)}: rename or add one")
    return dataset


def open_rows(name: str, config: str | None = None, split: str = "train") -> Dataset | IterableDataset:
    """Open a dataset, whatever its columns.

    Args:
        name: a file (.jsonl, .json, .csv, .parquet), a directory of `save_to_disk`, a hub id, or `path.py:function`.
        config: of a dataset on the hub.
        split: of it; for files and the hub also a slice such as `train[:1000]`.

    Raises:
        ValueError: nothing of the kind is there, it cannot be read, or it has no rows.
    """
    try:
        dataset = _open(name, config, split)
    except DatasetGenerationError as error:  # says what is wrong with the content only as its cause
        raise ValueError(f"dataset {name!r} cannot be read: {error.__cause__ or error}") from error
    except (OSError, ValueError, HFValidationError) as error:
        if "corresponds to no data" in str(error):  # what datasets says of a file without rows
            raise ValueError(f"dataset {name!r}, split {split!r}: it is empty") from error
        raise ValueError(f"dataset {name!r}: {str(error) or type(error).__name__}") from error
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"dataset {name!r}, split {split!r}: it is empty")
    return dataset


def _open(name: str, config: str | None, split: str) -> Dataset | IterableDataset:
    source, _, function = name.rpartition(":")
    if source.endswith(".py"):
        if split != "train":
            raise ValueError(f"a function gives one dataset, so split {split!r} cannot be taken: name another function")
        return _call(Path(source).expanduser(), function)
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in FILE_FORMATS:
            raise ValueError(f"files of type {path.suffix or 'none'} cannot be read: use {', '.join(FILE_FORMATS)}")
        if path.stat().st_size == 0:
            raise ValueError("it is empty")
        options = {"converters": dict.fromkeys(TEXTS, str)} if path.suffix == ".csv" else {}
        return load_dataset(FILE_FORMATS[path.suffix], data_files=str(path), split=split, **options)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        try:
            saved = load_from_disk(str(path))
        except IndexError as error:  # datasets cannot read what it wrote of a dataset without rows
            raise ValueError("it is empty") from error
        if isinstance(saved, DatasetDict):
            if split not in saved:
                raise ValueError(f"there is no split {split!r}, only {', '.join(saved)}")
            return saved[split]
        if split != "train":
            raise ValueError(f"the directory is one dataset without splits, so split {split!r} cannot be taken")
        return saved
    if not path.exists() and (path.suffix in FILE_FORMATS or path.is_absolute() or name.startswith((".", "~"))):
        raise ValueError(f"there is no such file or directory (looked in {path.parent.resolve()})")
    return load_dataset(name, config, split=split)


def _call(path: Path, function: str) -> Dataset | IterableDataset:
    """What `function` of the Python file returns."""
    if not path.is_file():
        raise ValueError(f"there is no file {path.name} in {path.parent.resolve()}")
    spec = importlib.util.spec_from_file_location(f"colora_dataset_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, function, None)
        dataset = make() if callable(make) else None
    except Exception as error:  # the user's code may raise anything; it is told whose it is
        raise ValueError(f"running it raised {type(error).__name__}: {error}") from error
    if not callable(make):
        raise ValueError(f"{path} has no function {function!r}")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise ValueError(f"{function} returned a {type(dataset).__name__}, not a datasets.Dataset")
    return dataset
