"""`algorithm: NAME`: the values that a paper used, for the options that were not given.

A preset sets what makes the algorithm: loss, ratio, clip range, advantages, KL, minibatches. What belongs to the model
and the task stays with the user: learning rate, batch and group sizes, lengths. `docs/algorithms.md` has the equations.
"""

import functools
import inspect
from collections.abc import Callable, Set
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from .option_values import is_default

Config = TypeVar("Config", bound=type)


@dataclass(frozen=True)
class Preset:
    """What one algorithm is.

    Attributes:
        source: where its values come from.
        values: of options of `GRPOConfig`.
        minibatches: optimizer steps on each generation.
        overlong_share: length of the overlong buffer as a share of `max_completion_length`.
    """

    source: str
    values: dict[str, Any]
    minibatches: int = 1
    overlong_share: float = 0.0


def _values(loss_type: str, **others: Any) -> dict[str, Any]:
    """The options that every preset sets, with the values that most have, then its own."""
    common = {
        "loss_type": loss_type,
        "importance_sampling_level": "token",
        "advantage_estimator": "group",
        "scale_rewards": "group",
        "beta": 0.0,
    }
    return common | others


_CLIP = {"epsilon": 0.2}  # `epsilon_high` is the same where it is not given
_GSPO = {"epsilon": 3e-4, "epsilon_high": 4e-4}
_DAPO_LENGTH = 4096 / 20480  # the buffer and the limit of DAPO, section 4.1

PRESETS: dict[str, Preset] = {
    "grpo": Preset(
        # One update after each exploration. The paper does not give its clip range: PPO's.
        "DeepSeekMath, arXiv 2402.03300, section 4.2",
        _values("grpo", **_CLIP, beta=0.04, kl_estimator="k3", use_bias_correction_kl=False),
    ),
    "dr_grpo": Preset(
        # 128 prompts of 8 completions, trained on in parts of 128 completions.
        "Dr. GRPO, arXiv 2503.20783, section 3.2; the authors' script",
        _values("dr_grpo", **_CLIP, scale_rewards="none"),
        minibatches=8,
    ),
    "bnpo": Preset("TRL's loss type of this name; not the paper's Beta normalization", _values("bnpo", **_CLIP)),
    "dapo": Preset(
        "DAPO, arXiv 2503.14476, section 4.1; the authors' script for the rounds",
        _values(
            "dapo",
            epsilon=0.2,
            epsilon_high=0.28,
            dynamic_sampling=True,
            dynamic_sampling_max_rounds=10,
            overlong_penalty=1.0,
        ),
        minibatches=16,
        overlong_share=_DAPO_LENGTH,
    ),
    "gspo": Preset(
        "GSPO, arXiv 2507.18071, section 5.1",
        _values("grpo", **_GSPO, importance_sampling_level="sequence"),
        minibatches=4,
    ),
    "gspo_token": Preset(
        "GSPO, arXiv 2507.18071, sections 4.3 and 5.1",
        _values("grpo", **_GSPO, importance_sampling_level="sequence_token"),
        minibatches=4,
    ),
    "cispo": Preset(
        # MiniMax-M1 does not give its cap; everything else is its, the float32 head is in both.
        "MiniMax-M1, arXiv 2506.13585, section 3.1; the cap from ScaleRL, arXiv 2510.13786",
        _values(
            "cispo",
            epsilon_high=5.0,
            dynamic_sampling=True,
            dynamic_sampling_max_rounds=10,
            overlong_penalty=1.0,
            cast_lm_head_to_fp32=True,
        ),
        minibatches=16,
        overlong_share=_DAPO_LENGTH,
    ),
    "sapo": Preset(
        "SAPO, arXiv 2511.20347, section 5",
        _values("sapo", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05),
        minibatches=4,
    ),
    "luspo": Preset(
        # The paper's changes are to GSPO, whose minibatches are taken over.
        "LUSPO, arXiv 2602.05261, section 5.1",
        _values("luspo", importance_sampling_level="sequence", epsilon=2e-3, epsilon_high=2.5e-3),
        minibatches=4,
    ),
    "gmpo": Preset(
        # The clip range is one of log-ratios: (exp(-0.4), exp(0.4)).
        "GMPO, arXiv 2507.20673, section 4; the authors' script",
        _values("gmpo", epsilon=0.4),
        minibatches=8,
    ),
    "rloo": Preset(
        # REINFORCE has a loss summed over tokens; Dr. GRPO's is that, divided by a constant.
        "RLOO, arXiv 2402.14740, appendix C",
        _values(
            "dr_grpo",
            **_CLIP,
            advantage_estimator="rloo",
            scale_rewards="none",
            beta=0.03,
            kl_estimator="k1",
            kl_in_reward=True,
        ),
        minibatches=2,
    ),
    "reinforce_pp": Preset(
        "REINFORCE++, arXiv 2501.03262, hyperparameters for mathematics",
        _values(
            "dapo",
            **_CLIP,
            advantage_estimator="reinforce_pp",
            scale_rewards="batch",
            beta=0.001,
            kl_estimator="k1",
            kl_in_reward=True,
        ),
        minibatches=8,
    ),
    "reinforce_pp_baseline": Preset(
        "REINFORCE++ with baseline, arXiv 2501.03262; OpenRLHF's script",
        _values(
            "dapo",
            **_CLIP,
            advantage_estimator="reinforce_pp_baseline",
            scale_rewards="batch",
            beta=0.001,
            kl_estimator="k2",
            use_bias_correction_kl=False,
        ),
        minibatches=8,
    ),
    "maxrl": Preset(
        "MaxRL, arXiv 2602.02710; the authors' script",
        _values("dapo", **_CLIP, advantage_estimator="maxrl", scale_rewards="none"),
    ),
    "vespo": Preset(
        "VESPO, arXiv 2602.10693; the authors' script",
        _values("vespo", vespo_k_pos=2.0, vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0),
        minibatches=8,
    ),
}

