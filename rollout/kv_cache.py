"""The KV cache of the transformers engine, and the attention that reads it in decoding.

Both plug into transformers' public extension points: cache layers are `CacheLayerMixin`s, attention functions are
registered by name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "colora_grouped_sdpa"
MINIMUM_ROOM = 64


def grouped_sdpa(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, except that a decode step never repeats keys and values for grouped queries.

    With one query token the query heads that share a key head (Ainslie et al. 2023, arXiv 2305.13245) can stand where
    query positions stand: (batch, kv_heads, group, head_dim) against the cache as it is. The repeated copy that this
    avoids is the largest cost of a decode step wherever a mask is needed.

    Args:
        query: (batch, heads, tokens, head_dim).
        key, value: (batch, kv_heads, cached, head_dim).
        attention_mask: boolean (batch, 1, tokens, cached), True where attended, or None for causal.

    Returns:
        (batch, tokens, heads, head_dim) and None, as transformers expects.
    """
    batch, heads, tokens, head_dim = query.shape
    if tokens != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(batch, key.shape[1], -1, head_dim)
    output = F.scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(batch, 1, heads, head_dim), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


class GrowingLayer(DynamicLayer):
    """One layer's keys and values, (batch, kv_heads, cached, head_dim) each, appended in place.

    transformers' own layer copies everything it holds for every token; this one leaves room behind the last token and
    copies when the room is used up. Supports appending and selecting rows, which is what the engine does.
    """

    def __init__(self) -> None:
        super().__init__()
        self._key_room: Tensor | None = None
        self._value_room: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (batch, kv_heads, tokens, head_dim) and return all keys and values so far, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cached = self.get_seq_length()
        self._key_room = _append(self._key_room, cached, key_states)
        self._value_room = _append(self._value_room, cached, value_states)
        return self._show(cached + key_states.shape[-2])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, in that order; a row may be taken several times."""
        if self._key_room is not None and self._value_room is not None:
            cached = self.get_seq_length()
            self._key_room, self._value_room = self._key_room[indices], self._value_room[indices]
            self._show(cached)

    def _show(self, cached: int) -> tuple[Tensor, Tensor]:
        """Make `keys` and `values`, which transformers reads, the filled part of the room."""
        assert self._key_room is not None and self._value_room is not None
        keys, values = self._key_room[:, :, :cached], self._value_room[:, :, :cached]
        self.keys, self.values = keys, values
        return keys, values


def _append(room: Tensor | None, cached: int, states: Tensor) -> Tensor:
    """Write `states` behind the first `cached` tokens of `room`, in a larger one where it does not fit."""
    total = cached + states.shape[-2]
    if room is None or total > room.shape[-2]:
        batch, heads, _, head_dim = states.shape
        larger = states.new_empty(batch, heads, total + max(MINIMUM_ROOM, total // 4), head_dim)
        if room is not None:
            larger[:, :, :cached] = room[:, :, :cached]
        room = larger
    room[:, :, cached:total] = states
    return room


def new_cache(config: PretrainedConfig) -> Cache:
    """An empty cache for a model of `config`: growing layers, and transformers' own for sliding windows."""
    layers = DynamicCache(config=config).layers
    return Cache(layers=[GrowingLayer() if type(layer) is DynamicLayer else layer for layer in layers])
