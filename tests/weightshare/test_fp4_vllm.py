"""An FP4 base in vLLM: its tensors are the trainer's, its values those of FP4, its log-probs the merged model's."""

from pathlib import Path

import torch
from colora.kernels import fp4
from colora.rl.policy import Policy
from colora.rollout.engine import generate
from colora.weightshare.fp4_weight import TENSOR_NAMES
from colora.weightshare.guard import check_storage

from ..models import plain_logprobs, save_checkpoint, tiny_model
from ..nf4_models import merged_model, nf4_configs
from ..vllm_engines import VLLM_MARKS, engine_logprobs, open_engine, requests_of, trainer_logprobs

pytestmark = VLLM_MARKS


def test_shared_tensors_equal_values_and_logprobs(tmp_path: Path) -> None:
    dense = tiny_model(nf4_configs()["qwen2_biased_tied"])
    engine = open_engine(save_checkpoint(dense, tmp_path), base="fp4")
    try:
        policy = Policy(engine.weights, engine.config, engine.adapter)
        engine_tensors = engine.named_tensors()
        check_storage(policy.weights, engine_tensors)
        name = "model.layers.1.mlp.gate_up_proj"
        held = policy.weights.linears[name].weight.tensors()
        assert all(engine_tensors[f"{name}.{kind}"].data_ptr() == held[kind].data_ptr() for kind in TENSOR_NAMES)
        shared = dict(policy.weights.dense_parameters())
        up = "model.layers.1.mlp.up_proj.weight"
        assert torch.equal(shared[up], fp4.dequantize(fp4.quantize(dense.state_dict()[up]), torch.float32))

        sampled = list(generate(engine, requests_of([3, 21, 40], 128)))
        assert (trainer_logprobs(policy, sampled) - engine_logprobs(sampled)).abs().max() < 1e-4
        reference, pieces = merged_model(policy, dense), []
        for trajectory in sampled:
            sequence = torch.tensor(trajectory.prompt_ids + trajectory.completion_ids)
            pieces.append(plain_logprobs(reference, [sequence])[len(trajectory.prompt_ids) - 1 :])
        assert (torch.cat(pieces) - engine_logprobs(sampled)).abs().max() < 1e-4
    finally:
        engine.close()
