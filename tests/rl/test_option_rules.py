"""Every refusal and every warning is provoked once, and each goes away with the remedy that it names."""

import warnings

import pytest
from colora.rl.config import GRPOConfig
from colora.rl.option_rules import remarks

CISPO = {"loss_type": "cispo", "epsilon_high": 5.0}
GSPO = {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4}
MODE, LEAST, MOST = (f"vllm_importance_sampling_{name}" for name in ("mode", "clip_min", "clip_max"))
CORRECTION = "vllm_importance_sampling_correction"
GDPO = {"multi_objective_aggregation": "normalize_then_sum"}

# Options, what the message must say, and the change that makes it go away.
REFUSED = [
    (
        {"advantage_estimator": "rloo", "scale_rewards": "group"},
        "scale_rewards='group' .*'rloo': .* to none or batch",
        {"scale_rewards": "none"},
    ),
    (
        {"advantage_estimator": "reinforce_pp", "scale_rewards": "none"},
        "whitened .* to batch",
        {"scale_rewards": "batch"},
    ),
    (
        {"advantage_estimator": "reinforce_pp_baseline", "scale_rewards": "group"},
        "whitened",
        {"scale_rewards": "batch"},
    ),
    (
        {"advantage_estimator": "maxrl", "scale_rewards": "batch"},
        "divides by the group's mean",
        {"scale_rewards": "none"},
    ),
    (
        GDPO | {"advantage_estimator": "rloo"},
        r"\(GDPO\) cannot be used with advantage_estimator='rloo'",
        {"advantage_estimator": "group"},
    ),
    (
        GDPO | {"scale_rewards": "none"},
        r"\(GDPO\) cannot be used with scale_rewards='none'",
        {"scale_rewards": "group"},
    ),
    (GDPO | {"kl_in_reward": True, "beta": 0.1}, "normalised like a reward", {"kl_in_reward": False}),
    (
        {"dynamic_sampling": True, "advantage_estimator": "reinforce_pp"},
        "dynamic_sampling=True .* whole batch",
        {"advantage_estimator": "reinforce_pp_baseline"},
    ),
    ({"kl_in_reward": True}, "kl_in_reward=True with beta=0", {"beta": 0.01}),
    (
        {"overlong_buffer": 64, "max_completion_length": 64},
        "overlong_buffer=64 must be less than max_completion_length=64",
        {"overlong_buffer": 63},
    ),
    ({"overlong_penalty": 2.0}, "overlong_penalty=2 without overlong_buffer", {"overlong_buffer": 9}),
    (
        {"advantage_estimator": "maxrl", "overlong_buffer": 9},
        "overlong_buffer=9 cannot be used with advantage_estimator='maxrl'",
        {"overlong_buffer": 0},
    ),
    (
        {"advantage_estimator": "maxrl", "kl_in_reward": True, "beta": 0.1},
        "kl_in_reward=True cannot",
        {"kl_in_reward": False},
    ),
    (
        {"loss_type": "vespo", "importance_sampling_level": "sequence"},
        "own weight of a sequence",
        {"importance_sampling_level": "token"},
    ),
    (
        {"loss_type": "gmpo", "importance_sampling_level": "sequence_token"},
        "own weight",
        {"importance_sampling_level": "token"},
    ),
    (
        {"loss_type": "vespo", MODE: "sequence_mask"},
        "vllm_importance_sampling_mode='sequence_mask' cannot .*'vespo'",
        {MODE: "token_mask"},
    ),
    (
        {"loss_type": "cispo"},
        "epsilon_high=None with loss_type='cispo': .* largest ratio itself",
        {"epsilon_high": 5.0},
    ),
    ({"loss_type": "cispo", "epsilon_high": 0.28}, "epsilon_high=0.28 with loss_type='cispo'", {"epsilon_high": 5.0}),
    ({LEAST: 2.5, MODE: "token_mask"}, f"{LEAST}=2.5 must be below {MOST}=2", {LEAST: 0.5}),
    (
        {"temperature": 2.5, "engine": "vllm"},
        "temperature=2.5 with engine='vllm': vLLM samples from 0.01 to 2",
        {"engine": "transformers"},
    ),
    ({"temperature": 0.005, "engine": "vllm"}, "temperature=0.005", {"temperature": 0.01}),
    ({"use_vllm": True, "temperature": 3.0}, "temperature=3 with engine='vllm'", {"temperature": 1.0}),
]
WARNED = [
    (GSPO | {"epsilon": 0.2}, "so this never clips. GSPO has 3e-4", {"epsilon": 3e-4}),
    (GSPO | {"epsilon_high": 0.28}, "never clips", {"epsilon_high": 4e-4}),
    (
        {"epsilon": 3e-4},
        "epsilon=0.0003 with importance_sampling_level='token': .* lose their gradient",
        {"epsilon": 0.2},
    ),
    (
        GSPO | {"loss_type": "dapo"},
        "loss_type='dapo' with .*'sequence': token losses are summed",
        {"loss_type": "grpo"},
    ),
    (GSPO | {"loss_type": "bnpo"}, "a sequence weighs as much as it is long", {"loss_type": "grpo"}),
    (
        {"loss_type": "luspo"},
        "LUSPO has the sequence's ratio",
        {"importance_sampling_level": "sequence", "epsilon": 2e-3},
    ),
    ({"delta": 1.1}, r"delta=1.1 is not above 1 \+ epsilon_high = 1.2", {"delta": 4.0}),
    (
        {"epsilon_high": 5.0},
        "epsilon_high=5 with loss_type='dapo': ratios above 1 are hardly ever clipped",
        {"loss_type": "cispo"},
    ),
    (GSPO | {"old_logprobs": "engine"}, "old_logprobs='engine' .* clips that gap", {"old_logprobs": "trainer"}),
    (CISPO | {"delta": 4.0}, "delta has no effect with loss_type='cispo'", {"delta": None}),
    (CISPO | {"epsilon": 0.1}, "epsilon has no effect with loss_type='cispo': grpo, bnpo", {"epsilon": 0.2}),
    (
        {"loss_type": "sapo", "epsilon_high": 0.28},
        "epsilon_high has no effect with loss_type='sapo'",
        {"epsilon_high": None},
    ),
    (
        {"sapo_temperature_neg": 2.0},
        "sapo_temperature_neg has no effect with loss_type='dapo': sapo",
        {"loss_type": "sapo"},
    ),
    ({"vespo_k_pos": 1.0}, "vespo_k_pos has no effect", {"loss_type": "vespo"}),
    (
        {"kl_estimator": "k2"},
        "kl_estimator has no effect without a KL penalty",
        {"beta": 0.1, "use_bias_correction_kl": False},
    ),
    (
        {"beta": 0.1, "kl_estimator": "k1", "use_bias_correction_kl": False},
        "gradient is zero on average",
        {"kl_in_reward": True},
    ),
    ({"beta": 0.1, "kl_estimator": "k2"}, "the ratio spoils it", {"use_bias_correction_kl": False}),
    ({CORRECTION: False, MODE: "token_mask"}, f"{MODE} has no effect without {CORRECTION}", {CORRECTION: True}),
    (
        {MODE: "sequence_mask", "max_completion_length": 8192},
        "long ones leave the bounds",
        {MODE: "sequence_mean_mask"},
    ),
    ({LEAST: 0.5}, "weights below it are raised to it", {MODE: "token_mask"}),
    (
        {"mask_truncated_completions": True, "overlong_buffer": 16},
        "is not trained on, so the penalty acts",
        {"overlong_buffer": 0},
    ),
    ({"dynamic_sampling_max_rounds": 3}, "no effect without dynamic_sampling", {"dynamic_sampling": True}),
    (
        {"activation_offload": True, "gradient_checkpointing": False},
        "activation_offload has no effect with gradient_checkpointing=False",
        {"activation_offload": False},
    ),
    (
        {"mlp_tile_tokens": 512, "gradient_checkpointing": False},
        "mlp_tile_tokens has no effect with gradient_checkpointing=False",
        {"gradient_checkpointing": True},
    ),
]


def make(**options):
    return GRPOConfig(**({"output_dir": "runs/test", "device": "cpu"} | options))


@pytest.mark.parametrize(("options", "message", "remedy"), REFUSED)
def test_a_combination_that_cannot_work_is_refused_until_it_is_remedied(options, message, remedy):
    with pytest.raises(ValueError, match=message):
        make(**options)
    make(**(options | remedy))


@pytest.mark.parametrize(("options", "message", "remedy"), WARNED)
def test_a_doubtful_combination_is_told_where_it_is_made_until_it_is_remedied(options, message, remedy):
    with pytest.warns(UserWarning, match=message) as caught:
        make(**options)
    assert {warning.filename for warning in caught} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make(**(options | remedy))


def test_the_defaults_are_quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make()


def test_one_update_for_each_generation_is_remarked_and_not_warned_of():
    (remark,) = remarks(make())
    assert "one update for each generation" in remark and "steps_per_generation" in remark
    assert not list(remarks(make(num_iterations=2)))
