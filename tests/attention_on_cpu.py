"""torch's attention operators for GPUs, played by the CPU's: the same contract, one sequence at a time, any dtype."""

from typing import Any

import pytest
import torch
from colora.kernels import attention, attention_dense, attention_shared
from torch import Tensor

Grads = tuple[Tensor, Tensor, Tensor]
_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Played:
    """Counts the calls."""

    def __init__(self) -> None:
        self.forwards = self.backwards = 0

    def varlen(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], keys: tuple[int, ...], scale: float,
        causal: bool = True, window: int | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        self.forwards += 1
        outs, log_sums = [], []
        for q_s, k_s, v_s in zip(q.split(lengths), k.split(keys), v.split(keys), strict=True):
            mask = visible(q_s.shape[0], k_s.shape[0], causal, window)
            expanded = [_heads_first(x, q.shape[1]) for x in (q_s, k_s, v_s)]
            out, log_sum = _forward(*expanded, attn_mask=mask.to(q.dtype).log(), scale=scale)
            outs.append(out[0].transpose(0, 1))
            log_sums.append(log_sum[0].float())
        return torch.cat(outs), torch.cat(log_sums, 1)

    def varlen_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, lengths: tuple[int, ...],
        keys: tuple[int, ...], scale: float, causal: bool = True, window: int | None = None,
    ) -> Grads:  # fmt: skip
        self.backwards += 1
        found: list[Grads] = []
        queries = zip(*(x.split(lengths) for x in (grad, q, out)), log_sum.split(lengths, 1), strict=True)
        for (grad_s, q_s, out_s, log_s), k_s, v_s in zip(queries, k.split(keys), v.split(keys), strict=True):
            mask = visible(q_s.shape[0], k_s.shape[0], causal, window).to(q.dtype).log()
            expanded = [_heads_first(x, q.shape[1]) for x in (grad_s, q_s, k_s, v_s, out_s)]
            log_s = log_s[None].to(torch.float64 if q.dtype == torch.float64 else torch.float32)
            grads = _backward(*expanded, log_s, 0.0, False, attn_mask=mask, scale=scale)
            found.append(tuple(_group(x, like) for x, like in zip(grads, (q_s, k_s, v_s), strict=True)))
        grad_q, grad_k, grad_v = (torch.cat(parts) for parts in zip(*found, strict=True))
        return grad_q, grad_k, grad_v

    def cudnn(self, q: Tensor, k: Tensor, v: Tensor, *rest: Any, scale: float) -> tuple[Tensor, ...]:
        """Batches (sequences, heads, tokens, head_dim); the log-sum-exp has a last dimension of 1."""
        sequences, causal = q.shape[0], rest[3]
        lengths = [(x.shape[2],) * sequences for x in (q, k)]
        out, log_sum = self.varlen(*(_side_by_side(x) for x in (q, k, v)), *lengths, scale, causal)
        log_sum = log_sum.unflatten(1, (sequences, -1)).transpose(0, 1)[..., None]
        return out.unflatten(0, (sequences, -1)).transpose(1, 2), log_sum

    def cudnn_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor, *rest: Any, scale: float
    ) -> tuple[Tensor, ...]:
        sequences, causal = q.shape[0], rest[-1]
        lengths = [(x.shape[2],) * sequences for x in (q, k)]
        given = (_side_by_side(x) for x in (grad, q, k, v, out))
        log_sums = log_sum[..., 0].transpose(0, 1).flatten(1)
        grads = self.varlen_backward(*given, log_sums, *lengths, scale, causal)
        return tuple(x.unflatten(0, (sequences, -1)).transpose(1, 2) for x in grads)


def visible(queries: int, keys: int, causal: bool, window: int | None) -> Tensor:
    """(queries, keys): the last query is at the place of the last key."""
    distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)[None, :]
    seen = (distance >= 0) if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance < window)


def _heads_first(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1)[None]


def _group(grad: Tensor, like: Tensor) -> Tensor:
    return grad[0].transpose(0, 1).unflatten(1, (like.shape[1], -1)).sum(2)


def _side_by_side(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def play_kernels(monkeypatch: pytest.MonkeyPatch) -> Played:
    """Attention takes its way over kernels, on the CPU, until the test ends."""
    play = Played()
    for module in (attention, attention_shared):
        monkeypatch.setattr(module, "varlen", play.varlen)
        monkeypatch.setattr(module, "varlen_backward", play.varlen_backward)
        monkeypatch.setattr(module, "has_dense_kernel", lambda q, k, v, causal=True: True)
    monkeypatch.setattr(attention_dense, "_forward", play.cudnn)
    monkeypatch.setattr(attention_dense, "_backward", play.cudnn_backward)
    monkeypatch.setattr(attention, "has_kernel", lambda q: True)
    return play
