"""Facts about ships, and questions that need several of them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

FIRST = ("Amber", "Autumn", "Bold", "Crimson", "Distant", "Golden", "Grey", "Northern", "Quiet", "Silver", "Swift")
SECOND = ("Anchor", "Comet", "Dolphin", "Falcon", "Harvest", "Heron", "Lantern", "Meadow", "Pilgrim", "Star", "Willow")
SMALLEST, LARGEST = 100, 999  # crates
MOST_DIFFERENCE = 60
KINDS = ("sum", "spread", "chain")


@dataclass(frozen=True)
class Fact:
    """One sentence, with the one number in it."""

    text: str
    number: int


@dataclass(frozen=True)
class Question:
    """A question and what it takes to answer it.

    Attributes:
        kind: `sum` (of some ships' crates), `spread` (largest less smallest of them) or `chain` (each ship's number is
            told by another's, but for the last).
        needed: the facts without any of which the answer cannot be known.
        others: facts of the same form that have nothing to do with it.
    """

    kind: str
    text: str
    answer: int
    needed: tuple[Fact, ...]
    others: tuple[Fact, ...]


def make_question(rng: random.Random, facts: int, needed: int) -> Question:
    """A question of a random kind over `facts` facts of which it needs `needed`.

    Raises:
        ValueError: fewer than two facts are needed, or more than there are, or there are too few ships' names.
    """
    names = [f"{first} {second}" for first in FIRST for second in SECOND]
    if not 2 <= needed <= facts <= len(names):
        raise ValueError(f"needs 2 <= needed <= facts <= {len(names)}, got needed={needed}, facts={facts}")
    kind = rng.choice(KINDS)
    ships = rng.sample(names, facts)
    asked, unasked = ships[:needed], ships[needed:]
    if kind == "chain":
        facts_needed, answer = _chain(rng, asked)
        text = f"How many crates did the {asked[-1]} unload?"
    else:
        numbers = [rng.randint(SMALLEST, LARGEST) for _ in asked]
        facts_needed = [_plain(ship, number) for ship, number in zip(asked, numbers, strict=True)]
        listed = f"{', '.join(f'the {ship}' for ship in asked[:-1])} and the {asked[-1]}"
        if kind == "sum":
            answer, text = sum(numbers), f"How many crates did {listed} unload altogether?"
        else:
            answer = max(numbers) - min(numbers)
            text = f"Of {listed}, by how many crates does the largest cargo exceed the smallest?"
    # Some of them relative too, so that the form of a sentence does not give away what is asked for.
    others = [_relative(rng, ship, rng.choice(asked))[0] if rng.random() < 0.5 else _random_plain(rng, ship)
              for ship in unasked]  # fmt: skip
    return Question(kind, text, answer, tuple(facts_needed), tuple(others))


def _chain(rng: random.Random, ships: Sequence[str]) -> tuple[list[Fact], int]:
    """The first ship's number, and each later one's by the one before it; the last ship's number."""
    crates = rng.randint(SMALLEST, LARGEST) + MOST_DIFFERENCE * len(ships)  # stays above 0
    facts = [_plain(ships[0], crates)]
    for before, ship in zip(ships[:-1], ships[1:], strict=True):
        fact, difference = _relative(rng, ship, before)
        facts.append(fact)
        crates += difference
    return facts, crates


def _plain(ship: str, number: int) -> Fact:
    return Fact(f"The {ship} unloaded {number} crates.", number)


def _random_plain(rng: random.Random, ship: str) -> Fact:
    return _plain(ship, rng.randint(SMALLEST, LARGEST))


def _relative(rng: random.Random, ship: str, other: str) -> tuple[Fact, int]:
    """`ship`'s number as a difference to `other`'s, and that difference."""
    number, more = rng.randint(2, MOST_DIFFERENCE), rng.random() < 0.5
    text = f"The {ship} unloaded {number} crates {'more' if more else 'fewer'} than the {other}."
    return Fact(text, number), number if more else -number
