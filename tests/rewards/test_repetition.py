import pytest
from colora.rewards.repetition import RepetitionPenalty, repetition_penalty


def test_share_of_repeated_four_grams():
    once, loop = "one two three four five six seven", "go on and on " * 10
    # 40 words: 37 four-grams, of which 4 differ.
    assert repetition_penalty([once, "", "one two", loop], ids=[[]] * 4) == [0.0, 0.0, 0.0, pytest.approx(4 / 37 - 1)]


def test_case_counts_for_nothing_and_messages_are_read():
    pairs = RepetitionPenalty(size=2)
    message = [{"role": "assistant", "content": "Yes no yes No YES"}]
    assert pairs([message], [[]]) == [-0.5]  # yes no, no yes, yes no, no yes


def test_by_tokens():
    assert RepetitionPenalty(size=1, unit="tokens")(["x y", "x y"], [[5, 5, 5, 5], [1, 2]]) == [-0.75, 0.0]


@pytest.mark.parametrize("arguments", [(0,), (2, "letters")])
def test_wrong_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="RepetitionPenalty"):
        RepetitionPenalty(*arguments)
