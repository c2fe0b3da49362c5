import dataclasses
import json
import math
import pickle
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
import trl
from colora.rl import option_values
from colora.rl.config import GRPOConfig
from colora.rl.options import ALSO_ACCEPTED, HONOURED_BY_TRANSFORMERS, HONOURED_HERE, INERT, REFUSED
from transformers.training_args import OptimizerNames


def make(**options):
    return GRPOConfig(**({"output_dir": "runs/test", "device": "cpu"} | options))


def test_every_option_of_trl_stands_in_exactly_one_table():
    """A release of TRL or transformers with a new option fails here until somebody decides what it means."""
    tables = [HONOURED_BY_TRANSFORMERS, HONOURED_HERE, set(INERT), set(REFUSED)]
    assert sum(map(len, tables)) == len(set().union(*tables))
    assert set().union(*tables) == {entry.name for entry in dataclasses.fields(trl.GRPOConfig)}
    assert set(ALSO_ACCEPTED) <= set(REFUSED)


# A value for every refused option that TRL would take, apart from its default.
OFF_DEFAULT = {
    "optim_target_modules": ["q_proj"], "label_smoothing_factor": 0.1, "neftune_noise_alpha": 5.0,
    "bf16_full_eval": True, "fp16_full_eval": True, "torch_compile": True, "torch_compile_backend": "inductor",
    "torch_compile_mode": "default", "use_liger_kernel": True, "liger_kernel_config": {"rope": True},
    "gradient_checkpointing_kwargs": {"use_reentrant": True}, "debug": "underflow_overflow", "use_cache": True,
    "torch_empty_cache_steps": 1, "auto_find_batch_size": True, "include_num_input_tokens_seen": "all",
    "prediction_loss_only": True, "eval_do_concat_batches": False, "eval_use_gather_object": True,
    "eval_accumulation_steps": 1, "include_for_metrics": ["inputs"], "batch_eval_metrics": True,
    "label_names": ["labels"], "local_rank": 0, "ddp_backend": "gloo", "parallelism_config": {"cp_size": 2},
    "fsdp": "full_shard", "fsdp_config": {"version": 2}, "deepspeed": "zero3.json",
    "accelerator_config": {"split_batches": True},
    "dataloader_num_workers": 2, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2,
    "dataloader_multiprocessing_context": "fork", "dataloader_in_order": False, "remove_unused_columns": True,
    "data_seed": 1, "train_sampling_strategy": "sequential", "length_column_name": "len", "trust_remote_code": True,
    "router_aux_loss_coef": 0.1, "pad_to_multiple_of": 8, "top_p": 0.9, "top_k": 20,
    "min_p": 0.1, "repetition_penalty": 1.1, "vllm_structured_outputs_regex": "a+", "generation_kwargs": {"seed": 1},
    "cache_implementation": "static", "use_transformers_continuous_batching": True,
    "transformers_continuous_batching_config": {"block_size": 16}, "use_transformers_paged": True,
    "vllm_mode": "server", "vllm_server_base_url": "http://localhost", "vllm_server_host": "localhost",
    "vllm_server_port": 1, "vllm_server_timeout": 1.0, "vllm_group_port": 1, "vllm_model_impl": "transformers",
    "vllm_gpu_memory_utilization": 0.5, "vllm_max_model_length": 1024, "vllm_tensor_parallel_size": 2,
    "use_adaptive_entropy": True, "entropy_coef_min": 0.1, "entropy_coef_max": 2.0, "entropy_coef_delta": 0.1,
    "entropy_target": 1.0, "sync_ref_model": True,
    "ref_model_mixup_alpha": 0.1, "ref_model_sync_steps": 1, "vllm_importance_sampling_cap": 2.0,
    "log_unique_prompts": True, "log_completions_hub_repo": "someone/completions",
}  # fmt: skip


def test_every_refused_option_is_tried():
    assert set(OFF_DEFAULT) == set(REFUSED)


