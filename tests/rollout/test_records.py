"""Rollouts through parquet and back, bit by bit, and what happens to files that are not whole."""

import math
import os
import struct

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from colora.rollout.records import SCHEMA, RolloutRecord, read_records, rollout_path, write_records
from colora.rollout.trajectory import Segment, Trajectory
from hypothesis import given, settings
from hypothesis import strategies as st


def record(step=3, sample=0, **changes):
    segments = [Segment([5, 6], "model", [-0.1, -1e-300]), Segment([7], "environment"), Segment([8], "model", [-2.5])]
    values = {
        "step": step,
        "prompt_index": 41,
        "sample": sample,
        "trajectory": Trajectory(f"{step}/41/{sample}", [1, 2, 3], segments, "length", 2**63 - 1),
        "prompt": [{"role": "user", "content": "2 × 3 = ? 🦊", "tool_calls": None}],
        "completion": "sechs — ½\x00\n",
        "rewards": {"zulu": 1.0, "alpha": None, "länge": math.nan},
        "reward": 0.1,
        "advantage": -1 / 3,
        "old_logprobs": [-0.1, -math.inf, 0.0, -2.5],
        "extra": {"answer": ["6", None, {"deep": [1.5, True]}]},
    }
    return RolloutRecord(**{**values, **changes})


