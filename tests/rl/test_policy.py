"""The policy against transformers and PEFT in fp32: log-probs and the gradient of every adapter matrix, within 1e-5."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from colora.rl.packing import TrainingSample, pack
from colora.rl.policy import Policy, build, load
from colora.weightshare.weights import SharedWeights
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedConfig

from ..models import (
    SMALL,
    next_token_rows,
    plain_logprobs,
    random_lora,
    random_sequences,
    save_checkpoint,
    tiny_configs,
    tiny_llama,
    tiny_model,
    tiny_multimodal,
)

TOLERANCE = 1e-5
LENGTHS = (13, 2, 19)  # longer and shorter than every window
CONFIGS = tiny_configs()


def objective(logprobs: Tensor) -> Tensor:
    """A scalar that weighs every token differently."""
    return (logprobs * torch.linspace(-1.0, 2.0, len(logprobs))).mean()


@dataclass
class Parity:
    """A model, sequences, and what PEFT over transformers makes of them with the adapter of `seed` 3."""

    config: PreTrainedConfig
    sequences: list[Tensor]
    logprobs: Tensor
    base_logprobs: Tensor
    gradients: dict[str, Tensor]

    def policy(self) -> Policy:
        return load(tiny_model(self.config), random_lora(), seed=3)


@pytest.fixture(scope="module", params=CONFIGS)
def parity(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    config = CONFIGS[request.param]
    sequences = random_sequences(LENGTHS, config.vocab_size)
    directory = tmp_path_factory.mktemp("adapter")
    load(tiny_model(config), random_lora(), seed=3).adapter.save(directory)
    model = tiny_model(config)
    model.set_attn_implementation("eager")
    base_logprobs = plain_logprobs(model, sequences)
    peft_model = PeftModel.from_pretrained(model, directory, is_trainable=True).eval()
    logprobs = plain_logprobs(peft_model, sequences)
    objective(logprobs).backward()
    gradients = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    return Parity(config, sequences, logprobs.detach(), base_logprobs, gradients)


def gradients_by_name(policy: Policy, directory: Path) -> dict[str, Tensor]:
    """The masters' gradients under PEFT's names, through the adapter's own file format."""
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.copy_(parameter.grad)
    policy.adapter.save(directory)
    return load_file(directory / "adapter_model.safetensors")


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_logprobs_and_gradients_equal_peft_over_transformers(
    parity: Parity, packed: bool, checkpointing: bool, tmp_path: Path
):
    policy = parity.policy()
    policy.gradient_checkpointing = checkpointing
    rows = [parity.sequences] if packed else [[sequence] for sequence in parity.sequences]
    logprobs = torch.cat([policy.logprobs(*next_token_rows(row))[0] for row in rows])
    objective(logprobs).backward()

    assert (parity.logprobs - parity.base_logprobs).abs().max() > 0.05  # the adapter matters
    torch.testing.assert_close(logprobs, parity.logprobs, rtol=0, atol=TOLERANCE)
    gradients = gradients_by_name(policy, tmp_path)
    assert gradients.keys() == parity.gradients.keys()
    for name, expected in parity.gradients.items():
        assert expected.abs().max() > 100 * TOLERANCE, f"{name}: the gradient is too small to be compared"
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_reference_is_the_base_without_gradient(parity: Parity):
    policy = parity.policy()
    row = next_token_rows(parity.sequences)
    with policy.reference():
        reference, _ = policy.logprobs(*row)
    assert not reference.requires_grad
    torch.testing.assert_close(reference, parity.base_logprobs, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(policy.logprobs(*row)[0], parity.logprobs, rtol=0, atol=TOLERANCE)


def test_entropies_and_temperature_equal_the_plain_computation(parity: Parity):
    policy = load(tiny_model(parity.config))
    logprobs, entropies = policy.logprobs(*next_token_rows(parity.sequences), temperature=0.7, entropy=True)
    model = tiny_model(parity.config)
    plain = torch.cat([model(input_ids=ids[None]).logits[0, :-1] for ids in parity.sequences]).div(0.7).softmax(-1)
    expected = -(plain * plain.log()).sum(-1)
    torch.testing.assert_close(entropies, expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(logprobs, plain_logprobs(model, parity.sequences, 0.7), rtol=0, atol=TOLERANCE)


BF16_BOUND = 0.12  # nats: two units in the last place of a logit of 8 in bf16


def test_bf16_rounds_where_transformers_does(parity: Parity):
    """Unpacked, the difference to transformers in bf16 is a fraction of what bf16 costs; packed, within a bound."""
    policy = load(tiny_model(parity.config), dtype="bfloat16")
    policy.fp32_head = False
    assert policy.dtype == torch.bfloat16
    expected = plain_logprobs(tiny_model(parity.config, dtype=torch.bfloat16), parity.sequences)
    cost_of_bf16 = (expected - parity.base_logprobs).abs().mean()
    alone = torch.cat([policy.logprobs(*next_token_rows([ids]))[0] for ids in parity.sequences])
    assert (alone - expected).abs().mean() < 0.4 * cost_of_bf16  # 0 but for the softcap, which is fp32 here
    packed, _ = policy.logprobs(*next_token_rows(parity.sequences))
    assert (packed - expected).abs().max() < BF16_BOUND


def test_gradient_checkpointing_keeps_less_for_the_backward_pass():
    policy = load(tiny_llama(), random_lora())
    row = next_token_rows(random_sequences(LENGTHS, 128))

    def saved_elements() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
            policy.logprobs(*row)
        return sum(sizes)

    kept = saved_elements()
    policy.gradient_checkpointing = True
    assert saved_elements() < kept / 3


def test_packing_order_does_not_matter():
    policy = load(tiny_llama(), random_lora(), seed=3)
    first, second, third = random_sequences(LENGTHS, 128)
    hidden = policy.hidden_states(torch.cat([first, second, third]), LENGTHS)
    turned = policy.hidden_states(torch.cat([third, first, second]), [LENGTHS[2], *LENGTHS[:2]])
    torch.testing.assert_close(torch.cat([turned[19:], turned[:19]]), hidden, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_completions_that_share_a_prompt_are_as_sequences_of_their_own(name: str, checkpointing: bool):
    policy = load(tiny_model(CONFIGS[name]), random_lora(), seed=3)
    policy.gradient_checkpointing = checkpointing
    prompt, *completions, other = random_sequences((11, 7, 1, 12, 5), CONFIGS[name].vocab_size)
    whole = [torch.cat((prompt, completion)) for completion in completions] + [other]
    samples = [
        TrainingSample(
            tokens.tolist(), list(range(first, len(tokens))), [0.0] * (len(tokens) - first), 0.0, prompt=shared
        )
        for tokens, first, shared in zip(whole, (11, 12, 11, 1), (11, 11, 11, 0), strict=True)
        if len(tokens) > first
    ]
    found = []
    for budget in (1000, 1):
        rows = pack(samples, budget)
        policy.zero_grad()
        by_sample = {}
        for micro in rows:
            logprobs, _ = policy.logprobs(micro.tokens, micro.layout, micro.rows, micro.targets)
            parts = logprobs.split(micro.trained_lengths)
            by_sample |= {id(sample): part for sample, part in zip(micro.samples, parts, strict=True)}
            sum(objective(part) for part in parts).backward()
        found.append((rows, torch.cat([by_sample[id(sample)] for sample in samples]), gradients(policy)))
    (shared, ours, ours_grad), (apart, true, true_grad) = found
    assert len(shared) == 1 and len(apart) == len(samples)
    assert any(isinstance(entry, tuple) for entry in shared[0].layout)
    torch.testing.assert_close(ours, true, rtol=0, atol=TOLERANCE)
    for name, expected in true_grad.items():
        torch.testing.assert_close(ours_grad[name], expected, rtol=0, atol=TOLERANCE, msg=name)


def gradients(policy: Policy) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in policy.named_parameters()}


def test_only_the_adapter_is_trained():
    policy = load(tiny_llama(), random_lora())
    trained = {id(parameter) for parameter in policy.parameters()}
    assert trained == {id(parameter) for parameter in policy.adapter.parameters()}
    assert not any(tensor.requires_grad for _, tensor in policy.weights.dense_parameters())
    assert list(load(tiny_llama()).parameters()) == []
    assert set(policy.state_dict()) == {name for name, _ in policy.named_parameters()}


def test_adapter_change_is_seen_only_after_publishing():
    policy = load(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"), seed=3)
    row = next_token_rows(random_sequences(LENGTHS, 128))
    before = policy.logprobs(*row)[0].detach()
    with torch.no_grad():
        for master in policy.adapter.masters_b:
            master.add_(0.5)
    assert torch.equal(policy.logprobs(*row)[0], before)
    policy.adapter.publish()
    assert (policy.logprobs(*row)[0] - before).abs().max() > 0.05


def test_reference_restores_the_adapter_after_an_error_and_when_nested():
    policy = load(tiny_llama(), random_lora())
    with pytest.raises(KeyError), policy.reference():
        with policy.reference():
            pass
        assert not policy.weights.adapter_on
        raise KeyError
    assert policy.weights.adapter_on
    assert all(linear.adapter_on for linear in policy.weights.linears.values())


@pytest.mark.parametrize(
    "change", [lambda p: p.to("meta"), lambda p: p.half(), lambda p: p.to(torch.bfloat16), lambda p: p.double()]
)
def test_moves_and_casts_are_refused(change):
    policy = load(tiny_llama(), random_lora())
    with pytest.raises(RuntimeError, match="shares its weights with the rollout engine.*when it is loaded"):
        change(policy)


def test_moving_to_where_it_is_copies_nothing():
    policy = load(tiny_llama(), random_lora())
    tensors = [policy.weights.embedding, *policy.parameters()]
    pointers = [tensor.data_ptr() for tensor in tensors]
    assert policy.to("cpu").float() is policy
    assert [tensor.data_ptr() for tensor in [policy.weights.embedding, *policy.parameters()]] == pointers


def test_loading_copies_a_model_in_memory():
    model = tiny_llama()
    policy = load(model)
    theirs = dict(model.named_parameters())
    for name, tensor in policy.weights.dense_parameters():
        assert torch.equal(tensor, theirs[name])
        assert tensor.data_ptr() != theirs[name].data_ptr()


def test_build_uses_the_weights_it_is_given():
    config = LlamaConfig(**SMALL)
    weights = SharedWeights.empty(model_layout(block_spec(config)), torch.float32, "cpu")
    policy = build(weights, config, random_lora(), seed=1)
    assert policy.weights is weights
    with pytest.raises(ValueError, match="do not have the layout that the llama config describes"):
        build(weights, LlamaConfig(**SMALL | {"intermediate_size": 80}))


def test_the_seed_decides_the_adapter():
    def masters(seed: int) -> list[Tensor]:
        return list(load(tiny_llama(), random_lora(), seed=seed).parameters())

    assert all(torch.equal(a, b) for a, b in zip(masters(1), masters(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(masters(1), masters(2), strict=True))


@pytest.mark.parametrize("from_disk", [True, False])
def test_the_decoder_of_a_multimodal_model_is_loaded_and_its_adapter_fits_it(from_disk: bool, tmp_path: Path):
    model = tiny_multimodal()
    sequences = random_sequences(LENGTHS, SMALL["vocab_size"])
    expected = plain_logprobs(model, sequences)
    policy = load(save_checkpoint(model, tmp_path / "model") if from_disk else model, random_lora(), seed=3)
    assert policy.config.model_type == "gemma3_text"
    with policy.reference():
        torch.testing.assert_close(policy.logprobs(*next_token_rows(sequences))[0], expected, rtol=0, atol=TOLERANCE)
    policy.adapter.save(tmp_path / "adapter")
    adapted = plain_logprobs(PeftModel.from_pretrained(model, tmp_path / "adapter").eval(), sequences)
    assert (adapted - expected).abs().max() > 0.05
    torch.testing.assert_close(policy.logprobs(*next_token_rows(sequences))[0], adapted, rtol=0, atol=TOLERANCE)


def test_sizes_that_do_not_fit_the_row_are_refused():
    policy = load(tiny_llama())
    with pytest.raises(ValueError, match=r"lengths \[2, 2\] do not split a row of shape \(5,\)"):
        policy.hidden_states(torch.zeros(5, dtype=torch.long), [2, 2])
    with pytest.raises(ValueError, match=r"lengths \[5, 0\]"):
        policy.hidden_states(torch.zeros(5, dtype=torch.long), [5, 0])
    assert policy.max_context == SMALL["max_position_embeddings"]


def test_what_cannot_be_loaded_is_refused_by_name(tmp_path: Path):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=8))
    message = "architecture 'gpt2' is not supported; known model types: llama, mistral, qwen2, qwen3, gemma3"
    with pytest.raises(ValueError, match=message):
        load(gpt2)
    with pytest.raises(ValueError, match=message):
        load(save_checkpoint(gpt2, tmp_path))
    with pytest.raises(TypeError, match="got int"):
        load(7)
    for dtype in ("int8", torch.float64):
        with pytest.raises(ValueError, match="is not supported; known: auto, float32, bfloat16, float16"):
            load(tiny_llama(), dtype=dtype)
