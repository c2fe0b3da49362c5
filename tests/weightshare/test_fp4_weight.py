"""FP4 storage: rows quantised as they load, from disk or from a model in memory, and clear refusals."""

from pathlib import Path

import pytest
import torch
from colora.kernels import fp4, nf4
from colora.rl.policy import load
from colora.weightshare.base_format import FP4, base_format
from colora.weightshare.fp4_weight import FP4Weight
from colora.weightshare.memory import nf4_saves

from ..models import random_lora, save_checkpoint, tiny_llama, tiny_model
from ..nf4_models import nf4_configs, quantised_model

CONFIGS = nf4_configs()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_rows_are_quantised_in_any_order_and_pieces() -> None:
    whole = randn(335, 128) * torch.logspace(-2, 2, 335)[:, None]
    weight = FP4Weight([70, 260, 5], 128, torch.bfloat16, "cpu")
    for start, stop in ((330, 335), (0, 50), (50, 330)):
        weight.load_rows(start, whole[start:stop])
    decoded = fp4.dequantize(fp4.quantize(whole), torch.bfloat16)
    assert torch.equal(weight.rows(0, 335), decoded)
    assert torch.equal(weight.rows(60, 80), decoded[60:80])
    assert (weight.out_features, weight.in_features, weight.dtype) == (335, 128, torch.bfloat16)
    x = randn(3, 128).bfloat16()
    torch.testing.assert_close(weight.linear(x), x @ decoded.T, rtol=0.02, atol=0.5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_quantised_while_it_loads(name: str, tmp_path: Path) -> None:
    """The same from a directory, in shards, and from a model in memory; norms, embedding and head as they were."""
    model = tiny_model(CONFIGS[name])
    policy = load(save_checkpoint(model, tmp_path, "64KB"), random_lora(), device="cpu", seed=1, base="fp4")
    ours = dict(policy.weights.dense_parameters())
    for parameter, value in model.state_dict().items():
        if parameter.endswith("proj.weight"):
            value = fp4.dequantize(fp4.quantize(value), torch.float32)
        assert torch.equal(ours[parameter], value), parameter
    in_memory = load(model, device="cpu", base="fp4").weights
    assert all(torch.equal(ours[key], value) for key, value in in_memory.dense_parameters())
    assert in_memory.base == "fp4"
    dense = load(model, device="cpu").weights
    quantised = sum(linear.weight.nbytes for linear in in_memory.linears.values())
    elements = sum(linear.weight.out_features * linear.weight.in_features for linear in in_memory.linears.values())
    assert dense.nbytes - in_memory.nbytes == 4 * elements - quantised
    assert 4.25 < 8 * quantised / elements <= 4.75  # rows of 64 inputs have half a bit of their own each weight
    assert nf4_saves(in_memory.layout, torch.float32, FP4) == 0


def test_what_cannot_be_held_is_named_before_anything_is_loaded(tmp_path: Path) -> None:
    message = r"model.layers.0.self_attn.q_proj.weight: FP4 needs rows that are a multiple of 64 weights, .* have 48"
    with pytest.raises(ValueError, match=message):
        load(tiny_llama(), base="fp4")


def test_values_that_are_not_finite_are_named() -> None:
    model = tiny_model(CONFIGS["qwen3"])
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: FP4 holds finite weights only"):
        load(model, base="fp4")


def test_a_checkpoint_in_nf4_is_not_quantised_again(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path / "dense")
    directory = save_checkpoint(quantised_model(tmp_path / "dense"), tmp_path / "quantised")
    with pytest.raises(ValueError, match="base='fp4', but the checkpoint is quantised to NF4, and would lose a second"):
        load(directory, device="cpu", base="fp4")
    with pytest.raises(ValueError, match="set base='auto'"):
        FP4Weight([2], 64, torch.float32, "cpu").load_nf4(0, nf4.quantize(randn(2, 64)))
    assert base_format("fp4", ()) is FP4
