"""The KV cache of the transformers engine, and the attention that reads it in decoding.

Both plug into transformers' public extension points: cache layers are `CacheLayerMixin`s, attention functions are
registered by name.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer
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

    def join(self, other: "GrowingLayer") -> None:
        """Take in the rows of another layer, both filled; the fewer tokens of either are on the right, behind zeros."""
        cached = max(self.get_seq_length(), other.get_seq_length())
        self._key_room, self._value_room = _stack(self, other, cached, room=max(MINIMUM_ROOM, cached // 4))
        self._show(cached)

    def crop_left(self, columns: int) -> None:
        """Forget the first tokens of every row."""
        if self._key_room is not None and self._value_room is not None:
            cached = self.get_seq_length()
            self._key_room, self._value_room = self._key_room[:, :, columns:], self._value_room[:, :, columns:]
            self._show(cached - columns)

    def _show(self, cached: int) -> tuple[Tensor, Tensor]:
        """Make `keys` and `values`, which transformers reads, the filled part of the room."""
        assert self._key_room is not None and self._value_room is not None
        keys, values = self._key_room[:, :, :cached], self._value_room[:, :, :cached]
        self.keys, self.values = keys, values
        return keys, values


def _stack(first: DynamicLayer, second: DynamicLayer, cached: int, room: int = 0) -> tuple[Tensor, Tensor]:
    """Keys and values of the rows of both layers, which end at token `cached`, with `room` for more behind it.

    What is before the tokens is zero: masked or not, a NaN there would spoil attention.
    """
    assert first.keys is not None and first.values is not None and second.keys is not None and second.values is not None
    stacked = []
    for one, other in ((first.keys, second.keys), (first.values, second.values)):
        batch, heads, _, head_dim = one.shape
        rows = one.new_zeros(batch + other.shape[0], heads, cached + room, head_dim)
        rows[:batch, :, cached - one.shape[-2] : cached] = one
        rows[batch:, :, cached - other.shape[-2] : cached] = other
        stacked.append(rows)
    return stacked[0], stacked[1]


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


def join_caches(first: Cache, second: Cache) -> None:
    """Let `first` take in the rows of `second`, both made by `new_cache` and filled; `second` is used up."""
    for one, other in zip(first.layers, second.layers, strict=True):
        if isinstance(one, GrowingLayer) and isinstance(other, GrowingLayer):
            one.join(other)
        else:
            assert isinstance(one, DynamicSlidingWindowLayer) and isinstance(other, DynamicSlidingWindowLayer)
            one.cumulative_length = max(one.cumulative_length, other.cumulative_length)
            one.keys, one.values = _stack(one, other, _held(one))


def crop_left(cache: Cache, columns: int) -> None:
    """Forget the first tokens of every row of a cache made by `new_cache`."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.crop_left(columns)
        else:
            assert isinstance(layer, DynamicSlidingWindowLayer)
            assert layer.keys is not None and layer.values is not None
            layer.cumulative_length -= columns
            held = _held(layer)
            layer.keys, layer.values = layer.keys[:, :, -held:], layer.values[:, :, -held:]


def _held(layer: DynamicSlidingWindowLayer) -> int:
    """How many tokens transformers keeps of those that a layer with a window has seen."""
    return min(layer.cumulative_length, layer.sliding_window - 1)
