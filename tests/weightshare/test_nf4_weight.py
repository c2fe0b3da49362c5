"""NF4 storage: projections quantised one by one as they load, little memory beside it, and clear refusals."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colora.kernels import nf4
from colora.rl.families import block_spec, model_layout
from colora.rl.policy import load
from colora.weightshare.nf4_weight import NF4Weight
from colora.weightshare.storage import DenseWeight
from colora.weightshare.weights import SharedWeights
from safetensors.torch import save_file
from transformers import LlamaConfig, PreTrainedConfig

from ..models import SMALL, merged_weight, random_lora, save_checkpoint, tiny_llama, tiny_model
from ..nf4_models import nf4_configs

CONFIGS = nf4_configs()


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_projections_are_quantised_apart_in_any_order() -> None:
    parts = {0: randn(70, 128, seed=1), 70: randn(260, 128, seed=2) * 10, 330: randn(5, 128, seed=3)}
    weight = NF4Weight([70, 260, 5], 128, torch.bfloat16, "cpu")
    for start in (330, 0, 70):
        weight.load_rows(start, parts[start])
    alone = [nf4.dequantize(nf4.quantize(rows), torch.bfloat16) for rows in parts.values()]
    assert torch.equal(weight.rows(0, 335), torch.cat(alone))
    assert torch.equal(weight.rows(60, 80), torch.cat(alone)[60:80])
    assert (weight.out_features, weight.in_features, weight.dtype) == (335, 128, torch.bfloat16)
    loaded = NF4Weight([70, 260, 5], 128, torch.bfloat16, "cpu")
    for start, rows in parts.items():
        loaded.load_nf4(start, nf4.quantize(rows))
    assert all(torch.equal(tensor, loaded.tensors()[name]) for name, tensor in weight.tensors().items())
    dense = DenseWeight.empty(335, 128, torch.bfloat16, "cpu")
    for start, rows in parts.items():
        dense.load_nf4(start, nf4.quantize(rows))
    assert torch.equal(dense.tensor, weight.rows(0, 335))


@pytest.mark.parametrize(("start", "rows"), [(0, 3), (1, 4), (4, 4), (8, 1)])
def test_a_piece_of_a_projection_is_refused(start: int, rows: int) -> None:
    weight = NF4Weight([4, 5], 64, torch.float32, "cpu")
    with pytest.raises(
        ValueError, match=rf"{rows} rows at row {start} are not one of its projections \(4 at 0, 5 at 4\)"
    ):
        weight.load_rows(start, torch.zeros(rows, 64))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_checkpoint_quantised_while_it_loads(name: str, tmp_path: Path) -> None:
    """The same from a directory, in shards, and from a model in memory; norms, embedding and head as they were."""
    model = tiny_model(CONFIGS[name])
    policy = load(save_checkpoint(model, tmp_path, "64KB"), random_lora(), device="cpu", seed=1, base="nf4")
    ours, state = dict(policy.weights.dense_parameters()), model.state_dict()
    for parameter, value in state.items():
        if parameter.endswith("proj.weight"):
            value = nf4.dequantize(nf4.quantize(value), torch.float32)
        assert torch.equal(ours[parameter], value), parameter
    in_memory = load(model, device="cpu", base="nf4")
    assert all(torch.equal(ours[key], value) for key, value in in_memory.weights.dense_parameters())
    assert {key: tuple(value.shape) for key, value in ours.items()} == policy.weights.parameter_shapes()
    linear = policy.weights.linears["model.layers.1.self_attn.qkv_proj"]
    part = linear.parts[1]
    a, b = linear.slot_of(part)
    expected = ours["model.layers.1.self_attn.k_proj.weight"] + b @ a
    torch.testing.assert_close(merged_weight(linear, part), expected, rtol=0, atol=1e-6)


def test_bytes_are_those_of_four_bits() -> None:
    weights = load(tiny_model(CONFIGS["qwen3"]), device="cpu", base="nf4").weights
    dense = load(tiny_model(CONFIGS["qwen3"]), device="cpu").weights
    quantised = sum(linear.weight.nbytes for linear in weights.linears.values())
    elements = sum(linear.weight.out_features * linear.weight.in_features for linear in weights.linears.values())
    assert 4.1 < 8 * quantised / elements < 5.5  # rows of 64 inputs have a byte of offsets and starts each 8 weights
    assert dense.nbytes - weights.nbytes == 4 * elements - quantised
    assert (weights.base, dense.base) == ("nf4", "dense")


def test_rows_that_are_no_multiple_of_64_are_named_before_anything_is_loaded(tmp_path: Path) -> None:
    directory = save_checkpoint(tiny_llama(), tmp_path)
    (directory / "model.safetensors").write_bytes(b"")
    message = r"model.layers.0.self_attn.q_proj.weight: NF4 needs rows that are a multiple of 64 weights, .* have 48"
    with pytest.raises(ValueError, match="truncated or corrupt"):
        load(directory, base="auto")
    with pytest.raises(ValueError, match=message):
        load(tiny_llama(), base="nf4")


def test_values_that_are_not_finite_are_named() -> None:
    model = tiny_model(CONFIGS["qwen3"])
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.up_proj.weight: NF4 holds finite weights only"):
        load(model, base="nf4")


def test_an_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="base='int4': choose auto, nf4 or fp4"):
        load(tiny_llama(), base="int4")


MEASURE = """
import json
import sys
from pathlib import Path
import torch
from colora.kernels import nf4
from colora.rl.policy import load

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