def bits(value):
    """The value with every float replaced by its bits, so that NaN equals itself and 0.0 is not -0.0."""
    if isinstance(value, float):
        return struct.pack("<d", value) if value == value else "nan"
    if isinstance(value, dict):
        return [(key, bits(item)) for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [bits(item) for item in value]
    return bits(vars(value)) if hasattr(value, "__dict__") else (type(value), value)


def round_trip(directory, records):
    path = rollout_path(directory, 0)
    write_records(path, records)
    return read_records(path)


def test_round_trip(tmp_path):
    records = [
        record(),
        record(sample=1, prompt="plain", completion=[{"role": "assistant", "content": "ü"}], old_logprobs=None),
        record(sample=2, reward=None, rewards={}, extra={}, trajectory=Trajectory("empty", [1])),
        record(sample=3, reward=math.nan, advantage=0.0, prompt="[1]", completion=""),
        record(sample=4, used=False),
    ]
    assert bits(round_trip(tmp_path, records)) == bits(records)


def test_text_that_is_no_valid_unicode_survives(tmp_path):
    records = [record(completion="broken \ud83e half")]
    assert round_trip(tmp_path, records)[0].completion == "broken \ud83e half"


floats = st.floats(allow_nan=True, allow_infinity=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | floats | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
tokens = st.integers(0, 2**31 - 1)
sampled = st.lists(st.tuples(tokens, floats), max_size=6).map(
    lambda pairs: Segment([token for token, _ in pairs], "model", [value for _, value in pairs])
)
given_tokens = st.lists(tokens, max_size=6).map(lambda ids: Segment(ids, "environment"))
messages = st.lists(
    st.fixed_dictionaries({"role": st.just("user"), "content": st.text()}, optional={"name": json_values})
)
records_strategy = st.builds(
    RolloutRecord,
    step=st.integers(-1, 2**40),
    prompt_index=st.integers(0, 2**40),
    sample=st.integers(0, 2**31),
    trajectory=st.builds(
        Trajectory,
        request_id=st.text(),
        prompt_ids=st.lists(tokens, max_size=6),
        segments=st.lists(sampled | given_tokens, max_size=4),
        finish_reason=st.sampled_from(["stop", "length"]),
        seed=st.integers(0, 2**63 - 1),
    ),
    prompt=st.text() | messages,
    completion=st.text(st.characters()) | messages,
    rewards=st.dictionaries(st.text(), st.none() | floats, max_size=3),
    reward=st.none() | floats,
    advantage=floats,
    old_logprobs=st.none() | st.lists(floats, max_size=6),
    extra=st.dictionaries(st.text(), json_values, max_size=3),
    used=st.booleans(),
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(records=st.lists(records_strategy, max_size=4))
def test_round_trip_of_anything(records, tmp_path_factory):
    assert bits(round_trip(tmp_path_factory.mktemp("records"), records)) == bits(records)


def test_the_file_reads_without_this_package(tmp_path):
    path = tmp_path / "new" / "deeper" / "step_00000003.parquet"
    write_records(path, [record(prompt="text")])
    row = pq.read_table(path).to_pylist()[0]
    assert (row["prompt"], row["reward"], row["finish_reason"]) == ("text", 0.1, "length")
    assert row["segments"][1] == {"source": "environment", "token_ids": [7], "logprobs": None}


def test_path_of_a_step(tmp_path):
    assert rollout_path(tmp_path, 12) == tmp_path / "step_00000012.parquet"


def test_directory_is_read_by_step_and_leftovers_are_ignored(tmp_path):
    for step in (10, 2, 100_000_000, 9):
        write_records(rollout_path(tmp_path, step), [record(step=step, sample=sample) for sample in (1, 0)])
    (tmp_path / ".step_00000011.parquet.tmp").write_bytes(b"PAR1 half")
    (tmp_path / "notes.txt").write_text("mine")
    order = [(item.step, item.sample) for item in read_records(tmp_path)]
    assert order == [(step, sample) for step in (2, 9, 10, 100_000_000) for sample in (1, 0)]
    assert read_records(str(tmp_path / "step_00000009.parquet"))[0].step == 9


def test_empty_directory_has_no_records(tmp_path):
    assert read_records(tmp_path) == []


def test_missing_path(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rollouts at .*step_00000001"):
        read_records(rollout_path(tmp_path, 1))


def test_rewriting_replaces_and_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = rollout_path(tmp_path, 3)
    write_records(path, [record()])
    write_records(path, [record(reward=7.0)])
    assert read_records(path)[0].reward == 7.0

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            write_records(path, [record(reward=8.0)])
    assert read_records(path)[0].reward == 7.0
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trajectory": Trajectory("a", [2**31])}, "does not fit the schema"),
        ({"advantage": "high"}, "does not fit the schema"),
        ({"reward": "high"}, "does not fit the schema"),
        ({"extra": {"seen": {1, 2}}}, "step 3, prompt 41, sample 0: extra cannot be written as JSON.*set"),
        ({"prompt": [{"content": b"raw"}]}, "step 3, prompt 41, sample 0: prompt cannot be written as JSON.*bytes"),
    ],
)
def test_values_that_cannot_be_stored_are_named_and_nothing_is_written(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_records(rollout_path(tmp_path, 3), [record(**changes)])
    assert os.listdir(tmp_path) == []


def test_truncated_files_are_named(tmp_path):
    path = rollout_path(tmp_path, 3)
    write_records(path, [record(sample=sample) for sample in range(20)])
    whole = path.read_bytes()
    for size in (0, 3, 40, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="step_00000003.parquet: truncated or corrupt"):
            read_records(tmp_path)


def test_a_flipped_bit_in_the_data_is_noticed(tmp_path):
    path = rollout_path(tmp_path, 3)
    write_records(path, [record(sample=sample) for sample in range(20)])
    metadata = pq.read_metadata(path).row_group(0)
    whole = path.read_bytes()
    for number in range(metadata.num_columns):
        column = metadata.column(number)
        place = column.dictionary_page_offset or column.data_page_offset
        last = place + column.total_compressed_size - 1  # within the values of the column's last page
        path.write_bytes(whole[:last] + bytes([whole[last] ^ 1]) + whole[last + 1 :])
        with pytest.raises(ValueError, match="step_00000003.parquet: truncated or corrupt"):
            read_records(path)


def test_a_damaged_footer_never_raises_anything_else(tmp_path):
    path = rollout_path(tmp_path, 3)
    write_records(path, [record()])
    whole = path.read_bytes()
    footer = len(whole) - 8 - struct.unpack("<I", whole[-8:-4])[0]
    refused = 0
    for place in range(footer, len(whole), 9):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        try:
            read_records(path)
        except ValueError as error:
            assert str(error).startswith(str(path))
            refused += 1
    assert refused > 100


def test_other_parquet_files_and_other_versions_are_refused(tmp_path):
    path = rollout_path(tmp_path, 1)
    pq.write_table(pa.table({"step": [1]}), path)
    with pytest.raises(ValueError, match="step_00000001.parquet: a parquet file, but not one of rollouts"):
        read_records(path)
    pq.write_table(pa.table({"step": [1]}).replace_schema_metadata({"colora.rollout_schema": "7"}), path)
    with pytest.raises(ValueError, match="rollouts of schema version 7, this release reads 1 and 2"):
        read_records(path)


def test_files_of_version_1_are_read_as_used(tmp_path):
    path = rollout_path(tmp_path, 3)
    write_records(path, [record()])
    old = pq.read_table(path).drop_columns("used").replace_schema_metadata({"colora.rollout_schema": "1"})
    pq.write_table(old.cast(pa.schema(list(SCHEMA)[:-1], metadata=old.schema.metadata)), path)
    assert bits(read_records(path)) == bits([record()])
    pq.write_table(old.drop_columns("extra"), path)
    with pytest.raises(ValueError, match="rollouts of schema version 1, this release reads"):
        read_records(path)
