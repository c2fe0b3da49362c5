"""The training loop: against the oracle, under packing, across a kill, and with bad input."""

import asyncio
import json
import math
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colora import GRPOConfig, GRPOTrainer
from colora.rewards.runner import RewardError
from colora.rollout.engine import sample_seed
from colora.rollout.records import read_records
from colora.weightshare.guard import ParityError
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from ..oracle import grpo as oracle
from ..tiny_runs import EOS, tiny_checkpoint, tiny_tokenizer

PROMPTS = ["12+34=", "5+6=", "70+8=", "99+1=", "a b", "hello"]
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def threes(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [0.25 * sum(token % 3 == 0 for token in ids) for ids in completion_ids]


def config(output: Path, **options: object) -> GRPOConfig:
    defaults: dict = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 10,
        "learning_rate": 3e-3,
        "max_steps": 2,
        "report_to": [],
        "save_strategy": "no",
        "device": "cpu",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(str(output), **(defaults | options))


def make(model: str, output: Path, reward=threes, dataset: Dataset | None = None, **options: object) -> GRPOTrainer:
    rows = dataset
    if rows is None:
        rows = Dataset.from_dict({"prompt": PROMPTS, "answer": [str(i) for i in range(len(PROMPTS))]})
    return GRPOTrainer(model, reward, config(output, **options), rows, peft_config=LORA)


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    ("loss_type", "beta", "num_iterations"), [("dapo", 0.0, 1), ("grpo", 0.04, 2), ("dr_grpo", 0.0, 2)]
)
def test_a_whole_run_equals_the_oracles(
    model: str, tmp_path: Path, loss_type: str, beta: float, num_iterations: int
) -> None:
    """From seeds to adapter: the same tokens are sampled, the same losses logged, the same weights come out."""
    algorithm = {
        "loss_type": loss_type,
        "beta": beta,
        "num_iterations": num_iterations,
        "mask_truncated_completions": loss_type == "dapo",
    }
    steps = 3 * num_iterations
    trainer = make(
        model, tmp_path / "run", max_steps=steps, shuffle_dataset=False, tokens_per_microbatch=40, **algorithm
    )
    start = {name: value.clone() for name, value in trainer.adapter.named_matrices()}
    trainer.train()

    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    trained = oracle.attach_lora(base, start, scale=LORA.lora_alpha / LORA.r)
    ids = tiny_tokenizer()(PROMPTS)["input_ids"]
    options = oracle.Options(
        num_generations=4, max_completion_length=10, loss_type=loss_type, beta=beta, num_iterations=num_iterations,
        learning_rate=3e-3, total_steps=steps, mask_truncated=loss_type == "dapo",
    )  # fmt: skip

    def uniforms(generation: int, slot: int, index: int) -> torch.Tensor:
        seed = sample_seed(42, 1 + generation * num_iterations, slot, index)
        return torch.from_numpy(np.random.Generator(np.random.Philox(key=seed)).random(10))

    losses, completions = oracle.train(
        base,
        list(trained.values()),
        [ids[0:2], ids[2:4], ids[4:6]],
        lambda c: threes([c.ids])[0],
        uniforms,
        options,
        [EOS],
    )
    records = read_records(tmp_path / "run" / "rollouts")
    assert [r.trajectory.completion_ids for r in records] == [c.ids for c in completions]
    assert logged(trainer, "loss") == pytest.approx(losses, abs=1e-5)
    for name, value in trainer.adapter.named_matrices():
        torch.testing.assert_close(value, trained[name].detach(), rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_packing_changes_nothing(model: str, tmp_path: Path, loss_type: str) -> None:
    """Whatever the split into micro-batches and the order of the samples, the gradient is the same within 1e-6."""
    trainer = make(model, tmp_path / "run", loss_type=loss_type, beta=0.04, tokens_per_microbatch=10_000)
    trainer.engine.wake()
    trainer._generate(next(iter(trainer.get_train_dataloader())))
    samples = trainer.minibatch(0)

    def gradients(budget: int, order: list[int]) -> torch.Tensor:
        trainer.args.tokens_per_microbatch = budget
        trainer.policy.zero_grad()
        trainer.learner.accumulate([samples[index] for index in order], step=1, first_update=True)
        return torch.cat([parameter.grad.flatten() for parameter in trainer.policy.parameters()])

    whole = gradients(10_000, list(range(8)))
    assert whole.abs().max() > 1e-3
    for budget, order in [(1, list(range(8))), (20, [7, 2, 5, 0, 1, 6, 3, 4]), (35, list(reversed(range(8))))]:
        torch.testing.assert_close(gradients(budget, order), whole, rtol=0, atol=1e-6)


def test_groups_without_signal_are_counted_and_not_forwarded(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path / "run", reward=lambda completions, **_: [1.0] * len(completions), max_steps=1)
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    trainer.train()
    assert logged(trainer, "frac_groups_without_signal") == [1.0]
    assert logged(trainer, "throughput/train_tokens_per_s") == []
    for old, new in zip(before, trainer.policy.parameters(), strict=True):
        assert torch.equal(old, new)


def test_several_updates_per_generation_use_each_completion_once(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path / "run", steps_per_generation=2, per_device_train_batch_size=4, max_steps=4)
    seen: list[set[int]] = []
    original = trainer.minibatch

    def spy(update: int):
        samples = original(update)
        seen.append({id(s) for s in samples})
        return samples

    trainer.minibatch = spy  # type: ignore[method-assign]
    trainer.train()
    assert len(read_records(tmp_path / "run" / "rollouts")) == 2 * 8
    assert all(not (first & second) for first, second in zip(seen[::2], seen[1::2], strict=True))


def test_rewards_of_every_kind_with_weights_columns_and_logs(model: str, tmp_path: Path) -> None:
    async def length(completions, **_: object) -> list[float | None]:
        await asyncio.sleep(0)
        return [None if index == 0 else float(len(text)) for index, text in enumerate(completions)]

    def column(prompts, completions, answer, trainer_state, log_extra, log_metric, **_: object) -> list[float]:
        log_extra("answer_seen", answer)
        log_metric("my_metric", 7.0)
        return [float(a) + 0.1 * trainer_state.global_step for a in answer]

    trainer = make(model, tmp_path / "run", reward=[length, column], reward_weights=[0.5, 2.0])
    trainer.train()
    records = read_records(tmp_path / "run" / "rollouts")
    for record in (records[0], records[4]):  # async functions get a group a call
        assert record.rewards["length"] is None and record.reward == pytest.approx(2 * record.rewards["column"])
    for record in records[1:4] + records[5:8]:
        assert record.reward == pytest.approx(0.5 * record.rewards["length"] + 2 * record.rewards["column"], rel=1e-6)
    assert all(record.extra["answer_seen"] == str(record.prompt_index) for record in records)
    assert logged(trainer, "my_metric") == [7.0, 7.0]
    names = {
        "rewards/length/mean",
        "rewards/column/std",
        "completions/mean_length",
        "entropy",
        "clip_ratio/region_mean",
    }
    names |= {"sampling/sampling_logp_difference/mean", "num_tokens", "step_time", "time/rollout_s", "reward_std"}
    assert names <= set(trainer.state.log_history[0])
    assert max(logged(trainer, "sampling/sampling_logp_difference/max")) < 1e-5


def test_the_saved_adapter_is_peft(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path / "run")
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    peft = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tmp_path / "final"
    )
    record = read_records(tmp_path / "run" / "rollouts")[0]
    tokens = torch.tensor(record.trajectory.prompt_ids + record.trajectory.completion_ids)
    expected = peft(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    ours, _ = trainer.policy.logprobs(tokens, [len(tokens)], torch.arange(len(tokens) - 1), tokens[1:])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_conversations_and_evaluation(model: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}assistant: "
    seen: list[object] = []

    def reward(prompts, completions, **_: object) -> list[float]:
        seen.extend(completions)
        return [float(len(completion[-1]["content"])) for completion in completions]

    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in PROMPTS]})
    trainer = GRPOTrainer(
        model, reward, config(tmp_path / "run", eval_strategy="steps", eval_steps=1, num_generations_eval=2),
        rows, {"first": rows.select([0, 1]), "second": rows.select([2])}, tokenizer, peft_config=LORA,
    )  # fmt: skip
    trainer.train()
    assert all(isinstance(c, list) and c[0]["role"] == "assistant" for c in seen)
    assert len(logged(trainer, "eval_first_reward")) == 2 and len(logged(trainer, "eval_second_reward")) == 2
    assert trainer.evaluate(rows.select([0]))["eval_reward"] == trainer.evaluate(rows.select([0]))["eval_reward"]


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"prompt": []}), "eval_dataset is empty"),
        (Dataset.from_dict({"question": ["1+1"]}), "eval_dataset has no `prompt` column; its columns are: question"),
        (
            Dataset.from_dict({"prompt": ["1", "2" * 99]}),
            r"eval_dataset\[1\]: the prompt has 99 tokens, at most 54 fit",
        ),
        ([{"prompt": "1"}], "eval_dataset is a list: pass a datasets.Dataset"),
        (
            {"good": Dataset.from_dict({"prompt": ["1"]}), "bad": Dataset.from_dict({"prompt": ["1", ""]})},
            r"eval_dataset\['bad'\]\[1\]: the prompt has no tokens",
        ),
        (
            IterableDataset.from_generator(lambda: iter([{"question": "1"}])),
            "the stream has no rows, or no `prompt` in",
        ),
    ],
)
def test_evaluate_refuses_what_training_would_before_anything_is_sampled(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dataset: Any, message: str
) -> None:
    trainer = make(model, tmp_path / "run")
    monkeypatch.setattr(trainer.engine, "submit", lambda requests: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=message):
        trainer.evaluate(dataset)


