"""The order of prompts, their tokens, and the errors of datasets that cannot be trained on."""

from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from accelerate import skip_first_batches
from colora.rl.data import PromptTokenizer, SparePrompts, check_dataset, prompt_loader, usual_prompt_tokens
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils
from trl import chat_template_utils as trl_templates


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(
        models.WordLevel({character: index for index, character in enumerate("abcdefgh:u ")}, unk_token="u")
    )
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


def indices(loader) -> list[list[int]]:
    return [[index for index, _ in batch] for batch in loader]


def test_each_generation_is_repeated_for_its_updates_and_the_rest_left_out() -> None:
    dataset = Dataset.from_dict({"prompt": list("abcdefg")})
    order = indices(prompt_loader(dataset, 3, 2, shuffle=False, seed=0))
    assert order == [[0, 1, 2], [0, 1, 2], [3, 4, 5], [3, 4, 5]]


def test_order_depends_on_seed_and_epoch_alone() -> None:
    dataset = Dataset.from_dict({"prompt": list("abcdefgh")})

    def epoch(number: int, seed: int) -> list[list[int]]:
        loader = prompt_loader(dataset, 2, 1, shuffle=True, seed=seed)
        loader.set_epoch(number)
        return indices(loader)

    assert epoch(1, 5) == epoch(1, 5)
    assert epoch(1, 5) != epoch(2, 5) != epoch(2, 6)
    assert sorted(index for batch in epoch(3, 5) for index in batch) == list(range(8))


def test_skipping_batches_on_resume_keeps_the_order() -> None:
    loader = prompt_loader(Dataset.from_dict({"prompt": list("abcdefgh")}), 2, 1, shuffle=True, seed=1)
    skipped = skip_first_batches(loader, 2)
    skipped.batch_sampler.batch_sampler.set_epoch(1)
    loader.set_epoch(1)
    assert indices(skipped) == indices(loader)[2:]


def test_streams_are_numbered_repeated_and_started_again() -> None:
    stream = Dataset.from_dict({"prompt": list("abcde")}).to_iterable_dataset()
    batches = islice(prompt_loader(stream, 2, 2, shuffle=False, seed=0), 6)
    assert indices(batches) == [[0, 1], [0, 1], [2, 3], [2, 3], [0, 1], [0, 1]]


def test_a_stream_too_short_for_one_generation_is_refused() -> None:
    stream = Dataset.from_dict({"prompt": list("ab")}).to_iterable_dataset()
    with pytest.raises(ValueError, match="the stream has 2 prompts, one generation needs 3"):
        next(iter(prompt_loader(stream, 3, 1, shuffle=False, seed=0)))


def test_spare_prompts_are_the_others_each_once_in_an_order_of_seed_and_step() -> None:
    dataset = Dataset.from_dict({"prompt": list("abcdefgh")})

    def spare(start: int, number: int, step: int = 3, seed: int = 7) -> list[int]:
        rows = SparePrompts(dataset, seed).rows(step, [1, 4], start, number)
        assert all(row["prompt"] == "abcdefgh"[index] for index, row in rows)
        return [index for index, _ in rows]

    order = spare(0, 6)
    assert sorted(order) == [0, 2, 3, 5, 6, 7]
    assert spare(0, 2) + spare(2, 3) + spare(5, 1) == order  # whatever was asked for in which round
    assert spare(6, 8) == order + order[:2]
    assert len({tuple(spare(0, 6, step, seed)) for step in (3, 4, 5) for seed in (7, 8)}) == 6


def test_where_a_step_takes_every_prompt_they_are_their_own_spare_ones() -> None:
    rows = SparePrompts(Dataset.from_dict({"prompt": list("abc")}), 0).rows(1, [0, 1, 2], 0, 3)
    assert sorted(index for index, _ in rows) == [0, 1, 2]


def test_streams_have_no_spare_prompts() -> None:
    with pytest.raises(ValueError, match="dynamic_sampling=True.*IterableDataset: load it as a Dataset"):
        SparePrompts(Dataset.from_dict({"prompt": ["a"]}).to_iterable_dataset(), 0)


