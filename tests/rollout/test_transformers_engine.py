"""The embedded engine against transformers itself and against the policy that trains on the same tensors."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from colora.rollout.transformers_engine import TransformersEngine
from colora.weightshare.adapter import Adapter
from colora.weightshare.weights import EMBEDDING
from peft import LoraConfig

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")
UNEVEN = [3, 29, 1, 12]  # prompt lengths on both sides of the sliding window


def run(engine, requests):
    return {trajectory.request_id: trajectory for trajectory in generate(engine, requests)}


def tokens_of(engine, requests):
    return {name: trajectory.completion_ids for name, trajectory in run(engine, requests).items()}


def engine_of(policy, **settings):
    return TransformersEngine(policy.weights, policy.config, **settings)


class ForwardLog:
    """The shape of every forward's input ids, and whether it ran with a mask."""

    def __init__(self, engine):
        self.shapes, self.masked = [], []
        engine.model.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, module, args, kwargs):
        self.shapes.append(tuple(kwargs["input_ids"].shape))
        self.masked.append(kwargs["attention_mask"] is not None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_the_shared_memory(family, tied, dtype, make_policy):
    policy = make_policy(family, dtype=dtype, tie_word_embeddings=tied)
    engine = engine_of(policy)
    shared = {
        name: (tensor.data_ptr(), tensor.shape, tensor.dtype) for name, tensor in policy.weights.dense_parameters()
    }
    of_engine = dict(engine.model.named_parameters(remove_duplicate=False))
    assert {name: (p.data_ptr(), p.shape, p.dtype) for name, p in of_engine.items()} == shared
    pointers = [of_engine[name].data_ptr() for name in (EMBEDDING, "lm_head.weight")]
    assert (pointers[0] == pointers[1]) == tied
    assert not any(buffer.is_meta for buffer in engine.model.buffers())


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_with_the_adapter_merged(family, make_policy, merged_model, make_requests):
    policy = make_policy(family)
    requests = make_requests(UNEVEN, max_tokens=20, temperature=0.0)
    finished = run(engine_of(policy), requests)
    model = merged_model(policy)
    for request in requests:
        prompt = torch.tensor([request.prompt_ids])
        expected = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, pad_token_id=0
        )
        trajectory = finished[request.request_id]
        assert trajectory.completion_ids == expected[0, prompt.shape[1] :].tolist()
        with torch.no_grad():
            logprobs = model(expected).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
        expected_logprobs = logprobs.gather(1, expected[0, prompt.shape[1] :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(trajectory.logprobs), expected_logprobs, atol=1e-5, rtol=0)


def policy_logprobs(policy, trajectory, temperature=1.0):
    row = torch.tensor(trajectory.prompt_ids + trajectory.completion_ids)
    targets = row[len(trajectory.prompt_ids) :]
    rows = torch.arange(len(trajectory.prompt_ids) - 1, len(row) - 1)
    with torch.no_grad():
        return policy.logprobs(row, [len(row)], rows, targets, temperature)[0].cpu()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefill_tokens", [8192, 9])
def test_logprobs_equal_the_policys(family, prefill_tokens, make_policy, make_requests):
    """Sampled at a temperature, from left-padded prompts, prefilled at once or in slices of two tokens."""
    policy = make_policy(family)
    requests = make_requests(UNEVEN, max_tokens=24, temperature=0.7)
    for trajectory in generate(engine_of(policy, prefill_tokens=prefill_tokens), requests):
        expected = policy_logprobs(policy, trajectory, 0.7)
        assert len(expected) == 24
        torch.testing.assert_close(torch.tensor(trajectory.logprobs), expected, atol=1e-5, rtol=0)


def test_logprobs_equal_the_policys_after_the_cache_grew_and_rows_left(make_policy, make_requests):
    policy = make_policy("qwen2")
    requests = make_requests([2, 90, 5, 40], max_tokens=[260, 30, 190, 100])
    for trajectory in generate(engine_of(policy), requests):
        torch.testing.assert_close(
            torch.tensor(trajectory.logprobs), policy_logprobs(policy, trajectory), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text"])
def test_bfloat16_agrees_with_the_policy_up_to_rounding(family, make_policy, make_requests):
    policy = make_policy(family, dtype="bfloat16", initializer_range=0.1)
    for trajectory in generate(engine_of(policy), make_requests(UNEVEN)):
        torch.testing.assert_close(
            torch.tensor(trajectory.logprobs), policy_logprobs(policy, trajectory), atol=0.1, rtol=0
        )


def test_published_adapter_changes_the_next_generation(make_policy, make_requests):
    policy = make_policy("llama")
    engine, requests = engine_of(policy), make_requests(UNEVEN)
    before = tokens_of(engine, requests)
    with torch.no_grad():
        for master in policy.adapter.masters_b:
            master.mul_(-2.0)
    assert tokens_of(engine, requests) == before  # masters alone are not what the engine reads
    policy.adapter.publish()
    engine.adapter_changed()
    after = run(engine, requests)
    assert {name: trajectory.completion_ids for name, trajectory in after.items()} != before
    for trajectory in after.values():
        torch.testing.assert_close(
            torch.tensor(trajectory.logprobs), policy_logprobs(policy, trajectory), atol=1e-5, rtol=0
        )


def test_adapter_bound_after_the_engine_is_used(make_policy, make_requests):
    policy = make_policy("qwen3", lora=False)
    engine, requests = engine_of(policy), make_requests(UNEVEN)
    bare = tokens_of(engine, requests)
    lora = LoraConfig(r=4, lora_alpha=40, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    Adapter(policy.weights, lora, torch.Generator(policy.device).manual_seed(0))
    engine.adapter_changed()
    adapted = run(engine, requests)
    assert {name: trajectory.completion_ids for name, trajectory in adapted.items()} != bare
    for trajectory in adapted.values():  # and its update is added once only
        torch.testing.assert_close(
            torch.tensor(trajectory.logprobs), policy_logprobs(policy, trajectory), atol=1e-5, rtol=0
        )


def test_tokens_depend_on_prompt_and_seed_alone(make_policy, make_requests):
    policy = make_policy("gemma3_text")
    requests = make_requests([3, 29, 1, 12, 12, 7])
    together = tokens_of(engine_of(policy), requests)
    assert tokens_of(engine_of(policy), requests[::-1]) == together
    assert tokens_of(engine_of(policy, max_sequences=2), requests) == together
    engine = engine_of(policy)
    assert {name: ids for request in requests for name, ids in tokens_of(engine, [request]).items()} == together
    reseeded = [replace(request, seed=request.seed + 1) for request in requests]
    assert all(ids != together[name] for name, ids in tokens_of(engine, reseeded).items())


def test_max_tokens_only_cuts(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    long, short = (run(engine, make_requests(UNEVEN, max_tokens=n)) for n in (20, 6))
    for name, trajectory in short.items():
        assert trajectory.completion_ids == long[name].completion_ids[:6]


def test_stop_tokens_end_a_completion_and_are_kept(make_policy, make_requests):
    engine = engine_of(make_policy("qwen2"))
    free = run(engine, make_requests([5] * 8, max_tokens=30))
    stops = (4, 9, 17)
    stopped = run(engine, make_requests([5] * 8, max_tokens=30, stop=stops))
    for name, trajectory in stopped.items():
        everything = free[name].completion_ids
        first = next((i for i, token in enumerate(everything) if token in stops), None)
        assert trajectory.finish_reason == ("length" if first is None else "stop")
        assert trajectory.completion_ids == everything[: None if first is None else first + 1]
        assert len(trajectory.logprobs) == len(trajectory.completion_ids)
    assert Counter(trajectory.finish_reason for trajectory in stopped.values())["stop"] >= 4


def test_stop_on_the_last_token_is_a_stop(make_policy, make_requests):
    engine = engine_of(make_policy("qwen2"))
    last = run(engine, make_requests([5], max_tokens=1))["r0"].completion_ids[0]
    assert run(engine, make_requests([5], max_tokens=1, stop=(last,)))["r0"].finish_reason == "stop"


def test_each_request_of_a_wave_keeps_its_own_sampling(make_policy, make_requests):
    policy = make_policy("llama")
    requests = make_requests([6] * 4)
    settings = [
        SamplingParams(9, 0.0),
        SamplingParams(5, 0.3),
        SamplingParams(14, 2.0, (1, 2)),
        SamplingParams(9, 1.0, (3,)),
    ]
    requests = [replace(request, sampling=sampling) for request, sampling in zip(requests, settings, strict=True)]
    together = run(engine_of(policy), requests)
    for request in requests:
        alone = run(engine_of(policy), [request])[request.request_id]
        assert together[request.request_id].completion_ids == alone.completion_ids
        assert together[request.request_id].finish_reason == alone.finish_reason
        temperature = request.sampling.temperature or 1.0
        expected = policy_logprobs(policy, alone, temperature)
        torch.testing.assert_close(torch.tensor(alone.logprobs), expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(together[request.request_id].logprobs), expected, atol=1e-5, rtol=0)


def test_trajectories_come_one_by_one_the_short_ones_first(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    requests = make_requests([4, 9, 2, 6], max_tokens=[7, 2, 5, 2])
    engine.submit(requests)
    assert engine.unfinished == 4
    steps = [[trajectory.request_id for trajectory in engine.step()] for _ in range(7)]
    assert steps == [[], ["r1", "r3"], [], [], ["r2"], [], ["r0"]]
    assert engine.unfinished == 0
    assert engine.step() == []


def test_requests_submitted_while_others_decode(make_policy, make_requests):
    policy = make_policy("mistral")
    requests = make_requests([4, 21, 2, 6], max_tokens=10)
    expected = tokens_of(engine_of(policy), requests)
    engine, finished = engine_of(policy), {}
    for request in requests:
        engine.submit([request])
        finished |= {trajectory.request_id: trajectory.completion_ids for trajectory in engine.step()}
    while engine.unfinished:
        finished |= {trajectory.request_id: trajectory.completion_ids for trajectory in engine.step()}
    assert finished == expected


def test_samples_of_one_prompt_share_its_prefill(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    log = ForwardLog(engine)
    first, second = make_requests([5, 9], max_tokens=3)
    group = [
        replace(source, request_id=f"{source.request_id}.{i}", seed=i) for i in range(4) for source in (second, first)
    ]
    finished = run(engine, group)
    assert log.shapes == [(2, 9), (8, 1), (8, 1)]
    alone = tokens_of(engine_of(make_policy("llama")), group[:1] + group[3:4])
    assert {name: finished[name].completion_ids for name in alone} == alone
    assert len({tuple(trajectory.completion_ids) for trajectory in finished.values()}) > 4


def test_finished_rows_leave_the_batch(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    log = ForwardLog(engine)
    run(engine, make_requests([4, 9, 2], max_tokens=[3, 1, 5]))
    assert log.shapes == [(3, 9), (2, 1), (2, 1), (1, 1), (1, 1)]


def test_no_mask_once_the_padded_rows_have_left(make_policy, make_requests):
    engine = engine_of(make_policy("llama"))
    log = ForwardLog(engine)
    run(engine, make_requests([4, 9, 9], max_tokens=[2, 4, 4]))
    assert log.masked == [True, True, False, False]


def test_max_sequences_bounds_what_runs_at_once(make_policy, make_requests):
    engine = engine_of(make_policy("llama"), max_sequences=4)
    log = ForwardLog(engine)
    engine.submit(make_requests([3] * 11, max_tokens=[2, 9, 4, 7, 3, 1, 8, 5, 2, 6, 3]))
    count = 0
    while engine.unfinished:
        log.shapes.clear()
        count += len(engine.step())
        assert 1 <= sum(rows for rows, _ in log.shapes) <= 4
    assert count == 11


def test_sampling_frequencies_are_the_models(make_policy):
    """Pearson's chi-square of 5000 first tokens against the softmax, at the 99.9 % point of 36 degrees of freedom."""
    policy, count, temperature = make_policy("llama", initializer_range=0.1), 5000, 0.8
    prompt = (5, 6, 7)
    requests = [RolloutRequest(str(seed), prompt, seed, SamplingParams(1, temperature)) for seed in range(count)]
    engine = engine_of(policy, max_sequences=count)
    counts = Counter(trajectory.completion_ids[0] for trajectory in generate(engine, requests))
    vocab = torch.arange(37)
    row = torch.tensor([*prompt, 0])
    with torch.no_grad():
        logprobs, _ = policy.logprobs(row, [4], torch.full((37,), 2), vocab, temperature)
    expected = logprobs.cpu().double().exp() * count
    observed = torch.tensor([counts[token] for token in range(37)], dtype=torch.float64)
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 68.0


def test_padding_rows_of_the_vocabulary_are_never_sampled(make_policy, make_requests):
    policy = make_policy("qwen2")
    requests = make_requests([4] * 6)
    expected = tokens_of(engine_of(policy), requests)
    embedding = policy.weights.tensors[EMBEDDING]
    policy.weights.tensors[EMBEDDING] = torch.cat([embedding, torch.full_like(embedding, 50.0)])
    engine = engine_of(policy)
    assert engine.model.lm_head.weight.data_ptr() == policy.weights.head.data_ptr()
    assert tokens_of(engine, requests) == expected


def request(name="a", prompt=(1, 2, 3), max_tokens=4, seed=0, stops=()):
    return RolloutRequest(name, tuple(prompt), seed, SamplingParams(max_tokens, stop_token_ids=stops))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (request("x", max_tokens=14), r"request 'x': 3 prompt tokens \+ max_tokens 14 are over max_context 16"),
        (request("x", prompt=()), "request 'x': the prompt is empty"),
        (request("x", prompt=(1, 37)), r"request 'x': token id 37 is outside the vocabulary \(0 to 36\)"),
        (request("x", prompt=(-1, 2)), "request 'x': token id -1 is outside"),
        (request("x", stops=(3, 37)), r"request 'x': stop token 37 is outside the vocabulary \(0 to 36\)"),
        (request("x", seed=-5), "request 'x': the seed must not be negative, got -5"),
        (request("ok"), "request 'ok': the id is in flight"),
        (request("running"), "request 'running': the id is in flight"),
    ],
)
def test_submit_refuses_all_or_takes_all(bad, message, make_policy):
    engine = engine_of(make_policy("llama"), max_context=16)
    engine.submit([request("running", max_tokens=13)])
    with pytest.raises(ValueError, match=message):
        engine.submit([request("ok"), bad])
    assert engine.unfinished == 1
    while engine.unfinished:
        engine.step()
    engine.submit([request("running")])  # a returned id is free again


def test_refusals_while_requests_are_unfinished(make_policy):
    engine = engine_of(make_policy("llama"))
    engine.submit([request()])
    for action in (engine.adapter_changed, engine.sleep):
        with pytest.raises(RuntimeError, match="1 requests are unfinished; call step()"):
            action()
    while engine.unfinished:
        engine.step()
    engine.adapter_changed()


def test_sleep_wake_close(make_policy, make_requests):
    policy = make_policy("llama")
    engine, requests = engine_of(policy), make_requests(UNEVEN)
    expected = tokens_of(engine, requests)
    engine.sleep()
    for action in (lambda: engine.submit(requests), engine.step):
        with pytest.raises(RuntimeError, match=r"the engine is asleep; call wake\(\)"):
            action()
    engine.adapter_changed()  # where the trainer publishes before it wakes the engine
    engine.wake()
    assert tokens_of(engine, requests) == expected
    engine.submit(requests)
    engine.step()
    engine.close()
    assert engine.unfinished == 0
    for action in (lambda: engine.submit(requests), engine.step, engine.sleep, engine.wake, engine.adapter_changed):
        with pytest.raises(RuntimeError, match="the engine is closed"):
            action()
    assert tokens_of(engine_of(policy), requests) == expected  # the weights live on


def test_logits_that_are_not_finite_name_the_request(make_policy):
    policy = make_policy("llama")
    policy.weights.embedding[5] = torch.nan
    engine = engine_of(policy)
    engine.submit([request("fine"), request("broken", prompt=(1, 5))])
    with pytest.raises(
        FloatingPointError, match="request 'broken'.* not finite after 2 prompt and 0 completion tokens"
    ):
        engine.step()


def test_weights_of_another_model_are_refused(make_policy):
    policy, other = make_policy("llama"), make_policy("llama", num_hidden_layers=2)
    with pytest.raises(ValueError, match="not those of a llama model with this config"):
        TransformersEngine(policy.weights, other.config)


@pytest.mark.parametrize(("setting", "limit"), [("max_context", 0), ("max_sequences", "4"), ("prefill_tokens", 1.5)])
def test_limits_that_are_no_whole_numbers_above_zero_are_refused(setting, limit, make_policy):
    with pytest.raises(ValueError, match=f"{setting} must be a whole number of at least 1, got {limit!r}"):
        engine_of(make_policy("llama"), **{setting: limit})


def test_max_context_is_the_models_where_not_given(make_policy):
    policy = make_policy("llama")
    config_before = policy.config.to_dict()
    assert engine_of(policy).max_context == 512
    assert policy.config.to_dict() == config_before


def test_after_an_interrupt_in_a_forward_requests_can_be_dropped(make_policy, make_requests):
    policy = make_policy("llama")
    engine, requests = engine_of(policy, max_sequences=3), make_requests(UNEVEN)
    expected = tokens_of(engine, requests)
    engine.submit(requests)
    engine.step()

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = engine.model.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    handle.remove()
    engine.abort()
    assert engine.unfinished == 0
    engine.adapter_changed()
    engine.sleep()
    engine.wake()
    assert tokens_of(engine, requests) == expected
