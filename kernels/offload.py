"""The inputs of blocks in host memory between forward and backward, copied there and back beside the computation.

Gradient checkpointing keeps the input of every block: layers * tokens * hidden elements, 9.7 GB for 32K tokens of an
8B model in bfloat16. Of those only the last few stay on the GPU. Each of the others is copied out while its block
computes, and copied back while the block after it (the one before it in the backward pass) is differentiated. Where
there is room for more, what attention leaves (`KeptAttention`) goes out the same way: as much again, and a 64th. It
comes back later: asked for when the block after it has been differentiated, waited for where the block's attention
would be computed again. Its copy has only the norm and the projections before that to hide behind, but while a block is
differentiated, which takes the most memory, nothing of the next one's is there besides its input.

Bytes: one copy each way over PCIe; 268 MB a block in the case above, 5 ms at 50 GB/s beside some 60 ms of computing.
On the GPU: the block's own input, the next one's, and what attention left of the block. Exact: bytes are moved, not
changed.

How the streams agree. Everything is allocated, and freed, in the pool of the stream that computes; copies run on one
stream of their own, in order. Before a copy that stream waits for all that was given to the computing stream so far:
the source is ready, and earlier work with the target's memory is done. So a copy begins when the GPU has come to where
it was asked for, however far ahead the CPU is. After a copy the computing stream waits for its event, and only then is
our reference to the tensor dropped: memory that goes back to the caching allocator can be handed out again at once, as
whoever gets it works on the computing stream behind that wait. (`Tensor.record_stream` would do so too, but by keeping
freed memory aside until the GPU has come past; the CPU runs many blocks ahead, so every input would still be there.)
Reads and writes of the host memory are in order as one stream does both. Nothing waits on the CPU, but where the host
memory grows.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from .host_memory import GIB, Copies, HostMemory, available_bytes

# What a block's backward pass and the head's need beside the inputs that are kept: so many inputs and so many bytes.
WORKING_INPUTS, WORKING_BYTES = 16, 2 * GIB

PARTS = {"input": slice(1), "rest": slice(1, None)}  # of what is kept of a block
Part = tuple[int, str]  # of which block, and its name


class ActivationOffload:
    """Host memory and a copy stream, used for one forward pass after the other.

    The memory is that of the largest pass so far, to the byte. Several forward passes whose graphs are alive at once
    each have theirs.

    Args:
        device: of the blocks. On the CPU the copies are plain ones, which saves nothing: for tests.
        keep: how many inputs, of the last blocks, stay on the device, at least 1, as the last block's is wanted first;
            None: as many as fit in half of the memory that is free (see `fit_on_device`).

    Raises:
        ValueError: `keep` below 1.
    """

    def __init__(self, device: torch.device, keep: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"ActivationOffload: keep={keep}, but the last block's input always stays: give 1 or more")
        self.device, self.keep = device, keep
        self.copies = Copies(device)
        self._unused: list[HostMemory] = []

    def begin(self, like: Tensor, blocks: int, more: Sequence[Tensor] = ()) -> "BlockInputs":
        """What one forward pass through `blocks` blocks puts its inputs into.

        Args:
            like: a tensor of the inputs' shape and dtype.
            blocks: how many there are.
            more: tensors like those that are worth keeping of each block besides, where there is room for them: on the
                device for two blocks at least, in host memory within half of what is available.
        """
        likes = [like, *more]
        if more and not self._has_room(likes, blocks):
            likes = [like]
        return BlockInputs(self, likes, like.device, blocks - self._stay(likes))

    def _stay(self, likes: Sequence[Tensor]) -> int:
        """Of how many blocks everything stays on the device."""
        return max(1, fit_on_device(likes, self.device)) if self.keep is None else self.keep

    def _has_room(self, likes: Sequence[Tensor], blocks: int) -> bool:
        if fit_on_device(likes, self.device) < 2:
            return False
        on_host = (blocks - self._stay(likes)) * block_bytes(likes)
        ours = max((memory.nbytes for memory in self._unused), default=0)  # what `take` gives, or frees
        return on_host <= max(ours, (available_bytes() + ours) // 2)

    def take(self, nbytes: int) -> HostMemory:
        """Host memory that is not in use, at least `nbytes`."""
        self._unused.sort(key=lambda memory: memory.nbytes)
        large_enough = [memory.nbytes >= nbytes for memory in self._unused]
        if any(large_enough):
            return self._unused.pop(large_enough.index(True))
        if self._unused:
            self._unused.pop()  # freed first: both at once may be too much
        return HostMemory(nbytes, self.copies)

    def give_back(self, memory: HostMemory) -> None:
        self._unused.append(memory)

    @property
    def host_bytes(self) -> int:
        """Bytes of the host memory that is not in use by a pass."""
        return sum(memory.nbytes for memory in self._unused)


class BlockInputs:
    """The inputs of the blocks of one forward pass, until its backward pass has taken them all, each once.

    Dropped before that (no backward pass, or an exception), it gives everything back too. Made by
    `ActivationOffload.begin`; `save` is called in the order of the blocks, `load` in the opposite one. What is kept
    besides, the rest, follows its input: `save_rest`, and `load_rest` with a `fetch_rest` some time before it.
    """

    def __init__(self, offload: ActivationOffload, likes: Sequence[Tensor], device: torch.device, on_host: int):
        self._offload, self._on_host, self._device = offload, max(0, on_host), device
        self._likes = [torch.empty_like(like, device="meta") for like in likes]
        self._compute = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._memory: HostMemory | None = None
        self._in_host: dict[Part, Sequence[Tensor]] = {}
        self._on_device: dict[Part, Sequence[Tensor]] = {}
        # What the copy stream is at work on: held until the computing stream has been told to wait.
        self._leaving: list[tuple[Sequence[Tensor], torch.cuda.Event | None]] = []
        self._coming: dict[Part, tuple[Sequence[Tensor], torch.cuda.Event | None]] = {}

    @property
    def keeps_more(self) -> bool:
        """Whether more than the input is to be kept of each block."""
        return len(self._likes) > 1

    def save(self, index: int, x: Tensor) -> None:
        """Keep the input of block `index`, which nobody changes in place.

        Raises:
            ValueError: another shape or dtype than the pass was begun with.
        """
        self._let_leave()  # not before the rest: all of a block leaves while it computes
        self._save((index, "input"), x)

    def save_rest(self, index: int, *tensors: Tensor) -> None:
        """Keep what is worth keeping of block `index` besides, which nobody changes in place either.

        Raises:
            ValueError: other shapes, dtypes or another number of tensors than the pass was begun with.
        """
        self._save((index, "rest"), *tensors)

    def load(self, index: int) -> Tensor:
        """The input of block `index`; that of the block before it begins to come back.

        Raises:
            RuntimeError: it was loaded before, or never saved.
        """
        self._let_leave()
        taken = self._take((index, "input"))
        if not taken:
            raise RuntimeError(
                f"activation offload: the input of block {index} is gone, as a backward pass has taken it; with "
                "offload a graph can be walked once (no retain_graph): run the forward pass again"
            )
        self._fetch((index - 1, "input"))
        return taken[0]

    def fetch_rest(self, index: int) -> None:
        """The rest of block `index`, if any is in host memory, begins to come back."""
        self._fetch((index, "rest"))

    def load_rest(self, index: int) -> Sequence[Tensor]:
        """The rest of block `index`; nothing where none was saved."""
        return self._take((index, "rest"))

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

    def _save(self, part: Part, *tensors: Tensor) -> None:
        index, name = part
        for x, like in zip(tensors, self._likes[PARTS[name]], strict=True):
            if x.shape != like.shape or x.dtype != like.dtype:
                raise ValueError(
                    f"activation offload: the {name} of block {index} is {tuple(x.shape)} {x.dtype}, the pass was "
                    f"begun with {tuple(like.shape)} {like.dtype}"
                )
        # The graph of a tensor holds this object: kept with it, neither would ever be freed.
        sources = [x.detach() for x in tensors]
        if index >= self._on_host:
            self._on_device[part] = sources
            return
        if self._memory is None:
            self._memory = self._offload.take(self._on_host * block_bytes(self._likes))
        self._in_host[part] = self._slots(self._memory, index)[PARTS[name]]
        self._leaving.append((sources, self._copy(self._in_host[part], sources)))

    def _fetch(self, part: Part) -> None:
        """Let it come back, if it is in host memory."""
        if part in self._in_host:
            sources = self._in_host.pop(part)
            targets = [torch.empty_like(source, device=self._device) for source in sources]
            self._coming[part] = (targets, self._copy(targets, sources))

    def _take(self, part: Part) -> Sequence[Tensor]:
        """Ready for what the computing stream is given next; nothing where it is gone or never was."""
        self._fetch(part)
        tensors, event = self._coming.pop(part, ((), None))
        self._wait(event)
        tensors = tensors or self._on_device.pop(part, ())
        if not (self._on_device or self._in_host or self._coming):
            self.close()
        return tensors

    def _slots(self, memory: HostMemory, index: int) -> list[Tensor]:
        """The places of block `index` in host memory."""
        start = index * block_bytes(self._likes)
        return [memory.at(start + offset, like) for offset, like in zip(offsets(self._likes), self._likes, strict=True)]

    def _copy(self, targets: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.cuda.Event | None:
        """Copy after all that was given to the computing stream; the event tells when all of it is done."""
        event = None
        for target, source in zip(targets, sources, strict=True):
            event = self._offload.copies.start(target, source, self._compute)
        return event

    def _let_leave(self) -> None:
        for _, event in self._leaving:
            self._wait(event)
        self._leaving.clear()

    def _wait(self, event: torch.cuda.Event | None) -> None:
        if event is not None and self._compute is not None:
            self._compute.wait_event(event)


def offsets(likes: Sequence[Tensor]) -> list[int]:
    """Where in a block's bytes each of its tensors begins: at a multiple of the largest dtype's size."""
    size = max(like.itemsize for like in likes)
    return [0, *accumulate(-(-like.nbytes // size) * size for like in likes)][:-1]


def block_bytes(likes: Sequence[Tensor]) -> int:
    """Bytes of what is kept of one block, to the byte for a single tensor."""
    size = max(like.itemsize for like in likes)
    return sum(-(-like.nbytes // size) * size for like in likes)


def fit_on_device(likes: Sequence[Tensor], device: torch.device) -> int:
    """Of how many blocks everything fits in half of the GPU's free memory, 0 or below where there is no room to spare.

    Free is what the driver or PyTorch's allocator could still hand out, less what a backward pass works with
    (`WORKING_BYTES`, and `WORKING_INPUTS` times an input, the first of `likes`). All of them do on the CPU.
    """
    if device.type != "cuda":
        return 2**31
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + cached - WORKING_BYTES - WORKING_INPUTS * likes[0].nbytes
    return free // 2 // block_bytes(likes)