# What an estimator divides by, where scale_rewards is not given.
_OWN_SCALE = {"rloo": "none", "reinforce_pp": "batch", "reinforce_pp_baseline": "batch", "maxrl": "none"}


def remembers_given(cls: Config) -> Config:
    """Class decorator above @dataclass: `config.given` holds the names of the constructor's arguments.

    A value that was given counts more than a preset's, also where it equals the default, which the value alone does
    not show.
    """
    made: Callable[..., None] = cls.__init__  # type: ignore[misc]
    signature = inspect.signature(made)

    @functools.wraps(made)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        self.given = frozenset(signature.bind(self, *args, **kwargs).arguments) - {"self"}
        made(self, *args, **kwargs)

    cls.__init__ = init  # type: ignore[misc]
    return cls


def apply_preset(config: Any) -> None:
    """Set what `config.algorithm` says and was not given, and note it in `config.preset`.

    A configuration that is read again has its `preset` noted already; nothing changes then, so that what the first
    reading decided is what the second one gives.

    Raises:
        ValueError: there is no such algorithm.
    """
    if config.algorithm not in (None, *PRESETS):
        raise ValueError(f"algorithm={config.algorithm!r}: choose {' or '.join(PRESETS)}")
    noted = dict(config.preset or {})
    if config.algorithm is not None and noted.get("algorithm") == config.algorithm:
        return
    options = {option.name for option in fields(config) if option.init}
    given: Set[str] = getattr(config, "given", options) & options
    # An argument parser and dataclasses.replace pass every option, given or not, and so does a configuration that was
    # resolved with another algorithm: then the values must tell.
    if given == options or noted:
        given = {name for name in given if not _as_left(config, name, noted)}
    config.preset = None
    if config.algorithm is None:
        if "scale_rewards" not in given:
            config.scale_rewards = _OWN_SCALE.get(config.advantage_estimator, config.scale_rewards)
        return
    preset = PRESETS[config.algorithm]
    chosen = _wanted(preset, config, given)
    for name, value in chosen.items():
        setattr(config, name, value)
    if "steps_per_generation" in chosen:
        config.generation_batch_size = None
        chosen["steps_per_generation"] = preset.minibatches  # what it reads after the batches are folded
    config.preset = {"algorithm": config.algorithm} | chosen


def _as_left(config: Any, name: str, noted: dict[str, Any]) -> bool:
    """Whether the option has its default, or what an earlier preset or TRL put in its place."""
    value = getattr(config, name)
    if name == "generation_batch_size" and config.steps_per_generation is not None:
        return True  # TRL computes it
    return is_default(config, name) or (name in noted and value == noted[name])


def _wanted(preset: Preset, config: Any, given: Set[str]) -> dict[str, Any]:
    """The preset's values for the options that were not given."""
    values = dict(preset.values)
    if not {"steps_per_generation", "generation_batch_size"} & given:
        values["steps_per_generation"] = preset.minibatches * config.gradient_accumulation_steps
    if preset.overlong_share:
        values["overlong_buffer"] = int(preset.overlong_share * config.max_completion_length)
    if "advantage_estimator" in given:
        values["scale_rewards"] = _OWN_SCALE.get(config.advantage_estimator, values["scale_rewards"])
    return {name: value for name, value in values.items() if name not in given}
