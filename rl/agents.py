"""Agents in the trainer: conversations with tools and environments instead of completions, by TRL's contracts."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase, TrainerState
from trl.data_utils import is_conversational

from ..rewards.calls import ENVIRONMENTS
from ..rollout.agent import Agent
from ..rollout.chat_format import ChatFormat
from ..rollout.conversation import AgentLimits, Conversation, Ended, Task
from ..rollout.engine import SamplingParams, sample_seed
from ..rollout.records import RolloutRecord
from ..rollout.toolkit import ENVIRONMENT, EnvironmentFactory, Tool, Toolkit
from ..rollout.trajectory import Trajectory
from .collect import Collected, Collector, Request, Round
from .config import GRPOConfig
from .data import Prompt, PromptTokenizer, Row, SparePrompts
from .metrics import Metrics

EMPTY_PROMPT: Prompt = [{"role": "user", "content": ""}]  # where the environment gives the question
NOTES = ("turns", "tool_calls", "tool_failures", "tool_timeouts", "malformed_calls", "ended")


@dataclass(frozen=True)
class Agents:
    """What a trainer's agents are made of, before there is an engine.

    Attributes:
        rewarded: by the id of an environment, the conversation that was had with it and has its reward.
    """

    chat: ChatFormat
    toolkit: Toolkit
    limits: AgentLimits
    rewarded: dict[int, Conversation] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool] | None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None,
        tokenizer: PreTrainedTokenizerBase,
        stop_token_ids: Sequence[int],
        args: GRPOConfig,
        rollout_func: Callable[..., Any] | None = None,
    ) -> "Agents | None":
        """Agents with these tools, or None where there are none.

        Raises:
            ValueError: a tool or an environment that cannot be used, a chat template that does not serve, or a
                `rollout_func` besides, which would have to call the tools itself.
        """
        if rollout_func is not None and (tools or environment_factory is not None):
            raise ValueError("rollout_func makes the rollouts itself: tools and environment_factory cannot go with it")
        if not tools and environment_factory is None:
            return None
        assert not isinstance(args.chat_template_kwargs, str)  # the config has parsed it
        chat = ChatFormat(tokenizer, stop_token_ids, args.chat_template_kwargs)
        limits = AgentLimits(
            max_tool_rounds=args.max_tool_calling_iterations,
            tool_timeout=args.tool_timeout,
            conversation_timeout=args.conversation_timeout,
            max_threads=args.tool_threads,
            reproducible=args.reproducible_tools,
        )
        return cls(chat, Toolkit(tools or (), environment_factory), limits)

    def rewards(self) -> list[Callable[..., Any]]:
        """A reward function for each class of environments that has `get_reward`, named after it."""
        return [_environment_reward(kind, self.rewarded) for kind in self.toolkit.reward_types]

    @property
    def columns(self) -> list[str]:
        """What reward functions get besides the dataset's columns."""
        return [ENVIRONMENTS] if self.toolkit.has_environments else []

    def stand_in(self, args: GRPOConfig) -> Dataset | None:
        """Rows without a question, where none are given because the environment has the questions.

        Raises:
            ValueError: nothing would say how long the run is, or which environment a row is for.
        """
        if not self.toolkit.has_environments:
            return None
        if self.toolkit.named:
            raise ValueError(
                f"train_dataset is missing: with several environments it needs a column `{ENVIRONMENT}`, which chooses"
            )
        if args.max_steps <= 0:
            raise ValueError("without a train_dataset nothing says how long the run is: set max_steps")
        return Dataset.from_dict({"prompt": [EMPTY_PROMPT] * args.prompts_per_generation})

    def check_environments(self, dataset: Dataset | IterableDataset | None, name: str) -> None:
        """Raise ValueError for a row of the dataset called `name` which chooses an environment that there is not."""
        if not self.toolkit.named or not isinstance(dataset, Dataset):
            return
        if ENVIRONMENT not in dataset.column_names:
            self.toolkit.check(None, name)
        for index, chosen in enumerate(dataset[ENVIRONMENT]):
            self.toolkit.check(chosen, f"{name}[{index}]")


