"""The KL estimators against the divergence of two distributions that are known in full."""

import pytest
import torch
from colora.rl.kl import ESTIMATORS, kl_estimate


def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy and of a reference over nine tokens, in double precision."""
    generator = torch.Generator().manual_seed(0)
    policy, reference = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    return policy.requires_grad_(), policy.detach() + 0.3 * reference


def expected(policy: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """The mean of the estimate over tokens sampled from the policy, worked out over all nine."""
    logp, ref = policy.log_softmax(-1), reference.log_softmax(-1)
    return (logp.detach().exp() * kl_estimate(logp, ref, estimator)).sum()


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", True)])
def test_the_value_is_unbiased_for_k1_and_k3(estimator: str, unbiased: bool) -> None:
    policy, reference = distributions()
    logp, ref = policy.log_softmax(-1), reference.log_softmax(-1)
    true = (logp.exp() * (logp - ref)).sum()
    off = abs(float(expected(policy, reference, estimator).detach() - true.detach()))
    assert off < 1e-14 if unbiased else off > 1e-4


def test_as_a_loss_k1_has_no_gradient_k2_has_the_divergences_and_k3_has_it_with_the_ratio() -> None:
    policy, reference = distributions()
    logp, ref = policy.log_softmax(-1), reference.log_softmax(-1)
    (true,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), policy)
    gradient = {name: torch.autograd.grad(expected(policy, reference, name), policy)[0] for name in ESTIMATORS}
    assert gradient["k1"].abs().max() < 1e-14
    torch.testing.assert_close(gradient["k2"], true)
    assert (gradient["k3"] - true).abs().max() > 1e-3

    logp = policy.log_softmax(-1)
    ratio = torch.exp(logp - logp.detach())
    (corrected,) = torch.autograd.grad((logp.detach().exp() * ratio * kl_estimate(logp, ref)).sum(), policy)
    torch.testing.assert_close(corrected, true)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_far_policies_give_finite_values_and_gradients(estimator: str) -> None:
    logprobs = torch.tensor([-500.0, 0.0], requires_grad=True)
    values = kl_estimate(logprobs, torch.tensor([0.0, -500.0]), estimator)
    values.sum().backward()
    assert values.isfinite().all() and logprobs.grad is not None and logprobs.grad.isfinite().all()
    assert estimator == "k1" or (values >= 0).all()


def test_an_unknown_estimator_is_named() -> None:
    with pytest.raises(ValueError, match="kl_estimator='k4': known are k1, k2, k3"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
