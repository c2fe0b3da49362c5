"""From options to gradients: whose log-probs, which tokens, what is logged, and how often the device is waited for."""

import math
import random
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from colora.rl import learner as learner_module
from colora.rl.config import GRPOConfig
from colora.rl.learner import Learner
from colora.rl.metrics import Metrics
from colora.rl.packing import TrainingSample
from colora.rl.policy import load
from peft import LoraConfig
from torch.utils._python_dispatch import TorchDispatchMode

from ..tiny_runs import EOS, tiny_checkpoint

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint(tmp_path_factory.mktemp("model")))


def learner(model: str, output: Path, **options: object) -> Learner:
    config = GRPOConfig(
        str(output), device="cpu", report_to=[], per_device_train_batch_size=8, num_generations=4, **options
    )
    return Learner(load(model, LORA, seed=0), config, Metrics(), lambda *_: None)


def samples(of: Learner, gap: float = 0.0, advantage: float | None = None) -> list[TrainingSample]:
    """Eight random completions; the engine's log-probs are the trainer's less `gap`."""
    draw = random.Random(0)
    made = []
    for index in range(8):
        tokens = [draw.randrange(EOS) for _ in range(4 + index)]
        targets = list(range(3, len(tokens)))
        value = (-1.0) ** index if advantage is None else advantage
        made.append(TrainingSample(tokens, targets, [0.0] * len(targets), value))
    of.recompute_old_logprobs(made)
    shares = of.objective.shares([len(sample.targets) for sample in made])
    for sample, share in zip(made, shares, strict=True):
        assert sample.old_logprobs is not None
        sample.engine_logprobs = [value - gap for value in sample.old_logprobs]
        sample.share = share
        if not of.recomputes_old:
            sample.old_logprobs = None
    return made


