"""What every engine shares: sampling parameters and seeds."""

import pytest
from colora.rollout.engine import SamplingParams, sample_seed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0,), "max_tokens must be at least 1, got 0"), ((1, -0.5), "temperature must not be negative, got -0.5")],
)
def test_sampling_params_refuse(arguments, message):
    with pytest.raises(ValueError, match=message):
        SamplingParams(*arguments)


def test_every_coordinate_changes_the_seed():
    coordinates = [(0, 0, 0, 0, 0), (1, 0, 0, 0, 0), (0, 1, 0, 0, 0), (0, 0, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1)]
    seeds = {sample_seed(*place) for place in coordinates}
    assert len(seeds) == len(coordinates)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seeds_are_the_same_in_every_process():
    assert sample_seed(42, 3, 1, 2) == sample_seed(42, 3, 1, 2, 0) == 2083266887783670681
