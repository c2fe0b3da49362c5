"""GRPOTrainer: TRL's constructor and contracts around a loop of packed, token-budgeted micro-batches.

One Trainer step is one optimizer step: generate and score (every `updates_per_generation` steps), put the engine to
sleep, forward and backward for each micro-batch, step the masters, cast them into the slots that the engine reads.
"""

import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerState
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from ..rollout.records import RolloutRecord, read_records, rollout_path, write_records
from ..rollout.toolkit import EnvironmentFactory, Tool
from ..weightshare.guard import ParityError
from . import checkpoint, setup
from .agents import AgentCollector, Agents, ToolPromptTokenizer
from .collect import EVALUATION_STEP, Collected, Collector
from .config import GRPOConfig
from .data import PromptTokenizer, Row, SparePrompts, check_dataset, prompt_loader, usual_prompt_tokens
from .detectors import run_detectors
from .kl_reward import add_kl
from .learner import Learner
from .metrics import Metrics
from .packing import TrainingSample, training_sample
from .progress import ProgressBar
from .rating import record_advantages, reward_weights
from .reward_setup import RewardFunction, reward_functions, reward_runner
from .rollout_func import RolloutFuncCollector, RolloutFunction

BATCH_FILE = "rollout_batch.parquet"  # in a checkpoint made between two updates on the same rollouts
PENDING_FILE = "pending_metrics.json"  # what was noted since the last log
DETECTORS_FILE = "detectors.json"  # what the detectors have seen


