"""Inputs of blocks in host memory: what comes back, whose memory it was, and on a GPU that no copy is overtaken."""

import pytest
import torch
from colora.kernels.offload import ActivationOffload, BlockInputs, inputs_on_device
from torch import Tensor

CPU = torch.device("cpu")
BLOCKS = 6


def inputs(seed: int, tokens: int = 5, device: torch.device = CPU, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator(device).manual_seed(seed)
    return [torch.randn(tokens, 4, generator=generator, device=device).to(dtype) for _ in range(BLOCKS)]


def save_all(offload: ActivationOffload, saved: list[Tensor]) -> BlockInputs:
    block_inputs = offload.begin(saved[0], BLOCKS)
    for index, x in enumerate(saved):
        block_inputs.save(index, x)
    return block_inputs


def load_all(block_inputs: BlockInputs) -> list[Tensor]:
    return [block_inputs.load(index) for index in reversed(range(BLOCKS))][::-1]


@pytest.mark.parametrize("keep", [1, 2, BLOCKS, 100])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_what_was_saved_comes_back(keep: int, dtype: torch.dtype) -> None:
    offload, saved = ActivationOffload(CPU, keep), inputs(0, dtype=dtype)
    expected = [x.clone() for x in saved]
    block_inputs = save_all(offload, saved)
    on_host = max(0, BLOCKS - keep)
    for x in saved[:on_host]:
        x.fill_(torch.nan)  # as if the GPU's memory were used again
    assert all(map(torch.equal, load_all(block_inputs), expected))
    assert offload.host_bytes == on_host * expected[0].nbytes  # to the byte


def test_host_memory_is_made_once_and_grows_with_the_row() -> None:
    offload = ActivationOffload(CPU, keep=1)
    sizes = []
    for tokens in (5, 3, 5, 1, 8, 8, 2):
        saved = inputs(tokens, tokens)
        assert all(map(torch.equal, load_all(save_all(offload, saved)), saved))
        sizes.append(offload.host_bytes // ((BLOCKS - 1) * 16))
    assert sizes == [5, 5, 5, 5, 8, 8, 8]


def test_the_same_memory_serves_every_pass() -> None:
    offload = ActivationOffload(CPU, keep=1)
    load_all(save_all(offload, inputs(0)))
    first = offload.take(1)
    offload.give_back(first)
    load_all(save_all(offload, inputs(1)))
    assert offload.take(1) is first


def test_passes_at_once_have_memory_of_their_own() -> None:
    offload, one, two = ActivationOffload(CPU, keep=2), inputs(1), inputs(2, tokens=3)
    first, second = save_all(offload, one), save_all(offload, two)
    assert all(map(torch.equal, load_all(first), one))
    assert all(map(torch.equal, load_all(second), two))
    assert offload.host_bytes == (BLOCKS - 2) * (one[0].nbytes + two[0].nbytes)


def test_a_pass_that_is_dropped_gives_its_memory_back() -> None:
    offload = ActivationOffload(CPU, keep=1)
    block_inputs = save_all(offload, inputs(0))
    block_inputs.load(BLOCKS - 1)
    assert offload.host_bytes == 0
    del block_inputs
    assert offload.host_bytes == (BLOCKS - 1) * 80


def test_blocks_that_saved_nothing_are_passed_over() -> None:
    offload, saved = ActivationOffload(CPU, keep=1), inputs(0)
    block_inputs = offload.begin(saved[0], BLOCKS)
    for index in (1, 2, 4):
        block_inputs.save(index, saved[index])
    assert all(torch.equal(block_inputs.load(index), saved[index]) for index in (4, 2, 1))
    assert offload.host_bytes > 0


def test_what_is_taken_is_gone() -> None:
    block_inputs = save_all(ActivationOffload(CPU, keep=1), inputs(0))
    load_all(block_inputs)
    with pytest.raises(RuntimeError, match=r"the input of block 5 is gone.*a graph can be walked once"):
        block_inputs.load(BLOCKS - 1)


def test_another_shape_than_announced_is_refused() -> None:
    block_inputs = ActivationOffload(CPU, keep=1).begin(torch.empty(5, 4), BLOCKS)
    with pytest.raises(
        ValueError, match=r"the input of block 3 is \(6, 4\) torch.float32, the pass was begun with \(5"
    ):
        block_inputs.save(3, torch.empty(6, 4))


def test_the_last_input_always_stays() -> None:
    with pytest.raises(ValueError, match="keep=0"):
        ActivationOffload(CPU, keep=0)


def test_without_a_gpu_everything_stays() -> None:
    offload = ActivationOffload(CPU)
    save_all(offload, inputs(0))
    assert offload.host_bytes == 0


WIDTH = 2048
GPU = torch.device("cuda")


def chain(x: Tensor, weight: Tensor) -> Tensor:
    """A block that takes longer than the copy of its input, and whose intermediates want memory of the same size."""
    for _ in range(4):
        x = torch.tanh(x @ weight)
    return x


@pytest.mark.gpu
@pytest.mark.parametrize("keep", [1, 3])
def test_no_copy_is_overtaken(keep: int) -> None:
    """Twenty rows of other lengths; freed memory is written to at once, and every third pass is dropped half-way."""
    offload = ActivationOffload(GPU, keep)
    weight = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5
    wrong = torch.zeros((), device="cuda")
    for repeat in range(20):
        tokens = 128 + (repeat * 997) % 4096
        x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
        block_inputs, sums = offload.begin(x, BLOCKS), []
        for index in range(BLOCKS):
            sums.append(x.double().sum())
            block_inputs.save(index, x)
            x = chain(x, weight)
            torch.full_like(x, torch.nan)  # gets memory that was freed, if any was
        for index in reversed(range(0 if repeat % 3 else BLOCKS // 2, BLOCKS)):
            loaded = block_inputs.load(index)
            chain(loaded, weight)
            wrong += (loaded.double().sum() != sums[index]).float()
            del loaded
            torch.full_like(x, torch.nan)
        del block_inputs
    assert wrong.item() == 0.0


@pytest.mark.gpu
def test_inputs_on_the_gpu_are_two_at_most() -> None:
    offload, tokens = ActivationOffload(GPU, keep=1), 4096
    weight = torch.randn(WIDTH, WIDTH, device="cuda", dtype=torch.bfloat16) / WIDTH**0.5
    x = torch.randn(tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    chain(x, weight)
    one, before = x.nbytes, torch.cuda.memory_allocated() - x.nbytes
    block_inputs = offload.begin(x, 24)
    for index in range(24):  # the CPU is far ahead of the GPU: memory that waits for the GPU would add up
        block_inputs.save(index, x)
        x = x + 1
    del x
    assert torch.cuda.memory_allocated() - before <= 2 * one
    torch.cuda.reset_peak_memory_stats()
    for index in reversed(range(24)):
        loaded = block_inputs.load(index)
        assert torch.cuda.memory_allocated() - before <= 2 * one
        del loaded
    assert torch.cuda.max_memory_allocated() - before <= 2 * one
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_host_memory_is_page_locked_to_the_byte() -> None:
    offload = ActivationOffload(GPU, keep=1)
    saved = inputs(0, device=GPU)
    assert all(map(torch.equal, load_all(save_all(offload, saved)), saved))
    assert offload.host_bytes == (BLOCKS - 1) * saved[0].nbytes
    assert offload.take(1).slot(0, saved[0]).is_pinned()


@pytest.mark.gpu
def test_the_free_memory_decides_how_many_stay() -> None:
    free = torch.cuda.mem_get_info()[0]
    assert inputs_on_device(free, GPU) == 1
    assert inputs_on_device(1024, GPU) > 1000