@pytest.mark.parametrize("name", sorted(OFF_DEFAULT))
def test_a_refused_option_is_named_with_its_value_and_the_reason(name):
    with pytest.raises(ValueError) as error:
        make(**{name: OFF_DEFAULT[name]})
    message = str(error.value)
    assert message.startswith(f"{name}={OFF_DEFAULT[name]!r} cannot be used: ")
    assert REFUSED[name] in message


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in ALSO_ACCEPTED.items() for v in values])
def test_values_that_ask_for_what_happens_anyway_are_taken(name, value):
    make(**{name: value})


def test_an_option_of_a_later_trl_is_refused_off_its_default(monkeypatch):
    monkeypatch.delitem(REFUSED, "top_p")  # as if the tables had never heard of it
    make(top_p=1.0)
    with pytest.raises(ValueError, match="top_p=0.5 cannot be used: this version of colora does not know the option"):
        make(top_p=0.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"output_dir": None}, "output_dir is not given: name the directory"),
        ({"num_generations": 1}, "num_generations=1 must be a whole number of at least 2 .*a group needs at least two"),
        ({"num_generations": 8.0}, "num_generations=8.0 must be a whole number, not float"),
        ({"per_device_train_batch_size": True}, "per_device_train_batch_size=True must be a whole number, not bool"),
        ({"num_generations": 3}, "num_generations=3 does not divide the 8 completions"),
        ({"temperature": 0.0}, "temperature=0.0 must be a number above 0 .*nothing"),
        ({"temperature": math.nan}, "temperature=nan must be a number above 0"),
        ({"learning_rate": "1e-5"}, "learning_rate='1e-5' must be a number, not str"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be a number above 0"),
        ({"beta": -0.1}, "beta=-0.1 must be a number of at least 0"),
        ({"epsilon": None}, "epsilon=None must be a number"),
        ({"max_steps": 0}, "max_steps=0 must be a whole number of at least 1 .*-1 or not given: as many as num_tr"),
        ({"max_steps": -2}, "max_steps=-2 must be a whole number of at least 1"),
        ({"log_level": "loud"}, "log_level='loud': choose .* or passive"),
        ({"log_level_replica": "loud"}, "log_level_replica='loud': choose .* or passive"),
        ({"seed": -1}, "seed=-1 must be a whole number of at least 0"),
        ({"seed": 2**32}, "seed=4294967296 is more than .* lower it"),
        ({"tokens_per_microbatch": 0}, "tokens_per_microbatch=0 must be a whole number of at least 1"),
        ({"max_completion_length": None}, "max_completion_length=None"),
        ({"max_context": 9, "max_completion_length": 9}, "max_context=9 has no room for max_completion_length=9"),
        ({"reward_weights": [1.0, math.nan]}, "reward_weights=nan must be a number"),
        ({"reward_weights": 1.0}, "reward_weights=1.0 must be a list"),
        ({"loss_type": "gspo"}, "loss_type='gspo': choose grpo or bnpo .* or algorithm gspo"),
        ({"vllm_importance_sampling_mode": "icepop"}, "choose token_truncate or token_mask or sequence_truncate"),
        ({"importance_sampling_level": "group"}, "choose token or sequence or sequence_token"),
        ({"advantage_estimator": "gae"}, "choose group or rloo or reinforce_pp or reinforce_pp_baseline or maxrl"),
        ({"kl_estimator": "k4"}, "choose k1 or k2 or k3"),
        ({"old_logprobs": "none"}, "choose auto or engine or trainer"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile=1.5 must be a share"),
        ({"sapo_temperature_pos": 0}, "sapo_temperature_pos=0 must be a number above 0"),
        ({"max_sequence_gap": 0.0}, "max_sequence_gap=0.0 must be a number above 0"),
        ({"dynamic_sampling_max_rounds": 0}, "dynamic_sampling_max_rounds=0 must be a whole number of at least 1"),
        ({"overlong_buffer": -1}, "overlong_buffer=-1 must be a whole number of at least 0"),
        ({"scale_rewards": "max"}, "scale_rewards='max': choose group or batch or none"),
        ({"engine": "sglang"}, "engine='sglang': choose auto or vllm or transformers"),
        ({"engine": "transformers", "use_vllm": True}, "use_vllm=True contradicts engine='transformers'"),
        ({"engine_kwargs": "{oops"}, "engine_kwargs='{oops' is not JSON"),
        ({"chat_template_kwargs": "[1]"}, r"chat_template_kwargs=\[1\]: give a dict"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "model_init_kwargs: device_map cannot be used"),
        ({"bf16": True, "fp16": True}, "bf16=True and fp16=True contradict each other: set `dtype` alone"),
        ({"dtype": "float32", "bf16": True}, "dtype='float32' and bf16=True contradict each other"),
        ({"dtype": "int8"}, "dtype='int8': choose auto or float32 or bfloat16 or float16"),
        ({"base": "int4"}, "base='int4': choose auto or nf4 or fp4"),
        ({"device": "tpu"}, "device='tpu': give cpu or cuda"),
        ({"device": "cuda:1"}, "CUDA_VISIBLE_DEVICES"),
        ({"optim": "lomo"}, "optim='lomo' updates inside the backward pass"),
        ({"optim": "galore_adamw_8bit"}, "optim='galore_adamw_8bit' projects .* set optim to adamw_torch"),
        ({"optim": OptimizerNames.APOLLO_ADAMW}, "optim='apollo_adamw' projects the gradients of large matrices"),
        ({"optim": "schedule_free_adamw"}, "optim='schedule_free_adamw' has other weights while it trains"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "warmup_stable_decay' with .*num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr_rate should be set"),
        ({"lr_scheduler_kwargs": {"num_cycle": 2}, "lr_scheduler_type": "cosine"}, "num_cycle"),
        ({"report_to": "clearml"}, "report_to: clearml cannot be used: .* its package is not installed"),
        ({"chat_template_kwargs": {"truncation": True, "max_length": 5}}, "kwargs: max_length, truncation cannot be"),
        ({"save_strategy": "best"}, "save_strategy='best' with eval_strategy='no': .* none would be saved"),
        ({"metric_for_best_model": "loss"}, "an evaluation measures rewards"),
    ],
)  # fmt: skip
def test_a_bad_value_is_named_with_what_to_do(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_limits_of_the_rollout_correction_are_switched_off_by_none():
    bounds = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.5}
    config = make(max_sequence_gap=None, vllm_importance_sampling_clip_max=None, **bounds)
    assert config.max_sequence_gap is None and config.vllm_importance_sampling_clip_max is None


