"""One engine, one policy, one copy: memory after start, the KV pool asleep and awake, the adapter's way to the slots.

`python benchmarks/sharing.py CHECKPOINT` on a checkpoint of `benchmarks/checkpoints.py`.
"""

import time
from pathlib import Path

import torch
from colora.rl.policy import Policy
from colora.rollout.engine import RolloutRequest, SamplingParams, generate
from colora.rollout.vllm_engine import VLLMEngine
from colora.weightshare.guard import check_storage
from common import GIB, Report, best_of, parser, used_gib
from peft import LoraConfig

LORA = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
PROMPTS = [[(5 + (i * 7 + j) % 90) for j in range(512)] for i in range(8)]


def completions(engine: VLLMEngine, temperature: float = 0.0) -> list[list[int]]:
    sampling = SamplingParams(max_tokens=64, temperature=temperature)
    requests = [RolloutRequest(str(i), tuple(prompt), i, sampling) for i, prompt in enumerate(PROMPTS)]
    found = {t.request_id: t.completion_ids for t in generate(engine, requests)}
    return [found[request.request_id] for request in requests]


def measure_sleep(engine: VLLMEngine, report: Report, repeats: int) -> None:
    before = completions(engine)
    pointers = [tensor.data_ptr() for tensor in engine.named_tensors().values()]
    engine.sleep()
    engine.wake()
    asleep, awake, freed = [], [], []
    for _ in range(repeats):
        used = used_gib()
        asleep.append(best_of(engine.sleep, 1)[0])
        freed.append(used - used_gib())
        scratch = torch.empty(engine.kv_cache_bytes // 2, dtype=torch.uint8, device="cuda").random_(0, 255)
        del scratch  # training's use of the memory in between
        torch.cuda.empty_cache()
        awake.append(best_of(engine.wake, 1)[0])
    same_pointers = pointers == [tensor.data_ptr() for tensor in engine.named_tensors().values()]
    engine.adapter_changed()
    same_tokens = before == completions(engine)
    facts = {"pool_gib": round(engine.kv_cache_bytes / GIB, 2), "freed_gib": round(min(freed), 2), "repeats": repeats}
    facts |= {"same_pointers": same_pointers, "same_tokens": same_tokens}
    bar = {"bar": 50, "bar_is": "50 ms, pointers and captured graphs valid, tokens unchanged"}
    report.add(
        "sleep.kv_asleep_ms", max(asleep) * 1e3, "ms", "lower", fastest=round(min(asleep) * 1e3, 2), **bar, **facts
    )
    report.add("sleep.kv_awake_ms", max(awake) * 1e3, "ms", "lower", fastest=round(min(awake) * 1e3, 2), **bar, **facts)
    assert same_pointers and same_tokens, "sleeping changed the weights or what is generated"


def measure_adapter(engine: VLLMEngine, report: Report, repeats: int) -> None:
    adapter = engine.adapter
    before = completions(engine)
    with torch.no_grad():
        for master in adapter.masters_b:
            master.normal_(0.0, 0.02)
    adapter.publish()
    engine.adapter_changed()
    cast, spread = best_of(adapter.publish, repeats)
    whole, _ = best_of(lambda: (adapter.publish(), engine.adapter_changed()), repeats)
    changed = completions(engine) != before
    floor = 1.5 * adapter.slot_bytes * 2 / 4.3e12 * 1e3  # fp32 read, bf16 written
    facts = {
        "slot_mib": round(adapter.slot_bytes / 2**20, 1),
        "floor_ms": round(floor, 3),
        "generation_changed": changed,
    }
    report.add(
        "adapter.masters_to_slots_ms", cast * 1e3, "ms", "lower",
        bar=5, bar_is="5 ms", repeats=repeats, spread=round(spread, 3),
        with_prefix_cache_reset_ms=round(whole * 1e3, 3), **facts,
    )  # fmt: skip
    assert changed, "the captured graphs did not see the written slots"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--repeats", type=int, default=10)
    arguments = options.parse_args()
    report = Report("sharing", arguments)
    base = used_gib()
    started = time.perf_counter()
    engine = VLLMEngine(
        arguments.checkpoint, LORA, dtype=torch.bfloat16, max_context=4096, device="cuda",
        max_sequences=32, kv_cache_bytes=10 * GIB,
    )  # fmt: skip
    policy = Policy(engine.weights, engine.config, engine.adapter)
    start_seconds = time.perf_counter() - started
    torch.cuda.synchronize()
    checkpoint_gib = sum(path.stat().st_size for path in arguments.checkpoint.glob("*.safetensors")) / GIB
    above_pool = used_gib() - base - engine.kv_cache_bytes / GIB
    check_storage(policy.weights, engine.named_tensors())
    report.add(
        "share.memory_after_start_gib", above_pool, "GiB", "lower",
        bar=round(checkpoint_gib + 2.5, 2), bar_is="checkpoint bytes + 2.5 GiB, policy built",
        checkpoint_gib=round(checkpoint_gib, 2), kv_pool_gib=round(engine.kv_cache_bytes / GIB, 2),
        start_seconds=round(start_seconds, 1),
    )  # fmt: skip
    measure_sleep(engine, report, arguments.repeats)
    measure_adapter(engine, report, arguments.repeats)
    print(report.write())
    engine.close()


if __name__ == "__main__":
    main()
