"""Checkpoints: sharded, streamed, and every way one can be broken."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from colora.rl.policy import load
from colora.weightshare.loading import checkpoint_directory, load_weights, read_checkpoint, read_config
from colora.weightshare.weights import ModelLayout, SharedWeights
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel, Qwen2Config

from ..models import SMALL, save_checkpoint, tiny_llama, tiny_model

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_llama()


@pytest.fixture
def sharded(model: PreTrainedModel, tmp_path: Path) -> Path:
    return save_checkpoint(model, tmp_path / "sharded", "64KB")


def empty_weights(model: PreTrainedModel) -> SharedWeights:
    return SharedWeights.empty(model_layout(block_spec(model.config)), torch.float32, "cpu")


def assert_holds(weights: SharedWeights, model: PreTrainedModel) -> None:
    stored = dict(weights.dense_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(stored.pop(name), parameter), name
    assert set(stored) <= {"lm_head.weight"}


def test_shards_land_in_the_rows_of_the_fused_projections(model: PreTrainedModel, sharded: Path):
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    assert_holds(load(str(sharded)).weights, model)


def test_one_file_is_read_as_well(model: PreTrainedModel, tmp_path: Path):
    assert_holds(load(save_checkpoint(model, tmp_path)).weights, model)


def test_biases_and_tied_heads_are_loaded(tmp_path: Path):
    model = tiny_model(Qwen2Config(**SMALL, tie_word_embeddings=True))
    weights = load(save_checkpoint(model, tmp_path)).weights
    assert_holds(weights, model)
    assert weights.head.data_ptr() == weights.embedding.data_ptr()


def test_a_bf16_checkpoint_is_widened_on_the_cpu(tmp_path: Path):
    model = tiny_model(LlamaConfig(**SMALL), dtype=torch.bfloat16)
    weights = load(save_checkpoint(model, tmp_path)).weights
    assert weights.dtype == torch.float32
    assert_holds(weights, model.float())


def test_tensors_of_other_towers_and_missing_prefixes_are_understood(model: PreTrainedModel):
    plain = {name.removeprefix("model."): tensor for name, tensor in model.state_dict().items()}
    extra = {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6), "vision_tower.a.weight": torch.ones(2)}
    weights = empty_weights(model)
    load_weights(weights, (plain | extra).items())
    assert_holds(weights, model)


def changed(model: PreTrainedModel, **changes: Tensor | None) -> dict[str, Tensor]:
    """The model's tensors, some replaced, added or (None) removed."""
    tensors = dict(model.state_dict()) | changes
    return {name: tensor for name, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.layers.1.mlp.up_proj.weight": None}, "lacks 1 tensors .*: model.layers.1.mlp.up_proj.weight; it is"),
        ({"model.norm.weight": torch.ones(47)}, r"model.norm.weight has shape \(47,\) in the checkpoint, .* \(48,\)"),
        ({"model.layers.0.self_attn.k_proj.weight": torch.ones(48, 24)}, r"shape \(48, 24\) .* says \(24, 48\)"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, "1 tensors that its config.json does not describe"),
        (
            {"model.norm.weight": torch.ones(48, dtype=torch.uint8)},
            "torch.uint8, a quantised format that is not known. Supp",
        ),
        ({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, "float8_e4m3fn, a quantised format"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(model: PreTrainedModel, changes: dict[str, Tensor | None], message: str):
    with pytest.raises(ValueError, match=message):
        load_weights(empty_weights(model), changed(model, **changes).items())


def test_only_some_of_many_missing_tensors_are_listed(model: PreTrainedModel):
    with pytest.raises(ValueError, match=r"lacks 21 tensors that.*input_layernorm.weight, .* and 16 more; it is"):
        load_weights(empty_weights(model), [])


def test_a_tied_head_that_differs_is_refused():
    model = tiny_model(LlamaConfig(**SMALL, tie_word_embeddings=True))
    embedding = model.state_dict()["model.embed_tokens.weight"]
    same = changed(model, **{"lm_head.weight": embedding.clone()})
    load_weights(empty_weights(model), same.items())
    with pytest.raises(ValueError, match="the checkpoint's differ; set its tie_word_embeddings to false"):
        load_weights(empty_weights(model), (same | {"lm_head.weight": embedding + 1}).items())


def test_a_missing_shard_is_named(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"1 of \d+ shards are missing \({shard.name}\); copy or download"):
        load(sharded)


@pytest.mark.parametrize("damage", ["truncated", "overwritten", "empty"])
def test_a_damaged_shard_is_named(sharded: Path, damage: str):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    content = shard.read_bytes()
    shard.write_bytes({"truncated": content[:-100], "overwritten": b"\xff" * len(content), "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated or corrupt \(.*\); copy or download it again"):
        load(sharded)


def test_an_incomplete_shard_is_noticed(sharded: Path):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    dropped = sorted(tensors)[0]
    save_file({name: tensor for name, tensor in tensors.items() if name != dropped}, shard)
    with pytest.raises(ValueError, match=f"lacks 1 tensors that its config.json describes: {dropped}"):
        load(sharded)


def test_directories_without_a_checkpoint_are_refused(sharded: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="config.json is missing: the directory holds no transformers checkpoint"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"checkpoint directory .*nowhere does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"is a file; pass the checkpoint's directory"):
        load(sharded / "config.json")
    for file in sharded.glob("model*"):
        file.unlink()
    with pytest.raises(ValueError, match=f"has no weights: neither model.safetensors nor {INDEX}"):
        load(sharded)
    (sharded / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"PyTorch pickles but no safetensors; convert it once with .*save_pretrained"):
        load(sharded)


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(("text", "message"), [("{", "is not valid JSON"), ("[1]", "holds a JSON list, not an object")])
def test_broken_json_is_named(sharded: Path, name: str, text: str, message: str):
    (sharded / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} {message}.*copy or download it again"):
        load(sharded)


def test_quantised_checkpoints_are_refused(sharded: Path):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ValueError, match=r"the checkpoint is quantised \(gptq\), which is not supported"):
        read_config(sharded)


def test_hub_ids_come_from_the_cache_and_else_explain_themselves(
    sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for unreadable in ("someone/something", "no such name"):
        with pytest.raises(ValueError, match=f"'{unreadable}' is neither a directory nor a repository of the Hugging"):
            checkpoint_directory(unreadable)
    repository = tmp_path / "cache" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    sharded.rename(repository / "snapshots" / ("0" * 40))
    assert len(dict(read_checkpoint(checkpoint_directory("someone/something")))) == 21


MEASURE = """
import pickle
import sys
from pathlib import Path
import torch
from colora.weightshare.loading import load_weights, read_checkpoint
from colora.weightshare.weights import SharedWeights

def resident(field):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024

def peak(tensors_of):
    weights = SharedWeights.empty(layout, torch.float32, "cpu")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from what is resident
    before = resident("VmRSS")
    load_weights(weights, tensors_of(sys.argv[1]))
    return resident("VmHWM") - before

layout = pickle.loads(Path(sys.argv[2]).read_bytes())
print(peak(read_checkpoint), peak(lambda directory: [(n, t.clone()) for n, t in read_checkpoint(directory)]))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_host_memory_is_the_model_and_one_shard(tmp_path: Path):
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8, "vocab_size": 16384}
    layout = model_layout(block_spec(LlamaConfig(**SMALL | sizes)))
    (tmp_path / "layout").write_bytes(pickle.dumps(layout))
    model_bytes, shard_bytes = write_zeros(layout, tmp_path, shards=6)
    assert model_bytes > 150 * 2**20 and model_bytes > 3 * shard_bytes
    command = [sys.executable, "-c", MEASURE, tmp_path, tmp_path / "layout"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    streamed, hoarded = (int(number) for number in run.stdout.split())
    slack = 8 * 2**20
    assert model_bytes - slack < streamed < model_bytes + shard_bytes + slack
    assert hoarded > 2 * model_bytes - slack  # the same measurement sees a loader that keeps every shard


def write_zeros(layout: ModelLayout, directory: Path, shards: int) -> tuple[int, int]:
    """A checkpoint of zeros; returns the bytes of its tensors and of its largest file."""
    parameters = SharedWeights.empty(layout, torch.float32, "cpu").dense_parameters()
    tensors = {name: torch.zeros(parameter.shape) for name, parameter in parameters}
    files = {f"model-{index}.safetensors": sorted(tensors)[index::shards] for index in range(shards)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return sum(t.nbytes for t in tensors.values()), max((directory / file).stat().st_size for file in files)
