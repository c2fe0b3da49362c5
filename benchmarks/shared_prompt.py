"""Training the completions of one prompt: the prompt once for all of them, against once for each.

Forward and backward of every completion's tokens, 8 completions, the rows that `rl.packing` makes of them in a budget
of tokens. Before anything is timed the gradients of both ways are compared with those of fp32, from which either
differs by rounding only.
"""

from functools import partial
from typing import Any

import torch
from checkpoints import SHAPES, model_config
from colora.rl.packing import TrainingSample, pack
from common import Report, best_of, parser, peak_memory
from policies import exact_policy, random_policy

CASES = {  # tokens of the prompt, of a completion, of a row at most
    "160+1k": (160, 1024, 16384),
    "512+1k": (512, 1024, 16384),
    "4k+1k": (4096, 1024, 16384),
    "30k+2k": (30720, 2048, 49152),
    "4k+16k": (4096, 16384, 53248),
}
COMPLETIONS = 8
CHECKED = (512, 128, 16384)  # likewise, compared with fp32
CLOSE = 1.2  # times the rounding of completions that have their own prompt


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


def rounding(policy: Any, config: Any) -> dict[str, float]:
    """The relative distance of the gradients from those of fp32, either way.

    Raises:
        AssertionError: it is larger with the prompt shared.
    """
    prompt, completion, budget = CHECKED
    found: dict[str, torch.Tensor] = {}
    for way, given in (("exact", exact_policy(policy, config)), ("shared", policy), ("apart", policy)):
        rows = pack(samples(prompt, completion, config.vocab_size, way == "shared"), budget, "cuda", share_from=0.0)
        found[way] = gradient(given, rows)
    true = found.pop("exact")
    errors = {way: ((gradients - true).norm() / true.norm()).item() for way, gradients in found.items()}
    assert errors["shared"] < CLOSE * errors["apart"], f"the gradients are too far from those of fp32: {errors}"
    return errors


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=list(SHAPES), default="4b")
    options.add_argument("--base", default="auto")
    options.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    report, config = Report("shared_prompt", arguments), model_config(arguments.shape)
    policy = random_policy(config, base=arguments.base)
    errors = rounding(policy, config)
    for name in arguments.cases:
        prompt, completion, budget = CASES[name]
        seconds, peaks, tokens = {}, {}, {}
        for way in ("shared", "apart"):
            rows = pack(samples(prompt, completion, config.vocab_size, way == "shared"), budget, "cuda", share_from=0.0)
            tokens[way] = sum(len(micro.tokens) for micro in rows)
            torch.cuda.empty_cache()
            step(policy, rows)  # what is built once for these lengths
            with peak_memory() as peak:
                seconds[way], spread = best_of(partial(step, policy, rows), arguments.repeats)
            peaks[way] = round(peak[0], 2)
        report.add(
            f"shared_prompt.time_ratio.{arguments.shape}.{name}",
            seconds["shared"] / seconds["apart"], "ratio", "lower",
            peers={"apart": 1.0}, seconds={way: round(value, 3) for way, value in seconds.items()}, peak_gib=peaks,
            tokens=tokens, token_ratio=round(tokens["shared"] / tokens["apart"], 3),
            gradient_error={way: round(error, 5) for way, error in errors.items()}, base=arguments.base,
            repeats=arguments.repeats, spread=round(spread, 3),
        )  # fmt: skip
    print(report.write())


if __name__ == "__main__":
    main()
