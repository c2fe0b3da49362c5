"""One run of ours equals one of trl.GRPOTrainer on the same rollouts.

Proof: our trainer samples and records its rollouts; TRL gets exactly those through its `rollout_func`, the same base,
the same adapter values and the same reward function; then advantages, the loss of every optimizer step, and the
gradient of every adapter matrix that the optimizer sees are compared, with and without KL, with one and two updates on
the same rollouts.

Then one step for every loss type, ratio level, correction mode and mask that TRL has. TRL corrects for the engine only
with vLLM, so its trainer is told that it has one; rollouts, engine log-probs (off by 0.3 nats a token) and weights are
given to both, and TRL's own `_generate_and_score_completions` and `_compute_loss` run on them.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from colora.rl.config import GRPOConfig
from colora.rl.learner import Learner
from colora.rl.metrics import Metrics
from colora.rl.packing import TrainingSample
from colora.rl.policy import load
from colora.rl.trainer import GRPOTrainer
from colora.rollout.records import RolloutRecord, read_records
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig as TRLConfig
from trl import GRPOTrainer as TRLTrainer

from ..tiny_runs import EOS, tiny_checkpoint, tiny_tokenizer

PROMPTS = ["12+34=", "5+6=", "70+8=", "99+1="]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
SHARED = {
    "per_device_train_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 10,
    "learning_rate": 3e-3,
    "shuffle_dataset": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_steps": 1,
    "use_cpu": True,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}


def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
    return [0.25 * sum(token % 3 == 0 for token in ids) for ids in completion_ids]


class KeepGradients(TrainerCallback):
    """Copies every gradient, by PEFT's names, just before each optimizer step."""

    def __init__(self, named_gradients):
        self.named_gradients, self.steps = named_gradients, []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.steps.append({name: gradient.clone() for name, gradient in self.named_gradients()})


def run_ours(
    checkpoint: Path, output: Path, adapter: Path, options: dict
) -> tuple[list[RolloutRecord], list[float], list[dict]]:
    config = GRPOConfig(str(output), **SHARED, **options)
    dataset = Dataset.from_dict({"prompt": PROMPTS})
    trainer = GRPOTrainer(
        str(checkpoint), reward, config, dataset, peft_config=LoraConfig(**LORA, init_lora_weights=False)
    )
    trainer.adapter.save(adapter)
    keep = KeepGradients(lambda: trainer.adapter.named_matrices(gradients=True))
    trainer.add_callback(keep)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return read_records(output / "rollouts"), losses, keep.steps


def run_trl(checkpoint: Path, output: Path, adapter: Path, options: dict, records: list[RolloutRecord]):
    def rollout(prompts: list[str], trainer: TRLTrainer) -> dict:
        assert prompts == [record.prompt for record in records]
        return {
            "prompt_ids": [record.trajectory.prompt_ids for record in records],
            "completion_ids": [record.trajectory.completion_ids for record in records],
            "logprobs": [record.trajectory.logprobs for record in records],
        }

    trainer = make_trl(checkpoint, output, adapter, options, rollout)
    keep = KeepGradients(lambda: adapter_gradients(trainer))
    trainer.add_callback(keep)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return list(trainer._logs["advantages"]), losses, keep.steps


def make_trl(checkpoint: Path, output: Path, adapter: Path, options: dict, rollout: Callable) -> TRLTrainer:
    config = TRLConfig(str(output), **SHARED, **options, bf16=False, model_init_kwargs={"dtype": "float32"})
    trainer = TRLTrainer(
        str(checkpoint),
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=LoraConfig(**LORA),
        rollout_func=rollout,
    )
    trainer.model.load_adapter(str(adapter), "default", is_trainable=True)
    return trainer


def adapter_gradients(trainer: TRLTrainer) -> Iterator[tuple[str, torch.Tensor]]:
    for name, parameter in trainer.model.named_parameters():
        if "lora_" in name and ".default." in name:
            yield name.replace(".default", ""), parameter.grad


