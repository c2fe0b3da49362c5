"""vLLM on the card: captured graphs read the slots, the KV cache sleeps alone, and the policy computes the same."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import Qwen3Config

from ..tiny_runs import PAD, tiny_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.vllm, pytest.mark.xdist_group("vllm")]
pytest.importorskip("vllm")

CONFIG = Qwen3Config(
    vocab_size=PAD + 1,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    initializer_range=0.1,
)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    from colora.rollout.vllm_engine import VLLMEngine

    model = tiny_checkpoint(Path(tmp_path_factory.mktemp("model")), CONFIG)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    made = VLLMEngine(
        model, lora, dtype=torch.bfloat16, max_context=256, device="cuda", max_sequences=16, kv_cache_bytes=2**28
    )
    yield made
    made.close()


@pytest.fixture(scope="module")
def policy(engine):
    from colora.rl.policy import Policy

    return Policy(engine.weights, engine.config, engine.adapter)


def completions(engine, temperature: float = 0.0) -> list[list[int]]:
    from colora.rollout.engine import RolloutRequest, SamplingParams, generate

    sampling = SamplingParams(max_tokens=24, temperature=temperature)
    requests = [RolloutRequest(str(i), tuple(range(i, i + 40)), i, sampling) for i in range(4)]
    found = {trajectory.request_id: trajectory.completion_ids for trajectory in generate(engine, requests)}
    return [found[request.request_id] for request in requests]


def test_every_tensor_is_shared_and_the_self_test_passes(engine, policy) -> None:
    from functools import partial

    from colora.rl.setup import score
    from colora.rollout.self_test import self_test
    from colora.weightshare.guard import ParityGuard, check_storage

    assert check_storage(policy.weights, engine.named_tensors()) > 10
    report = self_test(
        engine, partial(score, policy), ParityGuard(None, torch.bfloat16), engine.weights, engine.adapter
    )
    assert 0 < report.mean_abs < 0.05


def test_an_adapter_update_changes_what_the_captured_graphs_give(engine) -> None:
    before = completions(engine)
    with torch.no_grad():
        for master in engine.adapter.masters_b:
            master.mul_(-2.0)
    engine.adapter.publish()
    engine.adapter_changed()
    assert completions(engine) != before
    assert engine.adapter.is_published()


def test_sleeping_frees_the_kv_cache_and_nothing_else(engine) -> None:
    before = completions(engine)
    pointers = [tensor.data_ptr() for tensor in engine.named_tensors().values()]
    used = torch.cuda.device_memory_used()
    engine.sleep()
    assert used - torch.cuda.device_memory_used() >= 0.9 * engine.kv_cache_bytes
    torch.empty(2**27, dtype=torch.uint8, device="cuda").random_(0, 255)
    engine.wake()
    assert pointers == [tensor.data_ptr() for tensor in engine.named_tensors().values()]
    assert completions(engine) == before


def test_the_same_seeds_in_another_batch_give_the_same_tokens(engine) -> None:
    from colora.rollout.engine import RolloutRequest, SamplingParams, generate

    def sampled(order: list[int]) -> dict[str, list[int]]:
        sampling = SamplingParams(max_tokens=8, temperature=1.0)
        requests = [RolloutRequest(str(i), tuple(range(i, i + 30)), 100 + i, sampling) for i in order]
        return {trajectory.request_id: trajectory.completion_ids for trajectory in generate(engine, requests)}

    together, apart = sampled([0, 1, 2, 3]), sampled([2]) | sampled([0])
    assert apart["0"] == together["0"] and apart["2"] == together["2"]
