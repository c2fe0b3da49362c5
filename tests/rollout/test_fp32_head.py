"""`fp32_head`: a 16-bit engine's logits are the fp32 sums of the products, or rounded to the dtype where it is off."""

from pathlib import Path

import pytest
import torch
from colora.kernels.head_logits import head_logits
from colora.rl.policy import load
from colora.rollout.transformers_engine import TransformersEngine
from torch import Tensor

from ..vllm_engines import VLLM_MARKS, open_engine, save_tiny, vllm_configs

CONFIG = next(iter(vllm_configs().values()))
HIDDEN = torch.randn(3, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()


def vllm_logits(directory: Path, fp32_head: bool) -> tuple[Tensor, Tensor]:
    """vLLM's logits of HIDDEN, and the head."""
    engine = open_engine(directory, dtype=torch.bfloat16, fp32_head=fp32_head)
    head = engine.weights.head.clone()
    logits = engine._model.compute_logits(HIDDEN)
    engine.close()
    return logits, head


def transformers_logits(directory: Path, fp32_head: bool) -> tuple[Tensor, Tensor]:
    policy = load(directory, dtype="bfloat16")
    engine = TransformersEngine(policy.weights, policy.config, max_context=64, fp32_head=fp32_head)
    return engine.model.get_output_embeddings()(HIDDEN), policy.weights.head


@pytest.mark.parametrize("fp32_head", [True, False])
@pytest.mark.parametrize("logits_of", [pytest.param(vllm_logits, marks=VLLM_MARKS), transformers_logits])
def test_logits_of_a_bf16_engine(logits_of, fp32_head: bool, tmp_path: Path) -> None:
    logits, head = logits_of(save_tiny(CONFIG, tmp_path), fp32_head)
    assert logits.dtype == (torch.float32 if fp32_head else torch.bfloat16)
    exact, rounded = head_logits(HIDDEN, head), head_logits(HIDDEN, head, fp32=False)
    torch.testing.assert_close(logits.float()[:, : len(head)], exact if fp32_head else rounded, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(exact, rounded, rtol=1e-5, atol=1e-5)
