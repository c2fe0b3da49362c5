"""GRPOTrainer: TRL's constructor and contracts around a loop of packed, token-budgeted micro-batches.

One Trainer step is one optimizer step: generate and score (every `updates_per_generation` steps), put the engine to
sleep, forward and backward for each micro-batch, step the masters, cast them into the slots that the engine reads.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..rewards.model import RewardModel
from ..rewards.runner import RewardRunner
from ..rollout.records import RolloutRecord, read_records, rollout_path, write_records
from ..weightshare.guard import ParityError
from . import checkpoint, setup
from .advantages import compute_advantages
from .collect import EVALUATION_STEP, Collected, Collector
from .config import GRPOConfig
from .data import PromptTokenizer, Row, check_dataset, prompt_loader
from .learner import Learner
from .metrics import Metrics
from .packing import TrainingSample
from .progress import ProgressBar

RewardFunction = Callable[..., Any] | str | nn.Module
BATCH_FILE = "rollout_batch.parquet"  # in a checkpoint made between two updates on the same rollouts


class GRPOTrainer(Trainer):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300) of a LoRA adapter.

    Args:
        model: a checkpoint directory or hub id; a `transformers` model (its weights are copied); or a `colora.load`ed
            Policy.
        reward_funcs: one or several: functions by TRL's contract, `f(prompts, completions, completion_ids,
            trainer_state, log_extra, log_metric, **columns) -> list[float | None]`, sync or async; or
            sequence-classification models (a path, hub id or module).
        args: the options; by default `GRPOConfig("<model>-GRPO")`.
        train_dataset: rows with a `prompt` (text or messages); the other columns go to the reward functions.
        eval_dataset: the same, or a dict of such, for `evaluate`.
        processing_class: the tokenizer; by default the one beside the model.
        reward_processing_classes: the tokenizers of reward models, one an entry of `reward_funcs` (None for functions).
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: which linears get LoRA; by default rank 16, alpha 32 on all of them.

    Raises:
        ValueError: something in the above cannot be trained on; the message says what and the remedy. Raised before
            weights are loaded wherever that can be known before.
    """

    args: GRPOConfig
    eval_dataset: Dataset | dict[str, Dataset] | None
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: setup.ModelLike,
        reward_funcs: RewardFunction | Sequence[RewardFunction],
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
    ):
        args = args or GRPOConfig(f"{Path(setup.model_name(model)).name}-GRPO")
        rewards = RewardRunner(
            _reward_functions(reward_funcs, reward_processing_classes), args.reward_weights, args.reward_errors
        )
        setup.check_model(model, peft_config)
        tokenizer = processing_class or setup.load_tokenizer(model)
        stops = setup.stop_token_ids(model, tokenizer)
        max_context, max_prompt = _context(setup.model_config(model), args)
        assert not isinstance(args.chat_template_kwargs, str)  # the config has parsed it
        tokenize = PromptTokenizer(tokenizer, max_prompt, args.chat_template_kwargs)
        check_dataset(train_dataset, "train_dataset", tokenize, args.prompts_per_generation)
        if isinstance(train_dataset, Dataset):
            rewards.check_columns(train_dataset.column_names)
        for name, dataset in _named_datasets(eval_dataset):
            check_dataset(dataset, name, tokenize, 1)

        self.policy, self.engine = setup.build(model, args, peft_config, max_context)
        assert self.policy.adapter is not None
        self.adapter = self.policy.adapter
        self.base_model = setup.model_name(model)
        self.output_dir = Path(str(args.output_dir))
        super().__init__(
            model=self.policy,
            args=args,
            data_collator=list,  # type: ignore[arg-type]  # a batch stays a list of rows
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.progress = ProgressBar()
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if not args.disable_tqdm:
            self.add_callback(self.progress)
        self.rewards = rewards
        self.collector = Collector(self.engine, tokenizer, tokenize, rewards, args, stops, self.progress.phase)
        self._metrics = Metrics()
        self.learner = Learner(self.policy, args, self._metrics, self.progress.phase)
        self._samples: list[TrainingSample] | None = None  # of the generation in use, all completions
        self._informative: list[bool] = []
        self._records: list[RolloutRecord] = []

    # ---- the step ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader[Any]:
        args = self.args
        return prompt_loader(
            self.train_dataset,
            args.prompts_per_generation,
            args.updates_per_generation,
            bool(args.shuffle_dataset),
            args.seed,
        )

    def training_step(  # type: ignore[override]  # a batch is rows, not tensors
        self, model: nn.Module, inputs: list[tuple[int, Row]], num_items_in_batch: Any = None
    ) -> Tensor:
        """One optimizer step's gradients: new rollouts where they are due, then every micro-batch forward and backward.

        Args:
            inputs: (dataset index, row) of the prompts of the generation that this step uses.

        Returns:
            The step's loss, a scalar without gradient.
        """
        started = time.perf_counter()
        model.train()
        update = self.state.global_step % self.args.updates_per_generation
        if update == 0 or self._samples is None:
            self._generate(inputs)
        training_started = time.perf_counter()
        loss = self.learner.accumulate(self._minibatch(update), self.state.global_step + 1, first_update=update == 0)
        self._metrics.add("time/train_s", time.perf_counter() - training_started)
        self._metrics.add("step_time", time.perf_counter() - started)
        return loss

    def _generate(self, rows: list[tuple[int, Row]]) -> None:
        """Make, score and store the rollouts of the coming updates."""
        step = self.state.global_step + 1
        if not self.adapter.is_published():
            raise ParityError(
                f"step {step}: the adapter's slots are not what its masters give: something besides the optimizer "
                "wrote to them (a callback, code that keeps the slots' tensors); call adapter.publish() after writing "
                "masters, never write slots, and resume from the last checkpoint"
            )
        with self._engine_awake():
            collected = self.collector.collect(rows, step, self.args.group_size, self._metrics, self.state)
        self._note_generation(collected)
        self._adopt(collected.records)
        assert self._samples is not None
        if self.args.updates_per_generation > 1:
            self.learner.recompute_old_logprobs(self._samples)
            for record, sample in zip(collected.records, self._samples, strict=True):
                record.old_logprobs = sample.old_logprobs
        write_records(rollout_path(self.output_dir / checkpoint.ROLLOUTS, step), collected.records)
        if self.args.log_completions:
            self.progress.show_completions(collected.records, step, self.args.num_completions_to_print)

    def _note_generation(self, collected: Collected) -> None:
        tokens = collected.sampled_tokens
        self.state.num_input_tokens_seen += sum(
            len(r.trajectory.prompt_ids) + len(r.trajectory.completion_ids) for r in collected.records
        )
        self._metrics.set("num_tokens", self.state.num_input_tokens_seen)
        self._metrics.add("time/rollout_s", collected.rollout_seconds)
        self._metrics.add("time/reward_s", collected.reward_seconds)
        self._metrics.add("throughput/rollout_tokens_per_s", tokens / max(collected.rollout_seconds, 1e-9))

    def _adopt(self, records: list[RolloutRecord]) -> None:
        """Make the training samples of a generation's records."""
        values = [[math.nan if value is None else value for value in record.rewards.values()] for record in records]
        advantages = compute_advantages(
            torch.tensor(values, dtype=torch.float32),
            torch.tensor(self.rewards.weights),
            self.args.group_size,
            self.args.scale_rewards,
            self.args.multi_objective_aggregation,
        )
        self._records = records
        self._samples = [training_sample(record, self.args.mask_truncated_completions) for record in records]
        self._informative = advantages.informative.tolist()

    def _minibatch(self, update: int) -> list[TrainingSample]:
        """The completions of one optimizer step, their shares of its loss set; those that cannot matter left out."""
        assert self._samples is not None
        order = list(range(len(self._samples)))
        count = self.args.minibatches_per_generation
        if count > 1:
            first_step = self.state.global_step - update
            generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + first_step)
            order = torch.randperm(len(order), generator=generator).tolist()
        size = len(order) // count
        chosen = order[update % count * size : (update % count + 1) * size]
        samples = [self._samples[index] for index in chosen]
        for sample, share in zip(
            samples, self.learner.objective.shares([len(s.targets) for s in samples]), strict=True
        ):
            sample.share = share
        if self.args.beta != 0.0:  # the KL penalty acts on every completion
            return samples
        return [self._samples[index] for index in chosen if self._informative[index]]

    @contextmanager
    def _engine_awake(self) -> Iterator[None]:
        """The engine has its memory inside, and training has it outside."""
        self.engine.wake()
        yield
        self.engine.sleep()

    # ---- optimizer, logs, evaluation ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        optimizer.register_step_post_hook(lambda *_: self._publish())
        return optimizer

    def _publish(self) -> None:
        """Hand the adapter to both forwards: masters go into the slots, the engine forgets what the old ones gave."""
        self.adapter.publish()
        self.engine.adapter_changed()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs | self._metrics.drain(), start_time)

    def evaluate(
        self,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample `num_generations_eval` completions of every prompt, score them, and log rewards and lengths.

        The same seeds are drawn each time, so that evaluations of a run can be compared.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(dataset, dict):
            merged: dict[str, float] = {}
            for name, part in dataset.items():
                merged |= self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}")
            return merged
        if dataset is None:
            raise ValueError("evaluate: there is no eval_dataset; pass one to the trainer or to evaluate()")
        started, metrics = time.perf_counter(), Metrics()
        generations = self.args.num_generations_eval or self.args.group_size
        with self._engine_awake():
            collected = self.collector.collect(
                list(enumerate(dataset)), EVALUATION_STEP, generations, metrics, self.state
            )
        results = metrics.drain(f"{metric_key_prefix}_")
        results[f"{metric_key_prefix}_runtime"] = time.perf_counter() - started
        results[f"{metric_key_prefix}_tokens_per_s"] = collected.sampled_tokens / max(collected.rollout_seconds, 1e-9)
        super().log(dict(results))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, results)
        return results

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train to `max_steps` or `num_train_epochs`.

        Args:
            resume_from_checkpoint: True goes on from the newest whole checkpoint of `output_dir`, or from the start
                where there is none; a path goes on from that checkpoint.

        Raises:
            ValueError: `output_dir` holds another run, or the checkpoint is damaged; OSError: the disk is too full.
        """
        resume = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        start = checkpoint.resolve_resume(self.output_dir, resume)
        if self.args.save_strategy != "no":
            trainable = sum(parameter.numel() for parameter in self.policy.parameters())
            checkpoint.check_disk(self.output_dir, trainable, self.args.save_total_limit)
        checkpoint.prepare_directory(self.output_dir, start)
        self._samples = None
        try:
            result = super().train(None if start is None else str(start), trial, ignore_keys_for_eval)
        finally:
            self.progress.close()
        if self.state.global_step >= self.state.max_steps:
            checkpoint.mark_finished(self.output_dir, self.state.global_step)
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """PEFT's adapter files, the tokenizer and the options."""
        directory = Path(output_dir or self.output_dir)
        self.adapter.save(directory, self.base_model)
        self.collector.tokenizer.save_pretrained(str(directory))
        (directory / "grpo_config.json").write_text(self.args.to_json_string())

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's checkpoint, then the seal, and only then the deletion of older ones."""
        directory = self.output_dir / f"{checkpoint.PREFIX}{self.state.global_step}"
        shutil.rmtree(directory, ignore_errors=True)
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        if self.state.global_step % self.args.updates_per_generation:
            write_records(directory / BATCH_FILE, self._records)
        checkpoint.seal(directory)
        rotate_checkpoints(str(self.output_dir), limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.adapter.load(resume_from_checkpoint)
        self.engine.adapter_changed()
        batch_file = Path(resume_from_checkpoint) / BATCH_FILE
        if batch_file.is_file():
            records = read_records(batch_file)
            self._adopt(records)
            assert self._samples is not None
            for record, sample in zip(records, self._samples, strict=True):
                sample.old_logprobs = record.old_logprobs

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def training_sample(record: RolloutRecord, mask_truncated: bool) -> TrainingSample:
    """What is trained of a rollout: the tokens the model sampled; none of a truncated one where those are masked."""
    trajectory = record.trajectory
    prompt_length = len(trajectory.prompt_ids)
    masked = mask_truncated and trajectory.finish_reason == "length"
    trained = [] if masked else [i for i, sampled in enumerate(trajectory.completion_mask) if sampled]
    logprobs = trajectory.logprobs
    return TrainingSample(
        tokens=trajectory.prompt_ids + trajectory.completion_ids,
        targets=[prompt_length + i for i in trained],
        engine_logprobs=[logprobs[i] for i in trained],
        advantage=record.advantage,
    )


def _reward_functions(
    reward_funcs: RewardFunction | Sequence[RewardFunction], tokenizers: Sequence[PreTrainedTokenizerBase | None] | None
) -> list[Callable[..., Any]]:
    """Functions as they are; models wrapped so that they can be called alike."""
    functions: list[RewardFunction] = []
    if isinstance(reward_funcs, Sequence) and not isinstance(reward_funcs, str):
        functions += reward_funcs
    else:
        functions.append(reward_funcs)
    each = tokenizers or [None] * len(functions)
    if len(each) != len(functions):
        raise ValueError(
            f"reward_processing_classes has {len(each)} entries, reward_funcs has {len(functions)}: give one for each "
            "(None for functions)"
        )
    return [
        RewardModel(function, tokenizer) if isinstance(function, (str, nn.Module)) else function
        for function, tokenizer in zip(functions, each, strict=True)
    ]


def _context(config: Any, args: GRPOConfig) -> tuple[int, int]:
    """(tokens of a whole sequence, tokens of a prompt) that fit."""
    context = config.get_text_config().max_position_embeddings
    if args.max_context is not None:
        if args.max_context > context:
            raise ValueError(
                f"max_context={args.max_context} is over the model's max_position_embeddings ({context}); lower it"
            )
        context = args.max_context
    if args.completion_limit >= context:
        raise ValueError(
            f"max_completion_length={args.completion_limit} leaves no room for a prompt in a context of {context} "
            "tokens; lower it"
        )
    longest = context - args.completion_limit
    return context, min(longest, args.max_prompt_length or longest)


def _named_datasets(datasets: Dataset | dict[str, Dataset] | None) -> list[tuple[str, Dataset]]:
    if datasets is None:
        return []
    return (
        [(f"eval_dataset[{name!r}]", part) for name, part in datasets.items()]
        if isinstance(datasets, dict)
        else [("eval_dataset", datasets)]
    )
