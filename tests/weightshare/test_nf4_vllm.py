"""An NF4 base in vLLM: its tensors are the trainer's, its values the checkpoint's, its log-probs the merged model's."""

from pathlib import Path

import pytest
import torch
from colora.kernels import nf4
from colora.rl.policy import Policy, load
from colora.rollout.engine import generate
from colora.weightshare.guard import check_storage
from colora.weightshare.nf4_weight import TENSOR_NAMES
from transformers import LlamaConfig

from ..models import SMALL, plain_logprobs, random_lora, save_checkpoint, tiny_model
from ..nf4_models import merged_model, nf4_configs, quantised_model
from ..vllm_engines import VLLM_MARKS, all_slots, engine_logprobs, open_engine, requests_of, trainer_logprobs

pytestmark = VLLM_MARKS
CONFIGS = nf4_configs()


@pytest.mark.parametrize("stored", ["dense", "quantised"])
@pytest.mark.parametrize("name", CONFIGS)
def test_shared_tensors_equal_values_and_logprobs(name: str, stored: str, tmp_path: Path) -> None:
    dense = tiny_model(CONFIGS[name])
    directory = save_checkpoint(dense, tmp_path / "dense")
    if stored == "quantised":
        directory = save_checkpoint(quantised_model(directory), tmp_path / "quantised")
    base = "nf4" if stored == "dense" else "auto"
    engine = open_engine(directory, base=base)
    try:
        policy = Policy(engine.weights, engine.config, engine.adapter)
        engine_tensors = engine.named_tensors()
        assert check_storage(policy.weights, engine_tensors) >= len(policy.weights.tensors) + 4 * 2 * (
            len(TENSOR_NAMES) + 2
        )
        for key in ("layers.0.self_attn.qkv_proj", "layers.1.mlp.down_proj"):
            held = policy.weights.linears[f"model.{key}"].weight.tensors()
            assert all(
                engine_tensors[f"model.{key}.{kind}"].data_ptr() == held[kind].data_ptr() for kind in TENSOR_NAMES
            )
        ours = load(directory, random_lora(), dtype="float32", device="cpu", seed=3, base=base).weights
        shared = dict(policy.weights.dense_parameters())
        assert all(torch.equal(shared[key], tensor) for key, tensor in ours.dense_parameters())
        assert torch.equal(all_slots(ours), all_slots(policy.weights))

        greedy = list(generate(engine, requests_of([3, 21, 40], 128, temperature=0.0)))
        reference = merged_model(policy, dense)
        for trajectory in greedy:
            prompt = torch.tensor([trajectory.prompt_ids])
            count = len(trajectory.completion_ids)
            expected = reference.generate(prompt, max_new_tokens=count, do_sample=False, eos_token_id=None)
            assert trajectory.completion_ids == expected[0, len(trajectory.prompt_ids) :].tolist()
        sampled = list(generate(engine, requests_of([3, 21, 40], 128)))
        assert (trainer_logprobs(policy, sampled) - engine_logprobs(sampled)).abs().max() < 1e-4
        pieces = []
        for trajectory in sampled:
            sequence = torch.tensor(trajectory.prompt_ids + trajectory.completion_ids)
            pieces.append(plain_logprobs(reference, [sequence])[len(trajectory.prompt_ids) - 1 :])
        assert (torch.cat(pieces) - engine_logprobs(sampled)).abs().max() < 1e-4
    finally:
        engine.close()


def test_a_written_slot_is_what_the_next_generation_reads(tmp_path: Path) -> None:
    engine = open_engine(save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path), base="nf4", dtype=torch.bfloat16)
    try:
        policy = Policy(engine.weights, engine.config, engine.adapter)
        before = list(generate(engine, requests_of([5], 128)))
        for parameter in policy.parameters():
            parameter.data.mul_(0.5)
        engine.adapter.publish()
        engine.adapter_changed()
        after = list(generate(engine, requests_of([5], 128)))
        assert after[0].logprobs[0] != before[0].logprobs[0]
        assert (trainer_logprobs(policy, after) - engine_logprobs(after)).abs().mean() < 0.05
    finally:
        engine.close()


def test_modules_left_dense_and_a_bare_base(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(CONFIGS["qwen3"]), tmp_path / "dense")
    model = quantised_model(tmp_path / "dense", llm_int8_skip_modules=["layers.0.self_attn.k_proj"])  # nor the head
    engine = open_engine(save_checkpoint(model, tmp_path / "quantised"), None)
    try:
        kinds = {name: type(linear.weight).__name__ for name, linear in engine.weights.linears.items()}
        assert [name for name, kind in kinds.items() if kind == "DenseWeight"] == ["model.layers.0.self_attn.qkv_proj"]
        sampled = list(generate(engine, requests_of([5], 128)))
        policy = Policy(engine.weights, engine.config)
        assert (trainer_logprobs(policy, sampled) - engine_logprobs(sampled)).abs().max() < 1e-4
        head = load(tmp_path / "quantised", device="cpu").weights.head
        assert torch.equal(engine.weights.head, head)
        assert torch.equal(head, nf4.dequantize(nf4.quantize(model_head(tmp_path / "dense")), torch.float32))
    finally:
        engine.close()


def model_head(directory: Path) -> torch.Tensor:
    return load(directory, device="cpu").weights.head


def test_what_nf4_cannot_hold_is_refused(tmp_path: Path) -> None:
    directory = save_checkpoint(tiny_model(LlamaConfig(**SMALL, head_dim=32)), tmp_path)
    with pytest.raises(ValueError, match=r"self_attn.q_proj.weight: NF4 needs rows that are a multiple of 64"):
        open_engine(directory, base="nf4", max_context=64)
