"""Whether the weights fit, and how large vLLM's KV cache may be: from the card, what is loaded, and the configuration.

The KV cache is the only large thing that comes and goes; everything else is resident. So its size is what is free once
the weights are there, less a reserve for what is allocated later, and never more than the sequences that can run at
once need.
"""

import math
import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from ..kernels.nf4 import BLOCK
from .base_format import DENSE, NF4, BaseFormat
from .weights import ModelLayout

GIB = 2**30
GRADIENT_BYTES = 4  # fp32, of a master
ADAM_STATE_BYTES = 8  # two fp32 moments of a master
LOGIT_COPIES = 4  # fp32 (sequences, vocabulary) alive while sampling: logits, log-softmax, probabilities, noise
GRAPH_BYTES = GIB  # captured graphs, cuBLAS and attention workspaces
CPU_LIMIT = 4 * GIB


def head_dim(config: PreTrainedConfig) -> int:
    """Elements of an attention head, which not every config names."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


@dataclass(frozen=True)
class KVLayout:
    """What the KV cache of a model is made of.

    Attributes:
        windows: for each layer its sliding window in tokens, or None where it attends to all.
        token_bytes: of one layer's keys and values of one token.
        block_size: tokens of a block, the unit in which vLLM gives out the cache.
    """

    windows: tuple[int | None, ...]
    token_bytes: int
    block_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig, element_bytes: int, block_size: int) -> "KVLayout":
        """From a Hugging Face config; `element_bytes` is 2 for a 16-bit cache, 1 for fp8."""
        window = getattr(config, "sliding_window", None)
        if not getattr(config, "use_sliding_window", True):
            window = None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        return cls(
            windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
            token_bytes=2 * config.num_key_value_heads * head_dim(config) * element_bytes,
            block_size=block_size,
        )

    @property
    def layer_slots(self) -> int:
        """Layers that a block is paid for: vLLM groups layers of one kind and pads the groups to the same size."""
        sliding = sum(window is not None for window in self.windows)
        full = len(self.windows) - sliding
        if not (sliding and full):
            return len(self.windows)
        group = min(sliding, full)
        return group * (math.ceil(sliding / group) + math.ceil(full / group))

    @property
    def block_bytes(self) -> int:
        """Of one block in every layer."""
        return self.layer_slots * self.block_size * self.token_bytes

    def bytes_for(self, sequences: int, tokens: int) -> int:
        """Enough for `sequences` of `tokens` each to run at once, whatever their windows."""
        blocks = sequences * math.ceil(tokens / self.block_size) + 1  # vLLM keeps one block back
        return blocks * self.block_bytes

    def least_bytes(self, tokens: int, prefill_tokens: int) -> int:
        """What vLLM asks for before it serves one sequence of `tokens`, prefilled by `prefill_tokens` at a time."""
        per_layer = []
        for window in self.windows:
            seen = tokens if window is None else min(tokens, window - 1 + prefill_tokens)
            per_layer.append(math.ceil(seen / self.block_size) + (window is not None))
        padding = self.layer_slots / len(self.windows)
        return math.ceil((sum(per_layer) * padding + self.layer_slots) * self.block_size * self.token_bytes)


def reserve_bytes(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    prefill_tokens: int,
    max_sequences: int,
    adapter_numel: int,
    state_bytes: int = ADAM_STATE_BYTES,
    attention_bytes: int = 0,
) -> int:
    """Bytes that are allocated after the weights: activations of a prefill, logits, graphs, the optimizer's state.

    Args:
        prefill_tokens: tokens of the largest forward.
        max_sequences: rows of the largest batch of logits.
        adapter_numel: elements of the adapter's masters, which are there already.
        state_bytes: what the optimizer keeps of each, from its first step on.
        attention_bytes: buffers of the attention of decode steps, beyond the workspace that is counted in any case.
    """
    widest = 4 * config.hidden_size + 3 * config.intermediate_size  # residual, norm, qkv; gate, up and their product
    activations = prefill_tokens * widest * dtype.itemsize
    logits = max_sequences * config.vocab_size * 4 * LOGIT_COPIES
    optimizer = adapter_numel * (GRADIENT_BYTES + state_bytes)
    return activations + logits + GRAPH_BYTES + attention_bytes + optimizer


def free_bytes(device: torch.device) -> int:
    """What can be allocated: on a GPU what its driver has left, on the CPU a quarter of its memory, at most 4 GiB."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return min(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4, CPU_LIMIT)


