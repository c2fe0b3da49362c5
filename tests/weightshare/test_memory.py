"""The KV cache's size: what is needed, what there is, and what is said where that is too little."""

import math

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from colora.weightshare import memory
from colora.weightshare.base_format import DENSE, NF4
from colora.weightshare.memory import GIB, KVLayout, check_fits, free_bytes, kv_cache_bytes, nf4_saves, reserve_bytes
from transformers import Gemma3TextConfig, MistralConfig, Qwen2Config, Qwen3Config

QWEN3_4B = Qwen3Config(
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
LAYOUT_4B = KVLayout.of(QWEN3_4B, 2, 16)
PLENTY = {"free": 500 * GIB, "reserve": 0, "prefill_tokens": 8192}


def test_layout_of_a_known_model() -> None:
    assert LAYOUT_4B.windows == (None,) * 36
    assert LAYOUT_4B.token_bytes == 4096  # 8 heads x 128 x (key + value) x 2 bytes; 144 KiB a token in all layers
    assert LAYOUT_4B.block_bytes == 16 * 36 * 4096


def test_never_more_than_the_sequences_need() -> None:
    size = kv_cache_bytes(LAYOUT_4B, max_sequences=64, max_context=1536, **PLENTY)
    assert size == (64 * 96 + 1) * LAYOUT_4B.block_bytes
    ragged = kv_cache_bytes(LAYOUT_4B, max_sequences=64, max_context=1537, **PLENTY)
    assert ragged == (64 * 97 + 1) * LAYOUT_4B.block_bytes  # a last block is paid for whole


def test_what_is_free_less_the_reserve_where_that_is_less() -> None:
    size = kv_cache_bytes(
        LAYOUT_4B, free=10 * GIB, reserve=3 * GIB, max_sequences=64, max_context=32768, prefill_tokens=8192
    )
    assert size == 7 * GIB


def test_too_little_says_how_much_and_what_helps() -> None:
    few = {"free": 6 * GIB, "reserve": 3 * GIB, "prefill_tokens": 8192}
    least = LAYOUT_4B.least_bytes(32768, 8192)
    with pytest.raises(ValueError) as caught:
        kv_cache_bytes(LAYOUT_4B, max_sequences=64, max_context=32768, **few)
    message = str(caught.value)
    assert f"{(least - 3 * GIB) / GIB:.2f} GiB are missing" in message and "kv_cache_dtype='fp8'" in message
    fitting = int(message.split("Lower max_context to ")[1].split(",")[0])
    assert kv_cache_bytes(LAYOUT_4B, max_sequences=1, max_context=fitting, **few) <= 3 * GIB
    with pytest.raises(ValueError):
        kv_cache_bytes(LAYOUT_4B, max_sequences=1, max_context=fitting + 16, **few)
    with pytest.raises(ValueError, match=r"Use a smaller model"):
        kv_cache_bytes(LAYOUT_4B, free=GIB, reserve=GIB, max_sequences=1, max_context=64, prefill_tokens=8192)


def test_windows() -> None:
    mistral = KVLayout.of(MistralConfig(num_hidden_layers=4, sliding_window=100), 2, 16)
    assert mistral.windows == (100,) * 4 and mistral.layer_slots == 4
    assert KVLayout.of(
        Qwen2Config(num_hidden_layers=2, sliding_window=64, use_sliding_window=False), 2, 16
    ).windows == (
        None,
        None,
    )
    kinds = (["sliding_attention"] * 5 + ["full_attention"]) * 4 + ["sliding_attention"] * 2
    gemma = KVLayout.of(Gemma3TextConfig(num_hidden_layers=26, layer_types=kinds, sliding_window=512), 2, 16)
    assert gemma.windows.count(512) == 22
    assert gemma.layer_slots == 4 * (1 + math.ceil(22 / 4))  # groups of four layers, the last one padded
    assert gemma.least_bytes(32768, 2048) < 0.4 * gemma.bytes_for(1, 32768)  # a window holds no more than it sees


def test_fp8_halves_it() -> None:
    assert KVLayout.of(QWEN3_4B, 1, 16).bytes_for(8, 4096) * 2 == LAYOUT_4B.bytes_for(8, 4096)


def test_reserve_grows_with_what_is_allocated_later() -> None:
    base = reserve_bytes(QWEN3_4B, torch.bfloat16, 8192, 256, 0)
    assert GIB < base < 4 * GIB
    assert reserve_bytes(QWEN3_4B, torch.bfloat16, 8192, 256, 10**6) == base + 12 * 10**6
    assert reserve_bytes(QWEN3_4B, torch.bfloat16, 8192, 256, 10**6, 3) == base + 7 * 10**6
    assert reserve_bytes(QWEN3_4B, torch.bfloat16, 8192, 512, 0) - base == 256 * 151936 * 16
    assert reserve_bytes(QWEN3_4B, torch.bfloat16, 8192, 256, 0, attention_bytes=12345) == base + 12345
    assert reserve_bytes(QWEN3_4B, torch.float32, 16384, 256, 0) > base


def test_free_memory_of_this_machine() -> None:
    assert 0 < free_bytes(torch.device("cpu")) <= 4 * GIB


QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
CARD = torch.device("cuda")


def test_the_base_in_four_bits() -> None:
    """8B parameters: 6.95e9 of them in linears; embedding and head, 1.24e9, stay in 16 bits."""
    layout = model_layout(block_spec(QWEN3_8B))
    saved = nf4_saves(layout, torch.bfloat16, DENSE)
    assert layout.nbytes(torch.bfloat16, NF4) == layout.nbytes(torch.bfloat16, DENSE) - saved
    assert saved == pytest.approx(6.946e9 * (2 - 4.15 / 8), rel=0.002)
    assert nf4_saves(layout, torch.bfloat16, NF4) == 0
    assert nf4_saves(model_layout(block_spec(Qwen3Config(hidden_size=96))), torch.bfloat16, DENSE) == 0


def test_a_card_too_small_for_the_weights_says_what_would_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = model_layout(block_spec(QWEN3_8B))
    check_fits(layout, torch.bfloat16, DENSE, torch.device("cpu"))
    for free, base, message in (
        (
            12,
            DENSE,
            r"the weights need 15.26 GiB \(dense, torch.bfloat16\), and 12.00 GiB .* Set base='nf4', .* 5.67 GiB",
        ),
        (4, DENSE, r"Even with base='nf4' they would need 5.67 GiB: use a smaller model, or free memory"),
        (4, NF4, r"the weights need 5.67 GiB \(nf4, .* Use a smaller model, or free memory"),
    ):
        monkeypatch.setattr(memory, "free_bytes", lambda device, free=free: free * GIB)
        with pytest.raises(ValueError, match=message):
            check_fits(layout, torch.bfloat16, base, CARD)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 12 * GIB)
    check_fits(layout, torch.bfloat16, NF4, CARD)


def test_a_cache_too_small_names_the_base_in_four_bits() -> None:
    few = {"free": 6 * GIB, "reserve": 3 * GIB, "prefill_tokens": 8192, "max_sequences": 64, "max_context": 32768}
    with pytest.raises(ValueError, match=r"Set base='nf4', which saves 4.00 GiB of the weights. Lower max_context to"):
        kv_cache_bytes(LAYOUT_4B, **few, saved_by_nf4=4 * GIB)
    with pytest.raises(ValueError) as caught:
        kv_cache_bytes(LAYOUT_4B, **few)
    assert "nf4" not in str(caught.value)