class ToolPromptTokenizer(PromptTokenizer):
    """A `PromptTokenizer` that counts the descriptions of the tools in; prompts are messages."""

    def __init__(self, base: PromptTokenizer, agents: Agents):
        super().__init__(base.tokenizer, base.max_tokens, base.chat_template_kwargs)
        self.agents, self.needs_prompt = agents, not agents.toolkit.has_environments

    def encode(self, prompt: Prompt, where: str) -> list[int]:
        if not prompt or isinstance(prompt, str) or not is_conversational({"prompt": prompt}):
            found = "a text" if isinstance(prompt, str) else f"{prompt!r:.100}"
            raise ValueError(
                f"{where}: the prompt is {found}; with tools prompts are lists of messages, such as "
                '[{"role": "user", "content": ...}]'
            )
        return self.agents.chat.prompt_ids(prompt, self.agents.toolkit.common_schemas)


def _environment_reward(kind: type, rewarded: Mapping[int, Conversation]) -> Callable[..., Any]:
    """The rewards that environments of a class gave when their conversations ended."""

    def get_reward(environments: Sequence[Any], **columns: Any) -> list[Any]:
        rewards = []
        for environment in environments:
            conversation = rewarded[id(environment)] if type(environment) is kind else None
            if conversation is not None and conversation.reward_error is not None:
                raise conversation.reward_error
            rewards.append(None if conversation is None else conversation.reward)
        return rewards

    get_reward.__name__ = kind.__name__
    return get_reward


