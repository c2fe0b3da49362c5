"""Where every option of `trl.GRPOConfig` stands: honoured, without effect by nature, or refused with a reason.

The three tables together name each field of `trl.GRPOConfig` (and so of `transformers.TrainingArguments`) once. Nothing
a user sets is dropped silently: a refused option, or one of a later TRL that no table knows, may only keep its default.
"""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _same(reason: str, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, reason)


HONOURED_BY_TRANSFORMERS = _names(
    """
    output_dir num_train_epochs max_steps
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay
    adam_beta1 adam_beta2 adam_epsilon max_grad_norm tf32
    logging_strategy logging_steps logging_first_step logging_nan_inf_filter log_level disable_tqdm report_to run_name
    project trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics
    eval_strategy eval_steps eval_delay eval_on_start
    save_strategy save_steps save_total_limit save_only_model enable_jit_checkpoint
    load_best_model_at_end metric_for_best_model greater_is_better
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed use_cpu
    """
)

HONOURED_HERE = _names(
    """
    per_device_train_batch_size gradient_accumulation_steps generation_batch_size steps_per_generation
    num_generations num_generations_eval num_iterations max_completion_length temperature resume_from_checkpoint
    shuffle_dataset chat_template_kwargs model_init_kwargs bf16 fp16 gradient_checkpointing use_vllm
    loss_type beta epsilon epsilon_high delta use_bias_correction_kl mask_truncated_completions
    reward_weights multi_objective_aggregation scale_rewards
    importance_sampling_level sapo_temperature_neg sapo_temperature_pos
    vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg
    top_entropy_quantile entropy_coef off_policy_mask_threshold cast_lm_head_to_fp32
    vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
    log_completions num_completions_to_print max_tool_calling_iterations
    """
)

HONOURED = HONOURED_BY_TRANSFORMERS | HONOURED_HERE

# Any value is accepted, because none could change what a run does.
INERT: dict[str, str] = {
    **_same(
        "there is one process",
        "average_tokens_across_devices",
        "ddp_broadcast_buffers",
        "ddp_bucket_cap_mb",
        "ddp_find_unused_parameters",
        "ddp_static_graph",
        "ddp_timeout",
        "ds3_gather_for_generation",
        "log_level_replica",
        "log_on_each_node",
        "save_on_each_node",
    ),
    **_same("transformers keeps it for scripts; its Trainer does not read it", "do_train", "do_eval", "do_predict"),
    "dataloader_drop_last": "a generation batch is always whole",
    "dataloader_pin_memory": "no tensors come out of the data loader",
    "disable_dropout": "the policy has no dropout",
    "log_multimodal": "prompts are text",
    "per_device_eval_batch_size": "the engine takes all prompts of an evaluation and batches them itself",
    "vllm_enable_sleep_mode": "the KV memory always sleeps while training and the shared weights never do",
}

_ONE_PROCESS = "one process trains on one GPU; start it without torchrun or accelerate launch"
_PACKED = "the policy is colora's own decoder and is not wrapped, patched or compiled by transformers"
_BIASED = (
    "the ratio is biased: the engine's log-probs would be those of a reshaped distribution, the trainer's those of the "
    "model. Change `temperature` instead, which both sides apply"
)
_ADAPTIVE = "the weight of the entropy does not adapt; set `entropy_coef` to a constant"
_EVAL = "evaluation is by reward functions on generated completions, not by labels"
_SERVER = "the engine runs in the trainer's process, because it shares the weights; there is no server to reach"
_PROMPTS = "the dataset yields only prompts, which are tokenized in the trainer's process"
_PAGED = "the transformers engine batches by itself; for more speed use engine='vllm'"
_REFERENCE = "the reference is the base model with the adapter switched off, which cannot move"
_DTYPE = "the weights have one dtype, for training and evaluation; set `dtype`"

