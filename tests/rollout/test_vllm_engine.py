"""VLLMEngine: what it generates, from which weights, and what it refuses."""

import gc
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from colora.rl.policy import Policy
from colora.rollout import vllm_engine
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from colora.rollout.self_test import self_test
from colora.rollout.vllm_engine import VLLMEngine, check_vllm
from colora.rollout.vllm_options import check_engine_kwargs
from colora.weightshare import vllm_names
from colora.weightshare.guard import ParityError, ParityGuard
from colora.weightshare.vllm_names import describe
from transformers import PreTrainedModel, Qwen3Config

from ..models import SMALL, tiny_multimodal
from ..vllm_engines import VLLM_MARKS, all_slots, engine_logprobs, open_engine, requests_of, save_tiny, trainer_logprobs

pytestmark = VLLM_MARKS
VOCAB = 101  # vLLM pads it to 128
EOS = 7
CONFIG = Qwen3Config(
    **SMALL | {"vocab_size": VOCAB, "head_dim": 32, "max_position_embeddings": 512},
    tie_word_embeddings=True,
    eos_token_id=EOS,
)
BLOCK = 128  # tokens of vLLM's KV blocks on the CPU: only full ones are found again


def process_state() -> dict[str, object]:
    """What an engine must not change."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),  # type: ignore[index]
        "torch": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "threads": torch.get_num_threads(),
        "set_num_threads": torch.set_num_threads,
        "precision": torch.get_float32_matmul_precision(),
        "frozen": gc.get_freeze_count(),
        "cudnn": torch.backends.cuda.cudnn_sdp_enabled(),
        "default dtype": torch.get_default_dtype(),
    }


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """One engine for the module, its policy, and the process before and after its start."""
    directory = save_tiny(CONFIG, tmp_path_factory.mktemp("model"))
    before = process_state()
    engine = open_engine(directory)
    after = process_state()
    policy = Policy(engine.weights, engine.config, engine.adapter)
    yield SimpleNamespace(engine=engine, policy=policy, before=before, after=after, directory=directory)
    engine.close()


@pytest.fixture
def engine(opened: SimpleNamespace) -> Iterator[VLLMEngine]:
    """Awake, idle, with the adapter's masters in the slots and an empty prefix cache."""
    opened.policy.adapter.publish()
    opened.engine.adapter_changed()
    yield opened.engine
    while opened.engine.unfinished:
        opened.engine.step()
    opened.engine.wake()


@pytest.fixture
def policy(opened: SimpleNamespace) -> Policy:
    return opened.policy


def by_id(trajectories: list) -> dict[str, list[int]]:
    return {trajectory.request_id: trajectory.completion_ids for trajectory in trajectories}


def test_starting_leaves_the_process_as_it_was(opened: SimpleNamespace) -> None:
    for name, value in opened.before.items():
        assert opened.after[name] == value, name


def test_greedy_tokens_and_log_probs_are_those_of_transformers_with_the_adapter_merged(
    engine: VLLMEngine, policy: Policy, merged_model: Callable[[Policy], PreTrainedModel]
) -> None:
    model = merged_model(policy)
    for trajectory in generate(engine, requests_of([4, 19, 33], VOCAB, 16, temperature=0.0)):
        tokens = list(trajectory.prompt_ids)
        for token, logprob in zip(trajectory.completion_ids, trajectory.logprobs, strict=True):
            with torch.no_grad():
                expected = model(torch.tensor([tokens])).logits[0, -1].log_softmax(-1)
            assert token == expected.argmax().item()
            assert logprob == pytest.approx(expected[token].item(), abs=1e-4)
            tokens.append(token)


def test_log_probs_are_those_of_the_temperature_sampled_at(engine: VLLMEngine, policy: Policy) -> None:
    warm, greedy = requests_of([6, 6], VOCAB, 20, temperature=0.6)
    greedy = RolloutRequest("greedy", greedy.prompt_ids, 1, SamplingParams(20, temperature=0.0))
    found = {trajectory.request_id: trajectory for trajectory in generate(engine, [warm, greedy])}
    for name, temperature in {warm.request_id: 0.6, "greedy": 1.0}.items():
        gap = trainer_logprobs(policy, [found[name]], temperature) - engine_logprobs([found[name]])
        assert gap.abs().max() < 1e-4


def test_tokens_do_not_depend_on_what_else_is_in_the_batch(engine: VLLMEngine) -> None:
    requests = requests_of([4, 30, 12, 7, 50], VOCAB, 24)
    together = by_id(list(generate(engine, requests)))
    backwards = by_id(list(generate(engine, requests[::-1])))
    alone = by_id([trajectory for request in requests for trajectory in generate(engine, [request])])
    assert together == backwards == alone
    other_seed = RolloutRequest("r1", requests[1].prompt_ids, 5, requests[1].sampling)
    assert by_id(list(generate(engine, [other_seed])))["r1"] != together["r1"]


