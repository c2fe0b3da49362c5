"""The adapter's files against PEFT itself, and everything of LoraConfig that is refused."""

import json
from pathlib import Path

import pytest
import torch
from colora.rl.policy import Policy, load
from colora.weightshare.adapter import Adapter, check_lora_config
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from ..models import merged_weight, next_token_rows, plain_logprobs, random_lora, random_sequences, tiny_llama

TOLERANCE = 1e-5
SEQUENCES = random_sequences((13, 4, 9), 128)


def policy_with(**options: object) -> Policy:
    return load(tiny_llama(), random_lora(**options), seed=3)


def logprobs(policy: Policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.logprobs(*next_token_rows(SEQUENCES))[0]


@pytest.mark.parametrize(
    ("options", "adapted"),
    [
        ({}, 14),
        ({"target_modules": None}, 14),
        ({"target_modules": ["q_proj", "v_proj"]}, 4),
        ({"target_modules": ["k_proj", "up_proj", "down_proj"], "layers_to_transform": [1]}, 3),
        ({"target_modules": r".*\.1\.(self_attn\.(k|o)|mlp\.gate)_proj"}, 3),
        ({"target_modules": "all-linear", "exclude_modules": ["up_proj", "q_proj"]}, 10),
        ({"target_modules": ["layers.0.mlp.gate_proj"]}, 1),
        ({"use_rslora": True, "r": 9}, 14),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_peft_loads_what_was_saved_and_says_the_same(options: dict, adapted: int, tmp_path: Path):
    policy = policy_with(**options)
    policy.adapter.save(tmp_path, base_model="some/model")
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert len(stored) == 2 * adapted
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "some/model"

    peft_model = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    loaded = {name for name, _ in peft_model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in loaded} == stored.keys()
    expected = plain_logprobs(peft_model, SEQUENCES)
    torch.testing.assert_close(logprobs(policy), expected, rtol=0, atol=TOLERANCE)
    assert (expected - plain_logprobs(tiny_llama(), SEQUENCES)).abs().max() > 1e-3


def test_an_adapter_of_peft_is_loaded(tmp_path: Path):
    torch.manual_seed(5)
    peft_model = get_peft_model(
        tiny_llama(), random_lora(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    )
    peft_model.save_pretrained(tmp_path)
    policy = policy_with(target_modules=["q_proj", "down_proj"])
    policy.adapter.load(tmp_path)
    torch.testing.assert_close(logprobs(policy), plain_logprobs(peft_model, SEQUENCES), rtol=0, atol=TOLERANCE)


def test_saving_and_loading_is_exact(tmp_path: Path):
    first, second = policy_with(), load(tiny_llama(), random_lora(), seed=4)
    assert not torch.equal(logprobs(first), logprobs(second))
    first.adapter.save(tmp_path)
    second.adapter.load(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert torch.equal(logprobs(first), logprobs(second))


def test_a_new_adapter_changes_nothing_and_is_drawn_as_peft_draws_it():
    policy = policy_with(init_lora_weights=True, r=64)
    torch.testing.assert_close(logprobs(policy), plain_logprobs(tiny_llama(), SEQUENCES), rtol=0, atol=TOLERANCE)
    bound = 48**-0.5  # in_features of qkv_proj
    values = policy.adapter.masters_a[0]
    assert bound * 0.99 < values.abs().max() <= bound
    gaussian = policy_with(init_lora_weights="gaussian", r=64).adapter.masters_a[0]
    assert gaussian.std().item() == pytest.approx(1 / 64, rel=0.05)


def test_the_merged_weight_is_pefts(tmp_path: Path):
    policy = policy_with()
    policy.adapter.save(tmp_path)
    merged = PeftModel.from_pretrained(tiny_llama(), tmp_path).merge_and_unload()
    theirs = dict(merged.named_parameters())
    for linear in policy.weights.linears.values():
        for part in linear.parts:
            name = f"{linear.part_name(part)}.weight"
            torch.testing.assert_close(merged_weight(linear, part), theirs[name], rtol=0, atol=TOLERANCE)


def test_publishing_casts_in_place():
    policy = load(tiny_llama(), random_lora(), dtype="bfloat16", seed=3)
    slot = policy.weights.linears["model.layers.0.mlp.down_proj"].slot
    pointers = slot.a.data_ptr(), slot.b.data_ptr()
    with torch.no_grad():
        slot.master_a.fill_(1.0)
        slot.master_b.fill_(1.0 + 2**-12)
    policy.adapter.publish()
    assert (slot.a.data_ptr(), slot.b.data_ptr()) == pointers
    assert slot.a.dtype == slot.b.dtype == torch.bfloat16
    assert slot.a.eq(1.0).all() and slot.b.eq(1.5).all()  # alpha / r = 1.5, rounded to bf16 after it was applied
    assert policy.adapter.slot_bytes == 2 * sum(parameter.numel() for parameter in policy.parameters())


def test_another_kind_of_config_is_refused():
    with pytest.raises(ValueError, match="peft_config is a dict: pass a peft.LoraConfig"):
        check_lora_config({"r": 16})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("use_dora", True),
        ("lora_bias", True),
        ("bias", "all"),
        ("lora_dropout", 0.1),
        ("modules_to_save", ["lm_head"]),
        ("trainable_token_indices", [1, 2]),
        ("target_parameters", ["q_proj.weight"]),
        ("layer_replication", [(0, 1)]),
        ("use_qalora", True),
        ("fan_in_fan_out", True),
        ("rank_pattern", {"q_proj": 2}),
        ("alpha_pattern", {"q_proj": 2}),
        ("alora_invocation_tokens", [1]),
        ("megatron_config", {"a": 1}),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "orthogonal"),
        ("lora_alpha", 0),
        ("task_type", "SEQ_CLS"),
    ],
)
def test_options_that_are_not_honoured_are_refused(option: str, value: object):
    with pytest.raises(ValueError, match=f"LoraConfig.*{option}.*(; |leave)"):
        policy_with(**{option: value})


def test_targets_that_match_nothing_are_refused():
    known = "its linears are: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for targets in (["query"], r".*\.attention\..*"):
        with pytest.raises(ValueError, match=f"matches no linear of the model; {known}"):
            policy_with(target_modules=targets)
    with pytest.raises(ValueError, match="regular expression for whole names, such as model.layers.1.mlp.down_proj; "):
        policy_with(target_modules="q_proj")
    with pytest.raises(ValueError, match="'lm_head' matches no linear of the model's blocks; they are: down_proj"):
        policy_with(target_modules=["q_proj", "lm_head"])


def test_files_of_another_adapter_are_refused(tmp_path: Path):
    adapter: Adapter = policy_with(target_modules=["q_proj"]).adapter
    with pytest.raises(ValueError, match="no adapter in .*adapter_model.safetensors is missing"):
        adapter.load(tmp_path)
    policy_with().adapter.save(tmp_path)
    with pytest.raises(ValueError, match="24 tensors belong to no target of this adapter, e.g. base_model.model.model"):
        adapter.load(tmp_path)
    policy_with(target_modules=["q_proj"], r=2).adapter.save(tmp_path)
    with pytest.raises(ValueError, match=r"q_proj.lora_A.weight has shape \(2, 48\), this adapter's is \(4, 48\)"):
        adapter.load(tmp_path)
    save_file({}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="lora_A.weight is missing; the adapter was trained with other target_modules"):
        adapter.load(tmp_path)
