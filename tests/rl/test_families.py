"""What a config becomes, and what is refused by name. That the specs are right is shown by the parity tests."""

import pytest
import torch
from colora.rl.families import block_spec, model_layout
from transformers import Gemma3TextConfig, GPTNeoXConfig, LlamaConfig, Qwen2Config, Qwen3Config

from ..models import ODD, SMALL, tiny_configs, tiny_model, tiny_multimodal

CONFIGS = tiny_configs()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_layout_has_every_parameter_of_the_transformers_model(name: str):
    layout = model_layout(block_spec(CONFIGS[name]))
    shapes = dict(layout.tensors)
    for linear in layout.linears:
        prefix = linear.name.rpartition(".")[0]
        for part, rows in linear.parts:
            shapes[f"{prefix}.{part}.weight"] = (rows, linear.in_features)
            if linear.bias:
                shapes[f"{prefix}.{part}.bias"] = (rows,)
    expected = {key: tuple(tensor.shape) for key, tensor in tiny_model(CONFIGS[name]).named_parameters()}
    assert shapes == expected
    assert layout.tied_head == ("lm_head.weight" not in expected)


def test_linears_are_fused_and_named_as_in_vllm():
    names = [linear.name for linear in model_layout(block_spec(LlamaConfig(**SMALL))).linears]
    assert names[:4] == [
        f"model.layers.0.{name}"
        for name in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    assert len(names) == 8


def test_gemma_layers_have_their_own_windows_and_ropes():
    spec = block_spec(CONFIGS["gemma3_text-odd_biased_softcap"])
    assert [(layer.window, layer.rope) for layer in spec.layers] == [
        (3, "sliding_attention"),
        (3, "sliding_attention"),
        (None, "full_attention"),
    ]
    near, far = spec.ropes["sliding_attention"], spec.ropes["full_attention"]
    torch.testing.assert_close(near.inverse_frequencies, 100.0 ** (-torch.arange(7) / 7))
    torch.testing.assert_close(far.inverse_frequencies, 10000.0 ** (-torch.arange(7) / 7) / 8)


def test_yarn_scales_the_tables():
    spec = block_spec(CONFIGS["qwen2-half_windows_yarn"])
    assert spec.ropes["full_attention"].scaling == pytest.approx(1.1386, abs=1e-4)  # 0.1 ln 4 + 1
    assert [layer.window for layer in spec.layers] == [None, 4]


def test_a_multimodal_config_gives_the_decoder():
    config = tiny_multimodal().config
    assert model_layout(block_spec(config)) == model_layout(block_spec(config.text_config))


def rope(kind: str, **parameters: object) -> dict[str, object]:
    return {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0, **parameters}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTNeoXConfig(), "architecture 'gpt_neox' is not supported; known model types: llama, mistral, qwen2, qwen3"),
        (LlamaConfig(**SMALL, hidden_act="gelu"), "llama: activation 'gelu' is not supported; known: silu"),
        (LlamaConfig(**SMALL, rope_parameters=rope("dynamic")), "rope type 'dynamic' is not supported; known: default"),
        (
            Qwen3Config(
                **SMALL,
                head_dim=8,
                rope_parameters=rope(
                    "longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=16
                ),
            ),
            "qwen3: rope type 'longrope' is not supported",
        ),
        (LlamaConfig(**SMALL, rope_parameters=rope("default", partial_rotary_factor=0.5)), "partial_rotary_factor=0.5"),
        (
            LlamaConfig(**SMALL | {"num_key_value_heads": 3}),
            "4 attention heads are not a multiple of 3 key-value heads",
        ),
        (Qwen2Config(**ODD, layer_types=["chunked_attention"] * 2), "layer type 'chunked_attention' is not supported"),
        (Gemma3TextConfig(**SMALL, attn_logit_softcapping=50.0), "gemma3_text: attn_logit_softcapping=50.0"),
        (Gemma3TextConfig(**SMALL, use_bidirectional_attention=True), "use_bidirectional_attention is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_supported_is_refused_by_name(config, message: str):
    with pytest.raises(ValueError, match=message):
        block_spec(config)
