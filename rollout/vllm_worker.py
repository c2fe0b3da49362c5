"""vLLM's GPU worker with nothing but the KV cache in the memory pool that sleeps.

vLLM imports this class by its dotted name, in the process of the trainer.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from vllm.v1.worker.gpu_worker import Worker


class KVPoolWorker(Worker):
    """With only the KV cache in the pool, sleeping frees it; weights, slots and captured graphs stay where they are."""

    def _maybe_get_memory_pool_context(self, tag: str) -> AbstractContextManager[Any]:
        return super()._maybe_get_memory_pool_context(tag) if tag == "kv_cache" else nullcontext()
