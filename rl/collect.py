"""One generation: prompts in, scored and recorded completions out."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerState

from ..rewards.runner import RewardRunner, RewardScores, Scoring
from ..rewards.scoring import none_if_nan
from ..rollout.conversation import Task
from ..rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, sample_seed
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
FAILURES = "reward_failures"  # column of the records: of each function that failed on the completion, the reason
Report = Callable[[str, int, int], None]
Request = RolloutRequest | Task
# Requests in; what finished since the last time out, again and again, often nothing: reward workers are seen to then.
Rollouts = Callable[[Sequence[Any]], Generator[list[Trajectory], None, None]]


@dataclass
class Collected:
    """A generation's rollouts, groups in the order of their slots, a group's completions consecutive.

    Attributes:
        records: one for each completion, those of groups that were thrown away included.
        rollout_seconds: wall time of generation, during which groups that are complete are scored already.
        reward_seconds: wall time from its end until the last score is there.
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
class Round:
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
        rollouts: makes trajectories of requests, by default those of the engine, step by step.
        scores_rollouts: whether rewards depend on more than the texts that are recorded: no replay without generating.

    Raises:
        ValueError: two terms of the reward have one name.
    """

    scores_rollouts = False

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
        self.rollouts: Rollouts = self._engine_steps

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
            record.reward, record.advantage = none_if_nan(reward), advantage
        metrics.add("frac_reward_zero_std", advantages.zero_std.float().mean().item())
        without_signal = ~advantages.informative.view(-1, num_generations).any(dim=1)
        metrics.add("frac_groups_without_signal", without_signal.float().mean().item())

    def _round(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int, state: TrainerState
    ) -> Round:
        repeated = [(index, row) for index, row in rows for _ in range(num_generations)]
        requests = self.requests(rows, first_slot, step, num_generations)
        scoring = self._start_scoring([row for _, row in repeated], step, state)
        started = time.perf_counter()
        prompts: dict[int, Prompt] = {}
        completions: dict[int, Prompt] = {}

        def take(place: int, trajectory: Trajectory) -> None:
            prompt = prompts[place] = self.prompt(trajectory, repeated[place][1])
            completions[place] = self.completion(trajectory, prompt)
            scoring.add(place, completions[place], trajectory.completion_ids, prompt, self.late_columns(trajectory))

        try:
            trajectories = self.generate(requests, take, scoring.poll)
        except BaseException:
            scoring.cancel()
            raise
        rollout_seconds = time.perf_counter() - started

        started = time.perf_counter()
        scores, rewards = self._finish_scoring(scoring, trajectories)
        reward_seconds = time.perf_counter() - started

        failures = _failures(scores)
        records = [
            RolloutRecord(
                step=step,
                prompt_index=index,
                sample=position % num_generations,
                trajectory=trajectories[position],
                prompt=prompts[position],
                completion=completions[position],
                rewards=rewards[position],
                reward=None,
                advantage=0.0,
                extra={column: values[position] for column, values in scores.extra.items()}
                | failures.get(position, {})
                | self.notes(trajectories[position]),
            )
            for position, (index, _) in enumerate(repeated)
        ]
        rated = record_advantages(records, self.weights, num_generations, self.config)
        for record, reward in zip(records, rated.rewards.tolist(), strict=True):
            record.reward = none_if_nan(reward)
        return Round(records, scores, rollout_seconds, reward_seconds)

    def signal(self, records: Sequence[RolloutRecord], num_generations: int) -> list[bool]:
        """For each group of a round whether it has something to learn from, by the rewards in the records."""
        rated = record_advantages(records, self.weights, num_generations, self.config)
        trained = torch.tensor(
            [bool(training_sample(r, self.config.mask_truncated_completions).targets) for r in records]
        )
        return (rated.informative & trained).view(-1, num_generations).any(dim=1).tolist()

    def requests(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int
    ) -> Sequence[Request]:
        """What the engine is asked for: each row's prompt `num_generations` times; slots count the step's groups."""
        sampling = SamplingParams(self.config.completion_limit, self.config.temperature, self.stop_token_ids)
        requests = []
        for slot, (index, row) in enumerate(rows, start=first_slot):
            prompt_ids = tuple(self.tokenize(row["prompt"], f"dataset row {index}"))
            for sample in range(num_generations):
                seed = sample_seed(self.config.seed, step, slot, sample)
                requests.append(RolloutRequest(f"{step}/{slot}/{sample}", prompt_ids, seed, sampling))
        return requests

    def generate(
        self,
        requests: Sequence[Request],
        take: Callable[[int, Trajectory], None] = lambda place, trajectory: None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> list[Trajectory]:
        """Trajectories, in the order of the requests.

        Args:
            take: gets each, with the place of its request, when it finishes.
            meanwhile: called now and then.

        What either raises, and an interrupt, may leave the engine with unfinished requests (see `RolloutEngine.abort`).
        """
        places = {request.request_id: place for place, request in enumerate(requests)}
        finished: dict[int, Trajectory] = {}
        self.report("generating", 0, len(requests))
        with closing(self.rollouts(requests)) as steps:  # what fails here is to end conversations there, at once
            for step in steps:
                for trajectory in step:
                    place = places[trajectory.request_id]
                    finished[place] = trajectory
                    take(place, trajectory)
                self.report("generating", len(finished), len(requests))
                meanwhile()
        return [finished[place] for place in range(len(requests))]

    def prompt(self, trajectory: Trajectory, row: Row) -> Prompt:
        """What reward functions and records get as the prompt of a finished trajectory."""
        return row["prompt"]

    def late_columns(self, trajectory: Trajectory) -> dict[str, Any]:
        """Values for the reward functions' columns that are known only now."""
        return {}

    def notes(self, trajectory: Trajectory) -> dict[str, Any]:
        """What a record says besides what reward functions have logged; of JSON's types."""
        return {}

    def read_again(self, records: Sequence[RolloutRecord]) -> list[Prompt]:
        """The completions of records, from their tokens."""
        return self.completions([r.trajectory for r in records], [r.prompt for r in records])

    def _engine_steps(self, requests: Sequence[RolloutRequest]) -> Generator[list[Trajectory], None, None]:
        self.engine.submit(requests)
        while self.engine.unfinished:
            yield self.engine.step()

    def completions(self, trajectories: Sequence[Trajectory], prompts: Sequence[Prompt]) -> list[Prompt]:
        """What reward functions get of each trajectory."""
        return [self.completion(*pair) for pair in zip(trajectories, prompts, strict=True)]

    def completion(self, trajectory: Trajectory, prompt: Prompt) -> Prompt:
        """What reward functions get: text, or a message where the prompt is one."""
        (text,) = self.tokenizer.batch_decode([trajectory.completion_ids], skip_special_tokens=True)
        return self.tokenize.completion(text, prompt)

    def score(
        self,
        rows: list[Row],
        completions: list[Prompt],
        trajectories: list[Trajectory],
        step: int,
        state: TrainerState,
    ) -> tuple[RewardScores, list[dict[str, float | None]]]:
        """What the reward functions give, and each completion's rewards by name, those that options add included."""
        scoring = self._start_scoring(rows, step, state)
        for place, (row, completion, trajectory) in enumerate(zip(rows, completions, trajectories, strict=True)):
            prompt, columns = self.prompt(trajectory, row), self.late_columns(trajectory)
            scoring.add(place, completion, trajectory.completion_ids, prompt, columns)
        return self._finish_scoring(scoring, trajectories)

    def _start_scoring(self, rows: list[Row], step: int, state: TrainerState) -> Scoring:
        prompts = [row.get("prompt") for row in rows]
        return self.rewards.start(prompts, self._columns(rows), trainer_state=state, step=step)

    def _columns(self, rows: list[Row]) -> dict[str, list[Any]]:
        reserved = ("prompt", "completion", "completion_ids")
        return {key: [row[key] for row in rows] for key in rows[0] if key not in reserved}

    def _finish_scoring(
        self, scoring: Scoring, trajectories: Sequence[Trajectory]
    ) -> tuple[RewardScores, list[dict[str, float | None]]]:
        self.report("scoring", 0, len(trajectories))
        scores = scoring.finish()
        return scores, [self._named_rewards(*pair) for pair in zip(scores.values.tolist(), trajectories, strict=True)]

    def _named_rewards(self, values: list[float], trajectory: Trajectory) -> dict[str, float | None]:
        rewards = {name: none_if_nan(value) for name, value in zip(self.rewards.names, values, strict=True)}
        return with_overlong(rewards, trajectory, self.config.completion_limit, self.config.overlong_buffer)


def _failures(scores: RewardScores) -> dict[int, dict[str, dict[str, str]]]:
    """By the place of a completion that a function failed on, why: a column of its record."""
    found: dict[int, dict[str, dict[str, str]]] = {}
    for failure in scores.failures:
        for place in range(len(scores.values)) if failure.sample is None else [failure.sample]:
            reasons = found.setdefault(place, {}).setdefault(FAILURES, {})
            reasons[failure.function] = f"{failure.kind}: {failure.reason}"
    return found


def _choose(records: Sequence[RolloutRecord], signal: Sequence[bool], wanted: int) -> None:
    """Mark the first `wanted` groups as used, those with a signal before those without."""
    order = sorted(range(len(signal)), key=lambda slot: not signal[slot])  # stable: slots stay in order
    used, group = set(order[:wanted]), len(records) // len(signal)
    for position, record in enumerate(records):
        record.used = position // group in used
