"""Where a config comes from: this machine's cache, the table of known GPUs, a rule of thumb; what a cache survives."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a card or TRITON_INTERPRET=1", allow_module_level=True)

from colora.kernels import few_rows_tuning, fp4_tuning, nf4_tuning
from colora.kernels.few_rows_tuning import Tuning

SHAPE, GPU = (6144, 2560), "A GPU"
DEVICE = torch.device("cuda", 0)
SHAPES = [SHAPE, (19456, 2560), (24576, 4096), (2560, 9728), (1152, 896), (896, 896), (128, 64), (64, 64)]
KERNELS = {kernel.name: kernel for kernel in (fp4_tuning.TUNING, nf4_tuning.TUNING)}
BAD_TABLES = ["", "{", "[1]", '{"a": 1}', '{"a": {"b": {"8": {"outs": 64}}}}', "\xff"]


class _Properties:
    multi_processor_count = 132


class _Known(Tuning[Any]):
    """With the table of known GPUs where a test can write it."""

    @property
    def known(self) -> Path:
        return self.cache.parent.with_name("known.json")


@pytest.fixture(params=KERNELS)
def tuning(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuning[Any]:
    """Of either kernel, on a machine with a GPU where nothing is known yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    given = KERNELS[request.param]
    return _Known(
        given.name, given.config, given.dtypes, given.rows, given.candidates, given.random_matrix, given.launch
    )


def thumb(tuning: Tuning[Any], rows: int = 8) -> Any:
    return tuning.candidates(SHAPE, rows, 132)[0]


def write(path: Path, gpu: str, config: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({gpu: {"6144x2560": {"8": asdict(config)}}}))


def chosen(tuning: Tuning[Any], rows: int = 3) -> Any:
    tuning._found.clear()
    return tuning.chosen(DEVICE, SHAPE, rows)


def tune_on_the_cpu(tuning: Tuning[Any], monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    """The fastest by made-up times: the candidate with the most splits, and of those the first."""
    monkeypatch.setattr(tuning, "microseconds", lambda x, copies, config: 10.0 - config.splits)
    monkeypatch.setattr(few_rows_tuning, "ROTATED_BYTES", 0)
    found = tuning.tune([SHAPE], torch.bfloat16, torch.device("cpu"), **more)
    assert set(found["6144x2560"]) == {str(rows) for rows in tuning.rows}
    return tuning.config(**found["6144x2560"]["8"])


def test_the_order_of_the_sources(tuning: Tuning[Any]) -> None:
    first = thumb(tuning)
    assert chosen(tuning) == first
    write(tuning.known, GPU, replace(first, splits=7))
    assert chosen(tuning).splits == 7
    write(tuning.cache, f"{GPU}, Triton another version", replace(first, splits=8))
    assert chosen(tuning).splits == 7, "another Triton's measurements do not count"
    write(tuning.cache, few_rows_tuning._machine(GPU), replace(first, splits=9))
    assert chosen(tuning).splits == 9
    assert chosen(tuning, rows=9) == thumb(tuning, 16), "measured for at most 8 rows"


@pytest.mark.parametrize("content", BAD_TABLES, ids=repr)
def test_a_corrupt_cache_is_ignored_and_written_anew(
    tuning: Tuning[Any], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    tuning.cache.parent.mkdir()
    tuning.cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match=f"is not a table of {tuning.name} configs and is ignored"):
        assert chosen(tuning) == thumb(tuning)
    with pytest.warns(UserWarning, match="is ignored"):
        best = tune_on_the_cpu(tuning, monkeypatch)
    assert chosen(tuning) == best
    assert list(tuning.cache.parent.iterdir()) == [tuning.cache], "no file left behind"


def test_what_was_measured_is_remembered_and_not_measured_again(
    tuning: Tuning[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = tuning.chosen(DEVICE, SHAPE, 8)
    measured = []

    def report(shape: tuple[int, int], rows: int, times: dict[Any, float]) -> None:
        measured.append((shape, rows, len(times)))

    best = tune_on_the_cpu(tuning, monkeypatch, report=report)
    assert best.splits == max(config.splits for config in tuning.candidates(SHAPE, 8, 132))
    assert measured == [(SHAPE, rows, len(tuning.candidates(SHAPE, rows, 132))) for rows in tuning.rows]
    assert tuning.chosen(DEVICE, SHAPE, 8) == best != before, "what was looked up before is forgotten"
    assert tune_on_the_cpu(tuning, monkeypatch, report=lambda *_: pytest.fail("measured again")) == best


def test_an_engine_that_starts_measures_only_what_nothing_is_known_of(
    tuning: Tuning[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tuning.known, GPU, replace(thumb(tuning), splits=7))
    asked: list[list[tuple[int, int]]] = []
    monkeypatch.setattr(tuning, "tune", lambda shapes, dtype, device: asked.append(list(shapes)) or {})
    tuning.tune_unknown([SHAPE, (64, 128)], torch.bfloat16, DEVICE)
    assert asked == [[(64, 128)]]
    tuning.tune_unknown([SHAPE, (64, 128)], torch.float32, DEVICE)
    assert asked == [[(64, 128)]], "the kernel does not multiply fp32"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, rows", [(name, rows) for name, kernel in KERNELS.items() for rows in kernel.rows])
def test_candidates_can_be_launched(name: str, rows: int, shape: tuple[int, int]) -> None:
    found = KERNELS[name].candidates(shape, rows, 132)
    assert len(set(found)) == len(found) > 0
    for config in found:
        assert config.outs >= 16 * config.warps, "a warp multiplies 16 rows of W at least"
        assert not config.together or config.warps % 4 == 0, "warps multiply together by fours"
        assert 1 <= config.splits <= shape[1] // 64, "a split has 64 columns at least"


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_the_committed_table_can_be_read(kernel: Tuning[Any]) -> None:
    assert kernel._read(kernel.known), "read without a warning"
