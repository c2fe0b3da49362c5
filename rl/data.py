"""From a dataset to the prompts of each step: order, tokenisation, checks."""

from collections.abc import Iterator, Sequence
from itertools import count, islice
from statistics import median_low
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset
from transformers import PreTrainedTokenizerBase
from trl.data_utils import is_conversational

from ..rollout.engine import sample_seed
from ..rollout.message_parts import MessageParts

Row = dict[str, Any]
Prompt = str | list[dict[str, Any]]
PROMPTS_CHECKED = 50_000  # longer datasets have the rest of their prompts checked when they are used
PROMPTS_MEASURED = 15  # for how long a prompt usually is


class PromptSchedule(Sampler[list[int]]):
    """Batches of dataset indices, one for each optimizer step.

    A generation's prompts are repeated for each of its updates. The order of epoch e is a permutation that depends on
    (seed, e) alone, so resuming needs no state but the step. Prompts that do not fill a last generation are left out
    of the epoch.
    """

    def __init__(self, size: int, prompts_per_generation: int, updates_per_generation: int, shuffle: bool, seed: int):
        self.size, self.prompts, self.updates = size, prompts_per_generation, updates_per_generation
        self.shuffle, self.seed, self.epoch = shuffle, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.prompts * self.updates

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(self.size))
        if self.shuffle:
            generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
            order = torch.randperm(self.size, generator=generator).tolist()
        for start in range(0, self.size - self.prompts + 1, self.prompts):
            for _ in range(self.updates):
                yield order[start : start + self.prompts]


class _IndexedRows(TorchDataset[tuple[int, Row]]):
    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Row]:
        return index, self.dataset[index]


