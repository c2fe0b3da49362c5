"""Shared prompts read once, in an engine with CUDA graphs: log-probs as near the trainer's as with FlashAttention.

The engines compute in bfloat16, so what they sample differs. Each one's log-probs are compared with those of a policy
on its own weights, for the very tokens that it sampled. Queries are large, so that a sequence sees few tokens of its
prompt, and other tokens there would give other log-probs.
"""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, PreTrainedConfig, Qwen3Config

from ..tiny_runs import PAD, tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed"),
]
PROGRAM = Path(__file__).parents[1] / "shared_prompt_run.py"
SHARED = 4001 // 16 * 16  # of the program's prompt the full blocks
SHAPE: dict[str, Any] = {
    "vocab_size": PAD + 1,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
    "tie_word_embeddings": True,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "qwen3": Qwen3Config(**SHAPE),
    "gemma3": Gemma3TextConfig(  # two groups of layers: FlashAttention's, with a window, and ours
        **SHAPE,
        query_pre_attn_scalar=64,
        final_logit_softcapping=5.0,  # else tokens are all but certain
        sliding_window=512,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def checkpoint(config: PreTrainedConfig, directory: Path) -> Path:
    """A random model of peaked attention: queries after their norm are four times as large as usual."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):  # Gemma's are less 1
                parameter.add_(3.0)
    model.save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def started(model: Path, **engine_kwargs: Any) -> subprocess.Popen[str]:
    command = [sys.executable, str(PROGRAM), str(model), json.dumps(engine_kwargs)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("family", CONFIGS)
def test_log_probs_are_the_policys(family: str, tmp_path: Path) -> None:
    """With CUDA graphs and without; after a sleep too, which takes memory away that must not be missed."""
    model = checkpoint(CONFIGS[family], tmp_path)
    runs = [started(model, attention_backend="FLASH_ATTN"), started(model), started(model, enforce_eager=True)]
    usual, *ours = map(result, runs)
    assert usual["groups"] == 0
    for found in ours:
        assert found["groups"] == 1
        assert found["shared"] == SHARED  # steps were planned, and what the group has in common was found
        assert found["mean"] <= 1.5 * usual["mean"] and found["high"] <= 2 * usual["high"]
        assert found["slept"] <= 1.5 * usual["slept"]
        assert found["mean"] < 0.3 * found["other_prompt"]  # what reading other blocks would give
