"""Decoding with the adapter on against the same engine without one, and against vLLM's own LoRA.

Each variant runs in a process of its own, one after the other: `python benchmarks/decode_adapter.py CHECKPOINT`.
Tokens/s are of the 256 tokens after the first 16, for 8, 32 and 128 sequences on prompts of 512 tokens.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import GIB, Report, parser, run_apart
from peft import LoraConfig

BATCHES = {8: 0.90, 32: 0.90, 128: 0.95}  # sequences -> least share of the speed without adapter
FEW, MANY = 16, 272
SAVED_ADAPTER = "decode-adapter"  # beside the checkpoint: our variant leaves it there for vLLM's own LoRA
LORA = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")


def prompts(count: int) -> list[list[int]]:
    return [[5 + (i * 7 + j) % 90 for j in range(512)] for i in range(count)]


def tokens_per_second(run, repeats: int) -> dict[int, list[float]]:
    """`run(sequences, tokens)` generates; the prefill is cancelled by the difference of a long and a short run."""
    speeds: dict[int, list[float]] = {}
    for count in BATCHES:
        run(count, FEW)
        for _ in range(repeats):
            seconds = []
            for tokens in (FEW, MANY):
                started = time.perf_counter()
                run(count, tokens)
                seconds.append(time.perf_counter() - started)
            speeds.setdefault(count, []).append(count * (MANY - FEW) / (seconds[1] - seconds[0]))
    return speeds


def run_ours(checkpoint: Path, adapter: bool, repeats: int) -> dict[int, list[float]]:
    from colora.rollout.engine import RolloutRequest, SamplingParams, generate
    from colora.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        checkpoint, LORA if adapter else None, dtype=torch.bfloat16, max_context=4096, device="cuda",
        max_sequences=max(BATCHES), kv_cache_bytes=32 * GIB, engine_kwargs={"enable_prefix_caching": False},
    )  # fmt: skip
    if engine.adapter is not None:
        engine.adapter.save(checkpoint.parent / SAVED_ADAPTER)

    def run(count: int, tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0)
        requests = [RolloutRequest(str(i), tuple(p), i, sampling) for i, p in enumerate(prompts(count))]
        assert sum(t.num_sampled for t in generate(engine, requests)) == count * tokens

    return tokens_per_second(run, repeats)


def run_vllm_lora(checkpoint: Path, repeats: int) -> dict[int, list[float]]:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(checkpoint), enable_lora=True, max_lora_rank=16, max_loras=1, dtype="bfloat16", max_model_len=4096,
        max_num_seqs=max(BATCHES), kv_cache_memory_bytes=32 * GIB, enable_prefix_caching=False,
        skip_tokenizer_init=True, async_scheduling=True, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"},
    )  # fmt: skip

    def run(count: int, tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": p} for p in prompts(count)]
        llm.generate(
            requests, sampling, lora_request=LoRARequest("a", 1, str(checkpoint.parent / SAVED_ADAPTER)), use_tqdm=False
        )

    return tokens_per_second(run, repeats)


VARIANTS = {
    "without": lambda checkpoint, repeats: run_ours(checkpoint, False, repeats),
    "adapter": lambda checkpoint, repeats: run_ours(checkpoint, True, repeats),
    "vllm_lora": run_vllm_lora,
}


def in_a_process(variant: str, arguments: argparse.Namespace) -> dict[int, list[float]]:
    options = [str(arguments.checkpoint), "--variant", variant, "--repeats", str(arguments.repeats)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    speeds = run_apart(variant, __file__, *options, environment=environment)
    return {int(count): measured for count, measured in speeds.items()}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoint", type=Path)
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--variant", choices=VARIANTS, help="run this one here and print its speeds")
    arguments = options.parse_args()
    if arguments.variant:
        print(json.dumps(VARIANTS[arguments.variant](arguments.checkpoint, arguments.repeats)))
        return
    report = Report("decode_adapter", arguments)
    speeds = {variant: in_a_process(variant, arguments) for variant in ("without", "adapter")}
    add_figures(report, speeds, arguments.repeats)
    print(report.write())
    speeds["vllm_lora"] = in_a_process("vllm_lora", arguments)  # a peer that fails costs no figure
    report.rows.clear()
    add_figures(report, speeds, arguments.repeats)
    print(report.write())


def add_figures(report: Report, speeds: dict[str, dict[int, list[float]]], repeats: int) -> None:
    for count, bar in BATCHES.items():
        best = {variant: max(measured[count]) for variant, measured in speeds.items()}
        peers = {name: round(speed / best["without"], 3) for name, speed in best.items() if name == "vllm_lora"}
        report.add(
            f"decode_adapter.share_of_no_adapter.4b.batch{count}", best["adapter"] / best["without"], "ratio", "higher",
            bar=bar, bar_is="the same engine without adapter, same run", peers=peers,
            tok_s={variant: round(speed) for variant, speed in best.items()},
            repeats=repeats,
            spread=round(max(speeds["adapter"][count]) / min(speeds["adapter"][count]) - 1, 3),
        )  # fmt: skip


if __name__ == "__main__":
    main()
