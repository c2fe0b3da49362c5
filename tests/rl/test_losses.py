"""Every loss against the oracle's padded loops: value and gradient, in double precision, on streams without a model."""

import pytest
import torch
from colora.rl.correction import MODES
from colora.rl.losses import LOSS_TYPES, Objective
from colora.rl.metrics import TokenStatistics
from colora.rl.policy_terms import LEVELS
from colora.rl.streams import TokenStreams

from ..oracle import grpo as oracle
from .stream_cases import oracle_loss, our_objective, random_rows, step_loss

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VARIANTS: dict[str, dict] = {
    "plain": {},
    "clip_higher": {"epsilon_high": 0.4},
    "gspo_range": {"epsilon": 3e-4, "epsilon_high": 4e-4},
    "delta": {"delta": 1.3},
    "shapes": {"sapo_temperatures": (1.3, 0.9), "vespo_negative": (2.1, 1.7), "vespo_positive": (1.3, 0.7)},
    "entropy_bonus": {"entropy_coef": 0.05},
    "entropy_quantile": {"top_entropy_quantile": 0.4},
    "bonus_within_quantile": {"entropy_coef": 0.05, "top_entropy_quantile": 0.4},
    "off_policy_mask": {"off_policy_threshold": 0.001},
    "rejection": {"max_sequence_gap": 0.15},
    "no_upper_bound": {"correction_mode": "token_truncate", "clip_max": None, "clip_min": 0.9},
    "everything": {
        "epsilon_high": 0.3, "delta": 1.4, "beta": 0.3, "kl_estimator": "k2", "entropy_coef": 0.1,
        "top_entropy_quantile": 0.7, "off_policy_threshold": 0.05, "correction_mode": "token_mask", "clip_min": 0.7,
        "clip_max": 1.4, "max_sequence_gap": 0.3,
    },
}  # fmt: skip
VARIANTS |= {
    f"{estimator}_{'corrected' if corrected else 'as_it_is'}": {
        "beta": 0.2, "kl_estimator": estimator, "use_bias_correction_kl": corrected,
    }
    for estimator in ("k1", "k2", "k3")
    for corrected in (True, False)
}  # fmt: skip
VARIANTS |= {mode: {"correction_mode": mode, "clip_min": 0.8, "clip_max": 1.2} for mode in MODES}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_equals_the_oracle(loss_type: str, level: str, variant: str) -> None:
    options = oracle.Options(loss_type=loss_type, importance_sampling_level=level, **VARIANTS[variant])
    for bypass in (False, True):
        rows = random_rows()
        rows.engine[1, 3], rows.engine[4, 0] = torch.nan, -torch.inf  # what the engine could not score is left out
        rows.advantages += torch.linspace(-0.2, 0.2, 6, dtype=torch.float64)  # of the tokens, not only the completion
        ours = step_loss(our_objective(options), rows, options.top_entropy_quantile, bypass)
        expected = oracle_loss(options, rows, bypass)
        assert expected[1].abs().max() > 1e-5
        for mine, theirs in zip(ours, expected, strict=True):
            torch.testing.assert_close(mine, theirs, **EXACT, msg=lambda m, b=bypass: f"bypass {b}: {m}")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
def test_every_variant_matters(variant: str) -> None:
    """Else the comparison above would prove nothing about it."""
    loss_type = "vespo" if variant == "shapes" else "grpo"
    rows = random_rows()
    changed = oracle_loss(oracle.Options(loss_type=loss_type, **VARIANTS[variant]), rows)
    plain = oracle_loss(oracle.Options(loss_type=loss_type), rows)
    assert max((a - b).abs().max() for a, b in zip(changed, plain, strict=True)) > 1e-4


def test_extreme_log_ratios_stay_finite() -> None:
    rows = random_rows(spread=300.0)
    for loss_type in LOSS_TYPES:
        for mode in MODES:
            options = oracle.Options(loss_type=loss_type, correction_mode=mode, beta=0.1)
            for bypass in (False, True):
                for value in step_loss(our_objective(options), rows, bypass=bypass):
                    assert value.isfinite().all(), (loss_type, mode, bypass)


