"""Rollouts of an engine on the GPU, and how far its log-probs are from a policy's on its weights: a program.

    python shared_prompt_run.py CHECKPOINT ENGINE_KWARGS_AS_JSON

A process an engine: a second one cannot capture CUDA graphs where a first one has freed its own (vLLM keeps one memory
pool for the graphs of a process). The last line is a JSON object, see `main`.
"""

import json
import sys
from collections.abc import Sequence
from typing import Any

import torch
from colora.kernels.decode_attention_triton import SHARED
from colora.rl.policy import Policy
from colora.rl.setup import score
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from colora.rollout.trajectory import Segment, Trajectory
from colora.rollout.vllm_engine import VLLMEngine
from peft import LoraConfig

PROMPT, SAMPLES = 4001, 8  # the prompt's last block is not full: every sample has a copy of it
VOCAB = 46


def requests(seed: int) -> list[RolloutRequest]:
    """A group of samples of one long prompt and some of others, which end one after the other: 13 become 1. The others
    are the first to end."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [PROMPT] * SAMPLES + [30, 700, 3000, 5000, 5000]
    prompts = [tuple(torch.randint(VOCAB, (length,), generator=generator).tolist()) for length in lengths]
    prompts[:SAMPLES] = [prompts[0]] * SAMPLES
    prompts[-1] = prompts[0][:2000] + prompts[-1][2000:]  # shares a part of what the group shares
    return [
        RolloutRequest(f"{seed}-{index}", prompt, 100 * seed + index, SamplingParams(4 + 5 * ((index + 5) % 13)))
        for index, prompt in enumerate(prompts)
    ]


def buffers(engine: VLLMEngine) -> list[Any]:
    """The kernel's, of the groups of layers that have some."""
    runner: Any = engine._engine.model_executor.driver_worker.worker.model_runner
    builders = [group.get_metadata_builder(0) for groups in runner.attn_groups for group in groups]
    return [builder._decode for builder in builders if getattr(builder, "_decode", None) is not None]


def rollouts(engine: VLLMEngine) -> tuple[list[Trajectory], int]:
    """Trajectories, and the most tokens that a step was planned to share."""
    engine.submit(requests(1))
    found, most = [], 0
    while engine.unfinished:
        found += engine.step()
        most = max([most, *(int(decode._sequences[SHARED.value].max()) for decode in buffers(engine))])
    return found, most


def other_half(trajectory: Trajectory) -> Trajectory:
    """The same completion, of a prompt with other tokens in its first half."""
    half = len(trajectory.prompt_ids) // 2
    prompt = [*trajectory.prompt_ids[:half][::-1], *trajectory.prompt_ids[half:]]
    return Trajectory(trajectory.request_id, prompt, [Segment(trajectory.completion_ids, "model", trajectory.logprobs)])


def gaps(engine: VLLMEngine, trajectories: Sequence[Trajectory]) -> torch.Tensor:
    """|engine's log-prob - policy's| of every token."""
    policy = Policy(engine.weights, engine.config, engine.adapter)
    found = torch.tensor([value for trajectory in trajectories for value in trajectory.logprobs])
    return (torch.cat([score(policy, [trajectory]).cpu() for trajectory in trajectories]) - found).abs()


def main(checkpoint: str, engine_kwargs: str) -> None:
    """Prints the gaps' mean and 99th percentile, their mean after a sleep and with other prompts, the most shared
    tokens, and the number of groups of layers with the kernel."""
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    options = {"max_context": 8192, "prompt_tokens": PROMPT, "max_sequences": 16, "kv_cache_bytes": 2**28, "seed": 0}
    engine = VLLMEngine(
        checkpoint, lora, dtype=torch.bfloat16, device="cuda", engine_kwargs=json.loads(engine_kwargs), **options
    )
    found, shared = rollouts(engine)
    usual, changed = gaps(engine, found), gaps(engine, [other_half(trajectory) for trajectory in found])
    engine.sleep()
    torch.empty(2**28, dtype=torch.uint8, device="cuda").random_(0, 255)  # over the memory that the cache had
    engine.adapter_changed()
    engine.wake()
    slept = gaps(engine, list(generate(engine, requests(2))))
    result = {"mean": usual.mean().item(), "high": usual.quantile(0.99).item(), "slept": slept.mean().item()}
    result |= {"other_prompt": changed.mean().item(), "shared": shared, "groups": len(buffers(engine))}
    engine.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
