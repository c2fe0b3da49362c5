"""One generation: prompts in, scored and recorded completions out."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from ..rewards.runner import RewardRunner, RewardScores
from ..rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate, sample_seed
from ..rollout.records import RolloutRecord
from ..rollout.trajectory import Trajectory
from .config import GRPOConfig
from .data import Prompt, PromptTokenizer, Row, SparePrompts
from .generation_metrics import note_lengths, note_rewards, note_rounds
from .metrics import Metrics
from .overlong import with_overlong
from .packing import training_sample
from .rating import record_advantages, reward_weights

EVALUATION_STEP = -1  # evaluations draw the same seeds each time, so that they can be compared
Report = Callable[[str, int, int], None]


@dataclass
class Collected:
    """A generation's rollouts, groups in the order of their slots, a group's completions consecutive.

    Attributes:
        records: one for each completion, those of groups that were thrown away included.
        rollout_seconds, reward_seconds: wall time.
    """

    records: list[RolloutRecord]
    rollout_seconds: float
    reward_seconds: float

    @property
    def used(self) -> list[RolloutRecord]:
        """The records of the groups that are trained on."""
        return [record for record in self.records if record.used]

    @property
    def sampled_tokens(self) -> int:
        return sum(record.trajectory.num_sampled for record in self.records)


@dataclass
class _Round:
    """What one call of the engine and the reward functions gave: a group's records consecutive."""

    records: list[RolloutRecord]
    scores: RewardScores
    rollout_seconds: float
    reward_seconds: float


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

    Attributes:
        weights: of each term of the reward, by name.

    Raises:
        ValueError: two terms of the reward have one name.
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
        self.weights = reward_weights(dict(zip(rewards.names, rewards.weights, strict=True)), config)
        self.stop_token_ids = tuple(stop_token_ids)

    def collect(
        self,
        rows: Sequence[tuple[int, Row]],
        step: int,
        num_generations: int,
        metrics: Metrics,
        state: TrainerState,
        spare: SparePrompts | None = None,
    ) -> Collected:
        """Make `num_generations` completions of each row's prompt and score them; `rate` then gives the advantages.

        Args:
            rows: (dataset index, row) of each group.
            step: the optimizer step they are made for; with the run's seed it decides every random number.
            metrics: where lengths, rewards and their like are noted, of all completions, thrown away or not: means over
                the used ones alone would rise with what was thrown away.
            state: passed to reward functions.
            spare: prompts that replace those whose groups carry no signal (DAPO's dynamic sampling, arXiv 2503.14476,
                section 3.2), until there are as many groups with a signal as rows, or the rounds are used up: then
                groups without one fill the batch. None: all groups are used.

        Raises:
            ValueError: a prompt does not fit; rewards.runner.RewardError: a reward function failed.
        """
        rounds = [self._round(rows, 0, step, num_generations, state)]
        records = list(rounds[0].records)
        if spare is not None:
            scheduled = [index for index, _ in rows]
            signal = self.signal(records, num_generations)
            while sum(signal) < len(rows) and len(rounds) < self.config.dynamic_sampling_max_rounds:
                # Exactly the missing groups are asked for. A small round keeps the engine less busy than a whole batch
                # would, but each of its tokens is used where it has a signal: a surplus would be thrown away, or make
                # the optimizer step larger than what was asked for.
                missing = len(rows) - sum(signal)
                asked = spare.rows(step, scheduled, len(signal) - len(rows), missing)
                rounds.append(self._round(asked, len(signal), step, num_generations, state))
                records += rounds[-1].records
                signal += self.signal(rounds[-1].records, num_generations)
            _choose(records, signal, len(rows))
            note_rounds(metrics, signal, len(rows), len(rounds), step)
        note_lengths(metrics, [record.trajectory for record in records])
        note_rewards(metrics, records, [part.scores for part in rounds])
        return Collected(
            records, sum(part.rollout_seconds for part in rounds), sum(part.reward_seconds for part in rounds)
        )

    def rate(self, records: Sequence[RolloutRecord], num_generations: int, metrics: Metrics) -> None:
        """Set reward and advantage of the records that are used, from the rewards they hold."""
        advantages = record_advantages(records, self.weights, num_generations, self.config)
        for record, reward, advantage in zip(
            records, advantages.rewards.tolist(), advantages.advantages.tolist(), strict=True
        ):
            record.reward, record.advantage = _none_if_nan(reward), advantage
        metrics.add("frac_reward_zero_std", advantages.zero_std.float().mean().item())
        without_signal = ~advantages.informative.view(-1, num_generations).any(dim=1)
        metrics.add("frac_groups_without_signal", without_signal.float().mean().item())

    def _round(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int, state: TrainerState
    ) -> _Round:
        started = time.perf_counter()
        trajectories = self.generate(self.requests(rows, first_slot, step, num_generations))
        rollout_seconds = time.perf_counter() - started

        started = time.perf_counter()
        repeated = [(index, row) for index, row in rows for _ in range(num_generations)]
        completions = self.completions(trajectories, [row["prompt"] for _, row in repeated])
        scores, rewards = self.score([row for _, row in repeated], completions, trajectories, step, state)
        reward_seconds = time.perf_counter() - started

        records = [
            RolloutRecord(
                step=step,
                prompt_index=index,
                sample=position % num_generations,
                trajectory=trajectories[position],
                prompt=row["prompt"],
                completion=completions[position],
                rewards=rewards[position],
                reward=None,
                advantage=0.0,
                extra={column: values[position] for column, values in scores.extra.items()},
            )
            for position, (index, row) in enumerate(repeated)
        ]
        rated = record_advantages(records, self.weights, num_generations, self.config)
        for record, reward in zip(records, rated.rewards.tolist(), strict=True):
            record.reward = _none_if_nan(reward)
        return _Round(records, scores, rollout_seconds, reward_seconds)

    def signal(self, records: Sequence[RolloutRecord], num_generations: int) -> list[bool]:
        """For each group of a round whether it has something to learn from, by the rewards in the records."""
        rated = record_advantages(records, self.weights, num_generations, self.config)
        trained = torch.tensor(
            [bool(training_sample(r, self.config.mask_truncated_completions).targets) for r in records]
        )
        return (rated.informative & trained).view(-1, num_generations).any(dim=1).tolist()

    def requests(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int
    ) -> list[RolloutRequest]:
        """What the engine is asked for: each row's prompt `num_generations` times; slots count the step's groups."""
        sampling = SamplingParams(self.config.completion_limit, self.config.temperature, self.stop_token_ids)
        requests = []
        for slot, (index, row) in enumerate(rows, start=first_slot):
            prompt_ids = tuple(self.tokenize(row["prompt"], f"dataset row {index}"))
            for sample in range(num_generations):
                seed = sample_seed(self.config.seed, step, slot, sample)
                requests.append(RolloutRequest(f"{step}/{slot}/{sample}", prompt_ids, seed, sampling))
        return requests

    def generate(self, requests: Sequence[RolloutRequest]) -> list[Trajectory]:
        """The engine's answers, in the order of the requests."""
        finished: dict[str, Trajectory] = {}
        self.report("generating", 0, len(requests))
        for trajectory in generate(self.engine, requests):
            finished[trajectory.request_id] = trajectory
            self.report("generating", len(finished), len(requests))
        return [finished[request.request_id] for request in requests]

    def completions(self, trajectories: Sequence[Trajectory], prompts: Sequence[Prompt]) -> list[Prompt]:
        """What reward functions get: text, or a message where the prompt is one."""
        texts = self.tokenizer.batch_decode([t.completion_ids for t in trajectories], skip_special_tokens=True)
        return [self.tokenize.completion(*pair) for pair in zip(texts, prompts, strict=True)]

    def score(
        self,
        rows: list[Row],
        completions: list[Prompt],
        trajectories: list[Trajectory],
        step: int,
        state: TrainerState,
    ) -> tuple[RewardScores, list[dict[str, float | None]]]:
        """What the reward functions gave, and each completion's rewards by name, those that options add included."""
        self.report("scoring", 0, len(trajectories))
        reserved = ("prompt", "completion", "completion_ids")
        columns = {key: [row[key] for row in rows] for key in rows[0] if key not in reserved}
        prompts = [row["prompt"] for row in rows]
        ids = [trajectory.completion_ids for trajectory in trajectories]
        scores = self.rewards.score(prompts, completions, ids, columns, trainer_state=state, step=step)
        return scores, [self._named_rewards(*pair) for pair in zip(scores.values.tolist(), trajectories, strict=True)]

    def _named_rewards(self, values: list[float], trajectory: Trajectory) -> dict[str, float | None]:
        rewards = {name: _none_if_nan(value) for name, value in zip(self.rewards.names, values, strict=True)}
        return with_overlong(rewards, trajectory, self.config.completion_limit, self.config.overlong_buffer)


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _choose(records: Sequence[RolloutRecord], signal: Sequence[bool], wanted: int) -> None:
    """Mark the first `wanted` groups as used, those with a signal before those without."""
    order = sorted(range(len(signal)), key=lambda slot: not signal[slot])  # stable: slots stay in order
    used, group = set(order[:wanted]), len(records) // len(signal)
    for position, record in enumerate(records):
        record.used = position // group in used
