"""One generation: prompts in, scored and recorded completions with their advantages out."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from ..rewards.runner import RewardRunner, RewardScores
from ..rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate, sample_seed
from ..rollout.records import RolloutRecord
from ..rollout.trajectory import Trajectory
from .advantages import Advantages, compute_advantages, nanstd
from .config import GRPOConfig
from .data import PromptTokenizer, Row
from .metrics import Metrics

EVALUATION_STEP = -1  # evaluations draw the same seeds each time, so that they can be compared
Report = Callable[[str, int, int], None]


@dataclass
class Collected:
    """A generation's rollouts, a group's completions consecutive.

    Attributes:
        records: one for each completion.
        rollout_seconds, reward_seconds: wall time.
    """

    records: list[RolloutRecord]
    rollout_seconds: float
    reward_seconds: float

    @property
    def sampled_tokens(self) -> int:
        return sum(record.trajectory.num_sampled for record in self.records)


class Collector:
    """Generates, scores and records completions.

    Args:
        engine: where completions come from.
        tokenizer: to decode them.
        tokenize: from prompts to token ids.
        rewards: the reward functions.
        config: the run's options.
        stop_token_ids: what ends a completion.
        report: called with (phase, done, total) while generating and scoring.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: PreTrainedTokenizerBase,
        tokenize: PromptTokenizer,
        rewards: RewardRunner,
        config: GRPOConfig,
        stop_token_ids: Sequence[int],
        report: Report,
    ):
        self.engine, self.tokenizer, self.tokenize, self.rewards = engine, tokenizer, tokenize, rewards
        self.config, self.report = config, report
        self.stop_token_ids = tuple(stop_token_ids)

    def collect(
        self, rows: Sequence[tuple[int, Row]], step: int, num_generations: int, metrics: Metrics, state: TrainerState
    ) -> Collected:
        """Make `num_generations` completions of each row's prompt and score them.

        Args:
            rows: (dataset index, row) of each group.
            step: the optimizer step they are made for; with the run's seed it decides every random number.
            metrics: where lengths, rewards and their like are noted.
            state: passed to reward functions.

        Raises:
            ValueError: a prompt does not fit; rewards.runner.RewardError: a reward function failed.
        """
        started = time.perf_counter()
        trajectories = self._generate(rows, step, num_generations)
        rollout_seconds = time.perf_counter() - started

        started = time.perf_counter()
        repeated = [(index, row) for index, row in rows for _ in range(num_generations)]
        texts = self.tokenizer.batch_decode([t.completion_ids for t in trajectories], skip_special_tokens=True)
        completions = [
            self.tokenize.completion(text, row["prompt"]) for text, (_, row) in zip(texts, repeated, strict=True)
        ]
        self.report("scoring", 0, len(trajectories))
        scores = self._score([row for _, row in repeated], completions, trajectories, step, state)
        advantages = compute_advantages(
            scores.values,
            torch.tensor(self.rewards.weights),
            num_generations,
            self.config.scale_rewards,
            self.config.multi_objective_aggregation,
        )
        reward_seconds = time.perf_counter() - started

        _note_lengths(metrics, trajectories)
        _note_rewards(metrics, self.rewards.names, scores, advantages, num_generations)
        records = [
            RolloutRecord(
                step=step,
                prompt_index=index,
                sample=position % num_generations,
                trajectory=trajectories[position],
                prompt=row["prompt"],
                completion=completions[position],
                rewards={
                    name: _none_if_nan(value)
                    for name, value in zip(self.rewards.names, scores.values[position].tolist(), strict=True)
                },
                reward=_none_if_nan(advantages.rewards[position].item()),
                advantage=advantages.advantages[position].item(),
                old_logprobs=None,
                extra={column: values[position] for column, values in scores.extra.items()},
            )
            for position, (index, row) in enumerate(repeated)
        ]
        return Collected(records, rollout_seconds, reward_seconds)

    def _generate(self, rows: Sequence[tuple[int, Row]], step: int, num_generations: int) -> list[Trajectory]:
        sampling = SamplingParams(self.config.completion_limit, self.config.temperature, self.stop_token_ids)
        requests = []
        for slot, (index, row) in enumerate(rows):
            prompt_ids = tuple(self.tokenize(row["prompt"], f"dataset row {index}"))
            for sample in range(num_generations):
                seed = sample_seed(self.config.seed, step, slot, sample)
                requests.append(RolloutRequest(f"{step}/{slot}/{sample}", prompt_ids, seed, sampling))
        finished: dict[str, Trajectory] = {}
        self.report("generating", 0, len(requests))
        for trajectory in generate(self.engine, requests):
            finished[trajectory.request_id] = trajectory
            self.report("generating", len(finished), len(requests))
        return [finished[request.request_id] for request in requests]

    def _score(
        self, rows: list[Row], completions: list[Any], trajectories: list[Trajectory], step: int, state: TrainerState
    ) -> RewardScores:
        reserved = ("prompt", "completion", "completion_ids")
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in reserved}
        prompts = [row["prompt"] for row in rows]
        ids = [trajectory.completion_ids for trajectory in trajectories]
        return self.rewards.score(prompts, completions, ids, columns, trainer_state=state, step=step)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _note_lengths(metrics: Metrics, trajectories: Sequence[Trajectory]) -> None:
    lengths = [trajectory.num_sampled for trajectory in trajectories]
    terminated = [t.num_sampled for t in trajectories if t.finish_reason == "stop"] or [0]
    metrics.add("completions/mean_length", sum(lengths) / len(lengths))
    metrics.add("completions/min_length", min(lengths))
    metrics.add("completions/max_length", max(lengths))
    metrics.add("completions/clipped_ratio", sum(t.finish_reason == "length" for t in trajectories) / len(lengths))
    metrics.add("completions/mean_terminated_length", sum(terminated) / len(terminated))
    metrics.add("completions/min_terminated_length", min(terminated))
    metrics.add("completions/max_terminated_length", max(terminated))


def _note_rewards(
    metrics: Metrics, names: Sequence[str], scores: RewardScores, advantages: Advantages, num_generations: int
) -> None:
    for column, name in enumerate(names):
        metrics.add(f"rewards/{name}/mean", torch.nanmean(scores.values[:, column]).item())
        metrics.add(f"rewards/{name}/std", nanstd(scores.values[:, column]).item())
        metrics.add(f"time/reward/{name}_s", scores.seconds.get(name, math.nan))
    metrics.add("reward", torch.nanmean(advantages.rewards).item())
    metrics.add("reward_std", nanstd(advantages.rewards).item())
    metrics.add("frac_reward_zero_std", advantages.zero_std.float().mean().item())
    without_signal = ~advantages.informative.view(-1, num_generations).any(dim=1)
    metrics.add("frac_groups_without_signal", without_signal.float().mean().item())
    metrics.add("rewards/failures", len(scores.failures))
    for name, value in scores.metrics.items():
        metrics.add(name, value)
