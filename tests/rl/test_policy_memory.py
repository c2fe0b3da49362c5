"""What a policy keeps and computes again, and which ops it computes with, change memory and time and not the result."""

import math
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from colora import GRPOConfig, GRPOTrainer, load
from colora.kernels import offload
from colora.kernels.glu import GLU
from colora.kernels.offload import ActivationOffload
from colora.kernels.ops import OPS
from colora.kernels.rms_norm import AddRMSNorm, RMSNorm
from colora.kernels.rope import RotateQKV
from colora.rl.policy import Policy
from colora.rl.setup import configure
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import Qwen3Config

from ..attention_on_cpu import play_kernels
from ..models import SMALL, next_token_rows, random_lora, random_sequences, tiny_configs, tiny_llama, tiny_model
from ..tiny_runs import tiny_checkpoint

LENGTHS = [9, 1, 14]


def logprobs_and_gradients(policy: Policy, row: Any) -> list[Tensor]:
    logprobs, _ = policy.logprobs(*row)
    return [logprobs, *torch.autograd.grad(logprobs.sin().sum(), list(policy.parameters()))]


@pytest.mark.parametrize("tile", [1, 5, 100])
@pytest.mark.parametrize("family", [name for name in tiny_configs() if "odd" in name])
def test_recomputed_in_tiles_and_from_the_host_every_family_is_the_same(family: str, tile: int) -> None:
    config = tiny_configs()[family]
    policy = load(tiny_model(config), random_lora(), seed=1)
    row = next_token_rows(random_sequences(LENGTHS, config.vocab_size))
    expected = logprobs_and_gradients(policy, row)
    policy.gradient_checkpointing, policy.mlp_tile_tokens = True, tile
    policy.offload = ActivationOffload(policy.device, keep=1)
    for _ in range(2):  # the second time in memory that the first has used
        for ours, kept in zip(logprobs_and_gradients(policy, row), expected, strict=True):
            torch.testing.assert_close(ours, kept, rtol=0, atol=1e-5 * kept.abs().max().item() + 1e-6)
    assert policy.offload.host_bytes == (config.num_hidden_layers - 1) * sum(LENGTHS) * config.hidden_size * 4


@pytest.mark.parametrize("family", tiny_configs())
def test_attention_is_computed_once_where_there_is_room_for_what_it_leaves(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_configs()[family]
    policy = load(tiny_model(config), random_lora(), seed=1)
    tokens, _, rows, targets = next_token_rows(random_sequences(LENGTHS, config.vocab_size))
    layout = (LENGTHS[0], (LENGTHS[1] + 6, 5, 3))
    expected = logprobs_and_gradients(policy, (tokens, layout, rows, targets))
    policy.gradient_checkpointing, policy.offload = True, ActivationOffload(policy.device, keep=1)
    played = play_kernels(monkeypatch)
    calls = {}
    for room in (False, True):
        monkeypatch.setattr(offload, "available_bytes", lambda room=room: 2**40 * room)
        before = played.forwards, played.backwards
        for ours, kept in zip(logprobs_and_gradients(policy, (tokens, layout, rows, targets)), expected, strict=True):
            torch.testing.assert_close(ours, kept, rtol=0, atol=1e-5 * kept.abs().max().item() + 1e-6)
        calls[room] = played.forwards - before[0], played.backwards - before[1]
    assert calls[False] == (2 * calls[True][0], calls[True][1])


def test_a_forward_that_is_scored_is_the_trained_one_to_the_bit() -> None:
    policy = load(tiny_llama(), random_lora())
    policy.gradient_checkpointing, policy.mlp_tile_tokens = True, 5
    row = next_token_rows(random_sequences(LENGTHS, 128))
    with torch.no_grad():
        scored, _ = policy.logprobs(*row)
    assert torch.equal(policy.logprobs(*row)[0].detach(), scored)


def test_the_adapter_may_be_off_between_forward_and_backward_but_not_during_it() -> None:
    policy = load(tiny_llama(), random_lora())
    policy.gradient_checkpointing = True
    row = next_token_rows(random_sequences(LENGTHS, 128))
    logprobs, _ = policy.logprobs(*row)
    with policy.reference():  # switched back before the backward pass
        policy.logprobs(*row)
    logprobs.sum().backward()
    loss = policy.logprobs(*row)[0].sum()
    with policy.reference(), pytest.raises(RuntimeError, match="switched on or off"):
        loss.backward()


def test_one_layer_adapted_of_two() -> None:
    config = LoraConfig(r=2, target_modules=["down_proj"], layers_to_transform=[1], init_lora_weights=False)
    policy = load(tiny_llama(), config)
    row = next_token_rows(random_sequences(LENGTHS, 128))
    expected = logprobs_and_gradients(policy, row)
    policy.gradient_checkpointing = True
    policy.offload = ActivationOffload(policy.device, keep=1)
    torch.testing.assert_close(logprobs_and_gradients(policy, row), expected, rtol=1e-5, atol=1e-6)
    assert policy.offload.host_bytes == 0  # the first block has no gradient to compute


def test_an_unknown_choice_of_kernels_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels='triton': choose auto or reference"):
        load(tiny_llama()).kernels = "triton"


def test_options_reach_the_policy(tmp_path: Path) -> None:
    policy = load(tiny_llama(), random_lora())
    options = {"output_dir": str(tmp_path), "device": "cpu", "report_to": []}
    configure(policy, GRPOConfig(**options, kernels="reference", mlp_tile_tokens=77, activation_offload=True))
    assert (policy.kernels, policy.mlp_tile_tokens, policy.offload) == (
        "reference",
        77,
        None,
    )  # no GPU: nothing to gain
    configure(policy, GRPOConfig(**options))
    assert (policy.kernels, policy.mlp_tile_tokens) == ("auto", 4096)


def test_yaml_booleans_and_wrong_values(tmp_path: Path) -> None:
    def make(**options: Any) -> GRPOConfig:
        return GRPOConfig(output_dir=str(tmp_path), device="cpu", **options)

    assert [make(activation_offload=value).activation_offload for value in (True, False)] == ["true", "false"]
    for options in ({"activation_offload": "host"}, {"kernels": "triton"}, {"mlp_tile_tokens": 0}):
        ((name, value),) = options.items()
        with pytest.raises(ValueError, match=f"{name}={value!r}"):
            make(**options)


def curve(policy: Policy, steps: int = 3) -> list[float]:
    """The losses of a few updates, which raise the log-probs of one row."""
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    row, losses = next_token_rows(random_sequences([5, 1, 6], 100)), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = -policy.logprobs(*row)[0].mean()
        loss.backward()
        optimizer.step()
        policy.adapter.publish()
        losses.append(loss.item())
    return losses


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # on the CPU the kernels run in Triton's interpreter


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton")
def test_the_kernels_learn_as_the_references_do(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = replace(
        OPS["auto"],
        rms_norm=RMSNorm.apply,
        add_rms_norm=AddRMSNorm.apply,
        rotate_qkv=RotateQKV.apply,
        glu=lambda gate_up, activation, overwrite: GLU.apply(gate_up, activation, overwrite),
    )
    monkeypatch.setitem(OPS, "forced", kernels)
    model = tiny_model(Qwen3Config(**SMALL, head_dim=24))
    curves = {}
    for name in ("reference", "forced"):
        policy = load(model, random_lora(), dtype="float32", seed=4, device=DEVICE)
        policy.kernels, policy.gradient_checkpointing, policy.mlp_tile_tokens = name, True, 8
        policy.offload = ActivationOffload(policy.device, keep=1)
        curves[name] = curve(policy)
    assert curves["reference"][-1] < curves["reference"][0] - 0.2
    assert curves["forced"] == pytest.approx(curves["reference"], abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-3), ("bfloat16", 0.05)])