@pytest.mark.parametrize("optim", ["adamw_8bit", "paged_adamw_8bit", OptimizerNames.ADAMW_BNB])
def test_an_optimizer_of_bitsandbytes_wants_it_installed(monkeypatch, optim):
    assert make(optim=optim).optim == OptimizerNames(optim)
    monkeypatch.setattr(option_values, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r'8bit\' is of bitsandbytes, which is not installed: pip install "colora\[bnb\]"'
    ):
        make(optim=optim)
    with pytest.raises(ValueError, match="'adamw_torch_8bit' is of torchao, which is not installed"):
        make(optim="adamw_torch_8bit")
    make(optim="adamw_torch")


def test_defaults_are_the_documented_ones_and_honoured_options_pass():
    config = make(report_to="tensorboard", lr_scheduler_type="cosine", save_steps=5, save_total_limit=2, beta=0.04)
    assert (config.learning_rate, config.logging_steps) == (1e-5, 1)
    assert (config.vllm_importance_sampling_mode, config.vllm_importance_sampling_clip_max) == ("token_truncate", 2.0)
    assert config.report_to == ["tensorboard"]
    assert config.n_gpu <= 1 and config.mixed_precision == "no"


@pytest.mark.parametrize(
    ("options", "per_step", "generated", "minibatches"),
    [
        ({}, 8, 8, 1),
        ({"gradient_accumulation_steps": 4}, 32, 32, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "steps_per_generation": 8}, 8, 16, 2),
        ({"gradient_accumulation_steps": 2, "generation_batch_size": 64}, 16, 64, 4),
        ({"per_device_train_batch_size": 1, "steps_per_generation": 8}, 1, 8, 8),
    ],
)  # fmt: skip
def test_batches_have_trls_meaning(options, per_step, generated, minibatches):
    """TRL's own class gives the completions of a generation and of an optimizer step for the same options."""
    theirs = trl.GRPOConfig(output_dir="runs/test", use_cpu=True, bf16=False, **options)
    assert theirs.generation_batch_size == generated
    assert theirs.per_device_train_batch_size * theirs.gradient_accumulation_steps == per_step

    config = make(num_iterations=3, **options)
    assert (config.completions_per_step, config.completions_per_generation) == (per_step, generated)
    assert config.prompts_per_generation == generated // 8
    assert (config.minibatches_per_generation, config.updates_per_generation) == (minibatches, 3 * minibatches)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (per_step, 1)
    assert config.train_batch_size == per_step  # what transformers reads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 3}, "a step would mix two generations"),
        ({"generation_batch_size": 12}, "generation_batch_size=12 is no multiple of the 8 completions"),
        ({"generation_batch_size": 16, "steps_per_generation": 4}, "set one of the two, and the other to None"),
    ],
)
def test_batches_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_reading_a_folded_configuration_again_changes_nothing():
    config = make(
        per_device_train_batch_size=2, gradient_accumulation_steps=4, steps_per_generation=8, num_generations=4,
        num_generations_eval=3, eval_strategy="steps", bf16=True, engine_kwargs='{"batch_size": 4}',
        scale_rewards=False, model_init_kwargs={"dtype": "bfloat16"},
    )  # fmt: skip
    stored = config.to_dict()
    assert GRPOConfig(**json.loads(json.dumps(stored))).to_dict() == stored
    assert dataclasses.replace(config).to_dict() == stored
    assert dataclasses.replace(config, learning_rate=0.1).to_dict() == stored | {"learning_rate": 0.1}
    assert pickle.loads(pickle.dumps(config)).to_dict() == stored
    assert (config.dtype, config.bf16, config.scale_rewards) == ("bfloat16", False, "none")
    assert config.engine_kwargs == {"batch_size": 4}


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({}, "auto"),
        ({"bf16": False}, "auto"),  # what a stored configuration says
        ({"fp16": True}, "float16"),
        ({"dtype": torch.bfloat16}, "bfloat16"),
        ({"model_init_kwargs": '{"dtype": "float32"}'}, "float32"),
    ],
)
def test_dtype_may_be_named_in_several_ways(options, dtype):
    config = make(**options)
    assert (config.dtype, config.bf16, config.fp16) == (dtype, False, False)


