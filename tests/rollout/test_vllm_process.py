"""Ctrl-C while vLLM works."""

import signal
from collections.abc import Iterator

import pytest
from colora.rollout.vllm_process import interrupts_held


@pytest.fixture(autouse=True)
def interrupts() -> Iterator[None]:
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background may ignore it
    yield
    assert signal.signal(signal.SIGINT, usual) is signal.default_int_handler


def test_an_interrupt_is_heard_at_the_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]


def test_a_second_one_is_heard_at_once() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
            done.append(1)
    assert done == [1]


def test_without_an_interrupt_errors_come_through() -> None:
    with pytest.raises(ArithmeticError), interrupts_held():
        raise ArithmeticError