nf4.ROW_CHUNK_ELEMENTS = int(sys.argv[3])
load(sys.argv[2], device="cpu", dtype="bfloat16", base="nf4")  # what is imported and allocated once
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
before = resident("VmRSS")
weights = load(sys.argv[1], device="cpu", dtype="bfloat16", base="nf4").weights
print(json.dumps([resident("VmHWM") - before, weights.nbytes]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_the_four_bit_model_a_shard_and_a_chunk_of_rows(tmp_path: Path) -> None:
    """The host stands for a GPU here: what is dense is never there whole."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    dense_bytes, shard_bytes = write_zeros(LlamaConfig(**SMALL | sizes), tmp_path / "large", shards=8)
    write_zeros(LlamaConfig(**SMALL | {"hidden_size": 64}), tmp_path / "small", shards=1)
    chunk = 2**19
    command = [sys.executable, "-c", MEASURE, tmp_path / "large", tmp_path / "small", str(chunk)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, nf4_bytes = json.loads(run.stdout)
    chunk_bytes = 6 * 4 * chunk + 2**23  # in fp32: the weights, their magnitudes, scaled, their codes; and slack
    assert nf4_bytes < 0.28 * dense_bytes
    assert peak < nf4_bytes + shard_bytes + chunk_bytes < 0.8 * dense_bytes


def write_zeros(config: PreTrainedConfig, directory: Path, shards: int) -> tuple[int, int]:
    """A bf16 checkpoint of zeros; returns the bytes of its tensors and of its largest file."""
    config.save_pretrained(directory)
    shapes = SharedWeights.empty(model_layout(block_spec(config)), torch.bfloat16, "meta").parameter_shapes()
    files = {f"model-{index}.safetensors": sorted(shapes)[index::shards] for index in range(shards)}
    for file, names in files.items():
        save_file({name: torch.zeros(shapes[name], dtype=torch.bfloat16) for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    total = sum(2 * math.prod(shape) for shape in shapes.values())
    return total, max((directory / file).stat().st_size for file in files)


@pytest.mark.gpu
@pytest.mark.parametrize("placed", ["cpu", "cuda"])
def test_peak_gpu_memory_while_a_large_projection_is_quantised_and_used(placed: str) -> None:
    """gate_up of a 24B model: 671 MB in 16 bits. The bar is 1 GiB beside the 4-bit model."""
    rows, inputs = 32768, 5120
    gate_up = torch.randn(rows, inputs, device=placed, dtype=torch.bfloat16)
    x = torch.randn(512, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    weight = NF4Weight([rows, rows], inputs, torch.bfloat16, "cuda")
    weight.load_rows(0, gate_up)
    weight.load_rows(rows, gate_up)
    quantising = torch.cuda.max_memory_allocated() - before - weight.nbytes
    y = weight.linear(x)
    y.sum().backward()
    using = torch.cuda.max_memory_allocated() - before - weight.nbytes
    assert quantising < 2**29 and using < 2**29
    whole = weight.rows(0, 2 * rows)
    torch.testing.assert_close(y, x.detach() @ whole.T, rtol=0, atol=2.0)
    torch.testing.assert_close(x.grad, torch.ones_like(y) @ whole, rtol=0.02, atol=4.0)
