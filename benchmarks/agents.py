"""Conversations with slow tools over vLLM: how long the engine waits, and what lockstep would cost.

`python benchmarks/agents.py`. 64 conversations of 8 turns with a random model; each turn but the last calls a tool that
takes 0 to 2 s. The peer does the same in lockstep on the same engine: all generate, all tools run (at the same time),
all go on. The bound is what the slowest conversation's tools take alone. Every stored token is compared with what the
engine sampled, turn by turn.
"""

import random
import tempfile
import time
import zlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from colora.rollout.agent import Agent
from colora.rollout.chat_format import Message, ToolRequest, Turn
from colora.rollout.conversation import AgentLimits, Conversation, Task
from colora.rollout.engine import RolloutEngine, RolloutRequest, SamplingParams, generate, sample_seed
from colora.rollout.toolkit import Toolkit
from colora.rollout.trajectory import Trajectory
from colora.rollout.vllm_engine import VLLMEngine
from common import Report, parser
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

VOCAB, PROMPT, REPLY = 512, 48, 24
STOPS = tuple(range(16))  # each token ends a turn with a probability of 1 in 32
SLOWEST = 2.0
MOST_TOKENS = 8 * 64


class RandomChat:
    """Whatever the model samples is a call, until its last turn."""

    def __init__(self, turns: int):
        self.turns = turns

    def prompt_ids(self, messages: Sequence[Message], schemas: Sequence[dict[str, Any]]) -> list[int]:
        return tokens(messages[0]["content"], PROMPT)

    def reply_ids(self, messages: Sequence[Message]) -> list[int]:
        return tokens(messages[0]["content"], REPLY)

    def read(self, token_ids: Sequence[int], schemas: Sequence[dict[str, Any]], number: int) -> Turn:
        message = {"role": "assistant", "content": ""}
        last = number == self.turns - 1
        return Turn(message, [] if last else [ToolRequest("search", {"query": str(list(token_ids))}, "")])


class Noting:
    """An engine that notes what it samples, by conversation."""

    def __init__(self, engine: VLLMEngine):
        self.engine, self.max_context = engine, engine.max_context
        self.sampled: defaultdict[str, list[Trajectory]] = defaultdict(list)

    def step(self) -> list[Trajectory]:
        finished = self.engine.step()
        for trajectory in finished:
            self.sampled[trajectory.request_id.rpartition("/")[0]].append(trajectory)
        return finished

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def tokens(text: str, count: int) -> list[int]:
    """`count` token ids that depend on a text."""
    return random.Random(zlib.crc32(text.encode())).choices(range(len(STOPS), VOCAB), k=count)


def latency(query: str) -> float:
    return random.Random(zlib.crc32(query.encode())).uniform(0.0, SLOWEST)


def search(query: str) -> str:
    """Search for something.

    Args:
        query: What to search for.
    """
    time.sleep(latency(query))
    return query


def make_tasks(count: int) -> list[Task]:
    sampling = SamplingParams(MOST_TOKENS, 1.0, STOPS)

    def task(index: int) -> Task:
        messages = [{"role": "user", "content": f"question {index}"}]
        return Task(f"c{index}", messages, {}, sampling, lambda turn: sample_seed(0, 1, index, 0, turn))

    return [task(index) for index in range(count)]


def concurrently(engine: RolloutEngine, tasks: Sequence[Task], turns: int) -> tuple[list[Conversation], float, float]:
    """(conversations, seconds, seconds that the engine had nothing to do)."""
    agent = Agent(engine, RandomChat(turns), Toolkit([search]), AgentLimits(max_threads=len(tasks)))
    found = list(agent.run(tasks))
    return found, agent.statistics.seconds, agent.statistics.idle_seconds


def in_lockstep(engine: RolloutEngine, tasks: Sequence[Task], turns: int) -> tuple[int, float, float]:
    """The peer: (turns that were had, seconds, idle seconds)."""
    chat, started, idle, had = RandomChat(turns), time.perf_counter(), 0.0, 0
    seen = {task.request_id: chat.prompt_ids(task.messages, []) for task in tasks}
    left = {task.request_id: task.sampling.max_tokens for task in tasks}
    going = list(tasks)
    for turn in range(turns):
        requests = [
            RolloutRequest(
                f"{task.request_id}/{turn}",
                tuple(seen[task.request_id]),
                task.seeds(turn),
                replace(task.sampling, max_tokens=left[task.request_id]),
            )
            for task in going
        ]
        spoken = {t.request_id.rpartition("/")[0]: t for t in generate(engine, requests)}
        had += len(spoken)
        going = [task for task in going if spoken[task.request_id].finish_reason == "stop"]
        if turn == turns - 1:
            break
        paused = time.perf_counter()
        with ThreadPoolExecutor(max(1, len(going))) as pool:
            queries = [str(spoken[task.request_id].completion_ids) for task in going]
            results = list(pool.map(search, queries))
        idle += time.perf_counter() - paused
        for task, result in zip(going, results, strict=True):
            reply = chat.reply_ids([{"role": "tool", "content": result}])
            seen[task.request_id] += spoken[task.request_id].completion_ids + reply
            left[task.request_id] -= len(spoken[task.request_id].completion_ids)
        going = [task for task in going if left[task.request_id] > 0]
    return had, time.perf_counter() - started, idle