class GRPOTrainer(Trainer):
    """Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300) of a LoRA adapter.

    Args:
        model: a checkpoint directory or hub id; a `transformers` model (its weights are copied); or a `colora.load`ed
            Policy.
        reward_funcs: one or several: functions by TRL's contract, `f(prompts, completions, completion_ids,
            trainer_state, log_extra, log_metric, **columns) -> list[float | None]`, sync or async; or
            sequence-classification models (a path, hub id or module). None: environments give the reward.
        args: the options; by default `GRPOConfig("<model>-GRPO")`.
        train_dataset: rows with a `prompt` (text or messages); the other columns go to the reward functions.
        eval_dataset: the same, or a dict of such, for `evaluate`.
        processing_class: the tokenizer; by default the one beside the model.
        reward_processing_classes: the tokenizers of reward models, one an entry of `reward_funcs` (None for functions).
        callbacks, optimizers: as in `transformers.Trainer`.
        peft_config: which linears get LoRA; by default rank 16, alpha 32 on all of them.
        tools: functions that the model may call, typed and documented, sync or async. With these, or environments,
            completions are conversations (docs/agents.md).
        rollout_func: makes the completions instead, by TRL's contract: see `rollout_func.RolloutFuncCollector`.
        environment_factory: makes an environment for a conversation, or several by name: see `rollout.toolkit.Toolkit`.

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
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        args: GRPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        reward_processing_classes: Sequence[PreTrainedTokenizerBase | None] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        peft_config: LoraConfig | None = None,
        tools: Sequence[Tool] | None = None,
        rollout_func: RolloutFunction | None = None,
        environment_factory: EnvironmentFactory | Mapping[str, EnvironmentFactory] | None = None,
    ):
        args = args or GRPOConfig(f"{Path(setup.model_name(model)).name}-GRPO")
        setup.check_model(model, peft_config, args.base)
        tokenizer = processing_class or setup.load_tokenizer(model)
        stops = setup.stop_token_ids(model, tokenizer)
        agents = Agents.of(tools, environment_factory, tokenizer, stops, args, rollout_func)
        rewards = reward_runner(reward_functions(reward_funcs, reward_processing_classes), args, agents)
        max_context, max_prompt = _context(setup.model_config(model), args)
        tokenize = _prompt_tokenizer(tokenizer, max_prompt, args, agents)
        train_dataset = agents.stand_in(args) if agents is not None and train_dataset is None else train_dataset
        self._check_datasets = partial(_check_datasets, tokenize, agents)
        self._check_datasets([("train_dataset", train_dataset)], args.prompts_per_generation)
        self._check_datasets(_named_datasets(eval_dataset))
        if isinstance(train_dataset, Dataset) and rollout_func is None:
            rewards.check_columns([*train_dataset.column_names, *(agents.columns if agents is not None else [])])
        assert train_dataset is not None  # check_dataset has seen to it
        spare = SparePrompts(train_dataset, args.seed) if args.dynamic_sampling else None
        reward_weights(dict(zip(rewards.names, rewards.weights, strict=True)), args)  # names that clash, before loading

        prompt_tokens = usual_prompt_tokens(train_dataset, tokenize) or args.max_prompt_length or 0
        self.policy, self.engine = setup.build(model, args, peft_config, max_context, prompt_tokens)
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
        self.progress = self._progress_bar()
        self.rewards, self.spare = rewards, spare
        completions = Collector(self.engine, tokenizer, tokenize, rewards, args, stops, self.progress.phase)
        self.collector = self._collector(completions, agents, rollout_func, max_prompt)
        self.metrics = Metrics()
        self.detectors = run_detectors(args, self.collector.weights, self.progress)
        self.learner = Learner(self.policy, args, self.metrics, self.progress.phase)
        self._samples: list[TrainingSample] | None = None  # of the generation in use, all completions
        self._records: list[RolloutRecord] = []

    def _progress_bar(self) -> ProgressBar:
        """Ours, in place of transformers' bar and printer; shown unless disable_tqdm is set."""
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        bar = ProgressBar()
        if not self.args.disable_tqdm:
            self.add_callback(bar)
        return bar

    def _collector(
        self, completions: Collector, agents: Agents | None, rollout_func: RolloutFunction | None, max_prompt: int
    ) -> Collector:
        """The collector of completions, or one in its place of conversations or of what the user's function makes."""
        if agents is not None:
            return AgentCollector(completions, agents, max_prompt)
        return completions if rollout_func is None else RolloutFuncCollector(completions, rollout_func, self)

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
        loss = self.learner.accumulate(self.minibatch(update), self.state.global_step + 1, first_update=update == 0)
        self.metrics.add("loss", loss.item())
        self.metrics.add("time/train_s", time.perf_counter() - training_started)
        self.metrics.add("step_time", time.perf_counter() - started)
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
        with self.engine_awake():
            collected = self.collector.collect(rows, step, self.args.group_size, self.metrics, self.state, self.spare)
        self._note_generation(collected)
        self.detectors.observe(collected.records, self.args.group_size, step, self.metrics)
        used = collected.used
        if self.args.kl_in_reward:
            add_kl(self.policy, used, self.args, self.metrics)
        self.collector.rate(used, self.args.group_size, self.metrics)
        self.adopt(used)
        assert self._samples is not None
        if self.learner.recomputes_old:
            self.learner.recompute_old_logprobs(self._samples)
            for record, sample in zip(used, self._samples, strict=True):
                record.old_logprobs = sample.old_logprobs
        write_records(rollout_path(self.output_dir / checkpoint.ROLLOUTS, step), collected.records)
        if self.args.log_completions:
            self.progress.show_completions(used, step, self.args.num_completions_to_print)

    def _note_generation(self, collected: Collected) -> None:
        tokens = collected.sampled_tokens
        self.state.num_input_tokens_seen += sum(
            len(r.trajectory.prompt_ids) + len(r.trajectory.completion_ids) for r in collected.records
        )
        self.metrics.set("num_tokens", self.state.num_input_tokens_seen)
        self.metrics.add("time/rollout_s", collected.rollout_seconds)
        self.metrics.add("time/reward_s", collected.reward_seconds)
        self.metrics.add("throughput/rollout_tokens_per_s", tokens / max(collected.rollout_seconds, 1e-9))

    def adopt(self, records: list[RolloutRecord]) -> None:
        """Make the training samples of a generation's records, those that are used."""
        advantages = record_advantages(records, self.collector.weights, self.args.group_size, self.args)
        self._records = records
        self._samples = [training_sample(record, self.args.mask_truncated_completions) for record in records]
        for sample, informative in zip(self._samples, advantages.informative.tolist(), strict=True):
            if not informative:  # at most a rounding error, for which the learner need not forward the completion
                sample.advantage = 0.0

    def minibatch(self, update: int) -> list[TrainingSample]:
        """The completions of one optimizer step, their shares of its loss set."""
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
        return samples

    @contextmanager
    def engine_awake(self) -> Iterator[None]:
        """The engine has its memory inside, and training has it outside."""
        self.engine.wake()
        try:
            yield
        except BaseException:
            self.engine.abort()  # with unfinished requests it could neither sleep nor be given an adapter
            raise
        self.engine.sleep()

    # ---- optimizer, logs, evaluation ---------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if not isinstance(optimizer, AcceleratedOptimizer):  # that of an earlier `train` has the hook inside
            optimizer.register_step_post_hook(lambda *_: self._publish())
        return optimizer

    def _publish(self) -> None:
        """Hand the adapter to both forwards: masters go into the slots, the engine forgets what the old ones gave."""
        self.adapter.publish()
        self.engine.adapter_changed()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with what was noted; the loss too is our mean, as the Trainer's forgets what came before a resume."""
        super().log(logs | self.metrics.drain(), start_time)

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
        if dataset is None:
            raise ValueError("evaluate: there is no eval_dataset; pass one to the trainer or to evaluate()")
        self._check_datasets(_named_datasets(dataset))
        if not isinstance(dataset, dict):
            return self._evaluate_one(dataset, metric_key_prefix)
        merged: dict[str, float] = {}
        for name, part in dataset.items():
            merged |= self._evaluate_one(part, f"{metric_key_prefix}_{name}")
        return merged

    def _evaluate_one(self, dataset: Dataset, metric_key_prefix: str) -> dict[str, float]:
        rows = list(enumerate(dataset))
        if not rows or (self.collector.tokenize.needs_prompt and "prompt" not in rows[0][1]):  # of a stream
            raise ValueError("eval_dataset: the stream has no rows, or no `prompt` in them")
        started, metrics = time.perf_counter(), Metrics()
        generations = self.args.num_generations_eval or self.args.group_size
        with self.engine_awake():
            collected = self.collector.collect(rows, EVALUATION_STEP, generations, metrics, self.state)
            self.engine.adapter_changed()  # empties the prefix cache: a resumed run has nothing of it there either
        self.collector.rate(collected.records, generations, metrics)
        results = metrics.drain(f"{metric_key_prefix}_")
        step = self.state.global_step
        results |= self.detectors.evaluated(metric_key_prefix, collected.records, generations, step)
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
        args = self.args
        resume = args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        start = checkpoint.resolve_resume(self.output_dir, resume)
        if start is not None:  # what this run cannot go on from is refused before anything in the directory changes
            checkpoint.check_base(start, self.policy.weights.base)
            checkpoint.check_optimizer(start, args.to_dict()["optim"])
            self._load_adapter(str(start))
        if args.save_strategy != "no":
            trainable = sum(parameter.numel() for parameter in self.policy.parameters())
            checkpoint.check_disk(self.output_dir, trainable, args.save_total_limit)
        checkpoint.prepare_directory(self.output_dir, start)
        if start is None:
            self.adapter.save(self.output_dir / checkpoint.INITIAL, self.base_model)
        self._samples = None
        evaluate_first, args.eval_on_start = args.eval_on_start, args.eval_on_start and start is None
        args.restore_callback_states_from_checkpoint = True  # such as the patience of early stopping
        try:
            if start is not None and checkpoint.step_of(start) >= self.total_steps():
                result = self._end_at(start)
            else:
                result = super().train(None if start is None else str(start), trial, ignore_keys_for_eval)
        finally:
            args.eval_on_start = evaluate_first
            self.progress.close()
        if self.state.global_step >= self.state.max_steps:
            self.state.save_to_json(str(self.output_dir / checkpoint.STATE))
            checkpoint.mark_finished(self.output_dir, self.state.global_step)
        return result

    def total_steps(self) -> int:
        """The optimizer steps of the whole run."""
        if self.args.max_steps > 0:
            return self.args.max_steps
        return math.ceil(self.args.num_train_epochs * len(self.get_train_dataloader()))

    def _end_at(self, last: Path) -> TrainOutput:
        """What is left to do where a run was killed after its last checkpoint: nothing but to load its results."""
        self._load_from_checkpoint(str(last))
        self.state = TrainerState.load_from_json(str(last / checkpoint.STATE))
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        return TrainOutput(self.state.global_step, math.nan, {})

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """PEFT's adapter files, the tokenizer and the options."""
        directory = Path(output_dir or self.output_dir)
        self.adapter.save(directory, self.base_model)
        self.collector.tokenizer.save_pretrained(str(directory))
        checkpoint.write_base(directory, self.base_model, self.policy.weights.base)
        (directory / checkpoint.CONFIG_FILE).write_text(self.args.to_json_string())

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
        (directory / PENDING_FILE).write_text(json.dumps(self.metrics.state()))
        (directory / DETECTORS_FILE).write_text(json.dumps(self.detectors.state()))
        checkpoint.seal(directory)
        rotate_checkpoints(str(self.output_dir), limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        directory = Path(resume_from_checkpoint)
        checkpoint.check_base(directory, self.policy.weights.base)
        self._load_adapter(resume_from_checkpoint)
        batch_file, pending_file, seen_file = (directory / name for name in (BATCH_FILE, PENDING_FILE, DETECTORS_FILE))
        if pending_file.is_file():
            self.metrics.load_state(json.loads(pending_file.read_text()))
        if seen_file.is_file():
            self.detectors.load_state(json.loads(seen_file.read_text()))
        if batch_file.is_file():
            self.adopt(read_records(batch_file))

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_adapter(self.state.best_model_checkpoint)

    def _load_adapter(self, directory: str) -> None:
        self.adapter.load(directory)
        self.engine.adapter_changed()


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


def _prompt_tokenizer(
    tokenizer: PreTrainedTokenizerBase, max_prompt: int, args: GRPOConfig, agents: Agents | None
) -> PromptTokenizer:
    assert not isinstance(args.chat_template_kwargs, str)  # the config has parsed it
    tokenize = PromptTokenizer(tokenizer, max_prompt, args.chat_template_kwargs)
    return tokenize if agents is None else ToolPromptTokenizer(tokenize, agents)


def _check_datasets(
    tokenize: PromptTokenizer,
    agents: Agents | None,
    named: Sequence[tuple[str, Dataset | IterableDataset | None]],
    at_least: int = 1,
) -> None:
    """Raise ValueError for a dataset that is missing, too small, or has prompts or environments that cannot be used."""
    for name, dataset in named:
        check_dataset(dataset, name, tokenize, at_least)
        if agents is not None:
            agents.check_environments(dataset, name)


def _named_datasets(datasets: Dataset | dict[str, Dataset] | None) -> list[tuple[str, Dataset]]:
    if datasets is None:
        return []
    return (
        [(f"eval_dataset[{name!r}]", part) for name, part in datasets.items()]
        if isinstance(datasets, dict)
        else [("eval_dataset", datasets)]
    )