class AgentCollector(Collector):
    """A collector whose completions are conversations.

    Args:
        base: what it collects with otherwise.
        agents: see there.
        max_prompt_tokens: of the prompt, with what tools and environments add.
    """

    def __init__(self, base: Collector, agents: Agents, max_prompt_tokens: int):
        super().__init__(
            base.engine, base.tokenizer, base.tokenize, base.rewards, base.config, base.stop_token_ids, base.report
        )
        self.agents = agents
        self.agent = Agent(base.engine, agents.chat, agents.toolkit, agents.limits, max_prompt_tokens)
        self.rollouts = self._conversations
        self.scores_rollouts = agents.toolkit.has_environments
        self._had: dict[str, Conversation] = {}  # of this generation, by request id
        self._seconds = self._idle = 0.0

    def collect(
        self,
        rows: Sequence[tuple[int, Row]],
        step: int,
        num_generations: int,
        metrics: Metrics,
        state: TrainerState,
        spare: SparePrompts | None = None,
    ) -> Collected:
        self._had.clear()
        self.agents.rewarded.clear()
        self._seconds = self._idle = 0.0
        collected = super().collect(rows, step, num_generations, metrics, state, spare)
        note_conversations(metrics, list(self._had.values()))
        metrics.add("time/engine_idle_share", self._idle / max(self._seconds, 1e-9))
        metrics.add("time/tools/abandoned", self.agent.statistics.abandoned)
        return collected

    def _round(self, *arguments: Any) -> Round:
        finished = super()._round(*arguments)
        self.agent.release()  # all is scored: the environments may be reset
        return finished

    def requests(
        self, rows: Sequence[tuple[int, Row]], first_slot: int, step: int, num_generations: int
    ) -> Sequence[Request]:
        """The conversations to be had: each row's `num_generations` times."""
        sampling = SamplingParams(self.config.completion_limit, self.config.temperature, self.stop_token_ids)
        tasks = []
        for slot, (index, row) in enumerate(rows, start=first_slot):
            where, prompt = f"dataset row {index}", _prompt_of(row)
            # What a prompt is with an environment is known when that was reset.
            known = None if self.agents.toolkit.has_environments else tuple(self.tokenize(prompt, where))
            for sample in range(num_generations):
                seeds = partial(sample_seed, self.config.seed, step, slot, sample)
                tasks.append(Task(f"{step}/{slot}/{sample}", prompt, row, sampling, seeds, where, known))
        return tasks

    def _conversations(self, tasks: Sequence[Task]) -> Generator[list[Trajectory], None, None]:
        with closing(self.agent.steps(tasks)) as steps:
            for ended in steps:
                for conversation in ended:
                    self._had[conversation.trajectory.request_id] = conversation
                    self.agents.rewarded[id(conversation.environment)] = conversation
                yield [conversation.trajectory for conversation in ended]
        self._seconds += self.agent.statistics.seconds
        self._idle += self.agent.statistics.idle_seconds

    def prompt(self, trajectory: Trajectory, row: Row) -> Prompt:
        """The prompt with what the environment has added."""
        had = self._had.get(trajectory.request_id)
        return _prompt_of(row) if had is None else had.prompt

    def completion(self, trajectory: Trajectory, prompt: Prompt) -> Prompt:
        """The messages of the model and of its tools."""
        return self._had[trajectory.request_id].completion

    def late_columns(self, trajectory: Trajectory) -> dict[str, Any]:
        """The environment that a conversation was had with."""
        if not self.scores_rollouts:
            return {}
        return {ENVIRONMENTS: self._had[trajectory.request_id].environment}

    def notes(self, trajectory: Trajectory) -> dict[str, Any]:
        """How the conversation went, as far as it does not depend on the clock."""
        had = self._had[trajectory.request_id]
        return {"agent": {name: getattr(had, name) for name in NOTES}}

    def read_again(self, records: Sequence[RolloutRecord]) -> list[Prompt]:
        """The completions of records: the model's messages from its tokens, the tools' as they were recorded."""
        return [self._read_again(record) for record in records]

    def _read_again(self, record: RolloutRecord) -> Prompt:
        turns = [segment for segment in record.trajectory.segments if segment.source == "model"]
        messages: list[dict[str, Any]] = []
        said = 0
        for message in record.completion:
            if not isinstance(message, dict) or message["role"] != "assistant" or said == len(turns):
                messages.append(message)  # type: ignore[arg-type]  # a text is no completion of an agent's
                continue
            read = self.agents.chat.read(turns[said].token_ids, self.agents.toolkit.schemas, said)
            messages.append(read.message)
            said += 1
        return messages

    def _columns(self, rows: list[Row]) -> dict[str, list[Any]]:
        columns = super()._columns(rows)
        return columns | ({ENVIRONMENTS: [None] * len(rows)} if self.scores_rollouts else {})

    def close(self) -> None:
        """End what tools need."""
        self.agent.close()


def note_conversations(metrics: Metrics, had: Sequence[Conversation]) -> None:
    """What is logged of a generation's conversations: TRL's figures of tools, and some more."""
    calls = sum(conversation.tool_calls for conversation in had)

    def share(name: str) -> float:
        return sum(getattr(conversation, name) for conversation in had) / calls if calls else 0.0

    metrics.add("tools/call_frequency", calls / len(had))
    metrics.add("tools/failure_frequency", share("tool_failures"))
    metrics.add("tools/timeout_frequency", share("tool_timeouts"))
    metrics.add("tools/malformed_frequency", share("malformed_calls"))
    metrics.add("agents/turns", sum(conversation.turns for conversation in had) / len(had))
    for ended in get_args(Ended):
        metrics.add(f"agents/ended/{ended}", sum(conversation.ended == ended for conversation in had) / len(had))
    metrics.add("time/tools/seconds", sum(conversation.tool_seconds for conversation in had) / len(had))
    cached = sum(conversation.cached_tokens for conversation in had)
    prompts = sum(conversation.prompt_tokens for conversation in had)
    metrics.add("throughput/cached_prompt_share", cached / max(prompts, 1))


def _prompt_of(row: Row) -> Any:
    return row.get("prompt", EMPTY_PROMPT)
