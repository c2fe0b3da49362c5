"""Training on an NF4 base: it learns as on a dense one, resumes exactly, and its adapter is PEFT's for that base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from colora import GRPOConfig, GRPOTrainer, load
from colora.rl.checkpoint import BASE_FILE
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, TrainerCallback

from ..models import next_token_rows, plain_logprobs, random_sequences
from ..nf4_models import quantised_model
from ..run_files import assert_same_run, tensors_of
from ..tiny_runs import tiny_checkpoint, tiny_config, tiny_tokenizer
from ..vllm_engines import VLLM_MARKS

NF4_OPTIONS: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": True}
ENGINES = ["transformers", pytest.param("vllm", marks=VLLM_MARKS)]


class Stopped(Exception):
    pass


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise Stopped


def decoded_model(dense: Path) -> PreTrainedModel:
    """transformers' model with every linear as bitsandbytes decodes it. Its own products are in bf16 on some CPUs."""
    model = AutoModelForCausalLM.from_pretrained(dense)
    for linear in model.model.modules():
        if isinstance(linear, nn.Linear):
            linear.weight.data = bnb.dequantize_4bit(*bnb.quantize_4bit(linear.weight.data, **NF4_OPTIONS))
    return model


def config_for_nf4() -> PreTrainedConfig:
    config = tiny_config()
    config.hidden_size, config.intermediate_size = 64, 64
    return config


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), config_for_nf4())


@pytest.fixture(scope="module")
def quantised(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("quantised")
    quantised_model(dense).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def threes(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [sum(token % 3 == 0 for token in ids) / len(ids) for ids in completion_ids]


def make(model: Path, output: Path, callbacks: list[TrainerCallback] | None = None, **options: Any) -> GRPOTrainer:
    defaults = {
        "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 10, "max_steps": 4,
        "learning_rate": 3e-3, "report_to": [], "save_steps": 1, "device": "cpu", "disable_tqdm": True,
    }  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["12+34=", "5+6=", "70+8=", "a b"]})
    lora = LoraConfig(r=32, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    args = GRPOConfig(str(output), **(defaults | options))
    return GRPOTrainer(str(model), threes, args, rows, callbacks=callbacks, peft_config=lora)


def rewards(trainer: GRPOTrainer) -> list[float]:
    return [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]


@pytest.mark.parametrize("base", ["nf4", "auto"])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_learns(engine: str, base: str, dense: Path, tmp_path: Path) -> None:
    options = {"max_steps": 10, "per_device_train_batch_size": 16, "learning_rate": 1e-2, "save_strategy": "no"}
    trainer = make(dense, tmp_path, engine=engine, base=base, **options)
    try:
        assert (trainer.policy.weights.base == "nf4") == (base == "nf4")
        trainer.train()
    finally:
        trainer.engine.close()
    found = rewards(trainer)
    assert sum(found[-3:]) / 3 > sum(found[:3]) / 3 + 0.2
    gaps = [entry["parity/mean_abs"] for entry in trainer.state.log_history if "parity/mean_abs" in entry]
    assert max(gaps) < 1e-5


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_a_pre_quantised_checkpoint_and_peft_on_it(
    dense: Path, quantised: Path, tmp_path: Path, gradient_checkpointing: bool
) -> None:
    """PEFT, with the saved adapter on the weights as bitsandbytes decodes them, computes the policy's log-probs."""
    trainer = make(quantised, tmp_path, gradient_checkpointing=gradient_checkpointing, mlp_tile_tokens=16, max_steps=2)
    trainer.train()
    saved = tmp_path / "checkpoint-2"
    assert json.loads((saved / BASE_FILE).read_text()) == {"model": str(quantised), "format": "nf4"}
    assert json.loads((saved / "adapter_config.json").read_text())["base_model_name_or_path"] == str(quantised)
    sequences = random_sequences([9, 20], 40)
    with torch.no_grad():
        ours, _ = trainer.policy.logprobs(*next_token_rows(sequences))
        peft_model = PeftModel.from_pretrained(decoded_model(dense), saved).eval()
        torch.testing.assert_close(plain_logprobs(peft_model, sequences), ours, rtol=0, atol=1e-4)
        peft_model.disable_adapter_layers()
        assert (plain_logprobs(peft_model, sequences) - ours).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_8bit", "paged_adamw_8bit"])
def test_resumed_equals_never_stopped(optim: str, dense: Path, tmp_path: Path) -> None:
    """Also with bitsandbytes' optimizers: a checkpoint has their 8-bit moments, and their steps publish the adapter."""
    options = {"base": "nf4", "optim": optim, "learning_rate": 1e-3}
    whole = make(dense, tmp_path / "whole", **options)
    whole.train()
    assert whole.adapter.is_published()
    assert any(parameter.abs().max() > 0 for parameter in whole.adapter.masters_b)
    with pytest.raises(Stopped):
        make(dense, tmp_path / "stopped", [StopAfter(2)], **options).train()
    make(dense, tmp_path / "stopped", **options).train(resume_from_checkpoint=True)
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    if optim.endswith("8bit"):
        states = torch.load(tmp_path / "whole" / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
        assert any(tensor.dtype == torch.uint8 for tensor in tensors_of(states))


def test_going_on_with_another_base_is_refused(dense: Path, tmp_path: Path) -> None:
    make(dense, tmp_path, base="nf4", max_steps=1).train()
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    message = r"checkpoint-1: it was trained on a base that is nf4, and this run's is dense: set base to nf4"
    with pytest.raises(ValueError, match=message):
        make(dense, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert files == {path for path in tmp_path.rglob("*") if path.is_file()}, "a refused run changed the old one"


@pytest.mark.parametrize(("first", "then"), [("adamw_torch", "adamw_8bit"), ("adamw_8bit", "adamw_torch_fused")])
def test_going_on_with_another_optimizer_is_refused(dense: Path, tmp_path: Path, first: str, then: str) -> None:
    make(dense, tmp_path, max_steps=1, optim=first).train()
    message = rf"checkpoint-1: it has the optimizer state of {first}, and this run's optim is {then}: set optim to"
    with pytest.raises(ValueError, match=message):
        make(dense, tmp_path, max_steps=2, optim=then).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_policy_in_memory_keeps_its_base(dense: Path, tmp_path: Path) -> None:
    def build(base: str, asked: str) -> GRPOTrainer:
        policy = load(dense, LoraConfig(r=4, target_modules="all-linear"), device="cpu", base=base)
        options = {"per_device_train_batch_size": 8, "max_completion_length": 10}
        args = GRPOConfig(str(tmp_path), device="cpu", base=asked, **options)
        rows = Dataset.from_dict({"prompt": ["1+1="]})
        return GRPOTrainer(policy, threes, args, rows)

    assert build("nf4", "auto").policy.weights.base == build("nf4", "nf4").policy.weights.base == "nf4"
    with pytest.raises(ValueError, match=r"base='nf4', but the Policy has a dense base: load it with colora.load"):
        build("auto", "nf4")


def test_what_nf4_cannot_hold_is_refused_before_loading(tmp_path: Path) -> None:
    model = tiny_checkpoint(tmp_path / "model")
    (model / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj.weight: NF4 needs rows .* 64 weights, .* have 32"):
        make(model, tmp_path / "run", base="nf4")