@pytest.mark.parametrize(
    ("loss_type", "beta", "num_iterations"),
    [("grpo", 0.04, 1), ("grpo", 0.0, 2), ("bnpo", 0.0, 2), ("dr_grpo", 0.04, 2), ("dapo", 0.0, 1), ("dapo", 0.04, 2)],
)
def test_advantages_losses_and_gradients_equal(
    tmp_path: Path, loss_type: str, beta: float, num_iterations: int
) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "model")
    options = {"loss_type": loss_type, "beta": beta, "num_iterations": num_iterations, "max_steps": num_iterations}
    records, losses, gradients = run_ours(checkpoint, tmp_path / "ours", tmp_path / "adapter", options)
    trl_advantages, trl_losses, trl_gradients = run_trl(
        checkpoint, tmp_path / "trl", tmp_path / "adapter", options, records
    )

    assert [record.advantage for record in records] == trl_advantages
    assert losses == pytest.approx(trl_losses, abs=1e-5)
    assert len(gradients) == len(trl_gradients) == num_iterations
    for ours, theirs in zip(gradients, trl_gradients, strict=True):
        assert ours.keys() == theirs.keys()
        assert max(grad.abs().max() for grad in theirs.values()) > 1e-3
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ---- one optimizer step, after the weights have moved and with an engine that is off ---------------------------------