def test_trajectories_are_handed_on_as_they_finish(engine: VLLMEngine) -> None:
    engine.submit(requests_of([5, 5, 5], VOCAB, [9, 3, 6]))
    finished_at, steps = {}, 0
    while engine.unfinished:
        steps += 1
        for trajectory in engine.step():
            finished_at[trajectory.request_id] = steps
            assert engine.unfinished == 3 - len(finished_at)
    assert finished_at["r1"] < finished_at["r2"] < finished_at["r0"]


def test_more_requests_than_sequences_at_once(engine: VLLMEngine) -> None:
    assert len(list(generate(engine, requests_of([5] * 20, VOCAB, 4)))) == 20


def test_more_prompt_tokens_than_a_forward_takes(engine: VLLMEngine) -> None:
    """Seeded prompts that are computed in pieces make vLLM's CPU sampler fail."""
    requests = requests_of([450] * 8, VOCAB, 4)
    assert by_id(list(generate(engine, requests)))["r7"] == by_id(list(generate(engine, requests[7:])))["r7"]


def test_only_the_stop_tokens_asked_for_end_a_completion(engine: VLLMEngine) -> None:
    (free,) = generate(engine, requests_of([8], VOCAB, 400))
    assert free.finish_reason == "length" and len(free.completion_ids) == 400
    assert EOS in free.completion_ids[:-1]  # config.json's EOS was not asked for
    stop = free.completion_ids[5]
    (stopped,) = generate(engine, requests_of([8], VOCAB, 400, stop_token_ids=(stop,)))
    end = free.completion_ids.index(stop) + 1
    assert stopped.completion_ids == free.completion_ids[:end]
    assert stopped.finish_reason == "stop" and len(stopped.logprobs) == end


def test_padding_of_the_vocabulary_is_never_sampled(engine: VLLMEngine) -> None:
    for trajectory in generate(engine, requests_of([5] * 8, VOCAB, 100, temperature=2.0)):
        assert max(trajectory.completion_ids) < VOCAB


