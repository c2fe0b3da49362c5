"""Training the completions of one prompt: the prompt once for all of them, against once for each.

Forward and backward of every completion's tokens, 8 completions, the rows that `rl.packing` makes of them in a budget
of tokens; the gradients of both ways are compared before anything is timed.
"""

from functools import partial
from typing import Any

import torch
from checkpoints import SHAPES, model_config
from colora.rl.packing import TrainingSample, pack
from common import Report, best_of, parser, peak_memory
from policies import random_policy

CASES = {  # tokens of the prompt, of a completion, of a row at most
    "512+1024": (512, 1024, 16384),
    "4k+1k": (4096, 1024, 16384),
    "30k+2k": (30720, 2048, 49152),
}
COMPLETIONS = 8
CLOSE = 0.05  # relative: bf16 on random weights, where the two ways round differently


def samples(prompt: int, completion: int, vocabulary: int, share: bool) -> list[TrainingSample]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, vocabulary, (prompt,), generator=generator).tolist()
    made = []
    for _ in range(COMPLETIONS):
        own = torch.randint(0, vocabulary, (completion,), generator=generator).tolist()
        targets = list(range(prompt, prompt + completion))
        made.append(TrainingSample(first + own, targets, [0.0] * completion, 1.0, prompt=prompt if share else 0))
    return made


def step(policy: Any, rows: list) -> None:
    for micro in rows:
        logprobs, _ = policy.logprobs(micro.tokens, micro.layout, micro.rows, micro.targets)
        (logprobs.sum() / 1e4).backward()


def gradient(policy: Any, rows: list) -> torch.Tensor:
    policy.zero_grad()
    step(policy, rows)
    return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="4b")
    options.add_argument("--base", default="auto")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    report, config = Report("shared_prompt", arguments), model_config(arguments.shape)
    policy = random_policy(config, base=arguments.base)
    for name in arguments.cases:
        prompt, completion, budget = CASES[name]
        seconds, peaks, gradients, tokens = {}, {}, {}, {}
        for way in ("shared", "apart"):
            rows = pack(samples(prompt, completion, config.vocab_size, way == "shared"), budget, "cuda")
            tokens[way] = sum(len(micro.tokens) for micro in rows)
            gradients[way] = gradient(policy, rows)
            torch.cuda.empty_cache()
            with peak_memory() as peak:
                seconds[way], spread = best_of(partial(step, policy, rows), arguments.repeats)
            peaks[way] = round(peak[0], 2)
        gap = ((gradients["shared"] - gradients["apart"]).norm() / gradients["apart"].norm()).item()
        assert gap < CLOSE, f"{name}: the gradients differ by {gap:.3f}"
        report.add(
            f"shared_prompt.time_ratio.{arguments.shape}.{name}",
            seconds["shared"] / seconds["apart"], "ratio", "lower",
            peers={"apart": 1.0}, seconds={way: round(value, 3) for way, value in seconds.items()}, peak_gib=peaks,
            tokens=tokens, token_ratio=round(tokens["shared"] / tokens["apart"], 3), gradient_gap=round(gap, 5),
            repeats=arguments.repeats, spread=round(spread, 3),
        )  # fmt: skip
    print(report.write())


if __name__ == "__main__":
    main()
