"""Decoding speed: the adapter's price on a bf16 base, and a 4-bit base with its adapter against bf16 without one.

    python benchmarks/decode.py 4b=CHECKPOINT 8b=CHECKPOINT

Every variant runs in a process of its own, one after the other; a shape's file, decode_SHAPE.json, is written after
each, so that a peer that fails costs no figure. Tokens/s are of the 256 tokens after the first 16, for 8, 32 and 128
sequences on prompts of 512 tokens. The checkpoints are dense (`checkpoints.py` makes random ones); the 4-bit variants
quantise them as they load.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from common import GIB, Report, parser, run_apart
from peft import LoraConfig

ADAPTER_BARS = {8: 0.90, 32: 0.90, 128: 0.95}  # sequences -> least share of the speed without adapter
FOUR_BIT_BARS = {8: 1.0, 32: 1.0, 128: 0.9}  # least share of the speed of bf16 without adapter
BNB_BARS = {8: 2.5, 32: 2.5, 128: None}  # least multiple of what vLLM does with bitsandbytes and LoRA
FEW, MANY = 16, 272
SAVED_ADAPTER = "decode-adapter"  # beside the checkpoint: our variant leaves it there for vLLM's own LoRA
LORA = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
OURS: dict[str, tuple[LoraConfig | None, str]] = {  # adapter, base
    "bf16": (None, "auto"),
    "bf16_lora": (LORA, "auto"),
    "nf4_lora": (LORA, "nf4"),
    "fp4_lora": (LORA, "fp4"),
}
PEERS = {"vllm_lora": {}, "vllm_bnb_lora": {"quantization": "bitsandbytes"}}
Speeds = dict[int, list[float]]  # sequences -> tokens/s of each repeat


def prompts(count: int) -> list[list[int]]:
    return [[5 + (i * 7 + j) % 90 for j in range(512)] for i in range(count)]


def tokens_per_second(run, repeats: int) -> Speeds:
    """`run(sequences, tokens)` generates; the prefill is cancelled by the difference of a long and a short run."""
    speeds: Speeds = {}
    for count in ADAPTER_BARS:
        run(count, FEW)
        for _ in range(repeats):
            seconds = []
            for tokens in (FEW, MANY):
                started = time.perf_counter()
                run(count, tokens)
                seconds.append(time.perf_counter() - started)
            speeds.setdefault(count, []).append(count * (MANY - FEW) / (seconds[1] - seconds[0]))
    return speeds


def run_ours(checkpoint: Path, lora: LoraConfig | None, base: str, repeats: int) -> Speeds:
    from colora.rollout.engine import RolloutRequest, SamplingParams, generate
    from colora.rollout.vllm_engine import VLLMEngine

    engine = VLLMEngine(
        checkpoint, lora, dtype=torch.bfloat16, base=base, max_context=4096, device="cuda",
        max_sequences=max(ADAPTER_BARS), kv_cache_bytes=32 * GIB, engine_kwargs={"enable_prefix_caching": False},
    )  # fmt: skip
    if engine.adapter is not None:
        engine.adapter.save(checkpoint.parent / SAVED_ADAPTER)

    def run(count: int, tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0)
        requests = [RolloutRequest(str(i), tuple(p), i, sampling) for i, p in enumerate(prompts(count))]
        assert sum(t.num_sampled for t in generate(engine, requests)) == count * tokens

    return tokens_per_second(run, repeats)


def run_vllm_lora(checkpoint: Path, repeats: int, options: dict[str, str]) -> Speeds:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        str(checkpoint), enable_lora=True, max_lora_rank=16, max_loras=1, dtype="bfloat16", max_model_len=4096,
        max_num_seqs=max(ADAPTER_BARS), kv_cache_memory_bytes=32 * GIB, enable_prefix_caching=False,
        skip_tokenizer_init=True, async_scheduling=True, compilation_config={"cudagraph_mode": "FULL_DECODE_ONLY"},
        **options,
    )  # fmt: skip

    def run(count: int, tokens: int) -> None:
        sampling = SamplingParams(max_tokens=tokens, temperature=1.0, logprobs=0, ignore_eos=True, detokenize=False)
        requests = [{"prompt_token_ids": p} for p in prompts(count)]
        llm.generate(
            requests, sampling, lora_request=LoRARequest("a", 1, str(checkpoint.parent / SAVED_ADAPTER)), use_tqdm=False
        )

    return tokens_per_second(run, repeats)


def measure(variant: str, checkpoint: Path, repeats: int) -> Speeds:
    if variant in OURS:
        return run_ours(checkpoint, *OURS[variant], repeats)
    return run_vllm_lora(checkpoint, repeats, PEERS[variant])


def in_a_process(variant: str, checkpoint: Path, repeats: int) -> Speeds:
    options = [f"here={checkpoint}", "--variant", variant, "--repeats", str(repeats)]
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    speeds = run_apart(variant, __file__, *options, environment=environment)
    return {int(count): measured for count, measured in speeds.items()}


def add_figures(report: Report, shape: str, speeds: dict[str, Speeds], repeats: int) -> None:
    """What can be said with the variants that are there."""
    for count in ADAPTER_BARS:
        best = {variant: max(measured[count]) for variant, measured in speeds.items()}
        facts = {"tok_s": {variant: round(speed) for variant, speed in best.items()}, "repeats": repeats}
        spreads = {name: round(max(found[count]) / min(found[count]) - 1, 3) for name, found in speeds.items()}
        if "bf16_lora" in best:
            report.add(
                f"decode_adapter.share_of_no_adapter.{shape}.batch{count}", best["bf16_lora"] / best["bf16"], "ratio",
                "higher", bar=ADAPTER_BARS[count], bar_is="the same engine without adapter, same run",
                peers={"vllm_lora": round(best["vllm_lora"] / best["bf16"], 3)} if "vllm_lora" in best else {},
                spread=spreads["bf16_lora"], **facts,
            )  # fmt: skip
        for variant in ("nf4_lora", "fp4_lora"):
            if variant not in best:
                continue
            report.add(
                f"decode_tok_s.{variant}.{shape}.batch{count}", best[variant], "tok/s", "higher",
                bar=round(FOUR_BIT_BARS[count] * best["bf16"]),
                bar_is=f"{FOUR_BIT_BARS[count]:g} x bf16 without adapter, same run", spread=spreads[variant], **facts,
            )  # fmt: skip
            if "vllm_bnb_lora" in best:
                report.add(
                    f"decode_tok_s.{variant}_over_vllm_bnb_lora.{shape}.batch{count}",
                    best[variant] / best["vllm_bnb_lora"], "ratio", "higher", bar=BNB_BARS[count],
                    bar_is="vLLM's bitsandbytes with its LoRA, same run, is 1", **facts,
                )  # fmt: skip


def main() -> None:
    options = parser(__doc__)
    options.add_argument("checkpoints", nargs="+", metavar="SHAPE=DIRECTORY")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--variants", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    options.add_argument("--variant", choices=[*OURS, *PEERS], help=argparse.SUPPRESS)  # measure it here, print speeds
    arguments = options.parse_args()
    for text in arguments.checkpoints:
        if not all(text.partition("=")):
            options.error(f"{text!r} is not of the form SHAPE=DIRECTORY, such as 8b=/checkpoints/8b")
    checkpoints = {name: Path(place) for name, _, place in (text.partition("=") for text in arguments.checkpoints)}
    if arguments.variant:
        (checkpoint,) = checkpoints.values()
        print(json.dumps(measure(arguments.variant, checkpoint, arguments.repeats)))
        return
    for shape, checkpoint in checkpoints.items():
        report = Report(f"decode_{shape}", arguments, script="decode")
        found: dict[str, Speeds] = {}
        for variant in arguments.variants:
            found[variant] = in_a_process(variant, checkpoint, arguments.repeats)
            add_figures(report, shape, found, arguments.repeats)
            print(report.write())


if __name__ == "__main__":
    main()