def test_an_update_changes_the_next_generation_and_no_old_prefix_is_used(engine: VLLMEngine, policy: Policy) -> None:
    requests = requests_of([2 * BLOCK + 40], VOCAB, 12)
    before = list(generate(engine, requests))
    with torch.no_grad():
        for master in policy.adapter.parameters():  # type: ignore[union-attr]
            master.add_(torch.randn(master.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    policy.adapter.publish()  # type: ignore[union-attr]

    stale = list(generate(engine, requests))  # the engine was not told
    assert (trainer_logprobs(policy, stale) - engine_logprobs(stale)).abs().mean() > 0.05

    engine.adapter_changed()
    fresh = list(generate(engine, requests))
    assert (trainer_logprobs(policy, fresh) - engine_logprobs(fresh)).abs().max() < 1e-4
    assert by_id(fresh) != by_id(before)


def test_a_slot_corrupted_behind_the_trainers_back_is_noticed(engine: VLLMEngine, policy: Policy) -> None:
    guard = ParityGuard(None, torch.float32)
    trajectories = list(generate(engine, requests_of([9, 20], VOCAB)))
    report = guard.observe(1, engine_logprobs(trajectories), trainer_logprobs(policy, trajectories))
    assert report.mean_abs < 1e-5 and report.tokens == 24
    policy.weights.linears["model.layers.0.mlp.down_proj"].slot.b.add_(0.5)  # type: ignore[union-attr]
    with pytest.raises(ParityError, match=r"step 2: .*writing the adapter's slots"):
        guard.observe(2, engine_logprobs(trajectories), trainer_logprobs(policy, trajectories))


def test_self_test(engine: VLLMEngine, policy: Policy) -> None:
    guard, slots = ParityGuard(None, torch.float32), all_slots(policy.weights)

    def score(trajectories: list) -> torch.Tensor:
        return trainer_logprobs(policy, trajectories)

    assert self_test(engine, score, guard, policy.weights, policy.adapter).mean_abs < 1e-5
    assert torch.equal(slots, all_slots(policy.weights))

    def score_without_adapter(trajectories: list) -> torch.Tensor:
        with policy.reference():
            return trainer_logprobs(policy, trajectories)

    with pytest.raises(ParityError):
        self_test(engine, score_without_adapter, guard, policy.weights, policy.adapter)
    assert torch.equal(slots, all_slots(policy.weights))


def test_sleeping(engine: VLLMEngine, policy: Policy) -> None:
    requests = requests_of([9], VOCAB)
    before = by_id(list(generate(engine, requests)))
    engine.submit(requests)
    for action in (engine.sleep, engine.adapter_changed):
        with pytest.raises(RuntimeError, match="1 requests are unfinished"):
            action()
    while engine.unfinished:
        engine.step()
    engine.sleep()
    engine.sleep()
    engine.adapter_changed()  # the optimizer steps while the engine sleeps
    with pytest.raises(RuntimeError, match=r"submit: the engine is asleep; call wake\(\) first"):
        engine.submit(requests)
    engine.wake()
    engine.wake()
    assert by_id(list(generate(engine, requests))) == before


def test_an_interrupt_is_heard_after_the_step_and_requests_can_be_dropped(engine: VLLMEngine) -> None:
    requests = requests_of([9, 30, 4], VOCAB, [12, 2, 12])  # one ends in the step that is interrupted
    before = by_id(list(generate(engine, requests)))
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    module = engine._model.model.layers[0]
    forwards: list[int] = []

    def interrupt(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        forwards.append(sum(range(1000)))  # Python hears of it before this

    engine.submit(requests)
    engine.step()
    handle = module.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            engine.step()
        with pytest.raises(KeyboardInterrupt):  # nor was the engine left where it cannot go on from
            engine.step()
    finally:
        handle.remove()
        assert signal.signal(signal.SIGINT, usual) is signal.default_int_handler
    assert len(forwards) == 2
    assert engine.unfinished == 3
    engine.abort()
    assert engine.unfinished == 0
    engine.adapter_changed()
    engine.sleep()
    engine.wake()
    assert by_id(list(generate(engine, requests))) == before


def test_a_step_that_fails_closes_the_engine(engine: VLLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []

    def fails() -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine._engine, "step", fails)
    monkeypatch.setattr(engine, "close", lambda: closed.append(True))  # the other tests go on with it
    with pytest.raises(torch.OutOfMemoryError):
        engine.step()
    assert closed == [True]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (RolloutRequest("bad", (), 1, SamplingParams(4)), "'bad': the prompt is empty"),
        (RolloutRequest("bad", (VOCAB,), 1, SamplingParams(4)), "token id 101 is outside the vocabulary"),
        (RolloutRequest("bad", (1,) * 510, 1, SamplingParams(4)), "510 prompt tokens .* over max_context 512"),
        (RolloutRequest("bad", (1,), -1, SamplingParams(4)), "the seed must not be negative"),
        (RolloutRequest("r0", (1,), 1, SamplingParams(4)), "'r0': the id is in flight"),
        (RolloutRequest("bad", (1,), 1, SamplingParams(4, temperature=3.0)), "from 0.01 to 2.0, not at 3.0"),
        (RolloutRequest("bad", (1,), 1, SamplingParams(4, temperature=0.001)), "from 0.01 to 2.0, not at 0.001"),
    ],
)
def test_bad_requests_are_refused_and_none_is_queued(
    engine: VLLMEngine, request_: RolloutRequest, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        engine.submit([*requests_of([5], VOCAB), request_])
    assert engine.unfinished == 0


def test_the_last_position_of_the_context_can_be_used(engine: VLLMEngine) -> None:
    (trajectory,) = generate(engine, requests_of([500], VOCAB, 12))
    assert len(trajectory.completion_ids) == 12


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    """Before its weights are looked for: an adapter's files are others."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds a PEFT adapter, not a model: merge it into its base"):
        open_engine(tmp_path)


def test_a_second_engine_is_refused(opened: SimpleNamespace) -> None:
    with pytest.raises(RuntimeError, match="another vLLM engine is open"):
        open_engine(opened.directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine_kwargs": {"max_num_sequences": 4}}, "no option 'max_num_sequences'; did you mean .*max_num_seqs"),
        (
            {"engine_kwargs": {"tensor_parallel_size": 2}},
            "tensor_parallel_size=2 cannot be set: engine and trainer share",
        ),
        ({"engine_kwargs": {"gpu_memory_utilization": 0.5}}, "set kv_cache_memory_bytes to override"),
        ({"engine_kwargs": {"load_format": "dummy"}}, "load_format='dummy' cannot be set"),
        ({"engine_kwargs": {"max_sequences": 4, "max_num_seqs": 4}, "max_sequences": None}, "given twice"),
        (
            {"engine_kwargs": {"max_num_seqs": None}, "max_sequences": None},
            "engine_kwargs: max_num_seqs=None must be a whole number of at least 1, or left out",
        ),
        ({"kv_cache_bytes": "4GiB"}, "kv_cache_memory_bytes='4GiB' must be a whole number"),
        (
            {"engine_kwargs": {"enable_chunked_prefill": True}},
            "enable_chunked_prefill=True cannot be set on a CPU: of a seeded prompt in pieces",
        ),
        ({"engine_kwargs": {"long_prefill_token_threshold": 64}}, "=64 cannot be set on a CPU"),
        ({"engine_kwargs": {"additional_config": 3}}, "additional_config=3 must be a mapping"),
        ({"dtype": torch.float64}, "dtype torch.float64 is not one that vLLM can share"),
        ({"device": "cuda"}, "is built for cpu, and the run is on cuda"),
        ({"device": "cuda:1"}, "set CUDA_VISIBLE_DEVICES"),
        ({"max_context": 0}, "max_context must be at least 1"),
    ],
)
def test_bad_arguments(opened: SimpleNamespace, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_engine(opened.directory, **options)


def test_options_are_passed_on() -> None:
    import vllm

    check_vllm(torch.device("cpu"), {"max_sequences": 4, "block_size": 64})
    with pytest.raises(ValueError, match="vLLM has no option 'max_sequence'; did you mean max_sequences"):
        check_vllm(torch.device("cpu"), {"max_sequence": 4})
    with pytest.raises(ValueError, match="is built for cpu, and the run is on cuda"):
        check_vllm(torch.device("cuda"), {})

    given = {
        "max_sequences": 4,
        "kv_cache_dtype": "fp8",
        "compilation_config": {"mode": 0},
        "load_format": "safetensors",
        "kv_cache_bytes": 4e9,
    }
    assert check_engine_kwargs(given | {"enable_chunked_prefill": False}, vllm.EngineArgs, "cpu") == {
        "enable_chunked_prefill": False,
        "max_num_seqs": 4,
        "kv_cache_dtype": "fp8",
        "compilation_config": {"mode": 0},
        "kv_cache_memory_bytes": 4_000_000_000,
    }


def edited_config(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a checkpoint with another config.json."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).symlink_to(file)
    config = json.loads((source / "config.json").read_text()) | changes
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(config))
    return target


def test_models_that_cannot_be_shared(opened: SimpleNamespace, tmp_path: Path) -> None:
    new = edited_config(opened.directory, tmp_path / "new", architectures=["Qwen9ForCausalLM"])
    with pytest.raises(ValueError, match="does not know the architecture Qwen9ForCausalLM; use a newer vLLM"):
        open_engine(new)
    narrow = edited_config(opened.directory, tmp_path / "narrow", head_dim=24)
    with pytest.raises(ValueError, match=r"heads of 32, .*, and the model's have 24: set engine='transformers'"):
        open_engine(narrow)
    quantised = edited_config(opened.directory, tmp_path / "quantised", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ValueError, match=r"the checkpoint is quantised \(fp8\)"):
        open_engine(quantised)
    tiny_multimodal().save_pretrained(tmp_path / "multimodal")
    with pytest.raises(ValueError, match="gemma3 is multimodal"):
        open_engine(tmp_path / "multimodal")


def test_names_are_all_there() -> None:
    assert "names that are used are there" in describe("cpu")


@pytest.mark.parametrize(
    "error", [ImportError("libcudart.so.13: cannot open"), OSError("libcudart.so.13: cannot open")]
)
def test_a_vllm_that_does_not_load_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: str) -> None:
        raise error

    monkeypatch.setattr(vllm_names, "import_module", broken)
    assert r"cannot be imported (libcudart.so.13: cannot open): it is for another" in describe("cpu")
    with pytest.raises(vllm_names.VLLMUnusable, match="cannot be imported .* or set engine='transformers'"):
        check_vllm(torch.device("cpu"), {})


def test_too_little_memory_and_what_vllm_refuses(
    opened: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Last: these starts fail half-way, which takes the open engine's groups with them, so it is closed first."""
    opened.engine.close()
    opened.engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed; make a new one"):
        opened.engine.step()
    assert torch.isfinite(opened.policy.weights.embedding).all()
    with monkeypatch.context() as patch:
        patch.setattr(vllm_engine, "free_bytes", lambda device: 2**19)
        with pytest.raises(
            ValueError, match=r"KV cache of one sequence of 512 tokens.*MiB are missing.*max_context to 384"
        ):
            open_engine(opened.directory)
    with pytest.raises(
        ValueError, match=r"kv_cache_memory_bytes=1000 is too little: .* one sequence of 512 tokens needs"
    ):
        open_engine(opened.directory, kv_cache_bytes=1000)
    with pytest.raises(
        ValueError, match=r"^engine_kwargs: vLLM [\d.]+ refuses its options: block_size: Input should be"
    ):
        open_engine(opened.directory, engine_kwargs={"block_size": -1})
    windows = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
    windows["layer_types"] = ["full_attention", "sliding_attention"]
    partly = edited_config(opened.directory, tmp_path / "partly", **windows)
    with pytest.raises(ValueError, match="does not serve this model with these options: Sliding window for some"):
        open_engine(partly)
    with pytest.raises(ValueError, match="max_model_len"):
        open_engine(opened.directory, max_context=1024)