def test_a_run_with_kernels_learns_as_one_without(tmp_path: Path, dtype: str, bound: float) -> None:
    """Both train on the same completions: sampled anew they would part where two tokens are nearly as likely."""
    model, curves = str(tiny_checkpoint(tmp_path / "model")), {}
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    sampled: list[dict[str, Any]] = []

    def sample(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids, limit = [trainer.collector.tokenizer(prompt)["input_ids"] for prompt in prompts], SamplingParams(10, 1.0)
        requests = [RolloutRequest(f"{i:02}", tuple(prompt), i, limit) for i, prompt in enumerate(ids)]
        found = sorted(generate(trainer.engine, requests), key=lambda trajectory: trajectory.request_id)
        output = {"completion_ids": [list(one.completion_ids) for one in found]}
        sampled.append({"prompt_ids": ids, **output, "logprobs": [list(one.logprobs) for one in found]})
        return sampled[-1]

    replayed = iter(sampled)
    for name, rollouts in {"auto": sample, "reference": lambda prompts, trainer: next(replayed)}.items():
        args = GRPOConfig(
            str(tmp_path / name), device="cuda", engine="transformers", dtype=dtype,
            kernels=name, max_steps=4, per_device_train_batch_size=8, num_generations=4, max_completion_length=10,
            learning_rate=3e-3, report_to=[], save_strategy="no", disable_tqdm=True,
            activation_offload=name == "auto", parity_limit=1.0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model,
            lambda completion_ids, **_: [float(ids[0] % 3) for ids in completion_ids],
            args,
            Dataset.from_dict({"prompt": ["12+34=", "5+6=", "70+8=", "99+1="]}),
            peft_config=lora,
            rollout_func=rollouts,
        )
        trainer.train()
        curves[name] = [entry["entropy"] for entry in trainer.state.log_history if "entropy" in entry]
    assert len(curves["auto"]) == 4 and all(map(math.isfinite, curves["auto"]))
    assert curves["auto"] == pytest.approx(curves["reference"], abs=bound)


@pytest.mark.gpu
def test_the_memory_of_the_mlp_does_not_grow_with_the_row() -> None:
    """A row of twice the length takes twice the memory of everything else; the MLP's is that of a tile."""
    config = Qwen3Config(
        vocab_size=256, hidden_size=256, intermediate_size=16384, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=32768, dtype=torch.bfloat16,
    )  # fmt: skip
    policy = load(tiny_model(config, dtype=torch.bfloat16), random_lora(), device="cuda")
    policy.gradient_checkpointing, policy.mlp_tile_tokens = True, 1024

    def peak(tokens: int) -> int:
        row = next_token_rows([torch.randint(0, 256, (tokens,))])
        for _ in range(2):  # the first time makes the gradients and what libraries keep
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            policy.logprobs(*row)[0].sum().backward()
        return torch.cuda.max_memory_allocated() - before

    more_tokens, mlp_bytes_per_token = 8192, 3 * 16384 * 2
    assert peak(16384) - peak(16384 - more_tokens) < 0.25 * more_tokens * mlp_bytes_per_token