def test_after_an_interrupt_in_the_middle_of_a_step_the_engine_can_be_used(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(model, tmp_path / "run")
    rows = Dataset.from_dict({"prompt": PROMPTS})
    expected = trainer.evaluate(rows)["eval_reward"]
    step, steps = trainer.engine.step, count()

    def interrupted() -> list:
        if next(steps) == 3:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(trainer.engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.engine.unfinished == 0
    assert trainer.evaluate(rows)["eval_reward"] == expected
    trainer.train()
    assert trainer.state.global_step == 2


def test_tensorboard_gets_the_metrics(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    make(model, tmp_path / "run", report_to=["tensorboard"]).train()
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    assert {"train/reward", "train/loss"} <= set(board.Tags()["scalars"])


def test_a_slot_written_behind_the_trainers_back_stops_the_run_at_the_next_step(model: str, tmp_path: Path) -> None:
    class Corrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                next(iter(trainer.policy.weights.linears.values())).slot.b.add_(0.5)

    trainer = make(model, tmp_path / "run", max_steps=5)
    trainer.add_callback(Corrupt())
    with pytest.raises(ParityError, match=r"step 3: the adapter's slots.*publish\(\)"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_gap_between_engine_and_trainer_stops_the_run_before_the_update(model: str, tmp_path: Path) -> None:
    trainer = make(model, tmp_path / "run", parity_limit=1e-9)
    before = [parameter.clone() for parameter in trainer.policy.parameters()]
    with pytest.raises(ParityError, match=r"step 1: engine and trainer disagree.*over the limit 1e-09"):
        trainer.train()
    assert all(torch.equal(old, new) for old, new in zip(before, trainer.policy.parameters(), strict=True))


def test_a_failing_reward_stops_the_run_with_the_last_checkpoint_whole(model: str, tmp_path: Path) -> None:
    calls: list[int] = []

    def fails_later(completions, trainer_state, **_: object) -> list[float]:
        calls.append(1)
        if trainer_state.global_step == 2:
            return [math.nan] * len(completions)
        return [float(len(text)) for text in completions]

    options: dict = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    with pytest.raises(RewardError, match=r"fails_later.*step 3"):
        make(model, tmp_path / "run", reward=fails_later, **options).train()
    trainer = make(model, tmp_path / "run", **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 4
    assert [r.step for r in read_records(tmp_path / "run" / "rollouts")] == [s for s in (1, 2, 3, 4) for _ in range(8)]


def test_after_a_failure_the_same_trainer_trains_again(model: str, tmp_path: Path) -> None:
    failures = [True]

    def fails_once(completions, **_: object) -> list[float]:
        if failures:
            failures.pop()
            raise ValueError("the service was down")
        return [float(len(text)) for text in completions]

    trainer = make(model, tmp_path, fails_once, max_steps=2)
    with pytest.raises(RewardError):
        trainer.train()
    before = [master.clone() for master in trainer.adapter.masters_b]
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.adapter.is_published()
    assert not any(torch.equal(*pair) for pair in zip(before, trainer.adapter.masters_b, strict=True))


def test_a_failing_reward_can_be_gone_on_without(model: str, tmp_path: Path) -> None:
    def fails_on_one(completions, **_: object) -> list[float]:
        return ["bad" if index == 3 else 1.0 * index for index in range(len(completions))]  # type: ignore[misc]

    trainer = make(model, tmp_path / "run", reward=fails_on_one, reward_errors="none", max_steps=1)
    trainer.train()
    records = read_records(tmp_path / "run" / "rollouts")
    assert records[3].rewards["fails_on_one"] is None
    assert [record.extra.get("reward_failures") for record in records[2:5]] == [
        None, {"fails_on_one": "error: it returned the string 'bad'"}, None
    ]  # fmt: skip
    assert logged(trainer, "rewards/failures") == [1.0]


@pytest.mark.parametrize(
    ("options", "dataset", "message"),
    [
        ({}, Dataset.from_dict({"prompt": []}), "train_dataset is empty"),
        ({}, Dataset.from_dict({"prompt": ["1" * 60] * 4}), r"train_dataset\[0\].*60 tokens, at most 54"),
        ({"max_completion_length": 64}, None, "max_completion_length=64 leaves no room"),
        ({"max_context": 4096}, None, "max_context=4096 is over.*64"),
    ],
)
def test_bad_input_is_refused_before_weights_are_loaded(tmp_path: Path, model: str, options, dataset, message) -> None:
    no_weights = tmp_path / "model"
    tiny_tokenizer().save_pretrained(no_weights)
    (no_weights / "config.json").write_text((Path(model) / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        make(str(no_weights), tmp_path / "run", dataset=dataset, **options)


def test_a_reward_function_by_name_is_refused_with_how_to_load_it(tmp_path: Path, model: str) -> None:
    with pytest.raises(ValueError, match="'my.py:close' names a function, .* load it with `colora.rewards.loading"):
        make(model, tmp_path / "run", reward=[threes, "my.py:close"])


def test_lora_targets_that_match_nothing_are_refused_before_weights_are_loaded(tmp_path: Path, model: str) -> None:
    no_weights = tmp_path / "model"
    tiny_tokenizer().save_pretrained(no_weights)
    (no_weights / "config.json").write_text((Path(model) / "config.json").read_text())
    rows = Dataset.from_dict({"prompt": PROMPTS})
    lora = LoraConfig(target_modules=["query", "v_proj"])
    with pytest.raises(ValueError, match="'query' matches no linear.*q_proj"):
        GRPOTrainer(str(no_weights), threes, config(tmp_path / "run"), rows, peft_config=lora)


def test_an_unknown_architecture_is_refused_by_name(tmp_path: Path, model: str) -> None:
    other = tmp_path / "model"
    tiny_tokenizer().save_pretrained(other)
    settings = json.loads((Path(model) / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2", "n_positions": 64}))
    with pytest.raises(ValueError, match="gpt2.*llama.*qwen3"):
        make(str(other), tmp_path / "run")


def test_two_eval_seeds_and_training_seeds_differ(model: str, tmp_path: Path) -> None:
    """The first generation of two runs with other seeds differs, with the same seed it does not."""

    def first(output: str, seed: int) -> list[list[int]]:
        make(model, tmp_path / output, max_steps=1, seed=seed, shuffle_dataset=False).train()
        return [r.trajectory.completion_ids for r in read_records(tmp_path / output / "rollouts")]

    assert first("a", 1) == first("b", 1) != first("c", 2)


@pytest.mark.parametrize(("stream", "expected"), [(False, 5), (True, 40)])
def test_the_engine_is_told_how_long_prompts_usually_are(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool, expected: int
) -> None:
    """The dataset's; of a stream `max_prompt_length` is taken for it."""

    def stop(*arguments: Any) -> None:
        raise InterruptedError(arguments[-1])

    monkeypatch.setattr("colora.rl.setup.build", stop)
    dataset = Dataset.from_dict({"prompt": ["1+2=", "12+3=", "123+4="]})
    with pytest.raises(InterruptedError, match=f"^{expected}$"):
        make(
            model, tmp_path, dataset=dataset.to_iterable_dataset() if stream else dataset, max_prompt_length=40,
            num_generations=8,
        )  # fmt: skip