STEP = {"old_logprobs": "trainer", "num_iterations": 2, "max_sequence_gap": 1e9}
LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
BOUNDS = {"vllm_importance_sampling_clip_max": 1.3, "vllm_importance_sampling_clip_min": 0.8}
CASES: dict[str, dict] = {
    f"{loss_type}-{level}": {"loss_type": loss_type, "importance_sampling_level": level}
    for loss_type in LOSSES
    for level in ("token", "sequence")
    if (loss_type, level) != ("vespo", "sequence")  # VESPO has a weight of its own for the sequence
}
CASES |= {
    f"grpo-{mode}": {"loss_type": "grpo", "vllm_importance_sampling_mode": mode} | BOUNDS
    for mode in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
}
CASES |= {
    "vespo-token_mask": {"loss_type": "vespo", "vllm_importance_sampling_mode": "token_mask"} | BOUNDS,
    "uncorrected": {"loss_type": "dapo", "vllm_importance_sampling_correction": False},
    "delta": {"loss_type": "grpo", "delta": 1.1, "epsilon": 0.05, "epsilon_high": 0.06},
    "entropy_coef": {"loss_type": "grpo", "entropy_coef": 0.1},
    "top_entropy_quantile": {"loss_type": "dapo", "top_entropy_quantile": 0.3},
    "entropy_coef-of-the-top": {"loss_type": "dapo", "top_entropy_quantile": 0.3, "entropy_coef": 0.1},
    "off_policy_mask": {"loss_type": "grpo", "off_policy_mask_threshold": 0.05},
    "kl": {"loss_type": "dapo", "beta": 0.1, "use_bias_correction_kl": False},
    "kl-corrected-by-sequence": {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence"},
}


@dataclass
class Stage:
    """What both sides start from: rollouts, weights that sampled them, weights that are updated."""

    checkpoint: Path
    adapters: tuple[Path, Path]
    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    engine_logprobs: list[list[float]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    directory = tmp_path_factory.mktemp("stage")
    checkpoint, adapters = tiny_checkpoint(directory / "model"), (directory / "before", directory / "after")
    for seed, adapter in enumerate(adapters):
        policy = load(checkpoint, LoraConfig(**LORA, init_lora_weights=False), seed=seed)
        if seed:  # near the other, so that most ratios are within the clip range
            own = dict(policy.adapter.named_matrices())
            policy.adapter.load(adapters[0])
            for name, value in policy.adapter.named_matrices():
                value += 0.05 * torch.randn(own[name].shape, generator=torch.Generator().manual_seed(1))
        policy.adapter.save(adapter)
    draw = random.Random(0)
    prompts = [ids for ids in tiny_tokenizer()(PROMPTS)["input_ids"] for _ in range(4)]
    completions = [[draw.randrange(EOS) for _ in range(draw.randint(1, 9))] + [EOS] for _ in prompts]
    samples = [sample(*pair, [0.0] * len(pair[1]), 0.0) for pair in zip(prompts, completions, strict=True)]
    learner = make_learner(checkpoint, adapters[0], directory / "run", {})
    learner.recompute_old_logprobs(samples)
    off = [[value + draw.gauss(0.0, 0.3) for value in one.old_logprobs or []] for one in samples]
    return Stage(checkpoint, adapters, prompts, completions, off)


def sample(prompt: list[int], completion: list[int], engine: list[float], advantage: float) -> TrainingSample:
    targets = list(range(len(prompt), len(prompt) + len(completion)))
    return TrainingSample(prompt + completion, targets, engine, advantage)


def make_learner(checkpoint: Path, adapter: Path, output: Path, options: dict, budget: int = 10_000) -> Learner:
    config = GRPOConfig(str(output), **SHARED, **STEP, **options, tokens_per_microbatch=budget)
    policy = load(checkpoint, LoraConfig(**LORA, init_lora_weights=False), seed=0)
    policy.adapter.load(adapter)
    return Learner(policy, config, Metrics(), lambda *_: None)


def our_step(stage: Stage, output: Path, options: dict, advantages: list[float], budget: int) -> tuple[float, dict]:
    learner = make_learner(stage.checkpoint, stage.adapters[0], output, options, budget)
    rollouts = zip(stage.prompt_ids, stage.completion_ids, stage.engine_logprobs, advantages, strict=True)
    samples = [sample(*rollout) for rollout in rollouts]
    learner.recompute_old_logprobs(samples)
    learner.policy.adapter.load(stage.adapters[1])
    shares = learner.objective.shares([len(one.targets) for one in samples])
    for one, share in zip(samples, shares, strict=True):
        one.share = share
    loss = learner.accumulate(samples, step=1, first_update=False)
    return loss.item(), dict(learner.policy.adapter.named_matrices(gradients=True))


def trl_step(stage: Stage, output: Path, options: dict) -> tuple[float, dict, list[float]]:
    def rollout(prompts: list[str], trainer: TRLTrainer) -> dict:
        completions = {"completion_ids": stage.completion_ids, "logprobs": stage.engine_logprobs}
        return {"prompt_ids": stage.prompt_ids} | completions

    defaults: dict = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0}
    defaults |= {"num_iterations": 2}  # so that it keeps the old log-probs
    trainer = make_trl(stage.checkpoint, output, stage.adapters[0], defaults | options, rollout)
    trainer.use_vllm, trainer._last_loaded_step = True, trainer.state.global_step  # an engine that is up to date
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(4)])
    trainer.model.load_adapter(str(stage.adapters[1]), "default", is_trainable=True)
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return loss.item(), dict(adapter_gradients(trainer)), inputs["advantages"].tolist()


@pytest.mark.parametrize("case", CASES)
def test_one_step_off_policy_and_off_engine_equals(tmp_path: Path, stage: Stage, case: str) -> None:
    """Every loss, level and correction mode of TRL's, in one micro-batch of TRL's and in several of ours."""
    options = CASES[case] | ({"epsilon_high": 1.2} if CASES[case]["loss_type"] == "cispo" else {})
    trl_loss, theirs, advantages = trl_step(stage, tmp_path / "trl", options)
    loss, ours = our_step(stage, tmp_path / "ours", options, advantages, budget=60)
    assert loss == pytest.approx(trl_loss, abs=1e-5)
    assert ours.keys() == theirs.keys()
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-3
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
