"""The attention backend, of vLLM's own classes: which steps and layers it takes, and that it computes attention there.

The kernels run in Triton's interpreter on the CPU. FlashAttention itself does not exist there, so what is left to it
is recognised by its metadata and by its own complaint.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from colora.kernels.decode_attention import DecodeShape, decode_attention_reference
from colora.rollout.vllm_options import LONG_PROMPT, shared_prompt_shape
from colora.rollout.vllm_process import vllm_starting
from transformers import Gemma3TextConfig, MistralConfig, Qwen3Config

from ..vllm_engines import VLLM_MARKS

pytestmark = [*VLLM_MARKS, pytest.mark.skipif(torch.cuda.is_available(), reason="test_vllm_attention_gpu.py is for it")]
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 4, 2, 64, 16
MAX_SEQUENCES = 6
SCALE = 0.2
DTYPE = torch.float16  # the interpreter has no bfloat16
CPU = torch.device("cpu")
CONFIG = Qwen3Config(
    architectures=["Qwen3ForCausalLM"],
    vocab_size=101,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=HEADS,
    num_key_value_heads=KV_HEADS,
    head_dim=HEAD_DIM,
    max_position_embeddings=2 * LONG_PROMPT,
)


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Our module of the backend, and vLLM's configuration with the option that the engine chooses the backend by."""
    directory = tmp_path_factory.mktemp("model")
    CONFIG.save_pretrained(directory)
    with vllm_starting(CPU):
        import vllm
        from colora.rollout import vllm_attention
        from colora.rollout.vllm_engine import _read_shared_prompts_once

        options = vllm.EngineArgs(
            model=str(directory),
            dtype="float16",
            max_model_len=1024,
            max_num_batched_tokens=1024,
            max_num_seqs=MAX_SEQUENCES,
            enforce_eager=True,
            skip_tokenizer_init=True,
            attention_config=_read_shared_prompts_once(),
        )
        config = options.create_engine_config()
    return SimpleNamespace(attention=vllm_attention, config=config)


def make_layer(vllm: SimpleNamespace, name: str, **settings: Any) -> Any:
    """vLLM's layer `name` with our backend's implementation."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention

    vllm.config.compilation_config.static_forward_context.pop(name, None)
    backend = vllm.attention.SharedPromptBackend
    with set_current_vllm_config(vllm.config):
        return Attention(HEADS, HEAD_DIM, SCALE, KV_HEADS, prefix=name, attn_backend=backend, **settings)


def make_builder(vllm: SimpleNamespace, *names: str, **settings: Any) -> Any:
    from vllm.config import set_current_vllm_config
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    spec = {"block_size": BLOCK, "num_kv_heads": KV_HEADS, "head_size": HEAD_DIM, "dtype": DTYPE} | settings
    with set_current_vllm_config(vllm.config):
        return vllm.attention.SharedPromptBuilder(FullAttentionSpec(**spec), list(names), vllm.config, CPU)


def make_step(lengths: list[int], tokens: list[int], table: torch.Tensor | None = None) -> Any:
    """What vLLM's runner tells of a step: of each sequence all tokens, and those that are computed in it."""
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.tensor([0, *tokens]).cumsum(0, dtype=torch.int32)
    blocks = -(-max(lengths) // BLOCK)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(lengths),
        num_actual_tokens=sum(tokens),
        max_query_len=max(tokens),
        max_seq_len=max(lengths),
        block_table_tensor=torch.zeros(len(lengths), blocks, dtype=torch.int32) if table is None else table,
        slot_mapping=torch.zeros(sum(tokens), dtype=torch.int64),
    )


