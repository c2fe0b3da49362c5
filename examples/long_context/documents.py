"""Documents of a given number of tokens with facts planted at given depths, as prompts for a chat model."""

import random
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset, DatasetDict
from facts import Fact, Question, make_question
from transformers import PreTrainedTokenizerBase

INSTRUCTION = (
    "First copy every sentence of the log that you use, word for word, between <facts> and </facts>. Work the answer "
    "out between <work> and </work>. Then write it, in digits and nothing else, between <answer> and </answer>."
)
PARAGRAPH = 8  # sentences
SUBJECTS = (
    "the harbour master", "an old pilot", "the keeper of the lighthouse", "a clerk of the customs house",
    "the night watch", "a young sailmaker", "the baker from the upper town", "a travelling musician", "the ferryman",
    "the schoolteacher", "a fisherman's widow", "the apprentice of the cooper",
)  # fmt: skip
VERBS = (
    "spoke at length about", "wrote a letter about", "could not stop thinking about", "made a drawing of",
    "complained to the council about", "sang a song about", "asked everyone about", "remembered", "was puzzled by",
    "walked down to the quay to see",
)  # fmt: skip
OBJECTS = (
    "the fog over the eastern pier", "the smell of tar in the yards", "the new ropes in the chandlery",
    "the gulls on the roof of the church", "the broken clock above the market", "the tide in the narrow channel",
    "the lamps along the breakwater", "the quarrel about the mooring fees", "the wind that came down from the hills",
    "the carts that blocked the lane", "the price of salted fish", "the bell that nobody rings any more",
)  # fmt: skip
ENDINGS = (
    "before the rain came", "while the kettle boiled", "until the lanterns were lit", "as on every market day",
    "although nobody listened", "because there was little else to do", "long after supper", "with a heavy heart",
    "to the amusement of the children", "and then went home by the lower road", "for the rest of the week",
)  # fmt: skip

Messages = list[dict[str, str]]


def problems(
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    size: int,
    held_out: int,
    *,
    facts: int = 8,
    needed: int = 3,
    seed: int = 0,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> DatasetDict:
    """`size` problems to train on and `held_out` others, as the splits `train` and `test`.

    Args:
        tokenizer: of the model, with a chat template.
        tokens: of a whole prompt; each has at most so many, and falls short of them by less than a sentence.
        facts: planted in each document, at random depths.
        needed: of those, what a question needs.
        seed: the same arguments make the same problems.

    Returns:
        Columns: `prompt` (messages), `answer` (digits), `evidence` (the numbers of the needed facts, as digits),
        `sentences` (those facts), `depths` (where they stand: the share of the document's characters before them) and
        `kind` (of the question).

    Raises:
        ValueError: `tokens` has no room for the facts; or as `make_question` does.
    """

    def count(messages: Messages) -> int:
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, **(chat_template_kwargs or {})
        )
        return len(encoded["input_ids"])

    rows = []
    for index in range(size + held_out):
        rng = random.Random(f"{seed} {index}")  # each row by itself: more rows leave the others as they are
        question = make_question(rng, facts, needed)
        depths = [rng.random() for _ in range(facts)]
        rows.append(problem(question, depths, rng, tokens, count))
    return DatasetDict(train=Dataset.from_list(rows[:size]), test=Dataset.from_list(rows[size:]))


def problem(
    question: Question, depths: Sequence[float], rng: random.Random, tokens: int, count: Callable[[Messages], int]
) -> dict[str, Any]:
    """One row: a document as long as `tokens` allows, with the needed facts, then the others, at `depths`."""
    planted = list(zip(depths, question.needed + question.others, strict=True))
    filler: list[str] = []

    def document(sentences: int) -> str:
        filler.extend(_sentence(rng) for _ in range(sentences - len(filler)))
        return plant(planted, filler[:sentences])

    def messages(sentences: int) -> Messages:
        text = f"The log of a harbour:\n\n{document(sentences)}\n\n{question.text}\n\n{INSTRUCTION}"
        return [{"role": "user", "content": text}]

    sentences = most_within(tokens, lambda number: count(messages(number)))
    text = document(sentences)
    return {
        "prompt": messages(sentences),
        "answer": str(question.answer),
        "evidence": [str(fact.number) for fact in question.needed],
        "sentences": [fact.text for fact in question.needed],
        "depths": [text.index(fact.text) / len(text) for fact in question.needed],
        "kind": question.kind,
    }


def plant(planted: Sequence[tuple[float, Fact]], filler: Sequence[str]) -> str:
    """The filler with each fact before the sentence at its depth (0: first, 1: last), in paragraphs."""
    sentences = list(filler)
    places = sorted(((round(depth * len(filler)), fact.text) for depth, fact in planted), reverse=True)
    for place, text in places:  # from the end, so that the places before stay what they are
        sentences.insert(place, text)
    paragraphs = [sentences[start : start + PARAGRAPH] for start in range(0, len(sentences), PARAGRAPH)]
    return "\n\n".join(" ".join(paragraph) for paragraph in paragraphs)


def most_within(tokens: int, count: Callable[[int], int]) -> int:
    """The number of filler sentences with which a prompt comes closest to `tokens` without exceeding them.

    `count` gives the tokens for a number of sentences; to count 32K takes a while, so it is called some five times:
    the number is foretold from the tokens of a sentence, and kept between what is known to fit and what does not.
    """
    fits, used = 0, count(0)
    if used > tokens:
        raise ValueError(
            f"{tokens} tokens are too few for a prompt that has {used} without any filler: give more tokens or fewer "
            "facts"
        )
    too_many, per_sentence = tokens + 1, 20.0  # a sentence has more than one token
    while too_many - fits > 1:
        number = min(max(fits + int((tokens - used) / per_sentence), fits + 1), too_many - 1)
        found = count(number)
        per_sentence = max(1.0, (found - used) / (number - fits))
        if found > tokens:
            too_many = number
        else:
            fits, used = number, found
    return fits


def _sentence(rng: random.Random) -> str:
    """A sentence without digits or ships."""
    subject = rng.choice(SUBJECTS)
    words = f"{subject} {rng.choice(VERBS)} {rng.choice(OBJECTS)} {rng.choice(ENDINGS)}."
    return words[0].upper() + words[1:]
