"""Peak memory of one forward and backward in six fixed cases, against benchmarks/memory_baseline.json.

`python benchmarks/memory_baseline.py` fails where a peak has grown by more than 1 %; `--update` writes the file anew,
for a change that is meant. Counted are the bytes of PyTorch's allocator above what the model itself takes, on the GPU:
they are the same in every run. Where one has shrunk by more than 1 %, it says so: then update, to hold what was won.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from colora.kernels.offload import ActivationOffload
from policies import random_policy
from transformers import Gemma3TextConfig, PreTrainedConfig, Qwen3Config

BASELINE = Path(__file__).with_suffix(".json")
ALLOWED = 0.01  # growth of a peak
MIB = 2**20
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}


def qwen(layers: int) -> Qwen3Config:
    """Blocks of the 8B shape over a smaller vocabulary."""
    return Qwen3Config(
        **HEADS, hidden_size=4096, intermediate_size=12288, num_hidden_layers=layers, vocab_size=32768,
        tie_word_embeddings=False, max_position_embeddings=131072,
    )  # fmt: skip


def gemma() -> Gemma3TextConfig:
    """Blocks of the 4B shape: one with a window of 1024 tokens, one without."""
    return Gemma3TextConfig(
        num_attention_heads=8, num_key_value_heads=4, head_dim=256, hidden_size=2560, intermediate_size=10240,
        num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"], sliding_window=1024, vocab_size=32768,
    )  # fmt: skip


def peak_mib(
    config: PreTrainedConfig, lengths: list[int], offload: bool = False, kept: bool = False, entropy: bool = False
) -> float:
    """MiB above the model that forward and backward of a packed row take, gradients included."""
    policy = random_policy(config)
    policy.gradient_checkpointing = not kept
    policy.offload = ActivationOffload(policy.device, keep=1) if offload else None
    tokens = torch.randint(0, config.vocab_size, (sum(lengths),), device="cuda")
    rows = torch.arange(len(tokens) - 1, device="cuda")
    for _ in range(2):  # the first compiles, and makes what is kept from pass to pass
        policy.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        logprobs, entropies = policy.logprobs(
            tokens, lengths, rows, tokens[1:], entropy=entropy, entropy_gradient=entropy
        )
        (logprobs.mean() if entropies is None else logprobs.mean() + entropies.mean()).backward()
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


CASES: dict[str, Callable[[], float]] = {
    "one row of 16K": lambda: peak_mib(qwen(4), [16384]),
    "one row of 16K, inputs in host memory": lambda: peak_mib(qwen(4), [16384], offload=True),
    "uneven sequences": lambda: peak_mib(qwen(2), [700, 1, 2300, 511, 129, 1500, 64, 2987]),
    "with entropies": lambda: peak_mib(qwen(2), [8192], entropy=True),
    "everything kept": lambda: peak_mib(qwen(2), [4096], kept=True),
    "windows, four norms a block": lambda: peak_mib(gemma(), [6000, 2192]),
}


def compare(peaks: dict[str, float], baseline: dict[str, float]) -> list[str]:
    """What has grown beyond what is allowed, or has no baseline; shrunk ones are printed."""
    grown = []
    for name, peak in peaks.items():
        before = baseline.get(name)
        share = "new" if before is None else f"{peak / before - 1:+.2%} of {before:.1f}"
        print(f"{name:40} {peak:10.1f} MiB   {share}", flush=True)
        if before is None or peak > before * (1 + ALLOWED):
            grown.append(f"{name}: {peak:.1f} MiB, {share}")
        elif peak < before * (1 - ALLOWED):
            print(f"{name} has shrunk: run with --update to hold it")
    return grown


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--update", action="store_true", help="write the baseline")
    options.add_argument("--baseline", type=Path, default=BASELINE, help="the file")
    arguments = options.parse_args()
    if not torch.cuda.is_available():
        options.error("it measures a GPU, and PyTorch finds none here")
    peaks = {name: round(case(), 1) for name, case in CASES.items()}
    if arguments.update:
        content = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "unit": "MiB", "peaks": peaks}
        arguments.baseline.write_text(json.dumps(content, indent=1) + "\n")
        return 0
    grown = compare(peaks, json.loads(arguments.baseline.read_text())["peaks"])
    if grown:
        print("more memory than before:\n  " + "\n  ".join(grown), file=sys.stderr)
    return len(grown)


if __name__ == "__main__":
    sys.exit(main())
