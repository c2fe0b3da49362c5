"""Checkpoints that bitsandbytes has quantised hold the same values here, bit for bit; what cannot be read says so."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.nn import Linear4bit, Params4bit
from colora.rl.policy import load
from colora.weightshare.nf4_weight import NF4Weight
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from ..models import save_checkpoint, tiny_model
from ..nf4_models import nf4_configs, quantised_model

CONFIGS = nf4_configs()
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module", params=CONFIGS)
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tiny_model(CONFIGS[request.param]), tmp_path_factory.mktemp(request.param))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One that a test may damage."""
    save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path / "dense")
    return save_checkpoint(quantised_model(tmp_path / "dense"), tmp_path / "quantised")


def decoded(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter by name, quantised ones as bitsandbytes decodes them."""
    values = {name: parameter.to(dtype) for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and isinstance(module.weight, Params4bit):  # not a tied head
            module.weight.quant_state.dtype = dtype
            values[f"{name}.weight"] = bnb.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_are_those_of_bitsandbytes(dense: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    model = quantised_model(dense)
    policy = load(save_checkpoint(model, tmp_path, "64KB"), dtype=dtype, device="cpu")
    assert len(list(tmp_path.glob("*.safetensors"))) >= 2  # pieces of one weight lie in different shards
    assert policy.weights.base == "nf4"
    assert all(isinstance(linear.weight, NF4Weight) for linear in policy.weights.linears.values())
    ours = dict(policy.weights.dense_parameters())
    for name, value in decoded(model, dtype).items():
        assert torch.equal(ours[name], value), name


def test_a_quantised_model_in_memory(dense: Path) -> None:
    model = quantised_model(dense)
    ours = dict(load(model, device="cpu").weights.dense_parameters())
    for name, value in decoded(model, torch.float32).items():
        assert torch.equal(ours[name], value), name


def test_names_of_a_multimodal_checkpoint(checkpoint: Path) -> None:
    expected = dict(load(checkpoint, device="cpu").weights.dense_parameters())
    file = checkpoint / "model.safetensors"
    renamed = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, {"format": "pt"})
    weights = load(checkpoint, device="cpu").weights
    assert all(isinstance(linear.weight, NF4Weight) for linear in weights.linears.values())
    assert all(torch.equal(expected[name], value) for name, value in weights.dense_parameters())


def test_modules_left_dense_stay_dense_and_fused_parts_agree(dense: Path, tmp_path: Path) -> None:
    """q and v in NF4 beside a dense k make one dense matrix, with the decoded values; a quantised head is decoded."""
    model = quantised_model(dense, llm_int8_skip_modules=["layers.0.self_attn.k_proj", "layers.1.mlp.down_proj"])
    policy = load(save_checkpoint(model, tmp_path), device="cpu", base="nf4")
    held = {name: type(linear.weight).__name__ for name, linear in policy.weights.linears.items()}
    left = {name for name, kind in held.items() if kind == "DenseWeight"}
    assert left == {"model.layers.0.self_attn.qkv_proj", "model.layers.1.mlp.down_proj"}
    ours = dict(policy.weights.dense_parameters())
    for name, value in decoded(model, torch.float32).items():
        assert torch.equal(ours[name], value), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, r"quantised \(bitsandbytes, fp4 in place of nf4\), which is not supported"),
        ({"bnb_4bit_use_double_quant": False}, r"quantised \(bitsandbytes, NF4 with scales of 32 bits"),
        ({"load_in_4bit": False, "load_in_8bit": True}, r"quantised \(bitsandbytes, 8 bits\)"),
        ({"quant_method": "gptq", "load_in_4bit": False}, r"quantised \(gptq\), which is not supported"),
        ({"quant_method": "mxfp4", "load_in_4bit": False}, r"quantised \(mxfp4\), which is not supported"),
    ],
)
def test_other_formats_are_named_with_what_is_supported(
    checkpoint: Path, settings: dict[str, Any], message: str
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= settings
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"{message}.*base='nf4'.*bnb_4bit_use_double_quant=True"):
        load(checkpoint)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"bnb_4bit_quant_type": "fp4"}, "proj.weight is stored in bitsandbytes' fp4"),
        ({"bnb_4bit_use_double_quant": False}, "proj.weight is stored in NF4 with scales of 32 bits"),
    ],
)
def test_tensors_of_other_formats_are_named_where_the_config_says_nothing(
    tmp_path: Path, option: dict[str, Any], message: str
) -> None:
    dense = save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path / "dense")
    directory = save_checkpoint(quantised_model(dense, **option), tmp_path / "quantised")
    (directory / "config.json").write_bytes((dense / "config.json").read_bytes())
    with pytest.raises(ValueError, match=rf"{message}.*which is not supported. Supported are"):
        load(directory)


def test_dense_weights_that_the_config_says_are_quantised(checkpoint: Path) -> None:
    """What is left where a model was decoded and saved again: nobody who asks for 4 bits is to train in 16 unawares."""
    dense = checkpoint.parent / "dense" / "model.safetensors"
    (checkpoint / "model.safetensors").write_bytes(dense.read_bytes())
    with pytest.raises(ValueError, match="says that the checkpoint is quantised to NF4, but none of its weights is"):
        load(checkpoint)


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Replace tensors, named without `.weight` parts' dots; None removes one."""
    file = directory / "model.safetensors"
    tensors = load_file(file) | {name: tensor for name, tensor in changes.items() if tensor is not None}
    save_file({n: t for n, t in tensors.items() if n not in changes or changes[n] is not None}, file, {"format": "pt"})


def with_state(directory: Path, **values: Any) -> dict[str, Tensor]:
    """The packed settings of q_proj, some of them changed."""
    name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"
    state = json.loads(bytes(load_file(directory / "model.safetensors")[name].tolist())) | values
    return {name: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)}


def test_missing_pieces_are_named(checkpoint: Path) -> None:
    rewrite(checkpoint, **{f"{Q_PROJ}.absmax": None, f"{Q_PROJ}.nested_quant_map": None})
    with pytest.raises(ValueError, match=rf"lacks absmax, nested_quant_map of {Q_PROJ}, which is in NF4; copy"):
        load(checkpoint)


def test_other_tables_block_sizes_and_shapes_are_refused(checkpoint: Path) -> None:
    original = load_file(checkpoint / "model.safetensors")
    rewrite(checkpoint, **{f"{Q_PROJ}.quant_map": original[f"{Q_PROJ}.quant_map"] * 0.5})
    with pytest.raises(ValueError, match=rf"{Q_PROJ}: its quant_map is not bitsandbytes' own"):
        load(checkpoint)
    rewrite(checkpoint, **original | with_state(checkpoint, blocksize=128))
    with pytest.raises(ValueError, match=rf"{Q_PROJ} is stored in NF4 with blocks of 128 weights and 256 scales"):
        load(checkpoint)
    rewrite(checkpoint, **original | with_state(checkpoint, shape=[256, 32], blocksize=64))
    with pytest.raises(ValueError, match=rf"{Q_PROJ} is stored in NF4 with rows of 32 weights: blocks of 64"):
        load(checkpoint)
    rewrite(checkpoint, **original | with_state(checkpoint, shape=[64, 128]))
    with pytest.raises(ValueError, match=rf"{Q_PROJ} has shape \(64, 128\) .* says \(128, 64\)"):
        load(checkpoint)
