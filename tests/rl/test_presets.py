import dataclasses
import json
import pickle
import warnings

import pytest
import yaml
from colora.rl.config import GRPOConfig
from colora.rl.options import REFUSED
from colora.rl.presets import PRESETS
from colora.rl.resolved import resolved_yaml
from colora.rl.run_config import read_run_config
from transformers import HfArgumentParser
from trl import TrlParser

OPTIONS = {option.name for option in dataclasses.fields(GRPOConfig)} - REFUSED.keys()


def make(**options):
    return GRPOConfig(**({"output_dir": "runs/test", "device": "cpu"} | options))


@pytest.fixture
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_configuration_without_warnings(name, quiet):
    config = make(algorithm=name, gradient_accumulation_steps=2, max_completion_length=1000)
    preset = PRESETS[name]
    assert {option: getattr(config, option) for option in preset.values} == preset.values
    assert config.updates_per_generation == preset.minibatches
    assert config.overlong_buffer == int(preset.overlong_share * 1000)
    assert preset.values.keys() <= OPTIONS


def test_presets_have_the_values_of_their_papers():
    """Written down again from the papers, not from the table."""
    gspo = make(algorithm="gspo")  # arXiv 2507.18071, section 5.1
    assert (gspo.loss_type, gspo.importance_sampling_level, gspo.beta) == ("grpo", "sequence", 0)
    assert (gspo.epsilon, gspo.epsilon_high, gspo.minibatches_per_generation) == (3e-4, 4e-4, 4)
    dapo = make(algorithm="dapo", max_completion_length=20480)  # arXiv 2503.14476, section 4.1
    assert (dapo.epsilon, dapo.epsilon_high, dapo.minibatches_per_generation) == (0.2, 0.28, 16)
    assert (dapo.overlong_buffer, dapo.overlong_penalty, dapo.dynamic_sampling) == (4096, 1.0, True)
    grpo = make(algorithm="grpo")  # arXiv 2402.03300, section 4.2
    assert (grpo.beta, grpo.kl_estimator, grpo.use_bias_correction_kl, grpo.updates_per_generation) == (
        0.04, "k3", False, 1,
    )  # fmt: skip
    dr_grpo = make(algorithm="dr_grpo")  # arXiv 2503.20783, section 3.2
    assert (dr_grpo.loss_type, dr_grpo.scale_rewards, dr_grpo.beta) == ("dr_grpo", "none", 0)
    cispo = make(algorithm="cispo")  # arXiv 2506.13585, section 3.1; 2510.13786
    assert (cispo.loss_type, cispo.epsilon_high, cispo.cast_lm_head_to_fp32) == ("cispo", 5.0, True)
    rloo = make(algorithm="rloo")  # arXiv 2402.14740, appendix C
    assert (rloo.advantage_estimator, rloo.kl_in_reward, rloo.kl_estimator, rloo.beta) == ("rloo", True, "k1", 0.03)


def test_a_given_value_wins_also_where_it_is_the_default():
    config = make(algorithm="gspo", epsilon_high=2e-4, importance_sampling_level="token", beta=0.0, epsilon=0.2)
    assert (config.epsilon, config.epsilon_high, config.importance_sampling_level) == (0.2, 2e-4, "token")
    assert not {"epsilon", "epsilon_high", "importance_sampling_level", "beta"} & config.preset.keys()
    assert config.preset["steps_per_generation"] == 4
    assert make(algorithm="dapo", dynamic_sampling=False, overlong_buffer=0).overlong_buffer == 0
    assert GRPOConfig("runs/test", algorithm="gspo", device="cpu").output_dir == "runs/test"


