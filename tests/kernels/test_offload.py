"""Inputs of blocks in host memory: what comes back, whose memory it was, and on a GPU that no copy is overtaken."""

import mmap
import os
from pathlib import Path

import pytest
import torch
from colora.kernels import offload as module
from colora.kernels.host_memory import Copies, HostMemory, available_bytes
from colora.kernels.offload import ActivationOffload, BlockInputs, fit_on_device
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


def test_a_pass_gets_the_smallest_memory_that_is_large_enough() -> None:
    offload = ActivationOffload(CPU, keep=1)
    memories = [offload.take(nbytes) for nbytes in (300, 900, 600)]
    for memory in memories:
        offload.give_back(memory)
    assert offload.take(800) is memories[1] and offload.take(500) is memories[2]
    offload.give_back(memories[2])
    assert offload.take(1000).nbytes == 1000 and offload.host_bytes == 300  # the largest is freed for it


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


@pytest.mark.parametrize("fetched", [True, False])
@pytest.mark.parametrize("keep", [1, 3, BLOCKS])
def test_more_of_a_block_comes_back_after_its_input(keep: int, fetched: bool) -> None:
    offload, xs = ActivationOffload(CPU, keep), inputs(0, dtype=torch.bfloat16)
    outs, sums = inputs(1, tokens=3, dtype=torch.bfloat16), inputs(2, tokens=1, dtype=torch.float64)
    block_inputs = offload.begin(xs[0], BLOCKS, (outs[0], sums[0]))
    assert block_inputs.keeps_more
    for index, tensors in enumerate(zip(xs, outs, sums, strict=True)):
        block_inputs.save(index, tensors[0])
        if index != 4:  # as where no kernel left anything
            block_inputs.save_rest(index, *tensors[1:])
    for index in reversed(range(BLOCKS)):
        assert offload.host_bytes == 0  # in use
        loaded = [block_inputs.load(index), *block_inputs.load_rest(index)]
        expected = [xs[index], outs[index], sums[index]][: 1 if index == 4 else 3]
        assert len(loaded) == len(expected) and all(map(torch.equal, loaded, expected))
        assert not block_inputs.load_rest(index)
        if fetched:
            block_inputs.fetch_rest(index - 1)
    assert offload.host_bytes == (BLOCKS - keep) * (40 + 24 + 32)


def test_a_pass_that_is_dropped_while_more_is_coming() -> None:
    offload, xs = ActivationOffload(CPU, keep=1), inputs(0)
    for stop in range(BLOCKS):
        block_inputs = offload.begin(xs[0], BLOCKS, (xs[0],))
        for index, x in enumerate(xs):
            block_inputs.save(index, x)
            block_inputs.save_rest(index, x + 1)
        for index in range(BLOCKS - 1, stop, -1):
            assert torch.equal(block_inputs.load(index), xs[index])
            assert torch.equal(block_inputs.load_rest(index)[0], xs[index] + 1)
            block_inputs.fetch_rest(index - 1)
        del block_inputs
        assert offload.host_bytes == (BLOCKS - 1) * 160


def test_nothing_waits_between_what_is_saved_of_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wait there would hold the block until its input has left; the next block's frees both."""
    waits: list[int] = []
    monkeypatch.setattr(BlockInputs, "_wait", lambda self, event: waits.append(0))
    x = inputs(0)[0]
    block_inputs = ActivationOffload(CPU, keep=1).begin(x, BLOCKS, (x,))
    for index in range(3):
        block_inputs.save(index, x)
        assert len(waits) == 2 * index
        block_inputs.save_rest(index, x)
        assert len(waits) == 2 * index


def test_more_is_kept_only_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: 2 * 5 * 160 - 1)
    offload, x = ActivationOffload(CPU, keep=1), torch.empty(5, 4)
    assert not offload.begin(x, BLOCKS, (x,)).keeps_more  # half of that is a byte short of five blocks
    assert offload.begin(x, BLOCKS - 1, (x,)).keeps_more
    load_all(save_all(offload, inputs(0, tokens=10)))
    assert offload.begin(x, BLOCKS, (x,)).keeps_more  # in memory that is there already
    monkeypatch.setattr(module, "available_bytes", lambda: 1120)
    assert offload.begin(x, BLOCKS + 1, (x,)).keeps_more  # 960, half of 1120 and the 800 that `take` frees
    assert not offload.begin(x, BLOCKS + 1, (x, x)).keeps_more
    monkeypatch.setattr(module, "fit_on_device", lambda likes, device: 1)
    assert not offload.begin(x, BLOCKS, (x,)).keeps_more


