"""Packing keeps every sample whole, in budget, and knows where its trained tokens are."""

import pytest
from colora.rl.packing import MicroBatch, TrainingSample, pack
from hypothesis import given
from hypothesis import strategies as st


def sample(length: int, trained: int, first: int = 0) -> TrainingSample:
    targets = list(range(length - trained, length))
    return TrainingSample(list(range(first, first + length)), targets, [-0.5] * trained, advantage=float(length))


@given(
    st.lists(st.tuples(st.integers(2, 40), st.integers(0, 10)), min_size=0, max_size=20),
    st.integers(1, 60),
)
def test_every_trained_sample_is_packed_once_within_the_budget(shapes: list[tuple[int, int]], budget: int) -> None:
    samples = [sample(length, min(trained, length - 1), 1000 * index) for index, (length, trained) in enumerate(shapes)]
    micro_batches = pack(samples, budget)
    packed = [member for micro in micro_batches for member in micro.samples]
    assert sorted(map(id, packed)) == sorted(id(s) for s in samples if s.targets)
    for micro in micro_batches:
        assert len(micro.tokens) <= budget or len(micro.samples) == 1
        assert sum(micro.lengths) == len(micro.tokens)
        check_targets(micro)


def check_targets(micro: MicroBatch) -> None:
    """Each target follows its row in the packed row, and belongs to the sample it says."""
    assert (micro.tokens[micro.rows + 1] == micro.targets).all()
    starts = [sum(micro.lengths[:index]) for index in range(len(micro.lengths))]
    for row, owner in zip(micro.rows.tolist(), micro.sequence.tolist(), strict=True):
        assert starts[owner] <= row < starts[owner] + micro.lengths[owner] - 1


def test_streams_follow_the_trained_tokens() -> None:
    micro = pack([sample(4, 2), sample(6, 3)], 100)[0]
    assert micro.lengths == [6, 4]
    assert micro.per_token([1.0, 2.0]).tolist() == [1, 1, 1, 2, 2]
    assert micro.stream([[1.0, 2.0, 3.0], [4.0, 5.0]]).tolist() == [1, 2, 3, 4, 5]


def test_short_samples_fill_up_rows() -> None:
    assert [sorted(m.lengths) for m in pack([sample(n, 1) for n in (6, 5, 4, 3, 2)], 10)] == [[4, 6], [2, 3, 5]]


@pytest.mark.parametrize("samples", [[], [sample(5, 0)]])
def test_nothing_to_train_gives_no_micro_batch(samples: list[TrainingSample]) -> None:
    assert pack(samples, 10) == []