@pytest.mark.parametrize("loss_type", ["grpo", "gmpo"])
def test_clip_statistics_mark_the_tokens_without_gradient(loss_type: str) -> None:
    logp = torch.tensor([1.0, 0.0, -1.0, -1.0], requires_grad=True)
    streams = TokenStreams(
        logp, torch.zeros(4), torch.tensor([1.0, 1.0, -1.0, 1.0]), torch.ones(4), [1, 1, 1, 1], torch.zeros(4)
    )
    loss, statistics, _ = Objective(loss_type, 8).loss(streams)
    loss.backward()
    clipped = (statistics["clip_low"] + statistics["clip_high"]).bool()
    assert clipped.tolist() == [True, False, True, False]
    assert ((logp.grad == 0) == clipped).all()


def test_corrections_scale_the_policy_term_only() -> None:
    half = torch.log(torch.tensor([2.0, 2.0]))  # pi_old / pi_engine is 1/2
    logp, ref, shares = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -1.0]), torch.full((2,), 0.5)
    objective = Objective("grpo", 8, beta=1.0, bias_correction=False)

    def value(gap: torch.Tensor, advantage: float) -> float:
        streams = TokenStreams(logp, logp + gap, torch.full((2,), advantage), shares, [2], logp, ref_logprobs=ref)
        return objective.loss(streams)[0].item()

    kl = value(0 * half, 0.0)
    assert kl > 0.1
    assert value(half, 0.0) == pytest.approx(kl)
    assert value(half, 1.0) - kl == pytest.approx(0.5 * (value(0 * half, 1.0) - kl))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_on_a_gpu_the_same_and_without_waiting(loss_type: str) -> None:
    options = oracle.Options(loss_type=loss_type, **VARIANTS["everything"])
    objective, rows = our_objective(options), random_rows()
    live = int(rows.mask.sum())

    def streams(device: str) -> TokenStreams:
        flat = {name: value.flatten().to(device, torch.float32) for name, value in vars(rows).items()}
        return TokenStreams(
            flat["logp"].requires_grad_(), flat["engine"], flat["advantages"], torch.full_like(flat["logp"], 1 / live),
            [6] * 5, flat["old"], flat["old"], flat["ref"], flat["entropy"], 1 / live, mask=flat["mask"].bool(),
        )  # fmt: skip

    there, here = streams("cuda"), streams("cpu")
    statistics, gradients = TokenStatistics(), []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loss, per_token, sequences = objective.loss(there)
            statistics.add(per_token, sequences)
            gradients += torch.autograd.grad(loss, there.logprobs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(gradients[0], gradients[1])
    expected, expected_statistics, expected_sequences = objective.loss(here)
    torch.testing.assert_close(loss.cpu(), expected)
    torch.testing.assert_close(gradients[0].cpu(), *torch.autograd.grad(expected, here.logprobs))
    on_cpu = TokenStatistics()
    on_cpu.add(expected_statistics, expected_sequences)
    for name, summary in on_cpu.summaries().items():
        assert list(vars(statistics.summaries()[name]).values()) == pytest.approx(list(vars(summary).values())), name


def test_shares_of_a_step() -> None:
    lengths = [3, 0, 5]
    for loss_type, expected in {
        "grpo": [1 / 9, 1 / 3, 1 / 15], "sapo": [1 / 9, 1 / 3, 1 / 15], "gmpo": [1 / 9, 1 / 3, 1 / 15],
        "dapo": [1 / 8] * 3, "bnpo": [1 / 8] * 3, "cispo": [1 / 8] * 3, "vespo": [1 / 8] * 3,
        "dr_grpo": [1 / 21] * 3, "luspo": [1 / 3] * 3,
    }.items():  # fmt: skip
        assert Objective(loss_type, 7).shares(lengths) == pytest.approx(expected), loss_type


def test_what_is_unknown_is_named() -> None:
    with pytest.raises(ValueError, match="loss_type='ppo': known are grpo"):
        Objective("ppo", 8)
    with pytest.raises(ValueError, match="importance_sampling_level='word': known are token"):
        step_loss(Objective("grpo", 8, importance_sampling_level="word"), random_rows())
