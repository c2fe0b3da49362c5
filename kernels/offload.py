"""The inputs of blocks in host memory between forward and backward, copied there and back beside the computation.

Gradient checkpointing keeps the input of every block: layers * tokens * hidden elements, 9.7 GB for 32K tokens of an
8B model in bfloat16. Of those only the last few stay on the GPU. Each of the others is copied out while its block
computes, and copied back while the block after it (the one before it in the backward pass) is differentiated.

Bytes: one copy each way over PCIe; 268 MB a block in the case above, 5 ms at 50 GB/s beside some 60 ms of computing.
On the GPU: the block's own input and the next one's. Exact: bytes are moved, not changed.

How the streams agree. Everything is allocated, and freed, in the pool of the stream that computes; copies run on one
stream of their own, in order. Before a copy that stream waits for all that was given to the computing stream so far:
the source is ready, and earlier work with the target's memory is done. After a copy the computing stream waits for its
event, and only then is our reference to the tensor dropped: memory that goes back to the caching allocator can be
handed out again at once, as whoever gets it works on the computing stream behind that wait. (`Tensor.record_stream`
would do so too, but by keeping freed memory aside until the GPU has come past; the CPU runs many blocks ahead, so every
input would still be there.) Reads and writes of the host memory are in order as one stream does both. Nothing waits on
the CPU, but where the host memory grows.
"""

import mmap
import weakref

import torch
from torch import Tensor

GIB = 2**30
# What a block's backward pass and the head's need beside the inputs that are kept: so many inputs and so many bytes.
WORKING_INPUTS, WORKING_BYTES = 16, 2 * GIB


