"""Rollouts on disk: the token ledger and what was made of it, one parquet file a step.

Files are written whole or not at all: a run killed at any moment leaves complete files and at most a temporary one,
which reading ignores and the next write of the same step replaces.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .trajectory import Segment, Trajectory

SCHEMA_VERSION = 2  # 1 had no `used`
VERSION_KEY = b"colora.rollout_schema"
Text = str | list[dict[str, Any]]  # plain text, or chat messages

_SEGMENT = pa.struct(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("token_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("logprobs", pa.list_(pa.float64())),
    ]
)
SCHEMA = pa.schema(
    [
        pa.field("step", pa.int64(), nullable=False),
        pa.field("prompt_index", pa.int64(), nullable=False),
        pa.field("sample", pa.int64(), nullable=False),
        pa.field("request_id", pa.string(), nullable=False),
        pa.field("prompt_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("segments", pa.list_(_SEGMENT), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("prompt_format", pa.string(), nullable=False),  # `text` as it is, or `json`
        pa.field("completion", pa.string(), nullable=False),
        pa.field("completion_format", pa.string(), nullable=False),
        pa.field("rewards", pa.map_(pa.string(), pa.float64()), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("advantage", pa.float64(), nullable=False),
        pa.field("old_logprobs", pa.list_(pa.float64())),
        pa.field("extra", pa.string(), nullable=False),  # JSON
        pa.field("used", pa.bool_(), nullable=False),
    ],
    metadata={VERSION_KEY: str(SCHEMA_VERSION).encode()},
)
_SCHEMA_1 = SCHEMA.remove(SCHEMA.get_field_index("used"))


@dataclass
class RolloutRecord:
    """One completion of one step, with its rewards.

    Attributes:
        step: the optimizer step it was generated for.
        prompt_index: the dataset row of its prompt.
        sample: its place among the completions of that prompt.
        trajectory: the tokens.
        prompt, completion: their text, or chat messages.
        rewards: each reward function's value, and those of other terms of the reward; None where it did not apply.
        reward: the weighted sum; None where no function applied.
        advantage: what its tokens were trained with; 0 where it was not used.
        old_logprobs: the policy's log-probs (nats) of the completion tokens before the step, where they were computed.
        extra: whatever else was logged; survives a round trip through JSON.
        used: False where dynamic sampling threw its group away: nothing was trained on it.
    """

    step: int
    prompt_index: int
    sample: int
    trajectory: Trajectory
    prompt: Text
    completion: Text
    rewards: dict[str, float | None]
    reward: float | None
    advantage: float
    old_logprobs: list[float] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    used: bool = True


def rollout_path(directory: str | Path, step: int) -> Path:
    """The file of one step, e.g. `step_00000012.parquet`."""
    return Path(directory) / f"step_{step:08d}.parquet"


def write_records(path: str | Path, records: Iterable[RolloutRecord]) -> None:
    """Write one parquet file, atomically and durably: after the return it survives a loss of power.

    Raises ValueError where a record has a value that the schema cannot hold; nothing is written then.
    """
    path = Path(path)
    rows = [_to_row(record) for record in records]
    try:
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
    except (pa.ArrowException, OverflowError) as error:
        raise ValueError(f"{path}: a record does not fit the schema of rollouts: {error}") from error
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            pq.write_table(table, file, compression="zstd", write_page_checksum=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the new name itself
    finally:
        os.close(directory)


def read_records(path: str | Path) -> list[RolloutRecord]:
    """The records of one file, or of all `step_*.parquet` of a directory by step.

    Raises:
        FileNotFoundError: there is no such path.
        ValueError: a file that is truncated, corrupt or not of rollouts, by name.
    """
    path = Path(path)
    if not path.is_dir():
        return _read_file(path)
    records = [record for file in sorted(path.glob("step_*.parquet")) for record in _read_file(file)]
    return sorted(records, key=lambda record: record.step)


def _read_file(path: Path) -> list[RolloutRecord]:
    if not path.exists():
        raise FileNotFoundError(f"no rollouts at {path}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: truncated or corrupt, restore or delete it: {error}") from error
    version = (table.schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        raise ValueError(f"{path}: a parquet file, but not one of rollouts: its metadata has no schema version")
    known = {str(SCHEMA_VERSION).encode(): SCHEMA, b"1": _SCHEMA_1}
    if version not in known or not table.schema.equals(known[version]):
        raise ValueError(
            f"{path}: rollouts of schema version {version.decode(errors='replace')}, this release reads 1 and "
            f"{SCHEMA_VERSION}; read it with the release that wrote it"
        )
    return [_from_row(row) for row in table.to_pylist()]


def _to_row(record: RolloutRecord) -> dict[str, Any]:
    trajectory = record.trajectory
    where = f"rollout of step {record.step}, prompt {record.prompt_index}, sample {record.sample}"
    prompt, prompt_format = _encode_text(record.prompt, f"{where}: prompt")
    completion, completion_format = _encode_text(record.completion, f"{where}: completion")
    return {
        "step": record.step,
        "prompt_index": record.prompt_index,
        "sample": record.sample,
        "request_id": trajectory.request_id,
        "prompt_ids": trajectory.prompt_ids,
        "segments": [
            {"source": segment.source, "token_ids": segment.token_ids, "logprobs": segment.logprobs}
            for segment in trajectory.segments
        ],
        "finish_reason": trajectory.finish_reason,
        "seed": trajectory.seed,
        "prompt": prompt,
        "prompt_format": prompt_format,
        "completion": completion,
        "completion_format": completion_format,
        "rewards": list(record.rewards.items()),
        "reward": record.reward,
        "advantage": record.advantage,
        "old_logprobs": record.old_logprobs,
        "extra": _to_json(record.extra, f"{where}: extra"),
        "used": record.used,
    }


def _from_row(row: dict[str, Any]) -> RolloutRecord:
    segments = [Segment(part["token_ids"], part["source"], part["logprobs"]) for part in row["segments"]]
    return RolloutRecord(
        step=row["step"],
        prompt_index=row["prompt_index"],
        sample=row["sample"],
        trajectory=Trajectory(row["request_id"], row["prompt_ids"], segments, row["finish_reason"], row["seed"]),
        prompt=_decode_text(row["prompt"], row["prompt_format"]),
        completion=_decode_text(row["completion"], row["completion_format"]),
        rewards=dict(row["rewards"]),
        reward=row["reward"],
        advantage=row["advantage"],
        old_logprobs=row["old_logprobs"],
        extra=json.loads(row["extra"]),
        used=row.get("used", True),  # files of version 1 hold nothing else
    )


def _encode_text(text: Text, where: str) -> tuple[str, str]:
    """Text as it is, which other tools can read; messages, and text that is not valid Unicode, as JSON."""
    if isinstance(text, str) and not any("\ud800" <= char <= "\udfff" for char in text):
        return text, "text"
    return _to_json(text, where), "json"


def _decode_text(stored: str, text_format: str) -> Text:
    return json.loads(stored) if text_format == "json" else stored


def _to_json(value: Any, where: str) -> str:
    try:
        return json.dumps(value)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where} cannot be written as JSON: {error}; use plain dicts, lists, strings, numbers"
        ) from error
