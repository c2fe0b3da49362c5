"""The longest sequence that trains on a card with 24 and 80 GiB free: 8B shape, bf16, LoRA r=32 on all linears.

One sequence, forward and backward, every token trained, against transformers + PEFT + gradient checkpointing patched by
Liger. A ballast (card.py) holds the rest of the card, so memory really runs out there. Each side runs in a process of
its own: `python benchmarks/longest_context.py`. The limit is foretold from two short sequences, as if memory grew with
the length in a straight line; from there the search goes up or down, further each time, until it has a length that
works and one that does not, and halves what is between them until they are STEP apart.
"""

import gc
import json
import sys
import time

import torch
from card import ballast
from checkpoints import SHAPES, model_config
from common import GIB, Report, parser, run_apart
from policies import Step, policy_step, random_policy, transformers_step

SIDES = ("ours", "liger")
NAMES = {"liger": "transformers_liger"}  # of the peers
SHORT = (2048, 4096)
STEP = 1.04  # of a length that works, within which one that does not lies
UNIT = 256  # tokens


def attempt(step: Step, tokens: int, vocabulary: int) -> tuple[float, float] | None:
    """(seconds, peak GiB of PyTorch's allocator) of one step on `tokens`, None where memory runs out."""
    row = torch.randint(0, vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    try:
        step(row)
        torch.cuda.synchronize()
        found = time.perf_counter() - started, torch.cuda.max_memory_allocated() / GIB
    except torch.OutOfMemoryError:
        found = None
    gc.collect()  # the frames of the failed step hold its tensors
    torch.cuda.empty_cache()
    print(f"{tokens} tokens: {found}", file=sys.stderr, flush=True)
    return found


def search(step: Step, vocabulary: int, most: int) -> dict[str, float]:
    """{tokens that work, their seconds and peak_gib, fails: the least tried that do not, 0 where all did}."""
    peaks = []
    for tokens in SHORT:
        result = attempt(step, tokens, vocabulary)
        if result is None:
            return {"tokens": 0, "seconds": 0.0, "peak_gib": 0.0, "fails": tokens}
        peaks.append(result[1])
    slope = max((peaks[1] - peaks[0]) / (SHORT[1] - SHORT[0]), 1e-9)
    limit = (torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()) / GIB
    length = min(most, int(SHORT[1] + (limit - peaks[1]) / slope))
    best, fails, longest, stride = result, 0, SHORT[1], STEP
    while longest < most and (not fails or fails > STEP * longest):
        length = max(longest + UNIT, length // UNIT * UNIT)
        result = attempt(step, length, vocabulary)
        if result is None:
            fails = length
            length = max(int(fails / stride), (longest + fails) // 2)
        else:
            best, longest = result, length
            length = min(most, int(length * stride)) if not fails else (longest + fails) // 2
        stride = min(stride**2, 1.5)
    return {"tokens": longest, "seconds": round(best[0], 2), "peak_gib": round(best[1], 2), "fails": fails}


def measure(side: str, shape: str, most: int) -> dict[str, float]:
    config = model_config(shape)
    if side == "liger":
        return search(transformers_step(config, liger=True), config.vocab_size, most)
    from colora.kernels.offload import ActivationOffload

    policy = random_policy(config)
    policy.offload = ActivationOffload(policy.device)
    return search(policy_step(policy), config.vocab_size, most)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="8b")
    options.add_argument("--free-gib", nargs="+", type=float, default=[24.0, 80.0])
    options.add_argument("--most", type=int, default=196608, help="tokens at which the search ends")
    options.add_argument("--side", choices=SIDES, help="run this one here, in the memory there is")
    arguments = options.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments.side, arguments.shape, arguments.most)))
        return
    for free_gib in arguments.free_gib:
        report = Report(f"longest_context_{free_gib:g}", arguments, script="longest_context")
        found: dict[str, dict] = {}
        with ballast(free_gib) as free:
            for side in SIDES:
                apart = ["--side", side, "--shape", arguments.shape, "--most", str(arguments.most)]
                found[side] = run_apart(side, __file__, *apart)
                report.add(
                    f"card{free_gib:g}.longest_trained.{arguments.shape}.bf16", found["ours"]["tokens"], "tokens",
                    "higher", peers={NAMES[side]: found[side]["tokens"] for side in found if side in NAMES},
                    free_gib=round(free, 2), search_ended_at=arguments.most, **found,
                )  # fmt: skip
        print(report.write())


if __name__ == "__main__":
    main()