# Only the default is accepted. The text completes the sentence "OPTION=VALUE cannot be used: ...".
REFUSED: dict[str, str] = {
    **_same(
        "adapter weights are the only trainable parameters; choose them by LoraConfig.target_modules",
        "optim_target_modules",
    ),
    **_same("the loss is a policy gradient, not a cross-entropy", "label_smoothing_factor", "neftune_noise_alpha"),
    **_same(_DTYPE, "bf16_full_eval", "fp16_full_eval"),
    **_same(
        _PACKED,
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "use_liger_kernel",
        "liger_kernel_config",
        "gradient_checkpointing_kwargs",
        "debug",
    ),
    "use_cache": "the training forward keeps no KV cache; the engine has its own",
    "torch_empty_cache_steps": "memory is bounded by `tokens_per_microbatch`; lower that instead",
    "auto_find_batch_size": "a batch holds whole groups of completions; lower `tokens_per_microbatch` to save memory",
    "include_num_input_tokens_seen": "the log has `num_tokens` instead",
    **_same(
        _EVAL,
        "prediction_loss_only",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "eval_accumulation_steps",
        "include_for_metrics",
        "batch_eval_metrics",
        "label_names",
    ),
    **_same(_ONE_PROCESS, "local_rank", "ddp_backend", "parallelism_config", "fsdp", "fsdp_config", "deepspeed"),
    "accelerator_config": "batches are built here, packed to `tokens_per_microbatch`; accelerate has nothing to split",
    **_same(
        _PROMPTS,
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
    ),
    "remove_unused_columns": "reward functions get every column; drop some with Dataset.remove_columns",
    **_same(
        "the order of prompts is set by `shuffle_dataset` and `seed`",
        "data_seed",
        "train_sampling_strategy",
        "length_column_name",
    ),
    "trust_remote_code": "the policy is colora's own decoder; no code of a checkpoint is run",
    "router_aux_loss_coef": "mixture-of-experts models are not among the known families",
    "pad_to_multiple_of": "sequences are packed, never padded",
    **_same(_BIASED, "top_p", "top_k", "min_p", "repetition_penalty", "vllm_structured_outputs_regex"),
    "generation_kwargs": "sampling unknown to the trainer biases the ratio; engine settings go into `engine_kwargs`",
    **_same(_PAGED, "cache_implementation", "use_transformers_continuous_batching"),
    **_same(_PAGED, "transformers_continuous_batching_config", "use_transformers_paged"),
    **_same(
        _SERVER,
        "vllm_mode",
        "vllm_server_base_url",
        "vllm_server_host",
        "vllm_server_port",
        "vllm_server_timeout",
        "vllm_group_port",
    ),
    "vllm_model_impl": "the weights are shared with vLLM's own implementation of the model",
    "vllm_gpu_memory_utilization": "the KV memory is set from the card and the needs of training; see `engine_kwargs`",
    "vllm_max_model_length": "set `max_context`, which every engine and the trainer obey",
    "vllm_tensor_parallel_size": _ONE_PROCESS,
    **_same(_ADAPTIVE, "use_adaptive_entropy", "entropy_coef_min", "entropy_coef_max"),
    **_same(_ADAPTIVE, "entropy_coef_delta", "entropy_target"),
    **_same(_REFERENCE, "sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    "vllm_importance_sampling_cap": "it has a new name: vllm_importance_sampling_clip_max",
    "log_unique_prompts": "every completion of a group is logged, to be compared with the others",
    "log_completions_hub_repo": "completions are written to the output directory; upload them from there",
}

# Values other than the default that ask for what happens anyway, or that TRL itself puts in place of the default.
ALSO_ACCEPTED: dict[str, tuple[object, ...]] = {
    "debug": ([], None),  # None: how argument parsers pass it
    "fsdp": ([], False),
    "gradient_checkpointing_kwargs": ({}, {"use_reentrant": False}),
    "include_num_input_tokens_seen": (False,),
    "min_p": (0.0,),
    "optim_target_modules": ([],),
    "pad_to_multiple_of": (None,),
    "top_k": (-1, None),  # vLLM's and older TRL's way to say "all tokens"
}
