"""Starting vLLM inside the trainer's process without changing the process.

An in-process vLLM reseeds every random generator, freezes the garbage collector, sets environment variables that child
processes inherit, and turns PyTorch's switches. All of that is put back once it has started.
"""

import gc
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import numpy as np
import torch
import torch._inductor.config as inductor_config


@contextmanager
def vllm_starting(device: torch.device) -> Iterator[None]:
    """Within it vLLM may be imported and started; afterwards the process is as it was, but for the engine.

    Args:
        device: whose random state is kept as well.
    """
    environment = dict(os.environ)
    randomness = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    device_randomness = torch.cuda.get_rng_state(device) if on_gpu else None
    cudnn_attention = torch.backends.cuda.cudnn_sdp_enabled()
    precision = torch.get_float32_matmul_precision()
    set_num_threads, compile_threads = torch.set_num_threads, inductor_config.compile_threads
    os.environ.update(_settings(precision))
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # what matters here is checked here
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # would override the size that is asked for
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        torch.set_num_threads = set_num_threads  # vLLM's CPU worker replaces it by a function that does nothing
        inductor_config.compile_threads = compile_threads
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
        gc.unfreeze()
        random.setstate(randomness[0])
        np.random.set_state(randomness[1])
        torch.set_rng_state(randomness[2])
        if device_randomness is not None:
            torch.cuda.synchronize(device)
            torch.cuda.set_rng_state(device_randomness, device)


def _settings(precision: str) -> dict[str, str]:
    """vLLM's switches that have no argument; it reads them while it starts and remembers them."""
    return {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, so that its tensors are ours
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else the process is pinned to cores
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # unset, vLLM would leave the process with one thread
        "VLLM_FLOAT32_MATMUL_PRECISION": precision,
        "VLLM_USE_FLASHINFER_SAMPLER": "0",  # has no seed a request
    }


@contextmanager
def collector_frozen() -> Iterator[None]:
    """Within it a garbage collection is free: vLLM collects when it goes to sleep, over all objects of the process."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def interrupts_held() -> Iterator[None]:
    """Ctrl-C within it is heard at its end: vLLM cannot go on from where it was interrupted. A second one at once."""
    usual, held = signal.getsignal(signal.SIGINT), list[int]()
    if usual is None or threading.current_thread() is not threading.main_thread():
        yield  # not Python's to handle, or heard in another thread
        return

    def hold(number: int, frame: FrameType | None) -> None:
        if held and callable(usual):
            usual(number, frame)
        held.append(number)

    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)
        if held:
            signal.raise_signal(signal.SIGINT)