def step(of: Learner, made: list[TrainingSample], **options: Any) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient and the metrics."""
    of.policy.zero_grad()
    of.accumulate(made, **({"step": 1, "first_update": True} | options))
    return torch.cat([parameter.grad.flatten() for parameter in of.policy.parameters()]), of.metrics.drain()


@pytest.mark.parametrize(
    ("options", "engine", "recomputed"),
    [
        ({}, True, False),
        ({"num_iterations": 2}, False, True),
        ({"num_iterations": 2, "old_logprobs": "engine"}, True, False),
        ({"old_logprobs": "trainer"}, False, False),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4}, False, False),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "num_iterations": 2},
         False, True),
    ],
)  # fmt: skip
def test_whose_log_probs_the_ratio_is_taken_against(
    model: str, tmp_path: Path, options: dict, engine: bool, recomputed: bool
) -> None:
    ours = learner(model, tmp_path / "run", **options)
    assert (ours.old_is_engine, ours.recomputes_old) == (engine, recomputed)


def test_bypass_and_old_by_the_trainer_give_the_same_first_step(model: str, tmp_path: Path) -> None:
    """The weight of a token is pi / mu either way, as long as no ratio is outside of the clip range."""
    gradients = []
    for old in ("engine", "trainer"):
        ours = learner(model, tmp_path / old, old_logprobs=old, parity_limit=0.1)
        gradients.append(step(ours, samples(ours, gap=0.02))[0])
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"entropy_coef": 0.1}, {"beta": 0.1}])
def test_high_entropy_tokens_are_those_of_the_whole_step(model: str, tmp_path: Path, options: dict) -> None:
    whole = learner(model, tmp_path / "a", top_entropy_quantile=0.25, tokens_per_microbatch=10_000, **options)
    split = learner(model, tmp_path / "b", top_entropy_quantile=0.25, tokens_per_microbatch=1, **options)
    made = samples(whole)
    expected, _ = step(whole, made)
    flags = [sample.high_entropy for sample in made]
    gradient, _ = step(split, made)
    assert flags == [sample.high_entropy for sample in made]
    tokens = sum(len(sample.targets) for sample in made)
    assert sum(map(sum, flags)) == math.ceil(tokens / 4)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-6)
    everywhere, _ = step(learner(model, tmp_path / "c", **options), made)
    assert (everywhere - expected).abs().max() > 1e-3


def test_the_entropy_bonus_acts_on_completions_without_advantage(model: str, tmp_path: Path) -> None:
    ours = learner(model, tmp_path / "run", entropy_coef=0.5)
    made = samples(ours, advantage=0.0)
    gradient, before = step(ours, made)
    with torch.no_grad():
        for parameter in ours.policy.parameters():
            parameter -= 0.01 * parameter.grad
    assert gradient.abs().max() > 1e-3
    ours.policy.adapter.publish()
    assert step(ours, made, first_update=False)[1]["entropy"] > before["entropy"]


def test_the_figures_of_the_correction(model: str, tmp_path: Path) -> None:
    ours = learner(model, tmp_path / "run", parity_limit=10.0)
    made = samples(ours)
    made[0].engine_logprobs = [value - 1.0 for value in made[0].engine_logprobs]  # ratio e: cut to 2, and rejected
    made[7].engine_logprobs[0] += 0.5  # a single token of 8: kept
    tokens = sum(len(sample.targets) for sample in made)
    first = len(made[0].targets)
    _, metrics = step(ours, made)
    assert metrics["correction/rejected_sequences"] == pytest.approx(1 / 8)
    assert metrics["correction/outside_fraction"] == pytest.approx(first / tokens)
    lost = (first + 1 - math.exp(-0.5)) / tokens
    assert metrics["correction/kept_loss_weight"] == pytest.approx(1 - lost, abs=1e-6)
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1 - lost, abs=1e-6)
    assert metrics["sampling/importance_sampling_ratio/min"] == 0.0
    square = (tokens - first - 1 + math.exp(-1.0)) / tokens
    assert metrics["correction/effective_sample_size"] == pytest.approx((1 - lost) ** 2 / square, abs=1e-6)
    assert metrics["sampling/sampling_logp_difference/max"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["correction/dropped_tokens"] == 0


def test_tokens_without_an_engine_log_prob_are_left_out(model: str, tmp_path: Path) -> None:
    ours = learner(model, tmp_path / "run")
    made = samples(ours)
    values = [math.nan, *made[7].engine_logprobs[1:-1], -math.inf]
    spoilt = TrainingSample(made[7].tokens, made[7].targets, values, made[7].advantage, share=made[7].share)
    without = TrainingSample(
        made[7].tokens, made[7].targets[1:-1], values[1:-1], made[7].advantage, share=made[7].share
    )
    gradient, metrics = step(ours, [*made[:7], spoilt])
    assert metrics["correction/dropped_tokens"] == 2
    torch.testing.assert_close(gradient, step(ours, [*made[:7], without])[0], rtol=0, atol=0)


def test_an_engine_without_any_log_probs_stops_the_run(model: str, tmp_path: Path) -> None:
    ours = learner(model, tmp_path / "run")
    nothing = [TrainingSample([1, 2, 3], [1, 2], [math.nan] * 2, 1.0)]
    with pytest.raises(FloatingPointError, match="step 3: none of the engine's 2 log-probs is finite"):
        ours.accumulate(nothing, step=3, first_update=True)


class CountWaits(TorchDispatchMode):
    """Counts the times that a value is fetched from the device."""

    waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.waits += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_micro_batches_do_not_wait_for_the_device(model: str, tmp_path: Path) -> None:
    waits = []
    for budget in (10_000, 1):
        ours = learner(model, tmp_path / str(budget), tokens_per_microbatch=budget, beta=0.1, entropy_coef=0.1)
        made = samples(ours)
        with CountWaits() as counter:
            step(ours, made)
        waits.append(counter.waits)
    assert waits[0] == waits[1] < 30


def test_prompts_computed_again_and_again_are_told_once(
    model: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Prompts of 9 tokens and 1, 2, ... 8 of completion: a row of all has 45, eight rows 108."""
    for budget, repeated in ((45, 0), (1, 63)):
        ours = learner(model, tmp_path / str(budget), tokens_per_microbatch=budget)
        made = samples(ours)
        for sample in made:
            sample.tokens = [3, 1, 2, 5, 4, 2, 1, 6, 3, *sample.tokens[3:]]
            sample.targets = [target + 6 for target in sample.targets]
            sample.prompt = 9
        for _ in range(2):
            _, metrics = step(ours, made, first_update=False)
            assert metrics["throughput/repeated_prompt_tokens"] == repeated
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == (budget == 1)
    assert "58 % of the 108 tokens" in said[0] and "tokens_per_microbatch=1 tokens; with 45," in said[0]


def test_a_shared_prompt_changes_no_gradient_and_no_metric(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the speed, if the step takes as long: its tokens are those of whole sequences."""
    clock = SimpleNamespace(perf_counter=count().__next__)  # a second between calls
    monkeypatch.setattr(learner_module, "time", clock)
    ours = learner(model, tmp_path / "run")
    prompt = [3, 1, 2, 5, 4, 2, 1, 6, 3]
    made = samples(ours)
    for sample in made:
        sample.tokens = prompt + sample.tokens[3:]
        sample.targets = [target + len(prompt) - 3 for target in sample.targets]
    apart, before = step(ours, made, first_update=False)
    for sample in made:
        sample.prompt = len(prompt)
    shared, after = step(ours, made, first_update=False)
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-6)
    assert before["throughput/train_tokens_per_s"] == sum(len(sample.tokens) for sample in made)
    assert after == pytest.approx(before, rel=1e-5, abs=1e-6)