@pytest.mark.parametrize(
    ("options", "minibatches"),
    [
        ({}, 4),
        ({"gradient_accumulation_steps": 4}, 4),
        ({"steps_per_generation": 1}, 1),
        ({"generation_batch_size": 16}, 2),
        ({"generation_batch_size": 16, "per_device_train_batch_size": 16}, 1),
    ],
)
def test_the_minibatches_give_way_to_batches_that_were_given(options, minibatches):
    assert make(algorithm="gspo", **options).minibatches_per_generation == minibatches


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PRESETS)
def test_a_configuration_that_is_read_again_is_the_same(name, tmp_path):
    config = make(algorithm=name, epsilon=0.2, gradient_accumulation_steps=2, max_completion_length=100)
    stored = config.to_dict()
    assert GRPOConfig(**json.loads(json.dumps(stored))).to_dict() == stored
    assert dataclasses.replace(config).to_dict() == stored
    assert pickle.loads(pickle.dumps(config)).to_dict() == stored

    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: m\ndataset: d\nreward_funcs: [a:f]\noutput_dir: out\nalgorithm: {name}\nepsilon: 0.2\n"
        "gradient_accumulation_steps: 2\nmax_completion_length: 100\ndevice: cpu\n"
    )
    run = read_run_config(path)
    text = resolved_yaml(run, run.grpo_config())
    path.write_text(text)
    again = read_run_config(path)
    assert again.grpo_config().to_dict() == run.grpo_config().to_dict() == stored | {"output_dir": "out"}
    assert resolved_yaml(again, again.grpo_config()) == text


def test_the_resolved_configuration_shows_what_the_preset_set(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: m\ndataset: d\nreward_funcs: [a:f]\noutput_dir: out\nalgorithm: gspo\nepsilon_high: 5e-4\ndevice: cpu"
    )
    run = read_run_config(path)
    chosen, by_preset, rest = resolved_yaml(run, run.grpo_config()).split("\n# ")[:3]
    assert "epsilon_high: 0.0005" in chosen
    assert by_preset.startswith("set by algorithm gspo\n")
    shown = yaml.safe_load(by_preset.partition("\n")[2])
    assert shown["epsilon"] == 3e-4 and shown["importance_sampling_level"] == "sequence"
    assert "epsilon_high" not in shown and "epsilon" not in yaml.safe_load(rest.partition("\n")[2])


@pytest.mark.parametrize("parser", [HfArgumentParser, TrlParser])
def test_argument_parsers_which_pass_every_option_can_use_presets(parser):
    arguments = ["--output_dir", "out", "--use_cpu", "--algorithm", "gspo", "--epsilon_high", "5e-4"]
    (config,) = parser((GRPOConfig,)).parse_args_into_dataclasses(arguments)
    assert (config.epsilon, config.epsilon_high, config.importance_sampling_level) == (3e-4, 5e-4, "sequence")
    assert config.minibatches_per_generation == 4


def test_another_algorithm_can_be_put_in_the_place_of_one(tmp_path):
    config = dataclasses.replace(make(algorithm="gspo"), algorithm="dapo")
    assert config.to_dict() == make(algorithm="dapo").to_dict()
    assert dataclasses.replace(config, algorithm=None).algorithm is None


def test_a_subclass_can_add_fields():
    @dataclasses.dataclass
    class Extended(GRPOConfig):
        mine: int = 0

    config = Extended(output_dir="runs/test", device="cpu", algorithm="gspo", mine=3, epsilon=5e-4)
    assert (config.mine, config.epsilon, config.epsilon_high) == (3, 5e-4, 4e-4)


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="algorithm='ppo': choose grpo or dr_grpo or .* or vespo"):
        make(algorithm="ppo")


def test_a_preset_that_sets_nothing_is_told():
    preset = PRESETS["bnpo"]
    with pytest.warns(UserWarning, match="algorithm='bnpo' sets nothing: all that it would set is given"):
        make(algorithm="bnpo", steps_per_generation=1, **preset.values)


@pytest.mark.parametrize(
    ("estimator", "scale"),
    [
        ("group", "group"),
        ("rloo", "none"),
        ("reinforce_pp", "batch"),
        ("reinforce_pp_baseline", "batch"),
        ("maxrl", "none"),
    ],
)
def test_an_estimator_brings_its_scale(estimator, scale):
    assert make(advantage_estimator=estimator).scale_rewards == scale
    assert make(algorithm="gspo", advantage_estimator=estimator).scale_rewards == scale
    stored = make(advantage_estimator=estimator).to_dict()
    assert GRPOConfig(**stored).to_dict() == stored