def cache_of(lengths: list[int], shared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A cache as vLLM lays it out, (blocks, kv_heads, block_size, 2 * head_dim), and a table in which all sequences
    but the last begin with the same `shared` blocks; behind its own blocks each row has the numbers of old ones."""
    width = max(-(-length // BLOCK) for length in lengths) + 2
    count = len(lengths) * width + 1
    generator = torch.Generator().manual_seed(1)
    table = (torch.randperm(count - 1, generator=generator)[: len(lengths) * width] + 1).view(len(lengths), width)
    table[:-1, :shared] = table[0, :shared].clone()
    stored = torch.randn(count, BLOCK, KV_HEADS, 2 * HEAD_DIM, generator=generator)
    return (2 * stored).to(DTYPE).transpose(1, 2), table.to(torch.int32)


def test_the_engines_option_selects_the_backend_for_layers_that_attend_to_everything(vllm: SimpleNamespace) -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig

    assert vllm.config.attention_config.backend is None
    chosen = vllm.config.attention_config.backend_per_kind
    assert chosen == {"full_attention": AttentionBackendEnum.CUSTOM}
    backend = AttentionBackendEnum.CUSTOM.get_class()
    assert backend is vllm.attention.SharedPromptBackend
    asked = AttentionSelectorConfig(HEAD_DIM, DTYPE, "auto", None)
    refused = backend.validate_configuration(device_capability=DeviceCapability(9, 0), **asked._asdict())
    assert refused == []
    layer = make_layer(vllm, "layer")
    assert layer.backend is AttentionBackendEnum.CUSTOM  # looked up by the backend's name
    assert type(layer.impl) is vllm.attention.SharedPromptImpl


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, True),
        ({"max_num_seqs": 4, "enforce_eager": True, "block_size": 32}, True),
        ({"attention_backend": "FLASH_ATTN"}, False),
        ({"attention_config": {"flash_attn_version": 2}}, False),
        ({"compilation_config": {"cudagraph_mode": "FULL"}}, False),
        ({"kv_cache_dtype": "fp8"}, False),
        ({"enable_prefix_caching": False}, False),  # nothing is shared
        ({"enable_prefix_caching": True}, True),
    ],
)
def test_options_of_the_user_that_turn_it_off(given: dict[str, Any], expected: bool) -> None:
    shape = shared_prompt_shape(CONFIG, torch.bfloat16, (9, 0), LONG_PROMPT, given)
    assert shape == (DecodeShape(HEADS, KV_HEADS, HEAD_DIM, 16, torch.bfloat16) if expected else None)


def test_where_it_pays_and_works() -> None:
    usual = {
        "config": CONFIG,
        "dtype": torch.float16,
        "capability": (8, 0),
        "prompt_tokens": LONG_PROMPT,
        "given": {},
    }
    windows = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "num_hidden_layers": 2}
    gemma = Gemma3TextConfig(**windows, layer_types=["sliding_attention", "full_attention"])
    other_heads = Qwen3Config(num_attention_heads=4, num_key_value_heads=2, head_dim=96)
    for changed, expected in (
        ({}, True),
        ({"capability": (12, 0)}, True),
        ({"capability": (10, 0)}, False),
        ({"capability": (7, 5)}, False),
        ({"capability": None}, False),
        ({"dtype": torch.float32}, False),
        ({"prompt_tokens": LONG_PROMPT - 1}, False),
        ({"config": gemma}, True),
        ({"config": MistralConfig(**windows, sliding_window=4096)}, False),
        ({"config": MistralConfig(**windows, sliding_window=None)}, True),
        ({"config": other_heads}, False),
    ):
        assert (shared_prompt_shape(**usual | changed) is not None) == expected, changed


def test_a_decode_step_is_attention_of_every_sequence_on_its_own(vllm: SimpleNamespace) -> None:
    """With a shared prompt, another prompt, and the rows that a CUDA graph's size leaves over."""
    lengths, shared = [343, 330, 337, 75, 0, 0], 20
    layer = make_layer(vllm, "layer")
    builder = make_builder(vllm, "layer")
    cache, table = cache_of(lengths[:4], shared)
    table = torch.cat([table, torch.zeros(2, table.shape[1], dtype=torch.int32)])
    generator = torch.Generator().manual_seed(2)
    heads = torch.randn(6, HEADS + 3, HEAD_DIM, generator=generator).to(DTYPE)
    query = heads[:, :HEADS]  # as vLLM takes it out of the product with q, k and v
    expected = decode_attention_reference(query, cache, table, torch.tensor(lengths), SCALE)
    metadata = builder.build(0, make_step(lengths, [1] * 6, table))
    output = torch.full((6, HEADS, HEAD_DIM), float("nan"), dtype=DTYPE)
    key = value = torch.empty(0)
    assert layer.impl.forward(layer, query, key, value, cache, metadata, output) is output
    assert torch.isfinite(output[:4]).all()
    largest = cache[..., HEAD_DIM:].abs().max().item()
    assert (output - expected)[:4].abs().max() <= 2**-9 * largest
    apart = decode_attention_reference(query, cache, table.flip(1), torch.tensor(lengths), SCALE)
    assert (apart - expected)[:4].abs().max() > 0.1 * largest  # what the wrong blocks would give


def test_steps_that_are_not_one_token_a_sequence_are_flash_attentions(vllm: SimpleNamespace) -> None:
    layer = make_layer(vllm, "layer")
    builder = make_builder(vllm, "layer")
    planned, flash = vllm.attention.SharedPromptMetadata, vllm.attention.FlashAttentionMetadata
    assert type(builder.build(0, make_step([40, 50], [1, 1]))) is planned
    assert type(builder.build_for_cudagraph_capture(make_step([1] * 4, [1] * 4))) is planned
    for lengths, tokens in (([40, 50], [1, 7]), ([40], [40]), ([50, 50], [2, 2]), ([3] * 7, [1] * 7)):
        metadata = builder.build(0, make_step(lengths, tokens))
        assert type(metadata) is flash
        empty = torch.empty(sum(tokens), HEADS, HEAD_DIM)
        with pytest.raises(AssertionError, match="FlashAttention version not detected"):  # it is asked, and not there
            layer.impl.forward(layer, empty, empty, empty, torch.empty(0), metadata, empty)
    assert not builder.supports_update_block_table  # or vLLM would take one group's plan for another's blocks
    assert not builder.use_cascade_attention(4096, [1] * 64)


def test_buffers_are_made_once(vllm: SimpleNamespace) -> None:
    """CUDA graphs hold their addresses."""
    make_layer(vllm, "layer")
    builder = make_builder(vllm, "layer")
    first = builder.build_for_cudagraph_capture(make_step([1] * 6, [1] * 6)).decode
    assert first.max_sequences == MAX_SEQUENCES
    assert builder.build(0, make_step([40, 50], [1, 1])).decode is first


@pytest.mark.parametrize(
    "settings",
    [
        {"per_layer_sliding_window": 32},
        {"logits_soft_cap": 30.0},
        {"alibi_slopes": [0.5] * HEADS},
        {"attn_type": "encoder_only"},
    ],
)
def test_layers_that_the_kernel_lacks_something_for_are_flash_attentions(
    vllm: SimpleNamespace, settings: dict[str, Any]
) -> None:
    layer = make_layer(vllm, "other", **settings)
    assert not layer.impl.plain
    assert make_layer(vllm, "layer").impl.plain
    flash = vllm.attention.FlashAttentionMetadata
    for names in (("other",), ("layer", "other")):  # one of a group is enough: its layers have one plan
        assert type(make_builder(vllm, *names).build(0, make_step([40, 50], [1, 1]))) is flash


def test_caches_that_there_are_no_kernels_for(vllm: SimpleNamespace) -> None:
    make_layer(vllm, "layer")
    flash = vllm.attention.FlashAttentionMetadata
    for settings in ({"dtype": torch.uint8}, {"dtype": torch.bfloat16}, {"head_size": 80}):
        builder = make_builder(vllm, "layer", **settings)
        assert type(builder.build(0, make_step([40, 50], [1, 1]))) is flash, settings


def test_names_of_vllm_are_in_the_table() -> None:
    from colora.weightshare.vllm_names import missing_names

    assert missing_names("cuda") == []
