"""vLLM's GPU worker with nothing but the KV cache, in one piece, in the memory pool that sleeps.

vLLM imports this class by its dotted name, in the process of the trainer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from vllm.v1.worker.gpu_worker import Worker


class KVPoolWorker(Worker):
    """With only the KV cache in the pool, sleeping frees it; weights, slots and captured graphs stay where they are."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        if tag != "kv_cache":
            return nullcontext()
        return self._in_one_piece(super()._maybe_get_memory_pool_context(tag))

    @contextmanager
    def _in_one_piece(self, pool: AbstractContextManager[Any]) -> Iterator[None]:
        """Make the pool one mapping: vLLM would make one for each layer, and each has to be unmapped and mapped again.

        A tensor of the cache's size is made and dropped; PyTorch keeps its block and cuts the layers' tensors out of
        it.
        """
        with pool:
            torch.empty(self.cache_config.kv_cache_memory_bytes or 0, dtype=torch.uint8, device=self.device)
            yield