def test_how_long_prompts_usually_are(tokenizer: PreTrainedTokenizerFast) -> None:
    """The median of rows from all over the dataset; nothing is known of a stream's, or of rows without a prompt."""
    tokenize = PromptTokenizer(tokenizer, 100)
    dataset = Dataset.from_dict({"prompt": ["a" * (1 + row // 10) for row in range(95)]})
    assert usual_prompt_tokens(dataset, tokenize) == 5
    assert usual_prompt_tokens(dataset.select([0]), tokenize) == 1
    assert usual_prompt_tokens(dataset.to_iterable_dataset(), tokenize) is None
    assert usual_prompt_tokens(dataset.rename_column("prompt", "question"), tokenize) is None


def test_text_and_messages(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenize = PromptTokenizer(tokenizer, 10, {"suffix": "h"})
    assert tokenize("abc", "row") == [0, 1, 2]
    with pytest.raises(ValueError, match="row 7.*chat template"):
        tokenize([{"role": "user", "content": "a"}], "row 7")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}:{% endfor %}{{ suffix }}"
    assert tokenize([{"role": "user", "content": "a"}], "row") == [0, 8, 7]
    assert tokenize.completion("b", [{"role": "user", "content": "a"}]) == [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("columns", "at_least", "message"),
    [
        ({"prompt": []}, 1, "train_dataset is empty"),
        ({"question": ["a"]}, 1, "no `prompt` column.*question"),
        ({"prompt": ["a", "b"]}, 3, "2 prompts, one generation needs 3.*num_generations"),
        ({"prompt": ["a", "abcdef"]}, 1, r"train_dataset\[1\].*6 tokens, at most 4.*max_completion_length"),
        ({"prompt": ["a", ""]}, 1, r"train_dataset\[1\].*no tokens"),
        ({"prompt": [3]}, 1, "a text or a list of messages.*int"),
    ],
)
def test_bad_datasets_are_refused_with_the_remedy(tokenizer, columns: dict, at_least: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dataset(Dataset.from_dict(columns), "train_dataset", PromptTokenizer(tokenizer, 4), at_least)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (
            [{"prompt": "a"}],
            r"train_dataset is a list: pass a datasets.Dataset, such as Dataset.from_list makes of dicts$",
        ),
        (DatasetDict(train=Dataset.from_dict({"prompt": ["a"]})), "is a DatasetDict: .* one of its splits: train"),
    ],
)
def test_what_is_no_dataset_is_named(tokenizer, dataset: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dataset(dataset, "train_dataset", PromptTokenizer(tokenizer, 4), 1)


def test_a_missing_dataset_is_named(tokenizer) -> None:
    with pytest.raises(ValueError, match="train_dataset is missing"):
        check_dataset(None, "train_dataset", PromptTokenizer(tokenizer, 4), 1)


STRICT = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
TEMPLATES = {
    "writes_texts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}:",
    "writes_repr": "{% for m in messages %}{{ m.content }}{% endfor %}:",
    "writes_parts": "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}:",
    "strict": STRICT + "{{ m.content }}{% endfor %}:",
}


def prompt_of(content: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


@pytest.mark.parametrize(
    ("template", "prompt", "message"),
    [
        ("strict", prompt_of("ab", "system"), r"rows\[3\]: the chat template cannot write the prompt: no system role"),
        ("writes_texts", prompt_of(None), r"rows\[3\]: the content of a message of the role 'user' is None"),
        ("writes_texts", prompt_of([{"type": "text", "text": "ab"}]), r"rows\[3\].*list of parts.*give it as a text"),
        ("writes_repr", prompt_of([{"type": "text", "text": "ab"}]), r"rows\[3\].*list of parts.*give it as a text"),
        ("writes_parts", prompt_of([{"type": "image"}]), r"rows\[3\]: .*the part \{'type': 'image'\}.*text only"),
    ],
)
def test_messages_that_the_template_does_not_write_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str, prompt: Any, message: str
) -> None:
    tokenizer.chat_template = TEMPLATES[template]
    with pytest.raises(ValueError, match=message):
        PromptTokenizer(tokenizer, 9)(prompt, "rows[3]")


def test_parts_that_the_template_writes_are_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TEMPLATES["writes_parts"]
    tokenize = PromptTokenizer(tokenizer, 9)
    assert tokenize(prompt_of([{"type": "text", "text": "ab"}]), "row") == tokenize(prompt_of("ab"), "row")


def test_a_date_that_the_template_writes_can_be_fixed(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Today(datetime):
        day_of_month = 1

        @classmethod
        def now(cls, tz: Any = None) -> "Today":
            return cls(2026, 5, cls.day_of_month)

    templates = Path(trl_templates.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "llama3_2.jinja").read_text()
    monkeypatch.setattr(chat_template_utils, "datetime", Today)
    written: dict[bool, set[str]] = {True: set(), False: set()}
    for Today.day_of_month in (1, 2):
        for fixed in written:
            kwargs = {"date_string": "26 Jul 2024"} if fixed else {}
            tokenize = PromptTokenizer(tokenizer, 999, kwargs)
            assert tokenize(prompt_of("ab"), "row")
            text = tokenizer.apply_chat_template(prompt_of("ab"), tokenize=False, **tokenize.chat_template_kwargs)
            written[fixed].add(text.partition("Today Date: ")[2][:11])
    assert written == {False: {"01 May 2026", "02 May 2026"}, True: {"26 Jul 2024"}}
