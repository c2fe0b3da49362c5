"""Where a config comes from: this machine's cache, the table of known GPUs, a rule of thumb; what a cache survives."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a card or TRITON_INTERPRET=1", allow_module_level=True)

from colora.kernels import few_rows_tuning, fp4_tuning
from colora.kernels.few_rows_tuning import Tuning
from colora.kernels.fp4_few_rows import Config

SHAPE, GPU = (6144, 2560), "A GPU"
DEVICE = torch.device("cuda", 0)
SHAPES = [SHAPE, (19456, 2560), (2560, 9728), (128, 64), (896, 896)]


class _Properties:
    multi_processor_count = 132


class _Known(Tuning[Config]):
    """With the table of known GPUs where a test can write it."""

    @property
    def known(self) -> Path:
        return self.cache.with_name("known.json")


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuning[Config]:
    """Nothing is known yet, on a machine with a GPU; matrices are made on the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: _Properties)
    given = fp4_tuning.TUNING
    matrix = given.random_matrix(SHAPE, torch.device("cpu"))
    made = _Known("fp4", Config, given.rows, given.candidates, lambda shape, device: matrix, given.launch)
    made.cache.parent.mkdir()
    return made


def write(path: Path, gpu: str, config: Config) -> None:
    path.write_text(json.dumps({gpu: {"6144x2560": {"8": asdict(config)}}}))


def test_the_order_of_the_sources(tuning: Tuning[Config]) -> None:
    thumb = tuning.candidates(SHAPE, 8, 132)[0]

    def chosen() -> Config:
        tuning._found.clear()
        return tuning.chosen(DEVICE, SHAPE, 8)

    assert chosen() == thumb
    write(tuning.known, GPU, replace(thumb, splits=7))
    assert chosen().splits == 7
    write(tuning.cache, f"{GPU}, Triton another version", replace(thumb, splits=8))
    assert chosen().splits == 7, "another Triton's measurements do not count"
    write(tuning.cache, few_rows_tuning._machine(GPU), replace(thumb, splits=9))
    assert chosen().splits == 9
    assert tuning.chosen(DEVICE, SHAPE, 16) == tuning.candidates(SHAPE, 16, 132)[0], "measured for 8 rows"


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": {"b": {"8": {"outs": 64}}}}', "\xff"], ids=repr)
def test_a_corrupt_cache_is_ignored_and_written_anew(
    tuning: Tuning[Config], monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    tuning.cache.write_bytes(content.encode("latin-1"))
    with pytest.warns(UserWarning, match="is not a table of fp4 configs and is ignored"):
        assert tuning.chosen(DEVICE, SHAPE, 8) == tuning.candidates(SHAPE, 8, 132)[0]
    best = tuning.candidates(SHAPE, 8, 132)[5]
    monkeypatch.setattr(tuning, "microseconds", lambda x, copies, config: float(config != best))
    monkeypatch.setattr(torch, "randn", lambda *shape, device: torch.zeros(shape))
    with pytest.warns(UserWarning, match="is ignored"):
        table = tuning.tune([SHAPE], torch.bfloat16, DEVICE)
    assert set(table["6144x2560"]) == {str(rows) for rows in tuning.rows}
    measured = tuning.chosen(DEVICE, SHAPE, 8)
    assert asdict(measured) == table["6144x2560"]["8"] and measured == best
    assert list(tuning.cache.parent.iterdir()) == [tuning.cache], "a file left behind"
    monkeypatch.setattr(tuning, "microseconds", lambda x, copies, config: pytest.fail("measured again"))
    tuning.tune_unknown([SHAPE], torch.bfloat16, DEVICE)


@pytest.mark.parametrize("rows", fp4_tuning.TUNING.rows)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_candidates_can_be_launched(shape: tuple[int, int], rows: int) -> None:
    found = fp4_tuning.candidates(shape, rows, 132)
    assert len(set(found)) == len(found) > 0
    for config in found:
        if config.sharing:
            assert config.outs * config.sharing >= 16 * config.warps, "a warp multiplies 16 rows at least"
            assert config.warps % config.sharing == 0
        else:
            assert config.warps % 4 == 0, "warps multiply together by fours"
        assert 1 <= config.splits <= shape[1] // 64, "a split has a chunk at least"
