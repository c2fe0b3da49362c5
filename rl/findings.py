"""The comparisons of a replay: what a run kept of a step against what is computed again."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import load_file

from ..rewards.runner import RewardError
from ..rollout.records import RolloutRecord
from ..weightshare.adapter import ADAPTER_FILE
from . import checkpoint
from .data import Row, prompts_of_step
from .kl_reward import KL, add_kl
from .metrics import Metrics
from .packing import training_sample
from .rating import record_advantages
from .trainer import GRPOTrainer

Status = Literal["same", "different", "unchecked"]
BY_THE_CLOCK = ("time/", "throughput/", "step_time")  # logged values that nothing gives again
UPDATE = ("loss", "grad_norm", "learning_rate")
GAP = ("parity/", "sampling/")  # logged of the engine's log-probs against the trainer's


@dataclass(frozen=True)
class Finding:
    """What came of one comparison: `what` was compared; `text` says with which result, or why it was not."""

    what: str
    status: Status
    text: str

    def __str__(self) -> str:
        note = {"same": "as recorded: ", "different": "DIFFERENT: ", "unchecked": "not compared: "}[self.status]
        return f"{self.what:<15} {note}{self.text}"


def finding(what: str, differences: Sequence[str], same: str) -> Finding:
    """The first of `differences`, or `same` where there are none."""
    if not differences:
        return Finding(what, "same", same)
    more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
    return Finding(what, "different", f"{differences[0]}{more}")


class Checks:
    """Comparisons of one generation's records and of one step's results.

    Args:
        trainer: as the run's.
        records: of the generation that the step uses, those thrown away included.
        first: the first step of that generation.
        tolerance: the largest relative difference of two numbers that does not count.
    """

    def __init__(self, trainer: GRPOTrainer, records: Sequence[RolloutRecord], first: int, tolerance: float):
        self.trainer, self.args, self.collector = trainer, trainer.args, trainer.collector
        self.records, self.used = list(records), [record for record in records if record.used]
        self.first, self.tolerance = first, tolerance
        self.rows = self._rows()
        self.rounds = self._rounds()

    def equal(self, one: float | None, other: float | None) -> bool:
        """Whether two numbers are the same within the tolerance; None and NaN are only themselves."""
        if one is None or other is None:
            return one is other
        if math.isnan(one) or math.isnan(other):
            return math.isnan(one) and math.isnan(other)
        return one == other or abs(one - other) <= self.tolerance * max(abs(one), abs(other))

    def _rows(self) -> list[tuple[int, Row]]:
        """(dataset index, row) of each group as they follow from the seed, as many as are recorded."""
        rows = prompts_of_step(self.trainer.get_train_dataloader(), self.first)
        spare = math.ceil(len(self.records) / self.args.group_size) - len(rows)
        if self.trainer.spare is not None and spare > 0:
            rows = rows + self.trainer.spare.rows(self.first, [index for index, _ in rows], 0, spare)
        return rows

    def _rounds(self) -> list[range]:
        """The groups of each call of the engine: the batch, then those that dynamic sampling asked for besides."""
        size, groups = self.args.group_size, len(self.records) // self.args.group_size
        wanted = self.args.prompts_per_generation
        rounds, signals = [range(min(wanted, groups))], 0
        while rounds[-1].stop < groups:
            part = self.records[rounds[-1].start * size : rounds[-1].stop * size]
            before_kl = [replace(record, rewards=without_kl(record)) for record in part]
            signals += sum(self.collector.signal(before_kl, size))
            start = rounds[-1].stop
            rounds.append(range(start, min(start + max(wanted - signals, 1), groups)))
        return rounds

    # ---- the rollouts ------------------------------------------------------------------------------------------------

    def prompts(self) -> Finding:
        """Which rows of the dataset they are, their tokens, their seeds."""
        group = self.args.group_size
        expected = self.collector.requests(self.rows, 0, self.first, group)
        rows = [row for row in self.rows for _ in range(group)]
        differences = []
        if len(expected) != len(self.records):
            differences.append(f"{len(self.records)} completions instead of {len(expected)}")
        for record, request, (index, row) in zip(self.records, expected, rows, strict=False):
            trajectory = record.trajectory
            if record.prompt_index != index:
                differences.append(f"{describe(record)}: by the seed, prompt {index} stands there")
            elif (trajectory.request_id, trajectory.seed) != (request.request_id, request.seed):
                differences.append(f"{describe(record)}: it was sampled with another seed")
            elif request.prompt_ids is None:  # an environment has completed it
                continue
            elif record.prompt != row["prompt"]:
                differences.append(f"{describe(record)}: its text is not that of the dataset's row")
            elif trajectory.prompt_ids != list(request.prompt_ids):
                differences.append(f"{describe(record)}: its tokens are not those of its text")
        return finding("prompts", differences, f"{len(self.rows)} prompts, {len(self.records)} completions")

    def texts(self) -> Finding:
        """What the reward functions read, against the tokens."""
        texts = self.collector.read_again(self.records)
        differences = [
            f"{describe(record)}: the text is not that of its tokens"
            for record, text in zip(self.records, texts, strict=True)
            if record.completion != text
        ]
        return finding("completions", differences, "their texts are those of their tokens")

    def rewards(self) -> Finding:
        """Calls the reward functions again, round by round, as the run did."""
        group, differences = self.args.group_size, []
        for part in self.rounds:
            records = self.records[part.start * group : part.stop * group]
            rows = [row for _, row in self.rows[part.start : part.stop] for _ in range(group)]
            if len(rows) != len(records):
                return Finding("rewards", "unchecked", "the prompts are not those of the dataset")
            trajectories = [record.trajectory for record in records]
            texts = [record.completion for record in records]
            try:
                _, scored = self.collector.score(rows, texts, trajectories, self.first, self.trainer.state)
            except RewardError as error:
                return Finding("rewards", "different", str(error))
            for record, rewards in zip(records, scored, strict=True):
                differences += self._of_rewards(record, without_kl(record), rewards)
        return finding("rewards", differences, f"scored again, {len(self.records)} completions")

    def kl(self) -> Finding:
        """The KL divergence that is a part of the reward."""
        again = [replace(record, rewards=dict(record.rewards)) for record in self.used]
        add_kl(self.trainer.policy, again, self.args, Metrics())
        differences = [
            difference
            for record, other in zip(self.used, again, strict=True)
            for difference in self._of_rewards(record, record.rewards, other.rewards)
        ]
        return finding("kl reward", differences, f"{len(again)} completions")

    def _of_rewards(
        self, record: RolloutRecord, recorded: Mapping[str, float | None], now: Mapping[str, float | None]
    ) -> list[str]:
        if recorded.keys() != now.keys():
            return [f"{describe(record)}: rewards {', '.join(recorded)} are recorded, there are {', '.join(now)}"]
        return [
            f"{describe(record)}: {name} gave {recorded[name]}, now {now[name]}"
            for name in recorded
            if not self.equal(recorded[name], now[name])
        ]

    def advantages(self) -> Finding:
        """Rewards and advantages, from the rewards of the single functions as they are recorded."""
        rated = record_advantages(self.used, self.collector.weights, self.args.group_size, self.args)
        differences = []
        for record, reward, advantage in zip(self.used, rated.rewards.tolist(), rated.advantages.tolist(), strict=True):
            if not self.equal(math.nan if record.reward is None else record.reward, reward):
                differences.append(f"{describe(record)}: reward {record.reward}, now {reward}")
            if not self.equal(record.advantage, advantage):
                differences.append(f"{describe(record)}: advantage {record.advantage}, now {advantage}")
        return finding("advantages", differences, f"{len(self.used)} completions")

    def old_logprobs(self) -> Finding:
        """The trainer's log-probs before the first update on these rollouts; the adapter is the one of then."""
        again = [training_sample(record, self.args.mask_truncated_completions) for record in self.used]
        self.trainer.learner.recompute_old_logprobs(again)
        differences = [
            f"{describe(record)}: {self._gap(record.old_logprobs or [], sample.old_logprobs or [])}"
            for record, sample in zip(self.used, again, strict=True)
            if not self._all_equal(record.old_logprobs or [], sample.old_logprobs or [])
        ]
        return finding("old log-probs", differences, f"{len(self.used)} completions")

    def generation(self) -> Finding:
        """Samples the rollouts again; the adapter is the one that sampled them."""
        differences = []
        with self.trainer.engine_awake():
            for part in self.rounds:
                requests = self.collector.requests(
                    self.rows[part.start : part.stop], part.start, self.first, self.args.group_size
                )
                records = self.records[part.start * self.args.group_size :]
                for record, again in zip(records, self.collector.generate(requests), strict=False):
                    kept = record.trajectory
                    if kept.completion_ids != again.completion_ids or kept.finish_reason != again.finish_reason:
                        pairs = zip(kept.completion_ids, again.completion_ids, strict=False)
                        at = next((i for i, pair in enumerate(pairs) if pair[0] != pair[1]), None)
                        where = "its length" if at is None else f"token {at} of the completion"
                        differences.append(f"{describe(record)}: sampled again, {where} is another")
                    elif not self._all_equal(kept.logprobs, again.logprobs):
                        gap = self._gap(kept.logprobs, again.logprobs)
                        differences.append(f"{describe(record)}: the engine's log-probs: {gap}")
        return finding("generation", differences, f"sampled again, {len(self.records)} completions")

    def _all_equal(self, one: Sequence[float], other: Sequence[float]) -> bool:
        return len(one) == len(other) and all(self.equal(*pair) for pair in zip(one, other, strict=True))

    def _gap(self, one: Sequence[float], other: Sequence[float]) -> str:
        if len(one) != len(other):
            return f"{len(one)} log-probs instead of {len(other)}"
        return f"off by up to {max(abs(a - b) for a, b in zip(one, other, strict=True)):.3g} nats"

    # ---- the update --------------------------------------------------------------------------------------------------

    def log(self, logged: Mapping[str, float] | None, now: Mapping[str, float]) -> list[Finding]:
        """The logged values that follow from the rollouts and the adapter."""
        gap = [name for name in now if name.startswith(GAP)]
        update = [name for name in UPDATE if name in now]
        others = [name for name in now if not name.startswith(BY_THE_CLOCK) and name not in gap + update]
        names = {"log-probs": gap, "update": update, "other metrics": others}
        if logged is None:
            missing = "the run's log has no entry for this step alone"
            return [Finding(what, "unchecked", missing) for what, of_it in names.items() if of_it]
        findings = []
        for what, of_it in names.items():
            compared = [name for name in of_it if name in logged]
            differences = [
                f"{name} was {logged[name]}, now {now[name]}"
                for name in compared
                if not self.equal(logged[name], now[name])
            ]
            shown = ", ".join(f"{name} {now[name]:.4g}" for name in compared[:3])
            rest = f" and {len(compared) - 3} more" if len(compared) > 3 else ""
            if compared:
                findings.append(finding(what, differences, shown + rest))
        return findings

    def adapter(self, kept: Path) -> list[Finding]:
        """The adapter after the update, against the one in a checkpoint of this step."""
        if not (kept / checkpoint.MANIFEST).is_file():
            return [Finding("adapter", "unchecked", f"there is no {kept.name}")]
        damage = checkpoint.find_damage(kept)
        findings = [Finding(kept.name, "different", damage)] if damage else []
        try:
            stored = load_file(kept / ADAPTER_FILE, device="cpu")
        except (OSError, SafetensorError) as error:
            return [*findings, Finding("adapter", "different", f"{kept / ADAPTER_FILE} cannot be read: {error}")]
        differences, matrices = [], 0
        for name, master in self.trainer.adapter.named_matrices():
            matrices += 1
            other, matrix = stored.pop(name, None), master.cpu()
            if other is None or other.shape != matrix.shape:
                differences.append(f"{name} is not there, or of another shape")
            elif (gap := (matrix - other).abs()).gt(self.tolerance * matrix.abs().maximum(other.abs())).any():
                differences.append(f"{name} in {kept.name} is off by up to {gap.max().item():.3g}")
        differences += [f"{name} in {kept.name} is of no target" for name in stored]
        return [*findings, finding("adapter", differences, f"{matrices} matrices of {kept.name}")]


def without_kl(record: RolloutRecord) -> dict[str, float | None]:
    """A record's rewards but for the KL, which is added to those that are used at last."""
    return {name: value for name, value in record.rewards.items() if name != KL}


def describe(record: RolloutRecord) -> str:
    """Names a record in a message."""
    return f"prompt {record.prompt_index}, sample {record.sample} of step {record.step}"
