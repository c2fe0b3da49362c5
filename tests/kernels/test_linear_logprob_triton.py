"""The kernels of linear_logprob's two passes against autograd in double precision, interpreted or on a card."""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
ON_CARD = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(
    not ON_CARD and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a card or TRITON_INTERPRET=1"
)
DEVICE = "cuda" if ON_CARD else "cpu"
# One block, one above a block, several blocks; far fewer entries than lanes; a large one for the card.
VOCABULARIES = [5, 130, 4096, 4097, 9001] + ([151_936] if ON_CARD else [])


def reference(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """log p (rows, vocab) of double logits."""
    z = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return (z / temperature).log_softmax(-1)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("temperature", "softcap"), [(1.0, None), (0.7, None), (1.0, 3.0), (1.3, 30.0)])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_statistics_and_gradients(vocab: int, temperature: float, softcap: float | None, entropy: bool) -> None:
    from colora.kernels.linear_logprob_triton import row_gradients, row_statistics

    torch.manual_seed(0)
    rows = 3
    logits, targets = 4 * torch.randn(rows, vocab, device=DEVICE), torch.randint(0, vocab, (rows,), device=DEVICE)
    exact = logits.double().requires_grad_()
    log_p = reference(exact, temperature, softcap)
    expected, expected_entropy = log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    (expected_gradient,) = torch.autograd.grad((expected_entropy if entropy else expected).sum(), exact)

    logprobs, logsumexps, entropies = row_statistics(logits, targets, temperature, softcap, entropy)
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    if entropy:
        torch.testing.assert_close(entropies.double(), expected_entropy, rtol=1e-5, atol=1e-5)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 6e-3)):  # the interpreter truncates to bf16
        gradient = row_gradients(
            logits, targets, logsumexps, entropies if entropy else None, temperature, softcap, dtype
        )
        assert gradient.dtype == dtype
        assert (gradient.double() - expected_gradient).norm() / expected_gradient.norm() < bound


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_comes_out_as_nan(poison: float) -> None:
    from colora.kernels.linear_logprob_triton import row_statistics

    logits = torch.zeros(2, 100, device=DEVICE)
    logits[0, 3] = poison
    targets = torch.tensor([3, 7], device=DEVICE)
    logprobs, _, entropies = row_statistics(logits, targets, 1.0, None, True)
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == [True, False]
