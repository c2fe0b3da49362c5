"""Conversations over the real engines, with models that sample at random."""

import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from colora.rl.packing import training_sample
from colora.rl.policy import Policy
from colora.rollout.agent import Agent
from colora.rollout.conversation import AgentLimits, Conversation, Task
from colora.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, sample_seed
from colora.rollout.records import RolloutRecord
from colora.rollout.toolkit import Toolkit
from colora.rollout.trajectory import Trajectory
from colora.rollout.transformers_engine import TransformersEngine
from transformers import Qwen3Config

from ..models import SMALL
from ..vllm_engines import VLLM_MARKS, engine_logprobs, open_engine, save_tiny, trainer_logprobs
from .napping import STOPS, Napping, check_tokens

VOCAB = 101
TURNS, REPLY = 5, 20
BLOCK = 32  # tokens of a KV block, the fewest vLLM's CPU attention takes: only full ones are found again


def needs_vllm(test: Callable[..., None]) -> Callable[..., None]:
    for mark in VLLM_MARKS:
        test = mark(test)
    return test


class Recording:
    """An engine that notes what it returns."""

    def __init__(self, engine: RolloutEngine):
        self.engine, self.max_context = engine, engine.max_context
        self.sampled: defaultdict[str, list[Trajectory]] = defaultdict(list)
        self.submissions = 0

    def submit(self, requests: Sequence[RolloutRequest]) -> None:
        self.submissions += 1
        self.engine.submit(requests)

    def step(self) -> list[Trajectory]:
        finished = self.engine.step()
        for trajectory in finished:
            self.sampled[trajectory.request_id.rpartition("/")[0]].append(trajectory)
        return finished

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def converse(engine: RolloutEngine, count: int = 6, wait: Callable[[int], Any] = lambda heard: None):
    """(conversations by id, recording); the tool says what it heard, after `wait`."""

    def nap(heard: int) -> str:
        """Sleep.

        Args:
            heard: What there was to hear.
        """
        wait(heard)
        return f"heard {heard}"

    recording = Recording(engine)
    agent = Agent(recording, Napping(TURNS, REPLY, VOCAB), Toolkit([nap]), AgentLimits(tool_timeout=60.0))
    tasks = []
    for index in range(count):
        prompt = random.Random(index // 2).choices(range(8, VOCAB), k=30 + 5 * (index // 2))
        messages = [{"role": "user", "content": prompt}]

        def seed(turn: int, index: int = index) -> int:
            return sample_seed(3, 1, index, 0, turn)

        tasks.append(Task(f"c{index}", messages, {}, SamplingParams(200, 1.0, STOPS), seed))
    return {c.trajectory.request_id: c for c in agent.run(tasks)}, recording


def in_random_order() -> Callable[[int], Any]:
    """A wait of a few milliseconds, so that conversations come back in ever another order."""
    pause = threading.Event()
    return lambda heard: pause.wait(0.001 * (heard % 30))


def check(policy: Policy, found: dict[str, Conversation], recording: Recording) -> None:
    assert any(conversation.turns == TURNS for conversation in found.values())
    for name, conversation in found.items():
        check_tokens(conversation, recording.sampled[name])
        record = RolloutRecord(1, 0, 0, conversation.trajectory, "", "", {}, 0.0, 1.0)
        sample, tokens = training_sample(record, mask_truncated=False), []
        for turn in recording.sampled[name]:
            tokens += turn.completion_ids
        assert [sample.tokens[position] for position in sample.targets] == tokens  # what is trained was sampled
        mask = torch.tensor(conversation.trajectory.completion_mask, dtype=torch.bool)
        assert 0 < mask.sum() < len(mask)
        gap = trainer_logprobs(policy, [conversation.trajectory]) - engine_logprobs([conversation.trajectory])
        assert gap[mask].abs().max() < 1e-4


def test_transformers_engine(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy("qwen3", vocab_size=VOCAB)
    engine = TransformersEngine(policy.weights, policy.config)
    found, recording = converse(engine, wait=in_random_order())
    check(policy, found, recording)
    again, _ = converse(engine)
    assert {n: c.trajectory.completion_ids for n, c in found.items()} == {
        n: c.trajectory.completion_ids for n, c in again.items()
    }


@pytest.fixture(scope="module")
def vllm_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    config = Qwen3Config(**SMALL | {"vocab_size": VOCAB, "head_dim": 32, "max_position_embeddings": 512})
    directory: Path = save_tiny(config, tmp_path_factory.mktemp("model"))
    engine = open_engine(directory, engine_kwargs={"block_size": BLOCK})
    yield engine
    engine.close()


@needs_vllm
def test_vllm_engine(vllm_engine: Any) -> None:
    policy = Policy(vllm_engine.weights, vllm_engine.config, vllm_engine.adapter)
    found, recording = converse(vllm_engine, wait=in_random_order())
    check(policy, found, recording)
    again, _ = converse(vllm_engine)
    assert {n: c.trajectory.completion_ids for n, c in found.items()} == {
        n: c.trajectory.completion_ids for n, c in again.items()
    }


@needs_vllm
def test_a_turn_computes_only_its_new_tokens(vllm_engine: Any) -> None:
    """By vLLM's own count: of the tokens before a turn, the whole blocks that were there at the last one are cached."""
    vllm_engine.adapter_changed()  # empties the prefix cache
    found, recording = converse(vllm_engine, count=1)
    turns = recording.sampled["c0"]
    assert turns[0].cached_tokens == 0 and len(turns) > 2
    for before, after in zip(turns, turns[1:], strict=False):
        # The last token of a turn was sampled and never computed.
        known = len(before.prompt_ids) + len(before.completion_ids) - 1
        assert after.cached_tokens == known // BLOCK * BLOCK
        assert len(after.prompt_ids) - after.cached_tokens <= REPLY + BLOCK
    conversation = found["c0"]
    assert conversation.cached_tokens == sum(turn.cached_tokens for turn in turns)
    assert conversation.prompt_tokens == sum(len(turn.prompt_ids) for turn in turns)
