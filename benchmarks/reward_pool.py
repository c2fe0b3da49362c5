"""Reward workers against a hostile verifier: 1,000 samples of which 1 % each hang, crash, allocate without end, print.

`python benchmarks/reward_pool.py`. It times the same samples without the bad ones, then steps with them. The bar for a
step is 1.2 x the clean time plus what the limit on time itself takes: two calls for each sample that hangs, shared by
the workers.
"""

import os
import statistics
import time
from collections import Counter
from pathlib import Path

from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardRunner
from common import Report, parser

BAD = ("hang", "crash", "swell", "print")  # all but the last cannot be scored


def children() -> list[str]:
    """This process's children, zombies included."""
    return [pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()]


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def step(runner: RewardRunner, completions: list[str]) -> tuple[float, Counter[str]]:
    """Seconds of one step and the failures by kind, every score checked."""
    prompts = [f"question {index}" for index in range(len(completions))]
    start = time.perf_counter()
    scores = runner.score(prompts, completions, [[1]] * len(completions), {})
    seconds = time.perf_counter() - start
    failed = {failure.sample for failure in scores.failures}
    for index, (value, text) in enumerate(zip(scores.values[:, 0].tolist(), completions, strict=True)):
        unscored = text in BAD[:-1]
        if (index in failed) != unscored or (not unscored and value != len(text)):
            raise AssertionError(f"sample {index} ({text!r}) was scored {value}, failed: {index in failed}")
    return seconds, Counter(failure.kind for failure in scores.failures)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1000)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--timeout", type=float, default=2.0)
    options.add_argument("--memory-gib", type=float, default=0.25)
    args = options.parse_args()
    report = Report("reward_pool", args)
    limits = PoolLimits(args.workers, args.timeout, args.memory_gib)
    runner = RewardRunner([load_reward(f"{Path(__file__).with_name('hostile_verifier.py')}:verify")], workers=limits)
    clean = [f"answer {index}" for index in range(args.samples)]
    hostile = list(clean)
    each = args.samples // 100
    for offset, kind in enumerate(BAD):
        for index in range(each):
            hostile[index * 100 + 23 * offset + 7] = kind
    step(runner, clean[: 4 * args.workers])  # starts the workers
    clean_seconds, _ = step(runner, clean)
    seconds, resident, kinds = [], [], Counter[str]()
    for _ in range(args.steps):
        taken, kinds = step(runner, hostile)
        seconds.append(taken)
        resident.append(resident_mib())
    runner.close()
    limit_seconds = 2 * each * args.timeout / args.workers
    ratio = (statistics.median(seconds) - limit_seconds) / clean_seconds
    shape = {"samples": args.samples, "workers": args.workers, "timeout_s": args.timeout, "cores": os.cpu_count()}
    report.add("clean step", clean_seconds, "s", "lower", **shape)
    spread = [round(min(seconds), 2), round(max(seconds), 2)]
    report.add("hostile step", statistics.median(seconds), "s", "lower", repeats=args.steps, spread=spread, **shape)
    report.add("of which the time limit", limit_seconds, "s", "lower")
    report.add("hostile step without the limit / clean", ratio, "x", "lower", bar=1.2)
    for kind, count in sorted(kinds.items()):
        report.add(f"samples scored None: {kind}", count, "samples", "equal", bar=each)
    report.add("memory from the first to the last step", resident[-1] - resident[0], "MiB", "lower", bar=16)
    report.add("processes left", len(children()), "processes", "lower", bar=0)
    print(report.write())


if __name__ == "__main__":
    main()
