"""Reward workers against a hostile verifier: 1,000 samples of which 1 % each hang, crash, allocate without end, print.

`python benchmarks/reward_pool.py`. It times the same samples without the bad ones, then steps with them. The bar is
1.2 x (the clean time + what the limits take), or, read strictly, 1.2 x the clean time + what they take. A sample that
hangs is called twice and holds a worker for as long as the time limit says; one that allocates holds it until the
memory limit is reached, which takes as long as the machine's page faults do (measured alone, in this process). Places
are shared by the workers.

Then the clean samples are scored while they are generated: groups of 8, lengths exponentially distributed, all decoded
at once; decoding is imitated by waiting. The figure is how long is waited for rewards when the last token is there.
"""

import os
import random
import statistics
import time
from collections import Counter
from pathlib import Path

from colora.rewards.loading import load_reward
from colora.rewards.pool import PoolLimits
from colora.rewards.runner import RewardRunner
from common import GIB, Report, parser
from hostile_verifier import swell

BAD = ("hang", "crash", "swell", "print")  # all but the last cannot be scored
GROUP = 8
DECODE_STEP = 0.01  # seconds


def descendants(process: int | str = "self") -> list[int]:
    """The processes that this one, or those it started, have started, zombies included."""
    found: list[int] = []
    for task in Path(f"/proc/{process}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += [child, *descendants(child)]
    return found


def resident_mib() -> float:
    """Resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def with_bad_samples(completions: list[str], each: int) -> list[str]:
    """The completions, in every hundred of the first `each` hundreds one sample of every bad kind."""
    hostile = list(completions)
    for offset, kind in enumerate(BAD):
        for index in range(each):
            hostile[index * 100 + 23 * offset + 7] = kind
    return hostile


def step(runner: RewardRunner, completions: list[str]) -> tuple[float, Counter[str]]:
    """Seconds of one step and the failures by kind, every score checked."""
    prompts = [f"question {index}" for index in range(len(completions))]
    start = time.perf_counter()
    scores = runner.score(prompts, completions, [[1]] * len(completions), {})
    seconds = time.perf_counter() - start
    failed = {failure.sample: failure.reason for failure in scores.failures}
    for index, (value, text) in enumerate(zip(scores.values[:, 0].tolist(), completions, strict=True)):
        unscored = text in BAD[:-1]
        if (index in failed) != unscored or (not unscored and value != len(text)):
            raise AssertionError(f"sample {index} ({text!r}) was scored {value}: {failed.get(index)}")
    return seconds, Counter(failure.kind for failure in scores.failures)


def while_generating(runner: RewardRunner, completions: list[str], seconds: float) -> tuple[float, float]:
    """(seconds of generation, seconds waited afterwards): each completion comes when its length is reached."""
    lengths = random.Random(0)
    latest = [min(lengths.expovariate(4 / seconds), seconds) for _ in completions]
    coming = sorted(range(len(completions)), key=lambda index: latest[index], reverse=True)
    scoring = runner.start([f"question {index // GROUP}" for index in range(len(completions))], {})
    start = time.perf_counter()
    while coming:
        time.sleep(DECODE_STEP)
        while coming and latest[coming[-1]] <= time.perf_counter() - start:
            index = coming.pop()
            scoring.add(index, completions[index], [1])
        scoring.poll()
    generated = time.perf_counter()
    scores = scoring.finish()
    if scores.values[:, 0].tolist() != [len(text) for text in completions]:
        raise AssertionError("scored while generating, the scores are others")
    return generated - start, time.perf_counter() - generated


def seconds_to_swell(gib: float) -> float:
    """How long it takes to allocate this much, alone on the machine, the way the verifier does."""
    start = time.perf_counter()
    swell(int(gib * GIB))
    return time.perf_counter() - start


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--samples", type=int, default=1000)
    options.add_argument("--steps", type=int, default=10)
    options.add_argument("--workers", type=int, default=8)
    options.add_argument("--timeout", type=float, default=2.0)
    options.add_argument("--memory-gib", type=float, default=0.0625)
    args = options.parse_args()
    if args.samples < 100 or args.steps < 1:
        options.error("--samples has to be at least 100, of which 1 % is one bad sample of each kind, and --steps 1")
    report = Report("reward_pool", args, on_cpu=True)
    swell_seconds = min(seconds_to_swell(args.memory_gib) for _ in range(3))
    limits = PoolLimits(args.workers, args.timeout, args.memory_gib)
    verifier = load_reward(f"{Path(__file__).with_name('hostile_verifier.py')}:verify")
    runner = RewardRunner([verifier], workers=limits)
    clean = [f"answer {index}" for index in range(args.samples)]
    each = args.samples // 100
    hostile = with_bad_samples(clean, each)
    step(runner, clean[: 4 * args.workers])  # starts the workers
    clean_times = [step(runner, clean)[0] for _ in range(3)]
    clean_seconds = statistics.median(clean_times)
    seconds, resident, kinds, processes = [], [], Counter[str](), []
    for _ in range(args.steps):
        taken, kinds = step(runner, hostile)
        seconds.append(taken)
        resident.append(resident_mib())
        processes.append(len(descendants()))
    generation, waited = while_generating(runner, clean, 2 * clean_seconds)
    runner.close()
    hostile_seconds = statistics.median(seconds)
    time_limit, memory_limit = (2 * each * of_one / args.workers for of_one in (args.timeout, swell_seconds))
    shape = {"samples": args.samples, "workers": args.workers, "timeout_s": args.timeout, "cores": os.cpu_count()}
    shape["memory_gib"] = args.memory_gib
    spread = [round(min(clean_times), 2), round(max(clean_times), 2)]
    report.add("reward_pool.clean_seconds", clean_seconds, "s", "lower", repeats=3, spread=spread, **shape)
    spread = [round(min(seconds), 2), round(max(seconds), 2)]
    report.add("reward_pool.hostile_seconds", hostile_seconds, "s", "lower", repeats=args.steps, spread=spread, **shape)
    report.add("reward_pool.time_limit_seconds", time_limit, "s", "lower")
    report.add("reward_pool.memory_limit_seconds", memory_limit, "s", "lower")
    allowed = clean_seconds + time_limit + memory_limit
    report.add("reward_pool.hostile_over_clean_and_limits", hostile_seconds / allowed, "x", "lower", bar=1.2)
    strict = (hostile_seconds - time_limit - memory_limit) / clean_seconds
    report.add("reward_pool.hostile_less_limits_over_clean", strict, "x", "lower", bar=1.2)
    for kind, count in sorted(kinds.items()):
        report.add(f"reward_pool.unscored.{kind}", count, "samples", "equal", bar=each)
    report.add("reward_pool.growth_mib", resident[-1] - resident[0], "MiB", "lower", bar=16)
    report.add("reward_pool.most_processes", max(processes), "processes", "lower", bar=args.workers + 1)
    report.add("reward_pool.processes_left", len(descendants()), "processes", "lower", bar=0)
    report.add("reward_pool.overlapped_generation_seconds", generation, "s", "lower", completions_a_prompt=GROUP)
    report.add(
        "reward_pool.waited_afterwards_seconds",
        waited,
        "s",
        "lower",
        bar=clean_seconds,
        bar_is="scored after generation",
    )
    print(report.write())


if __name__ == "__main__":
    main()