class _Copies:
    """The stream of the copies. On the CPU there is none, and a copy is done when `start` returns."""

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def start(self, target: Tensor, source: Tensor, compute: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        """Copy after all that `compute` was given; the event tells when it is done."""
        if self._stream is None or compute is None:
            target.copy_(source)
            return None
        self._stream.wait_stream(compute)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def wait(self) -> None:
        """Wait, on the CPU, until all copies are done."""
        if self._stream is not None:
            self._stream.synchronize()


class _HostMemory:
    """Bytes of the host, page-locked where a GPU is to copy from and to them; unlocked and freed with the object.

    Not `torch.empty(pin_memory=True)`: its allocator rounds up to a power of two, which can double the memory, and
    keeps what is freed.
    """

    def __init__(self, nbytes: int, copies: _Copies):
        self.nbytes = nbytes
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # of its own, unlike malloc's
        self._bytes = torch.frombuffer(pages, dtype=torch.uint8)
        if copies.device.type == "cuda":
            runtime = torch.cuda.cudart()
            error = runtime.cudaHostRegister(self._bytes.data_ptr(), nbytes, 0)
            if error != runtime.cudaError.success:
                raise RuntimeError(
                    f"activation offload: {nbytes / GIB:.2f} GiB of host memory cannot be page-locked (CUDA error "
                    f"{int(error)}); lower tokens_per_microbatch, raise the memory limit (`ulimit -l`, the "
                    "container's), or set activation_offload to false"
                )
            # Given the tensor, and not its address: the memory is unlocked before it is unmapped.
            weakref.finalize(self, _unlock, self._bytes, copies)

    def slot(self, index: int, like: Tensor) -> Tensor:
        """The index-th piece, as a tensor of the shape and dtype of `like`."""
        start = index * like.nbytes
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _unlock(locked: Tensor, copies: _Copies) -> None:
    copies.wait()  # a pass that was abandoned may still be copying
    torch.cuda.cudart().cudaHostUnregister(locked.data_ptr())


class ActivationOffload:
    """Host memory and a copy stream, used for one forward pass after the other.

    The memory is that of the largest pass so far, to the byte. Several forward passes whose graphs are alive at once
    each have theirs.

    Args:
        device: of the blocks. On the CPU the copies are plain ones, which saves nothing: for tests.
        keep: how many inputs, of the last blocks, stay on the device, at least 1, as the last block's is wanted first;
            None: as many as fit in half of the memory that is free (see `inputs_on_device`).

    Raises:
        ValueError: `keep` below 1.
    """

    def __init__(self, device: torch.device, keep: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"ActivationOffload: keep={keep}, but the last block's input always stays: give 1 or more")
        self.device, self.keep = device, keep
        self.copies = _Copies(device)
        self._unused: list[_HostMemory] = []

    def begin(self, like: Tensor, blocks: int) -> "BlockInputs":
        """What one forward pass through `blocks` blocks puts its inputs into, all of the shape and dtype of `like`."""
        keep = inputs_on_device(like.nbytes, self.device) if self.keep is None else self.keep
        return BlockInputs(self, like, max(0, blocks - keep))

    def take(self, nbytes: int) -> _HostMemory:
        """Host memory that is not in use, at least `nbytes`."""
        memory = self._unused.pop() if self._unused else None
        if memory is None or memory.nbytes < nbytes:
            memory = None  # freed first: both at once may be too much
            memory = _HostMemory(nbytes, self.copies)
        return memory

    def give_back(self, memory: _HostMemory) -> None:
        self._unused.append(memory)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host memory that is not in use by a pass."""
        return sum(memory.nbytes for memory in self._unused)


class BlockInputs:
    """The inputs of the blocks of one forward pass, until its backward pass has taken them all, each once.

    Dropped before that (no backward pass, or an exception), it gives everything back too. Made by
    `ActivationOffload.begin`; `save` is called in the order of the blocks, `load` in the opposite one.
    """

    def __init__(self, offload: ActivationOffload, like: Tensor, on_host: int):
        self._offload, self._on_host = offload, on_host
        self._like = torch.empty_like(like, device="meta")
        self._compute = torch.cuda.current_stream(like.device) if like.is_cuda else None
        self._memory: _HostMemory | None = None
        self._in_host: set[int] = set()
        self._on_device: dict[int, Tensor] = {}
        # What the copy stream is at work on: held until the computing stream has been told to wait.
        self._leaving: tuple[Tensor, torch.cuda.Event | None] | None = None
        self._coming: dict[int, tuple[Tensor, torch.cuda.Event | None]] = {}

    def save(self, index: int, x: Tensor) -> None:
        """Keep the input of block `index`, an activation that nobody changes in place.

        Raises:
            ValueError: another shape or dtype than the pass was begun with.
        """
        if x.shape != self._like.shape or x.dtype != self._like.dtype:
            raise ValueError(
                f"activation offload: the input of block {index} is {tuple(x.shape)} {x.dtype}, the pass was begun "
                f"with {tuple(self._like.shape)} {self._like.dtype}"
            )
        x = x.detach()  # its graph holds this object: kept with it, neither would ever be freed
        self._let_leave()
        if index >= self._on_host:
            self._on_device[index] = x
            return
        if self._memory is None:
            self._memory = self._offload.take(self._on_host * self._like.nbytes)
        event = self._offload.copies.start(self._memory.slot(index, self._like), x, self._compute)
        self._leaving = (x, event)
        self._in_host.add(index)

    def load(self, index: int) -> Tensor:
        """The input of block `index`; the one of the block before it begins to come back.

        Raises:
            RuntimeError: it was loaded before, or never saved.
        """
        self._let_leave()
        if index in self._on_device:
            x = self._on_device.pop(index)
        else:
            if index not in self._coming:
                self._fetch(index)
            x, event = self._coming.pop(index)
            self._wait(event)
        if index - 1 in self._in_host:
            self._fetch(index - 1)
        if not (self._on_device or self._in_host or self._coming):
            self.close()
        return x

    def close(self) -> None:
        """Forget what is still there and give the host memory back."""
        self._let_leave()
        for _, event in self._coming.values():
            self._wait(event)
        self._coming.clear()
        self._on_device.clear()
        self._in_host.clear()
        if self._memory is not None:
            self._offload.give_back(self._memory)
            self._memory = None

    def __del__(self) -> None:
        self.close()

    def _fetch(self, index: int) -> None:
        if index not in self._in_host or self._memory is None:
            raise RuntimeError(
                f"activation offload: the input of block {index} is gone, as a backward pass has taken it; with "
                "offload a graph can be walked once (no retain_graph): run the forward pass again"
            )
        self._in_host.remove(index)
        target = torch.empty_like(self._like, device=self._offload.device)
        event = self._offload.copies.start(target, self._memory.slot(index, self._like), self._compute)
        self._coming[index] = (target, event)

    def _let_leave(self) -> None:
        if self._leaving is not None:
            self._wait(self._leaving[1])
            self._leaving = None

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None and self._compute is not None:
            self._compute.wait_event(event)


def inputs_on_device(nbytes: int, device: torch.device) -> int:
    """How many inputs of `nbytes` bytes are kept on the GPU: those that fit in half of what is free, at least one.

    Free is what the driver or PyTorch's allocator could still hand out, less what a backward pass works with
    (`WORKING_BYTES`, and `WORKING_INPUTS` times an input). Every one of them is kept on the CPU.
    """
    if device.type != "cuda":
        return 2**31
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached - WORKING_BYTES - WORKING_INPUTS * nbytes
    return max(1, free // 2 // nbytes)
