"""The tiled log-prob against log_softmax of all the logits at once, in double precision."""

from typing import Any

import pytest
import torch
from colora.kernels import linear_logprob as module
from colora.kernels.linear_logprob import linear_logprob
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

TOKENS, VOCAB, WIDTH = 8, 23, 10
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def random_inputs(tokens: int = TOKENS, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """hidden (tokens, WIDTH), head (VOCAB, WIDTH), targets (tokens,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, WIDTH, generator=generator).to(dtype)
    head = torch.randn(VOCAB, WIDTH, generator=generator).to(dtype)
    return hidden.requires_grad_(), head, torch.randint(0, VOCAB, (tokens,), generator=generator)


def all_logits(hidden: Tensor, head: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """(tokens, VOCAB) double."""
    logits = hidden.double() @ head.double().T
    return (logits if softcap is None else softcap * torch.tanh(logits / softcap)) / temperature


@pytest.mark.parametrize("tile_elements", [2**25, 3 * VOCAB, 1])  # one tile; three, the last smaller; one a token
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
def test_equals_log_softmax(
    monkeypatch: pytest.MonkeyPatch, temperature: float, softcap: float | None, tile_elements: int
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile_elements)
    hidden, head, targets = random_inputs()
    weights = torch.linspace(-1, 1, TOKENS)
    logprobs, entropies = linear_logprob(hidden, head, targets, temperature, softcap, entropy=True)
    (gradient,) = torch.autograd.grad((logprobs * weights).sum(), hidden)

    logits = all_logits(hidden, head, temperature, softcap)
    expected = logits.log_softmax(-1)[torch.arange(TOKENS), targets]
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), hidden)
    assert logprobs.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), expected, **CLOSE)
    torch.testing.assert_close(gradient, expected_gradient, **CLOSE)
    assert entropies is not None
    torch.testing.assert_close(entropies.double(), torch.distributions.Categorical(logits=logits).entropy(), **CLOSE)


@pytest.mark.parametrize("tile_elements", [2**25, 3 * VOCAB])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("with_logprobs", [True, False])
def test_gradient_of_the_entropy(
    monkeypatch: pytest.MonkeyPatch, temperature: float, softcap: float | None, tile_elements: int, with_logprobs: bool
) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", tile_elements)
    hidden, head, targets = random_inputs()
    weights, scale = torch.linspace(-2, 1, TOKENS), 0.7 if with_logprobs else 0.0
    logprobs, entropies = linear_logprob(
        hidden, head, targets, temperature, softcap, entropy=True, entropy_gradient=True
    )
    assert entropies is not None
    loss = (entropies * weights).sum() + (scale * logprobs.sum() if with_logprobs else 0.0)
    (gradient,) = torch.autograd.grad(loss, hidden)

    logits = all_logits(hidden, head, temperature, softcap)
    log_p = logits.log_softmax(-1)
    expected = -((log_p.exp() * log_p).sum(-1) * weights).sum() + scale * log_p[torch.arange(TOKENS), targets].sum()
    (expected_gradient,) = torch.autograd.grad(expected, hidden)
    assert expected_gradient.abs().max() > 0.1
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-4)


def test_certain_tokens_have_entropies_without_a_gradient_and_no_nan() -> None:
    hidden = torch.full((2, 4), 200.0, requires_grad=True)
    head = torch.linspace(-1, 1, 9)[:, None].expand(9, 4).contiguous()
    _, entropies = linear_logprob(hidden, head, torch.tensor([8, 0]), entropy=True, entropy_gradient=True)
    assert entropies is not None
    (gradient,) = torch.autograd.grad(entropies.sum(), hidden)
    assert (gradient == 0).all() and (entropies == 0).all()


def test_half_precision_inputs_give_float32_sums() -> None:
    hidden, head, targets = random_inputs(dtype=torch.bfloat16)
    logprobs, _ = linear_logprob(hidden, head, targets)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    expected = all_logits(hidden, head, 1.0, None).log_softmax(-1)[torch.arange(TOKENS), targets]
    (expected_gradient,) = torch.autograd.grad(expected.sum(), hidden)
    assert logprobs.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    # bf16 keeps 8 bits: the logits, at most 11 here, are rounded by at most 2**-5; log p is the difference of two.
    assert all_logits(hidden, head, 1.0, None).abs().max() < 16
    torch.testing.assert_close(logprobs.double(), expected, rtol=0, atol=2**-4)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0.05, atol=0.05)


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any op returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def test_no_more_than_a_tile_of_logits_is_ever_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_ELEMENTS", 20 * VOCAB)
    hidden, head, targets = random_inputs(tokens=45)  # three tiles; hidden itself is smaller than one
    with LargestTensor() as largest:
        logprobs, entropies = linear_logprob(hidden, head, targets, 0.7, 3.0, entropy=True, entropy_gradient=True)
        assert entropies is not None
        (logprobs + entropies).sum().backward()
    assert largest.elements == 20 * VOCAB


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket == torch.ops.aten.mm
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("trained", "entropy_gradient", "products"), [(0, 0, 1), (1, 0, 2), (1, 1, 3)])
def test_logits_are_computed_once(trained: bool, entropy_gradient: bool, products: int) -> None:
    hidden, head, targets = random_inputs()
    with Products() as mode, torch.set_grad_enabled(bool(trained)):
        logprobs, entropies = linear_logprob(
            hidden, head, targets, entropy=True, entropy_gradient=bool(entropy_gradient)
        )
        if trained:
            logprobs.sum().backward()
    assert mode.count == products
    assert entropies is not None and entropies.requires_grad == bool(entropy_gradient)


def test_the_gradient_may_be_taken_twice() -> None:
    hidden, head, targets = random_inputs()
    logprobs, _ = linear_logprob(hidden, head, targets)
    first, second = (torch.autograd.grad(2 * logprobs.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_the_gradient_of_entropies_that_are_not_asked_for_is_refused() -> None:
    with pytest.raises(ValueError, match="set entropy as well"):
        linear_logprob(*random_inputs(), entropy_gradient=True)


def test_the_head_gets_no_gradient() -> None:
    hidden, head, targets = random_inputs()
    head.requires_grad_()
    linear_logprob(hidden, head, targets)[0].sum().backward()
    assert head.grad is None


def test_nan_stays_in_its_row() -> None:
    hidden, head, targets = random_inputs()
    with torch.no_grad():
        hidden[5, 3] = torch.nan
    logprobs, entropies = linear_logprob(hidden, head, targets, entropy=True)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert entropies is not None
    only_row_5 = [row == 5 for row in range(TOKENS)]
    assert logprobs.isnan().tolist() == entropies.isnan().tolist() == only_row_5
    assert gradient.isnan().all(-1).tolist() == gradient.isnan().any(-1).tolist() == only_row_5


@pytest.mark.parametrize("tokens", [0, 1])
def test_one_token_and_none(tokens: int) -> None:
    hidden, head, targets = random_inputs(tokens)
    logprobs, entropies = linear_logprob(hidden, head, targets)
    logprobs.sum().backward()
    assert entropies is None
    expected = all_logits(hidden, head, 1.0, None).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, **CLOSE)
    assert hidden.grad is not None and hidden.grad.shape == (tokens, WIDTH)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_a_temperature_not_above_0_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=f"temperature must be above 0, got {temperature}"):
        linear_logprob(*random_inputs(), temperature)
