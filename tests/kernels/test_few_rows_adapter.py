"""The adapter within the products of few rows: how many programs it takes, and what it refuses."""

import os

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a card or TRITON_INTERPRET=1", allow_module_level=True)

from colora.kernels.few_rows_adapter import Adapter, adapter_programs, counters


def adapter(ranks: int, in_features: int) -> Adapter:
    return Adapter(torch.zeros(ranks, in_features), torch.zeros(64, 16), [(0, 64, 16, 0)])


@pytest.mark.parametrize(
    ("rows", "ranks", "in_features", "programs"),
    [
        pytest.param(8, 16, 256, 1, id="one"),
        pytest.param(8, 16, 2304 + 64, 10, id="pieces_of_256_columns"),
        pytest.param(8, 40, 256, 3, id="tiles_of_16_ranks"),
        pytest.param(70, 48, 2560, 60, id="tiles_of_64_rows"),
    ],
)
def test_programs_cover_every_rank_row_and_column(rows: int, ranks: int, in_features: int, programs: int) -> None:
    found, arguments = adapter_programs(torch.zeros(rows, in_features), adapter(ranks, in_features))
    assert found == programs == arguments["pieces"] * arguments["groups"]
    assert arguments["u"].shape == (rows, ranks)
    assert [arguments[name] for name in ("start0", "stop0", "a0", "b0")] == [0, 64, 16, 0]
    assert arguments["start1"] == arguments["stop1"] == 0, "no columns are of a part that is not there"


def test_no_programs_without_an_adapter() -> None:
    programs, arguments = adapter_programs(torch.zeros(8, 256), None)
    assert programs == arguments["pieces"] * arguments["groups"] == 0
    assert not arguments["ADAPTED"]


def test_more_ranks_than_there_are_counters_for() -> None:
    with pytest.raises(ValueError, match="131072 rows of A are too many for one launch, which takes 32752"):
        adapter_programs(torch.zeros(64, 64), adapter(2**17, 64))


def test_counters_are_not_made_during_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="first 4-bit product on a device cannot be captured"):
        counters(torch.device("cuda", 77))