class _PromptLoader(DataLoader[tuple[int, Row]]):
    """A DataLoader that hands the epoch on to its schedule."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


class _PromptStream(TorchIterableDataset[list[tuple[int, Row]]]):
    """The same batches out of a stream, in its order, numbered as they come; from its beginning again at its end.

    One iteration has no end, so that resuming need only skip as many batches as there were steps.
    """

    def __init__(self, dataset: IterableDataset, prompts_per_generation: int, updates_per_generation: int):
        self.dataset, self.prompts, self.updates = dataset, prompts_per_generation, updates_per_generation

    def __iter__(self) -> Iterator[list[tuple[int, Row]]]:
        for epoch in count():
            self.dataset.set_epoch(epoch)
            batch: list[tuple[int, Row]] = []
            generations = 0
            for index, row in enumerate(self.dataset):
                batch.append((index, row))
                if len(batch) == self.prompts:
                    for _ in range(self.updates):
                        yield batch
                    batch, generations = [], generations + 1
            if not generations:
                raise ValueError(
                    f"train_dataset: the stream has {len(batch)} prompts, one generation needs {self.prompts}: lower "
                    "per_device_train_batch_size or gradient_accumulation_steps, raise num_generations, or add prompts"
                )


def prompt_loader(
    dataset: Dataset | IterableDataset,
    prompts_per_generation: int,
    updates_per_generation: int,
    shuffle: bool,
    seed: int,
) -> DataLoader[Any]:
    """A loader that yields, for each optimizer step, the (dataset index, row) pairs of the generation it uses."""
    if isinstance(dataset, IterableDataset):
        stream = dataset.shuffle(seed=seed) if shuffle else dataset
        return DataLoader(_PromptStream(stream, prompts_per_generation, updates_per_generation), batch_size=None)
    schedule = PromptSchedule(len(dataset), prompts_per_generation, updates_per_generation, shuffle, seed)
    return _PromptLoader(_IndexedRows(dataset), batch_sampler=schedule, collate_fn=list)


def prompts_of_step(loader: DataLoader[Any], step: int) -> list[tuple[int, Row]]:
    """What a `prompt_loader` yields for an optimizer step, counted from 1, over all epochs."""
    if not isinstance(loader, _PromptLoader):  # a stream: one iteration goes through all epochs
        return next(islice(loader, step - 1, None))
    epoch, batch = divmod(step - 1, len(loader))
    loader.set_epoch(epoch)
    assert loader.batch_sampler is not None  # prompt_loader has given it one
    indices = next(islice(loader.batch_sampler, batch, None))
    return [loader.dataset[index] for index in indices]


class SparePrompts:
    """Prompts to ask for in place of those whose completions gave no signal (dynamic sampling).

    Each step has an order of its own, a permutation that depends on (seed, step) alone: resuming and replaying need no
    state, and the prompts that later steps are scheduled to use stay theirs.

    Raises:
        ValueError: the dataset is a stream, whose rows cannot be read in another order.
    """

    def __init__(self, dataset: Dataset | IterableDataset, seed: int):
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                "dynamic_sampling=True needs a dataset whose rows can be read in any order, train_dataset is an "
                "IterableDataset: load it as a Dataset (`Dataset.from_generator` writes it to disk), or set "
                "dynamic_sampling to False"
            )
        self.dataset, self.seed = dataset, seed

    def rows(self, step: int, scheduled: Sequence[int], start: int, count: int) -> list[tuple[int, Row]]:
        """(dataset index, row) of `count` prompts from the `start`-th spare one of a step on.

        Args:
            scheduled: the step's own prompts, which are no spare ones unless the dataset has no others. When all are
                used up, they are asked for again from the first on.
        """
        generator = torch.Generator().manual_seed(sample_seed(self.seed, step, -1, -1))  # as no completion has
        order = torch.randperm(len(self.dataset), generator=generator)
        others = order[~torch.isin(order, torch.tensor(scheduled, dtype=order.dtype))]
        order = others if len(others) else order
        chosen = [int(order[number % len(order)]) for number in range(start, start + count)]
        return [(index, self.dataset[index]) for index in chosen]


class PromptTokenizer:
    """Token ids of standard (text) and conversational (messages, through the chat template) prompts.

    Args:
        tokenizer: the model's.
        max_tokens: the most tokens a prompt may have; longer ones raise ValueError, none is cut.
        chat_template_kwargs: passed to the chat template.
    """

    needs_prompt = True  # of every row of a dataset

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, chat_template_kwargs: dict[str, Any] | None = None
    ):
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.chat_template_kwargs = chat_template_kwargs or {}
        self._parts = MessageParts(tokenizer, self.chat_template_kwargs)

    def __call__(self, prompt: Prompt, where: str) -> list[int]:
        """Token ids of `prompt`; `where` names it in errors."""
        try:
            self._parts.check(prompt if isinstance(prompt, list) else [])
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        try:
            ids = self.encode(prompt, where)
        except (TemplateError, TypeError, KeyError) as error:  # what templates raise themselves, and run into
            raise ValueError(f"{where}: the chat template cannot write the prompt: {error}") from error
        if not ids:
            raise ValueError(f"{where}: the prompt has no tokens; remove the row")
        if len(ids) > self.max_tokens:
            raise ValueError(
                f"{where}: the prompt has {len(ids)} tokens, at most {self.max_tokens} fit (the context less "
                "max_completion_length, or max_prompt_length); shorten or drop it, lower max_completion_length, or "
                "raise max_context"
            )
        return ids

    def encode(self, prompt: Prompt, where: str) -> list[int]:
        """Token ids, however many."""
        encoded: Any  # a BatchEncoding, but typed as all that a template can be rendered to
        if isinstance(prompt, str):
            encoded = self.tokenizer(prompt)
        elif prompt and is_conversational({"prompt": prompt}):
            if not self.tokenizer.chat_template:
                raise ValueError(
                    f"{where}: the prompt is a list of messages, but the tokenizer has no chat template; "
                    "use text prompts or set tokenizer.chat_template"
                )
            encoded = self.tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
            )
        else:
            raise ValueError(
                f"{where}: a prompt is a text or a list of messages with role and content, got {type(prompt).__name__}"
            )
        return list(encoded["input_ids"])

    def completion(self, text: str, prompt: Prompt) -> Prompt:
        """`text` in the form reward functions get it: as it is, or an assistant message for conversational prompts."""
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def check_dataset(
    dataset: Dataset | IterableDataset | None, name: str, tokenize: PromptTokenizer, at_least: int
) -> None:
    """Raise ValueError, saying what to change, for a dataset that cannot be trained on.

    Args:
        name: `train_dataset` or `eval_dataset`, for the message.
        at_least: rows that one step needs.
    """
    if dataset is None:
        raise ValueError(f"{name} is missing: pass a datasets.Dataset with a `prompt` column")
    if isinstance(dataset, IterableDataset):
        return
    if not isinstance(dataset, Dataset):
        splits = f" (or one of its splits: {', '.join(map(str, dataset))})" if isinstance(dataset, dict) else ""
        raise ValueError(
            f"{name} is a {type(dataset).__name__}: pass a datasets.Dataset, such as Dataset.from_list makes of "
            f"dicts{splits}"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} is empty: it needs rows with a `prompt` column")
    if "prompt" not in dataset.column_names and tokenize.needs_prompt:
        raise ValueError(f"{name} has no `prompt` column; its columns are: {', '.join(dataset.column_names)}")
    if len(dataset) < at_least:
        raise ValueError(
            f"{name} has {len(dataset)} prompts, one generation needs {at_least}: lower per_device_train_batch_size, "
            "gradient_accumulation_steps or steps_per_generation (set by presets), raise num_generations, or add "
            "prompts"
        )
    if "prompt" not in dataset.column_names:
        return
    prompts: Sequence[Prompt] = dataset["prompt"]
    for index in range(min(len(dataset), PROMPTS_CHECKED)):
        tokenize(prompts[index], f"{name}[{index}]")


def usual_prompt_tokens(dataset: Dataset | IterableDataset, tokenize: PromptTokenizer) -> int | None:
    """Tokens of the median prompt among some of a dataset that was checked; None where it cannot be known."""
    if isinstance(dataset, IterableDataset) or "prompt" not in dataset.column_names:
        return None
    checked = min(len(dataset), PROMPTS_CHECKED)
    rows = range(0, checked, -(-checked // PROMPTS_MEASURED))
    return int(median_low([len(tokenize(dataset[row]["prompt"], f"train_dataset[{row}]")) for row in rows]))