def nf4_saves(layout: ModelLayout, dtype: torch.dtype, base: BaseFormat) -> int:
    """Bytes that base='nf4' would save, 0 where a 4-bit base is set or the model cannot be held so."""
    if base.name != DENSE.name or any(spec.in_features % BLOCK for spec in layout.linears):
        return 0
    return layout.nbytes(dtype, base) - layout.nbytes(dtype, NF4)


def check_fits(layout: ModelLayout, dtype: torch.dtype, base: BaseFormat, device: torch.device) -> None:
    """Raise ValueError where a GPU has no room for a base, with what would fit."""
    if device.type != "cuda":
        return
    free, needed = free_bytes(device), layout.nbytes(dtype, base)
    if needed <= free:
        return
    saved = nf4_saves(layout, dtype, base)
    advice = f"Set base='nf4', with which they need {_size(needed - saved)}" if saved else "Use a smaller model"
    if saved and needed - saved > free:
        advice = f"Even with base='nf4' they would need {_size(needed - saved)}: use a smaller model"
    raise ValueError(
        f"the weights need {_size(needed)} ({base.name}, {dtype}), and {_size(free)} of the GPU's memory are free. "
        f"{advice}, or free memory that other processes hold"
    )


def kv_cache_bytes(
    layout: KVLayout,
    *,
    free: int,
    reserve: int,
    max_sequences: int,
    max_context: int,
    prefill_tokens: int,
    saved_by_nf4: int = 0,
) -> int:
    """The KV cache's size: all that is free less the reserve, at most what `max_sequences` full contexts need.

    Args:
        saved_by_nf4: what base='nf4' would leave free in addition; 0 where it is set.

    Raises:
        ValueError: not even one sequence of `max_context` fits; says how much is missing and what helps.
    """
    least = layout.least_bytes(max_context, prefill_tokens)
    available = free - reserve
    if available < least:
        fitting = max(0, int((available - layout.block_bytes) // (layout.layer_slots * layout.token_bytes)))
        fitting -= fitting % layout.block_size
        advice = f"Lower max_context to {fitting}" if fitting else "Use a smaller model"
        if saved_by_nf4:
            advice = f"Set base='nf4', which saves {_size(saved_by_nf4)} of the weights. {advice}"
        raise ValueError(
            f"too little memory for the KV cache of one sequence of {max_context} tokens: it needs {_size(least)}, and "
            f"of the {_size(free)} left beside the weights {_size(reserve)} are kept for activations, graphs and the "
            f"optimizer: {_size(least - available)} are missing. {advice}, set engine_kwargs kv_cache_dtype='fp8' "
            "(half the bytes), lower max_num_batched_tokens or max_sequences, take a smaller model, or free memory "
            "that other processes hold"
        )
    return min(layout.bytes_for(max_sequences, max_context), available)


def check_kv_cache_bytes(layout: KVLayout, given: int, max_context: int, prefill_tokens: int) -> None:
    """Raise ValueError where a KV cache of `given` bytes cannot hold one sequence of `max_context`."""
    least = layout.least_bytes(max_context, prefill_tokens)
    if given < least:
        raise ValueError(
            f"kv_cache_memory_bytes={given} is too little: the KV cache of one sequence of {max_context} tokens needs "
            f"{least} ({_size(least)}). Raise it, leave it out, or lower max_context"
        )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 10 else f"{count / 2**20:.2f} MiB"