def differences(found: Sequence[Conversation], sampled: dict[str, list[Trajectory]]) -> tuple[int, int]:
    """(sampled tokens, those that are stored, or trained, differently from how they were sampled)."""
    total, wrong = 0, 0
    for conversation in found:
        trajectory = conversation.trajectory
        ids, mask = trajectory.completion_ids, trajectory.completion_mask
        trained = [token for token, by_model in zip(ids, mask, strict=True) if by_model]
        turns = sampled[trajectory.request_id]
        spoken = [token for turn in turns for token in turn.completion_ids]
        total += len(spoken)
        wrong += sum(a != b for a, b in zip(trained, spoken, strict=False)) + abs(len(trained) - len(spoken))
        stored, position = trajectory.prompt_ids + ids, 0
        for turn in turns:
            wrong += turn.prompt_ids != stored[: len(turn.prompt_ids)]
            position = len(turn.prompt_ids) + len(turn.completion_ids)
        wrong += position != len(stored)
    return total, wrong


def make_checkpoint(directory: Path, hidden: int, layers: int) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        head_dim=32,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    return directory


def measured(run: Callable[..., Any], engine: VLLMEngine, *arguments: Any) -> Any:
    """`run` with the prefix cache empty."""
    engine.adapter_changed()
    return run(*arguments)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--conversations", type=int, default=64)
    options.add_argument("--turns", type=int, default=8)
    options.add_argument("--hidden", type=int, default=128)
    options.add_argument("--layers", type=int, default=2)
    args = options.parse_args()
    report = Report("agents", args, on_cpu=True)
    with tempfile.TemporaryDirectory() as directory:
        engine = VLLMEngine(
            make_checkpoint(Path(directory), args.hidden, args.layers),
            LoraConfig(r=8, target_modules="all-linear"),
            dtype=torch.float32,
            max_context=2048,
            device="cuda" if torch.cuda.is_available() else "cpu",
            max_sequences=args.conversations,
            engine_kwargs={} if torch.cuda.is_available() else {"block_size": 32},
        )
        tasks = make_tasks(args.conversations)
        list(generate(engine, [RolloutRequest("warm", tuple(range(16, 48)), 0, SamplingParams(8))]))
        noting = Noting(engine)
        found, seconds, idle = measured(concurrently, engine, noting, tasks, args.turns)
        had, lockstep_seconds, lockstep_idle = measured(in_lockstep, engine, engine, tasks, args.turns)
        engine.close()
    assert had == sum(conversation.turns for conversation in found), "the two did not have the same conversations"
    total, wrong = differences(found, noting.sampled)
    bound = max(conversation.tool_seconds for conversation in found)
    shape = {"conversations": len(found), "turns": had, "sampled_tokens": total}
    slower = {"bar": round(lockstep_seconds, 2), "bar_is": "lockstep, same engine, same tokens", **shape}
    report.add(
        "agents.seconds", seconds, "s", "lower", peers={"slowest conversation's tools": round(bound, 2)}, **slower
    )
    report.add("agents.speedup_over_lockstep", lockstep_seconds / seconds, "x", "higher", bar=1.0)
    share = lockstep_idle / lockstep_seconds
    report.add("agents.idle_share", idle / seconds, "", "lower", bar=round(share, 3), bar_is="lockstep")
    cached = sum(conversation.cached_tokens for conversation in found)
    prompts = sum(conversation.prompt_tokens for conversation in found)
    report.add("agents.prompt_tokens_from_the_prefix_cache", cached / prompts, "", "higher", by="vLLM's own count")
    report.add("agents.tokens_stored_other_than_sampled", wrong, "tokens", "equal", bar=0, of=total)
    print(report.write())


if __name__ == "__main__":
    main()
