"""Skips what this machine cannot run; without a GPU the Triton kernels run in Triton's interpreter."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine draws examples slowly: that says nothing of the code.
settings.register_profile("any_machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_machine")

# Triton reads it when it is imported, and its own functions and ours are defined: before any test imports anything.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where torch finds no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