def test_available_memory() -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < available_bytes() < total


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_available_memory_is_that_of_the_tightest_group(tmp_path: Path) -> None:
    host = {"proc/meminfo": "MemTotal: 90 kB\nMemAvailable: 80 kB\nHugePages_Total: 0\n"}
    top = "sys/fs/cgroup/"
    container = {
        f"{top}memory.max": "9000\n", f"{top}memory.current": "7000\n",
        f"{top}memory.stat": "anon 6000\ninactive_file 500\n",
    }  # fmt: skip
    job = {f"{top}slurm/job/memory.max": "max\n", f"{top}slurm/memory.max": "100\n"}
    job |= {f"{top}slurm/memory.current": "300\n", f"{top}slurm/memory.stat": ""}
    one = {
        f"{top}memory/box/memory.limit_in_bytes": "9223372036854771712\n",
        f"{top}memory/box/memory.usage_in_bytes": "1\n",
        f"{top}memory/memory.limit_in_bytes": "4000\n",
        f"{top}memory/memory.usage_in_bytes": "3000\n",
        f"{top}memory/box/memory.stat": "total_inactive_file 0\n",
        f"{top}memory/memory.stat": "inactive_file 5\ntotal_inactive_file 70\n",
    }
    cases: list[tuple[dict[str, str], str, int]] = [
        ({}, "0::/\n", 80 * 1024),
        (container, "0::/\n", 2500),
        (container, "0::/../elsewhere\n", 2500),  # a path of the host's tree
        (container | job, "0::/slurm/job\n", 0),  # more in use than there may be
        (one, "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n", 1070),
    ]
    for case, (files, groups, available) in enumerate(cases):
        assert available_bytes(write(tmp_path / str(case), host | {"proc/self/cgroup": groups} | files)) == available


def test_what_is_taken_is_gone() -> None:
    block_inputs = save_all(ActivationOffload(CPU, keep=1), inputs(0))
    load_all(block_inputs)
    with pytest.raises(RuntimeError, match=r"the input of block 5 is gone.*a graph can be walked once"):
        block_inputs.load(BLOCKS - 1)


def test_host_memory_of_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses the advice as it does one that does not exist; the memory is there all the same."""
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 2**30, raising=False)
    with pytest.raises(OSError, match="Invalid argument"):
        mmap.mmap(-1, 1).madvise(mmap.MADV_HUGEPAGE)
    x = torch.arange(5.0)
    at = HostMemory(x.nbytes, Copies(CPU)).at(0, x)
    at.copy_(x)
    assert torch.equal(at, x)


def test_another_shape_than_announced_is_refused() -> None:
    block_inputs = ActivationOffload(CPU, keep=1).begin(torch.empty(5, 4), BLOCKS)
    with pytest.raises(
        ValueError, match=r"the input of block 3 is \(6, 4\) torch.float32, the pass was begun with \(5"
    ):
        block_inputs.save(3, torch.empty(6, 4))
    block_inputs = ActivationOffload(CPU, keep=1).begin(torch.empty(5, 4), BLOCKS, (torch.empty(5),))
    with pytest.raises(ValueError, match=r"the rest of block 3 is \(5,\) torch.float64"):
        block_inputs.save_rest(3, torch.empty(5, dtype=torch.float64))


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
        block_inputs, sums = offload.begin(x, BLOCKS, (x, x[:, :1].float())), []
        for index in range(BLOCKS):
            sums.append(x.double().sum())
            block_inputs.save(index, x)
            if index != 4:
                block_inputs.save_rest(index, x + 1, x[:, :1].float())
            x = chain(x, weight)
            torch.full_like(x, torch.nan)  # gets memory that was freed, if any was
        for index in reversed(range(0 if repeat % 3 else BLOCKS // 2, BLOCKS)):
            loaded = block_inputs.load(index)
            wrong += (loaded.double().sum() != sums[index]).float()
            if index != 4:
                more = block_inputs.load_rest(index)
                wrong += (more[0] != loaded + 1).any() + (more[1] != loaded[:, :1]).any()
                del more
            chain(loaded, weight)
            torch.full_like(x, torch.nan)  # gets the rest's memory, which is free again ...
            block_inputs.fetch_rest(index - 1)  # ... and then is that of the next block's
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
def test_more_than_the_input_is_on_the_gpu_for_one_block_at_most() -> None:
    offload, blocks = ActivationOffload(GPU, keep=1), 24
    x = torch.randn(4096, WIDTH, device="cuda", dtype=torch.bfloat16)
    one, before = x.nbytes, torch.cuda.memory_allocated() - x.nbytes
    block_inputs = offload.begin(x, blocks, (x,))
    for index in range(blocks):
        block_inputs.save(index, x)
        x = x + 1
        block_inputs.save_rest(index, x)
    del x
    torch.cuda.reset_peak_memory_stats()
    for index in reversed(range(blocks)):
        loaded = block_inputs.load(index)
        (rest,) = block_inputs.load_rest(index)
        assert torch.cuda.memory_allocated() - before <= 3 * one
        del rest  # as after attention's backward pass
        assert torch.cuda.memory_allocated() - before <= 2 * one
        block_inputs.fetch_rest(index - 1)
        del loaded
    assert torch.cuda.max_memory_allocated() - before <= 3 * one
    assert torch.cuda.memory_allocated() == before


@pytest.mark.gpu
def test_host_memory_is_page_locked_to_the_byte() -> None:
    offload = ActivationOffload(GPU, keep=1)
    saved = inputs(0, device=GPU)
    assert all(map(torch.equal, load_all(save_all(offload, saved)), saved))
    assert offload.host_bytes == (BLOCKS - 1) * saved[0].nbytes
    assert offload.take(1).at(0, saved[0]).is_pinned()


@pytest.mark.gpu
def test_the_free_memory_decides_how_many_stay() -> None:
    free = torch.cuda.mem_get_info()[0]
    assert fit_on_device([torch.empty(free, dtype=torch.uint8, device="meta")], GPU) < 1
    small = torch.empty(1024, dtype=torch.uint8, device="meta")
    assert fit_on_device([small], GPU) > 1000
    assert fit_on_device([small, small], GPU) == pytest.approx(fit_on_device([small], GPU) / 2, rel=0.01)
