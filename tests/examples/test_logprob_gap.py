"""benchmarks/logprob_gap.py but for its runs on a card: the policies that it compares, and its figures."""

import importlib
import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from colora.rl.policy import load
from transformers import AutoModelForCausalLM

from ..nf4_models import nf4_configs


@pytest.fixture
def gap(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    return importlib.import_module("logprob_gap")


@pytest.mark.parametrize("base", ["nf4", "fp4"])
def test_the_peer_holds_the_base_s_values(gap: ModuleType, tmp_path: Path, base: str) -> None:
    torch.manual_seed(0)
    dense = tmp_path / "dense"
    AutoModelForCausalLM.from_config(nf4_configs()["qwen3"]).bfloat16().save_pretrained(dense)
    peer = load(gap.values_in_bf16(dense, base, tmp_path / "peer", "cpu"), dtype=torch.bfloat16).weights
    ours = load(dense, base=base, dtype=torch.bfloat16).weights
    assert len(ours.linears) == len(peer.linears) == 8
    for name, linear in ours.linears.items():
        everything = 0, linear.weight.out_features
        assert torch.equal(linear.weight.rows(*everything), peer.linears[name].weight.rows(*everything)), name


def test_bars_and_peers_are_of_the_same_run(gap: ModuleType, tmp_path: Path) -> None:
    report = gap.Report("logprob_gap", Namespace(results=tmp_path, commit="abc"), on_cpu=True)
    gap.add_figures(report, {"auto": [0.02, 0.022], "nf4": [0.022, 0.022], "fp4": [0.019, 0.021]}, {"nf4": [0.025]})
    verdict = importlib.import_module("table").verdict
    assert [(row["figure"], row["value"], row.get("bar"), verdict(row), row.get("peers")) for row in report.rows] == [
        ("bf16.logprob_gap.4b", 0.021, None, "", None),
        ("nf4.logprob_gap.4b", 0.022, 0.021, "missed", {"nf4's values in bf16": 0.025}),
        ("fp4.logprob_gap.4b", 0.02, 0.021, "met", None),
    ]


def test_what_is_measured_ahead_of_a_failure_is_kept(gap: ModuleType, tmp_path: Path) -> None:
    def of_base(base: str) -> list[float]:
        if base == "fp4":
            raise RuntimeError("out of memory")
        return [0.02]

    report = gap.Report("logprob_gap", Namespace(results=tmp_path, commit="abc"), on_cpu=True)
    with pytest.raises(RuntimeError, match="out of memory"):
        gap.measure(report, ["nf4", "fp4"], of_base, of_base, at_once=2)
    rows = json.loads((tmp_path / "logprob_gap.json").read_text())["rows"]
    assert [row["figure"] for row in rows] == ["bf16.logprob_gap.4b", "nf4.logprob_gap.4b"]
