import pickle

import pytest
from colora.rewards.length import LengthPenalty
from colora.rewards.runner import RewardRunner


def test_linear_between_the_bounds_by_tokens():
    penalty = pickle.loads(pickle.dumps(LengthPenalty(free=4, limit=8)))
    ids = [[1] * length for length in (0, 4, 5, 7, 8, 50)]
    scores = RewardRunner([penalty]).score(["q"] * 6, ["long enough to be beyond"] * 6, ids, {"limit": [1] * 6})
    assert scores.values[:, 0].tolist() == [0.0, 0.0, -0.25, -0.75, -1.0, -1.0]


def test_by_characters():
    penalty = LengthPenalty(free=0, limit=4, unit="characters")
    assert penalty(["ab", [{"role": "assistant", "content": "abc"}]], [[1] * 9] * 2) == [-0.5, -0.75]


@pytest.mark.parametrize("arguments", [(4, 4), (-1, 4), (1, 2, "words")])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="LengthPenalty"):
        LengthPenalty(*arguments)