def test_device_is_an_argument_and_reads_as_a_torch_device():
    config = make(device="cpu")
    assert config.use_cpu and config.device == torch.device("cpu")
    assert "device" not in config.to_dict()
    if not torch.cuda.is_available():
        assert GRPOConfig(output_dir="runs/test").device == torch.device("cpu")
        with pytest.raises(ValueError, match="device='cuda', but PyTorch finds no CUDA card"):
            make(device="cuda")


def test_the_best_checkpoint_is_told_by_reward():
    config = make(load_best_model_at_end=True, eval_strategy="steps", eval_steps=5, save_steps=5)
    assert (config.metric_for_best_model, config.greater_is_better) == ("reward", True)
    assert make().metric_for_best_model is None


def test_use_vllm_selects_the_engine():
    assert make(use_vllm=True).engine == "vllm"


def test_several_processes_and_autocast_from_the_environment_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", "2")
        with pytest.raises(ValueError, match="WORLD_SIZE=2: one process trains on one GPU"):
            make()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=bf16"):
        make()


def test_every_own_field_has_a_help_text():
    theirs = {entry.name for entry in dataclasses.fields(trl.GRPOConfig)}
    own = [entry for entry in dataclasses.fields(GRPOConfig) if entry.name not in theirs]
    assert {entry.name for entry in own} >= {"engine", "dtype", "tokens_per_microbatch", "reward_errors"}
    assert all(entry.metadata["help"] for entry in own)


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_importing_the_configuration_does_not_import_vllm():
    program = "import sys, colora.rl.config; sys.exit('vllm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
