"""Host memory that a GPU copies from and to, and the stream of those copies."""

import mmap
import weakref
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

GIB = 2**30


class Copies:
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


class HostMemory:
    """Bytes of the host, page-locked where a GPU is to copy from and to them; unlocked and freed with the object.

    Not `torch.empty(pin_memory=True)`: its allocator rounds up to a power of two, which can double the memory, and
    keeps what is freed.
    """

    def __init__(self, nbytes: int, copies: Copies):
        self.nbytes = nbytes
        pages = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # of its own, unlike malloc's
        if hasattr(mmap, "MADV_HUGEPAGE"):  # locking small pages takes seconds a dozen GiB
            with suppress(OSError):  # of a kernel without huge pages, which refuses the advice
                pages.madvise(mmap.MADV_HUGEPAGE)
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

    def at(self, start: int, like: Tensor) -> Tensor:
        """The bytes from `start`, a multiple of the dtype's size, as a tensor of the shape and dtype of `like`."""
        return self._bytes[start : start + like.nbytes].view(like.dtype).view(like.shape)


def _unlock(locked: Tensor, copies: Copies) -> None:
    copies.wait()  # a pass that was abandoned may still be copying
    torch.cuda.cudart().cudaHostUnregister(locked.data_ptr())


# By controllers as /proc/self/cgroup names them, of cgroup v2 and of v1: the folder below /sys/fs/cgroup, the files
# with the limit and with what is used, and the line of memory.stat with what can be given back at once.
CONTROL_GROUPS = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def available_bytes(root: Path = Path("/")) -> int:
    """What this process could still get of the host's memory, and of the control groups' that it is in.

    A container sees its group as the top of the tree; a batch system's job is further down. A control group counts the
    page cache as used; the part of it that can be given back at once is taken off.
    """
    found = [_named_values(root / "proc/meminfo").get("MemAvailable:", 0) * 1024]
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in CONTROL_GROUPS:
            continue
        folder, limit, used, cache = CONTROL_GROUPS[controllers]
        own = root / "sys/fs/cgroup" / folder / path.strip("/")
        for group in (own, *own.parents):
            if (group / limit).exists() and (most := (group / limit).read_text().strip()) != "max":
                held = int((group / used).read_text()) - _named_values(group / "memory.stat").get(cache, 0)
                found.append(int(most) - held)
    return max(0, min(found))


def _named_values(path: Path) -> dict[str, int]:
    """Lines of a name and a number."""
    return {name: int(value) for name, value, *_ in (line.split() for line in path.read_text().splitlines())}
