"""Where a config comes from: this machine's cache, the table of known GPUs, a rule of thumb; what a cache survives."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a card or TRITON_INTERPRET=1", allow_module_level=True)

from colora.kernels import few_rows_tuning, nf4_tuning
from colora.kernels.few_rows_tuning import Tuning
from colora.kernels.nf4_few_rows import Config

SHAPE, GPU = (6144, 2560), "A GPU"
DEVICE = torch.device("cuda", 0)
FIELDS = {"outs": 64, "warps": 4, "sharing": 1, "blocks": 4, "buffers": 2, "registers": None, "splits": 5}


class _Properties:
    multi_processor_count = 132


class _Known(Tuning[Config]):
    """With the table of known GPUs where a test can write it."""

    @property
    def known(self) -> Path:
        return self.cache.parent.parent / "known.json"


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """(the cache, the known table), neither there yet, on a machine with a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    given = nf4_tuning.TUNING
    made = _Known("nf4", Config, [8], given.candidates, given.random_matrix, given.launch)
    monkeypatch.setattr(nf4_tuning, "TUNING", made)
    return tmp_path / "cache" / "colora" / "nf4_linear.json", made.known


def thumb(rows: int = 8) -> Config:
    return nf4_tuning.candidates(SHAPE, rows, 132)[0]


def write(path: Path, gpu: str, splits: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({gpu: {"6144x2560": {"8": FIELDS | {"splits": splits}}}}))


def chosen(rows: int = 3) -> Config:
    nf4_tuning.TUNING._found.clear()
    return nf4_tuning.chosen(DEVICE, SHAPE, rows)


def test_the_order_of_the_sources(files: tuple[Path, Path]) -> None:
    cache, known = files
    assert chosen() == thumb()
    write(known, GPU, splits=7)
    assert chosen().splits == 7
    write(cache, f"{GPU}, Triton another version", splits=8)
    assert chosen().splits == 7, "another Triton's measurements do not count"
    write(cache, few_rows_tuning._machine(GPU), splits=9)
    assert chosen().splits == 9
    assert chosen(rows=9) == thumb(16), "measured for at most 8 rows"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', '{"a": {"b": {"8": {"outs": 64}}}}', "\xff"], ids=repr)
def test_a_corrupt_cache_is_ignored_and_written_anew(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    cache, _ = files
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="is ignored"):
        assert chosen() == thumb()
    with pytest.warns(UserWarning, match="is ignored"):
        best = tune_on_the_cpu(monkeypatch)
    assert chosen() == best
    assert list(cache.parent.iterdir()) == [cache], "no file left behind"


def tune_on_the_cpu(monkeypatch: pytest.MonkeyPatch, **more: Any) -> Config:
    """The fastest by made-up times: the candidate with the most splits, and of those the first."""
    monkeypatch.setattr(nf4_tuning.TUNING, "microseconds", lambda x, copies, config: 10.0 - config.splits)
    monkeypatch.setattr(few_rows_tuning, "ROTATED_BYTES", 0)
    found = nf4_tuning.TUNING.tune([SHAPE], torch.float16, torch.device("cpu"), **more)
    return Config(**found["6144x2560"]["8"])


def test_what_was_measured_is_remembered_and_not_measured_again(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    best = tune_on_the_cpu(monkeypatch, report=lambda shape, rows, times: measured.append((shape, rows, len(times))))
    assert best.splits == max(config.splits for config in nf4_tuning.candidates(SHAPE, 8, 132))
    assert measured == [(SHAPE, 8, len(nf4_tuning.candidates(SHAPE, 8, 132)))]
    assert chosen() == best
    assert tune_on_the_cpu(monkeypatch, report=lambda *_: pytest.fail("measured again")) == best


def test_an_engine_that_starts_measures_only_what_nothing_is_known_of(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(files[1], GPU, splits=7)
    asked: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(nf4_tuning.TUNING, "tune", lambda shapes, dtype, device: asked.append(list(shapes)) or {})
    nf4_tuning.tune_unknown([SHAPE, (64, 128)], torch.bfloat16, DEVICE)
    assert asked == [[(64, 128)]]


@pytest.mark.parametrize("rows", nf4_tuning.TUNING.rows)
@pytest.mark.parametrize("shape", [(64, 64), (2560, 9728), (24576, 4096), (1152, 896)], ids=str)
def test_configs_are_possible(shape: tuple[int, int], rows: int) -> None:
    for config in nf4_tuning.candidates(shape, rows, 132):
        assert config.outs % (16 * config.warps) == 0
        assert 1 <= config.splits <= shape[1] // 64


def test_the_committed_table_can_be_read() -> None:
    if nf4_tuning.TUNING.known.exists():
        assert nf4_tuning.TUNING._read(nf4_tuning.TUNING.known), "read without a warning"
