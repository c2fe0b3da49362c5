"""`GRPOConfig`: TRL's options, checked, plus the ones that only make sense with shared weights."""

import json
import math
import os
from dataclasses import InitVar, dataclass, field, fields
from typing import Any, Literal

import torch
import trl

from ..kernels.tiled_mlp import TILE_TOKENS
from .detector_limits import DetectorLimits
from .option_rules import check_combinations, warn_of_combinations
from .option_values import (
    check_choices,
    check_numbers,
    check_optimizer,
    check_reports,
    check_schedule,
    check_template_kwargs,
    is_default,
)
from .options import HONOURED, INERT, REFUSED
from .presets import apply_preset, remembers_given

DEVICE_HELP = "Where to run: `cuda` or `cpu`. Not given: CUDA where there is a card, else the CPU."


class _Device:
    """`args.device` as transformers has it, next to a `device=` that may be passed to the constructor.

    Read on the class it is None, which dataclasses takes as the default of the constructor's argument.
    """

    def __get__(self, config: "GRPOConfig | None", owner: type | None = None) -> torch.device | None:
        return None if config is None else super(GRPOConfig, config).device


@remembers_given
@dataclass
class GRPOConfig(trl.GRPOConfig):
    """Options of `GRPOTrainer`: those of `trl.GRPOConfig` and `transformers.TrainingArguments`, and the fields below.

    Every value is checked when the object is made, before any model is loaded; an option of TRL that this trainer does
    not honour raises a ValueError instead of being ignored (`colora.rl.options` lists where each option stands).

    Defaults that differ from TRL's:

    - `learning_rate` 1e-5 (TRL: 1e-6): only LoRA matrices are trained, which want a larger step than full weights.
    - `vllm_importance_sampling_mode` "token_truncate" and `..._clip_max` 2.0 (TRL: "sequence_mask", 3.0): a cap on the
      summed log-ratio of a sequence masks nearly every completion of some thousand tokens.
    - `cast_lm_head_to_fp32` True (TRL: False): a bfloat16 logit of 16 is off by up to 0.06 nats, on the engine's side
      and on the trainer's; sums kept in float32 cost neither a copy of the head nor time.
    - `logging_steps` 1 (TRL: 10): a step takes seconds to minutes, so each is worth a line.
    - `output_dir` must be given (TRL: "trainer_output"): two runs would otherwise write over each other.
    - `metric_for_best_model` is "reward" where one is needed (transformers: "loss"): evaluations measure rewards.

    `algorithm` names a preset: every option that its paper set has the paper's value, unless it is given. What was
    given wins also where it equals the default; `preset` says afterwards what the preset set. Where every option is
    passed (argument parsers, dataclasses.replace), one that equals its default counts as not given.

    Batches. As in TRL, an optimizer step takes `per_device_train_batch_size * gradient_accumulation_steps`
    completions. How they are cut for memory is decided by `tokens_per_microbatch`, so the two are folded: afterwards
    `per_device_train_batch_size` is the product, `gradient_accumulation_steps` is 1 and `steps_per_generation` counts
    optimizer steps.

    Precision. The base weights themselves have `dtype` and no autocast runs; `bf16=True` and `fp16=True` select the
    dtype and read False afterwards. The adapter's master weights are float32 always.

    `device` ("cpu", "cuda", or None: CUDA if there is a card, else the CPU) is an argument of the constructor;
    reading `args.device` gives the torch.device. What is stored is `use_cpu`.

    Raises:
        ValueError: names the field, its value, why it cannot be used and what to do.
    """

    device: InitVar[str | torch.device | None] = _Device()

    learning_rate: float = field(
        default=1e-5, metadata={"help": "Step size of the optimizer on the LoRA matrices, above 0."}
    )
    logging_steps: float = field(
        default=1, metadata={"help": "Log every so many optimizer steps; below 1, a fraction of all steps."}
    )
    vllm_importance_sampling_mode: str = field(
        default="token_truncate",
        metadata={
            "help": "How the gap between engine and trainer is corrected. The weight is each token's ratio of trainer "
            "to engine probability (`token_...`), or the product of a completion's ratios (`sequence_...`), or their "
            "geometric mean (`sequence_mean_...`); outside the bounds it is cut (`..._truncate`) or 0 (`..._mask`)."
        },
    )
    vllm_importance_sampling_clip_max: float | None = field(
        default=2.0, metadata={"help": "Upper bound of that weight. Null: none."}
    )
    algorithm: str | None = field(
        default=None,
        metadata={
            "help": "A preset: sets an algorithm's options to what its paper used, but for those given. One of "
            "grpo, dr_grpo, bnpo, dapo, gspo, gspo_token, cispo, sapo, luspo, gmpo, rloo, reinforce_pp, "
            "reinforce_pp_baseline, maxrl, vespo; docs/algorithms.md has a table of them."
        },
    )
    preset: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Filled in: the options that `algorithm` set, for whoever reads the configuration again."},
    )
    advantage_estimator: str = field(
        default="group",
        metadata={
            "help": "What a reward is compared with: `group` (mean of its group, scaled as scale_rewards says), `rloo` "
            "(mean of the others of its group), `reinforce_pp` (all completions: their mean and deviation), "
            "`reinforce_pp_baseline` (mean of its group, deviation of all), `maxrl` (mean of its group, divided by it)."
        },
    )
    kl_estimator: str = field(
        default="k3",
        metadata={"help": "Estimate of the KL divergence of each token to the base model: `k1`, `k2` or `k3`."},
    )
    kl_in_reward: bool = field(
        default=False,
        metadata={
            "help": "Take beta times the completion's summed KL divergence from its reward, instead of adding it to "
            "the loss."
        },
    )
    old_logprobs: str = field(
        default="auto",
        metadata={
            "help": "Whose log-probs the ratio is taken against: the `engine`'s, with which tokens were sampled, or "
            "the `trainer`'s before the first update. `auto`: the engine's where each generation has one update and "
            "ratios are of tokens, else the trainer's."
        },
    )
    max_sequence_gap: float | None = field(
        default=0.1,
        metadata={
            "help": "Completions whose log-probs in trainer and engine differ by more than this many nats on average "
            "over their tokens are left out of the loss. Null: none is."
        },
    )
    dynamic_sampling: bool = field(
        default=False,
        metadata={"help": "Replace groups without signal by groups of other prompts until the batch is full (DAPO)."},
    )
    dynamic_sampling_max_rounds: int = field(
        default=10,
        metadata={"help": "Generations at most for one batch with dynamic_sampling; it goes on with what there is."},
    )
    overlong_buffer: int = field(
        default=0,
        metadata={
            "help": "In the last so many tokens before max_completion_length a penalty rises from 0 to "
            "overlong_penalty (DAPO's soft punishment). 0: none."
        },
    )
    overlong_penalty: float = field(
        default=1.0, metadata={"help": "What a completion of max_completion_length tokens loses, with overlong_buffer."}
    )
    cast_lm_head_to_fp32: bool = field(
        default=True,
        metadata={"help": "Logits of engine and trainer as fp32 sums; false: rounded to the dtype of the weights."},
    )
    engine: str = field(
        default="auto",
        metadata={"help": "Who generates: `vllm`, `transformers`, or `auto`: vLLM on a GPU where it is installed."},
    )
    engine_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Arguments passed on to the engine as they are: a mapping, or one as JSON text."},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Dtype of the base weights: float32, bfloat16, float16. `auto`: float32 on the CPU; on a GPU the "
            "checkpoint's, or bfloat16 where that is float32."
        },
    )
    base: str = field(
        default="auto",
        metadata={
            "help": "How the frozen base is held. `nf4`: its linears are quantised to bitsandbytes' NF4 (4 bits) while "
            "they load, for engine and trainer alike; `fp4`: to FP4 (e2m1), which decodes faster. `auto`: as the "
            "checkpoint has them, unquantised or in NF4."
        },
    )
    tokens_per_microbatch: int = field(
        default=8192,
        metadata={
            "help": "Most tokens in one packed forward and backward: sets memory, changes no result. Completions of a "
            "prompt that are in one row share it: with room for all of a group it is computed once."
        },
    )
    activation_offload: str = field(
        default="auto",
        metadata={
            "help": "Where the blocks' inputs wait for the backward pass with gradient_checkpointing: `true`: all but "
            "the last in page-locked host memory, copied beside the computation; `false`: on the GPU; `auto`: on the "
            "GPU those that fit in half of its free memory, the rest in host memory. Unless `false`, attention's "
            "results wait there too where there is room for as much again, computed once. Changes no result."
        },
    )
    mlp_tile_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens for which an MLP's intermediate values are held at a time, with "
            f"gradient_checkpointing. Not given: {TILE_TOKENS}."
        },
    )
    kernels: str = field(
        default="auto",
        metadata={
            "help": "`reference`: the trainer computes in plain PyTorch, which is slow: for comparisons. `auto`: with "
            "kernels on a GPU. The engine takes no notice."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens in a prompt. A longer one is an error; prompts are never truncated."},
    )
    max_context: int | None = field(
        default=None,
        metadata={"help": "Most tokens in a prompt and its completion. Not given: what the model was made for."},
    )
    reward_errors: Literal["stop", "none"] = field(
        default="stop",
        metadata={"help": "When a reward function fails: `stop` the run, or score that sample `none` and go on."},
    )
    reward_workers: int = field(
        default=0,
        metadata={
            "help": "Worker processes that reward functions run in, so that one that hangs or crashes is killed and "
            "costs only its sample. 0: they run in the process of the training, without limits."
        },
    )
    reward_timeout: float = field(
        default=60.0,
        metadata={"help": "Seconds that a call of a reward function may take, in a worker or where it is async."},
    )
    reward_memory_gib: float = field(
        default=4.0,
        metadata={"help": "GiB of memory that a reward worker may use, its imports included, before it is killed."},
    )
    reward_failure_share: float = field(
        default=0.5,
        metadata={"help": "Stop when a reward function fails on more than this share of the completions."},
    )
    reward_concurrency: int = field(
        default=32, metadata={"help": "Calls of async reward functions, of all together, that are under way at once."}
    )
    tool_timeout: float = field(
        default=60.0,
        metadata={"help": "Seconds that a call of a tool may take before the model is told that it took too long."},
    )
    tool_threads: int = field(
        default=64, metadata={"help": "Calls of tools that are under way at once, but for async ones."}
    )
    reproducible_tools: bool = field(
        default=False,
        metadata={
            "help": "Let the engine wait for every call of a tool. Else the last bits of log-probs depend on how long "
            "tools take, so that a run with tools cannot be repeated bit for bit."
        },
    )
    conversation_timeout: float | None = field(
        default=None,
        metadata={"help": "Seconds after which a conversation with tools has no further turn. Not given: no limit."},
    )
    detectors: bool = field(
        default=True,
        metadata={
            "help": "Warn, and log `detectors/...`, when rewards lose their variance, lengths drift, one reward "
            "dominates, completions are copies, or the reward rises while that of evaluations falls."
        },
    )
    detector_limits: dict[str, Any] | None = field(
        default=None,
        metadata={"help": "Other limits for them, by name, as a mapping or JSON; docs/rewards.md has the names."},
    )
    parity_limit: float | None = field(
        default=None,
        metadata={
            "help": "Stop when engine and trainer disagree by more than this many nats a token on average. Not given: "
            "1e-3 in float32, 0.05 in bfloat16, 0.02 in float16."
        },
    )
    log_entropy: bool = field(
        default=True, metadata={"help": "Log the mean entropy of the policy's next-token distributions, in nats."}
    )

    def __post_init__(self, device: str | torch.device | None) -> None:
        self._check_one_process()
        self._check_output_dir()
        self._settle_device(device)
        self._parse_dicts()
        self._settle_dtype()
        self._check_options()
        self._check_values()
        apply_preset(self)
        self._settle_engine()
        check_combinations(self)
        self._settle_best_metric()
        self._fold_batches()
        super().__post_init__()
        check_schedule(self)
        check_reports(self.report_to or [])
        if self.mixed_precision != "no":
            raise ValueError(
                f"ACCELERATE_MIXED_PRECISION={self.mixed_precision} is set in the environment, but no autocast runs "
                "here: unset it and choose the dtype of the weights with `dtype`"
            )
        warn_of_combinations(self)
        self._n_gpu = 1  # else transformers would spread a batch over every card it sees with DataParallel

    # TRL declares these two as possibly None; `_check_values` made sure that they are not.

    @property
    def group_size(self) -> int:
        """Completions of one prompt: `num_generations`."""
        assert self.num_generations is not None
        return self.num_generations

    @property
    def completion_limit(self) -> int:
        """Most tokens in a completion: `max_completion_length`."""
        assert self.max_completion_length is not None
        return self.max_completion_length

    # What follows from the folded batch.

    @property
    def completions_per_step(self) -> int:
        """Completions in one optimizer step."""
        return self.per_device_train_batch_size

    @property
    def completions_per_generation(self) -> int:
        """Completions generated at a time, with one state of the weights."""
        assert self.generation_batch_size is not None  # TRL's __post_init__ fills it in
        return self.generation_batch_size

    @property
    def prompts_per_generation(self) -> int:
        """Different prompts among them: one for each group of `num_generations`."""
        return self.completions_per_generation // self.group_size

    @property
    def minibatches_per_generation(self) -> int:
        """Equal parts that the completions of one generation are cut into, one optimizer step each."""
        return self.completions_per_generation // self.completions_per_step

    @property
    def updates_per_generation(self) -> int:
        """Optimizer steps before the next generation: each part, `num_iterations` times."""
        return self.minibatches_per_generation * self.num_iterations

    # The rules, in the order in which __post_init__ applies them.

    def _check_one_process(self) -> None:
        # Read before transformers does, which would wait here for the other processes to join.
        processes = os.environ.get("WORLD_SIZE", "1")
        if processes != "1":
            raise ValueError(f"WORLD_SIZE={processes}: {REFUSED['local_rank']}")

    def _check_output_dir(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is not given: name the directory for checkpoints, rollouts and logs")

    def _settle_device(self, device: str | torch.device | None) -> None:
        has_cuda = torch.cuda.is_available()
        if device is None:
            self.use_cpu = self.use_cpu or not has_cuda
            return
        if str(device) not in ("cpu", "cuda", "cuda:0"):
            raise ValueError(f"device={str(device)!r}: give cpu or cuda; choose among cards with CUDA_VISIBLE_DEVICES")
        if str(device) == "cpu":
            self.use_cpu = True
        elif not has_cuda:
            raise ValueError(f"device={str(device)!r}, but PyTorch finds no CUDA card: give cpu, or see `colora env`")
        elif self.use_cpu:
            raise ValueError(f"device={str(device)!r} contradicts use_cpu=True: give only one of the two")

    def _parse_dicts(self) -> None:
        for name in ("engine_kwargs", "chat_template_kwargs", "model_init_kwargs", "preset", "detector_limits"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    value = json.loads(value)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{name}={value!r} is not JSON ({error}): give a dict") from None
            if not isinstance(value, dict | None):
                raise ValueError(f"{name}={value!r}: give a dict, or one as a JSON string")
            setattr(self, name, value)

    def _settle_dtype(self) -> None:
        """Bring the four ways of naming a dtype together in `dtype`."""
        init_kwargs = self.model_init_kwargs or {}
        assert isinstance(init_kwargs, dict)  # _parse_dicts came before
        unknown = set(init_kwargs) - {"dtype"}
        if unknown:
            raise ValueError(
                f"model_init_kwargs: {', '.join(sorted(unknown))} cannot be used, because the policy is colora's own "
                "decoder: it takes dtype alone. For a revision, download it and give its directory as the model"
            )
        asked = {f"dtype={self.dtype!r}": str(self.dtype), "model_init_kwargs['dtype']": str(init_kwargs.get("dtype"))}
        asked |= {"bf16=True": "bfloat16"} if self.bf16 else {}
        asked |= {"fp16=True": "float16"} if self.fp16 else {}
        asked = {how: name.removeprefix("torch.") for how, name in asked.items() if name not in ("auto", "None")}
        if len(set(asked.values())) > 1:
            raise ValueError(f"{' and '.join(asked)} contradict each other: set `dtype` alone")
        self.dtype = next(iter(asked.values()), "auto")
        self.bf16 = self.fp16 = False

    def _check_options(self) -> None:
        for option in fields(trl.GRPOConfig):
            name, value = option.name, getattr(self, option.name)
            if name in HONOURED or name in INERT or is_default(self, name):
                continue
            reason = REFUSED.get(name, "this version of colora does not know the option")
            raise ValueError(f"{name}={value!r} cannot be used: {reason}. Leave it out of the configuration")

    def _check_values(self) -> None:
        on_off: dict[Any, str] = {True: "group", False: "none", "true": "group", "false": "none"}
        self.scale_rewards = on_off.get(self.scale_rewards, self.scale_rewards)
        switch: dict[Any, str] = {True: "true", False: "false"}  # what YAML makes of them
        self.activation_offload = switch.get(self.activation_offload, self.activation_offload)
        check_choices(self)
        check_numbers(self)
        DetectorLimits.of(self.detector_limits)
        check_optimizer(self.optim)
        assert not isinstance(self.chat_template_kwargs, str)  # _parse_dicts came before
        check_template_kwargs(self.chat_template_kwargs)
        self._check_lengths()

    def _check_lengths(self) -> None:
        if self.max_completion_length is None:
            raise ValueError("max_completion_length=None: give the most tokens a completion may have")
        longest = self.max_completion_length + (self.max_prompt_length or 1)
        if self.max_context is not None and longest > self.max_context:
            raise ValueError(
                f"max_context={self.max_context} has no room for "
                f"max_completion_length={self.max_completion_length} after a prompt of "
                f"{self.max_prompt_length or 1} tokens: raise max_context or lower the others"
            )

    def _settle_engine(self) -> None:
        if self.use_vllm:
            if self.engine == "transformers":
                raise ValueError("use_vllm=True contradicts engine='transformers': set `engine` alone")
            self.engine = "vllm"

    def _settle_best_metric(self) -> None:
        if self.metric_for_best_model in ("loss", "eval_loss"):
            raise ValueError("metric_for_best_model='loss': an evaluation measures rewards, not a loss; use 'reward'")
        if self.save_strategy == "best" and self.eval_strategy == "no":
            raise ValueError(
                "save_strategy='best' with eval_strategy='no': evaluations say which checkpoint is the best, so none "
                "would be saved. Set eval_strategy, or save_strategy to steps"
            )
        compares = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and (
            compares or self.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")
        ):
            self.metric_for_best_model = "reward"

    def _fold_batches(self) -> None:
        accumulation, group = self.gradient_accumulation_steps, self.group_size
        per_step = self.per_device_train_batch_size * accumulation
        generated = self._completions_asked(per_step)
        if generated % per_step:
            raise ValueError(
                f"generation_batch_size={generated} is no multiple of the {per_step} completions of an optimizer step "
                f"(per_device_train_batch_size={self.per_device_train_batch_size} * gradient_accumulation_steps="
                f"{accumulation}): a step would mix two generations"
            )
        if generated % group:
            raise ValueError(
                f"num_generations={group} does not divide the {generated} completions generated at a time "
                "(generation_batch_size, or per_device_train_batch_size * steps_per_generation): make groups whole"
            )
        self.per_device_train_batch_size, self.gradient_accumulation_steps = per_step, 1
        # TRL's __post_init__ takes one of the two and computes the other.
        self.steps_per_generation, self.generation_batch_size = generated // per_step, None
        # Has no effect here, but TRL's __post_init__ wants whole groups.
        eval_group = self.num_generations_eval or group
        self.per_device_eval_batch_size = eval_group * math.ceil(self.per_device_eval_batch_size / eval_group)

    def _completions_asked(self, per_step: int) -> int:
        """Completions in one generation, by whichever of the two options was given."""
        micro_steps, asked = self.steps_per_generation, self.generation_batch_size
        if micro_steps is None:
            return asked or per_step
        generated = self.per_device_train_batch_size * micro_steps
        if asked not in (None, generated):  # equal where a folded configuration is read again
            raise ValueError(
                f"generation_batch_size={asked} contradicts steps_per_generation={micro_steps}, which gives "
                f"{generated} completions: set one of the two, and the other to None"
            )
        return generated
