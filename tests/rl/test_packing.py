"""Packing keeps every sample whole, in budget, and knows where its trained tokens are."""

import pytest
from colora.kernels.row_layout import row_tokens
from colora.rl.packing import MicroBatch, TrainingSample, pack, repeated_prompts
from hypothesis import given
from hypothesis import strategies as st


def sample(length: int, trained: int, first: int = 0) -> TrainingSample:
    targets = list(range(length - trained, length))
    return TrainingSample(list(range(first, first + length)), targets, [-0.5] * trained, advantage=float(length))


def family(prompt: int, completions: list[tuple[int, int]], first: int) -> list[TrainingSample]:
    """Completions (tokens, trained ones at the end) of one prompt; no two tokens of all are equal."""
    made = []
    for index, (length, trained) in enumerate(completions):
        own = first + prompt + 100 * index
        tokens = [*range(first, first + prompt), *range(own, own + length)]
        targets = list(range(max(1, prompt + length - trained), prompt + length))
        made.append(TrainingSample(tokens, targets, [-0.5] * len(targets), float(length), prompt=prompt))
    return made


def seen(micro: MicroBatch, row: int) -> list[int]:
    """The tokens that the one at `row` sees, as the layout has it."""
    start = 0
    for entry in micro.layout:
        prompt, *continuations = (entry,) if isinstance(entry, int) else entry
        if row < start + prompt:
            return micro.tokens[start : row + 1].tolist()
        at = start + prompt
        for length in continuations:
            if row < at + length:
                return micro.tokens[start : start + prompt].tolist() + micro.tokens[at : row + 1].tolist()
            at += length
        start = at
    raise IndexError(row)


@given(
    st.lists(
        st.tuples(st.integers(1, 40), st.lists(st.tuples(st.integers(1, 20), st.integers(0, 25)), max_size=6)),
        max_size=8,
    ),
    st.integers(1, 90),
)
def test_every_trained_token_is_predicted_from_what_came_before_it(
    families: list[tuple[int, list[tuple[int, int]]]], budget: int
) -> None:
    groups = [family(prompt, completions, 1000 * index) for index, (prompt, completions) in enumerate(families)]
    samples = [sample for group in groups for sample in group]
    micro_batches = pack(samples, budget)
    packed = [member for micro in micro_batches for member in micro.samples]
    assert sorted(map(id, packed)) == sorted(id(s) for s in samples if s.targets)
    for micro in micro_batches:
        assert len(micro.tokens) == row_tokens(micro.layout)
        assert len(micro.tokens) <= budget or len(micro.samples) == 1
        positions = [position for member in micro.samples for position in member.targets]
        for row, target, owner, position in zip(
            micro.rows.tolist(), micro.targets.tolist(), micro.sequence.tolist(), positions, strict=True
        ):
            assert target == micro.samples[owner].tokens[position]
            assert seen(micro, row) == micro.samples[owner].tokens[:position]


def test_a_prompt_is_there_once() -> None:
    made = family(30, [(6, 6), (4, 2), (5, 5)], 0)
    (micro,) = pack(made, 45)
    assert micro.layout == [(30, 6, 5, 4)]
    assert micro.samples == [made[0], made[2], made[1]]
    assert micro.rows[:2].tolist() == [29, 30], "its first token follows the prompt's last"


def test_a_family_that_does_not_fit_is_split() -> None:
    made = family(30, [(6, 6)] * 3, 0) + family(8, [(4, 4)] * 2, 1000)
    assert [micro.layout for micro in pack(made, 42)] == [[(30, 6, 6)], [36], [(8, 4, 4)]]
    assert [micro.layout for micro in pack(made, 52)] == [[(30, 6, 6, 6)], [(8, 4, 4)]]
    assert [micro.layout for micro in pack(made, 64)] == [[(30, 6, 6, 6), (8, 4, 4)]]


def test_a_family_is_not_scattered_over_what_others_leave() -> None:
    """Eight rows have room for one of its completions each: seven prompts more than in a row of its own."""
    others = [sample(51, 1, 1000 * index) for index in range(1, 9)]
    layouts = [micro.layout for micro in pack(others + family(40, [(7, 7)] * 8, 0), 100)]
    assert layouts == [[(40, *[7] * 8)]] + [[51]] * 8


@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=6)), max_size=8),
    st.integers(1, 90),
)
def test_prompts_are_repeated_only_where_the_budget_is_below_the_one_named(
    families: list[tuple[int, list[int]]], budget: int
) -> None:
    samples = [
        sample
        for index, (prompt, lengths) in enumerate(families)
        for sample in family(prompt, [(length, length) for length in lengths], 1000 * index)
    ]
    repeated, enough = repeated_prompts(samples, pack(samples, budget))
    assert (repeated > 0) == (budget < enough)
    assert repeated_prompts(samples, pack(samples, enough)) == (0, enough)


def test_a_short_prompt_is_not_worth_sharing() -> None:
    assert [micro.layout for micro in pack(family(2, [(30, 30)] * 4, 0), 200)] == [[32] * 4]


def test_long_completions_take_a_longer_prompt_to_be_worth_sharing() -> None:
    for prompt, completion, shared in ((4096, 1024, True), (4096, 16384, False), (32768, 16384, True)):
        layouts = [micro.layout for micro in pack(family(prompt, [(completion, 1)] * 4, 0), 200_000)]
        assert layouts == ([[(prompt, *[completion] * 4)]] if shared else [[prompt + completion] * 4])


def test_streams_follow_the_trained_tokens() -> None:
    micro = pack([sample(4, 2), sample(6, 3)], 100)[0]
    assert micro.layout == [6, 4]
    assert micro.per_token([1.0, 2.0]).tolist() == [1, 1, 1, 2, 2]
    assert micro.stream([[1.0, 2.0, 3.0], [4.0, 5.0]]).tolist() == [1, 2, 3, 4, 5]


def test_short_samples_fill_up_rows() -> None:
    assert [sorted(m.layout) for m in pack([sample(n, 1) for n in (6, 5, 4, 3, 2)], 10)] == [[4, 6], [2, 3, 5]]


@pytest.mark.parametrize("samples", [[], [sample(5, 0)]])
def test_nothing_to_train_gives_no_micro_batch(samples: list[TrainingSample]) -> None:
    assert pack(samples, 10) == []
