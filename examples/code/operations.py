"""What the tasks are put together from: functions of a list, each with the sentence that asks for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Operation:
    """A function of a list, or of a list and `k`.

    Attributes:
        phrase: what it does, for the statement of a task; `{k}` stands for the second argument.
        choices: of `k`; empty where there is none.
    """

    function: Callable[..., Any]
    phrase: str
    choices: Sequence[Any] = ()


# Each function is used by itself in a program, so it calls none of the others.


def reverse(items):
    return items[::-1]


def rotate(items, k):
    return items[k % len(items) :] + items[: k % len(items)] if items else []


def take_every(items, k):
    return items[::k]


def keep_first(items):
    return list(dict.fromkeys(items))


def swap_pairs(items):
    return [items[i ^ 1] if i ^ 1 < len(items) else items[i] for i in range(len(items))]


def keep_multiples(items, k):
    return [n for n in items if n % k == 0]


def drop_above(items, k):
    return [n for n in items if n <= k]


def remainders(items, k):
    return [n % k for n in items]


def affine(items, k):
    return [k * n + 1 for n in items]


def digit_sums(items):
    return [sum(int(digit) for digit in str(abs(n))) for n in items]


def running_sums(items):
    return [sum(items[: i + 1]) for i in range(len(items))]


def differences(items):
    return [items[i] - items[i - 1] for i in range(1, len(items))]


def ascending(items):
    return sorted(items)


def total(items):
    return sum(items)


def largest(items):
    return max(items, default=0)


def different(items):
    return len(set(items))


def weighted(items):
    return sum(i * n for i, n in enumerate(items))


def drop_short(items, k):
    return [word for word in items if len(word) >= k]


def without_letter(items, k):
    return [word.replace(k, "") for word in items]


def beginnings(items, k):
    return [word[:k] for word in items]


def backwards(items):
    return [word[::-1] for word in items]


def by_length(items):
    return sorted(items, key=lambda word: (len(word), word))


def capitals(items):
    return [word[:1].upper() + word[1:] for word in items]


def join(items):
    return "-".join(items)


def longest(items):
    return max(items, key=len, default="")


def letters(items):
    return sum(len(word) for word in items)


def unchanged(items):
    return items


_LIST = (
    Operation(reverse, "reverse the list"),
    Operation(rotate, "move the first element to the end, {k} times in a row", (2, 3)),
    Operation(take_every, "keep the elements with index 0, {k}, 2 * {k} and so on, and drop the others", (2, 3)),
    Operation(keep_first, "of equal elements keep the first only"),
    Operation(swap_pairs, "swap the first element with the second, the third with the fourth, and so on; one that is "
              "left over stays"),
)  # fmt: skip
OPERATIONS = {
    "integers": (
        *_LIST,
        Operation(keep_multiples, "keep the multiples of {k}", (2, 3)),
        Operation(drop_above, "drop those above {k}", (5, 10, 20)),
        Operation(remainders, "replace each by its remainder when divided by {k}, from 0 to {k} - 1", (4, 5, 7)),
        Operation(affine, "multiply each by {k} and add 1", (2, 3, -1)),
        Operation(digit_sums, "replace each by the sum of the digits of its absolute value"),
        Operation(running_sums, "replace each by the sum of it and all before it"),
        Operation(differences, "replace the list by what each element but the first exceeds the one before it by"),
        Operation(ascending, "sort the list from the smallest to the largest"),
    ),
    "words": (
        *_LIST,
        Operation(drop_short, "drop those of fewer than {k} letters", (3, 4, 5)),
        Operation(without_letter, "remove every letter {k} from them", ("a", "e", "o")),
        Operation(beginnings, "cut each off after its first {k} letters", (2, 3, 4)),
        Operation(backwards, "write each backwards"),
        Operation(by_length, "sort the list by length, and alphabetically among equal lengths"),
        Operation(capitals, "make the first letter of each a capital"),
    ),
}
RESULTS = {
    "integers": (
        Operation(unchanged, "the list"),
        Operation(total, "the sum of the list"),
        Operation(largest, "the largest element, 0 if the list is empty"),
        Operation(different, "how many different elements there are"),
        Operation(weighted, "the sum of each element times its index, the first having index 0"),
    ),
    "words": (
        Operation(unchanged, "the list"),
        Operation(join, "the elements joined by hyphens into one string"),
        Operation(longest, "the longest element, the first of several, an empty string if the list is empty"),
        Operation(letters, "the number of letters of all elements together"),
    ),
}
