"""Which columns share a word: those that one lane of the tensor cores multiplies."""

import torch
from colora.kernels.words import in_columns, in_words


def test_a_word_has_the_columns_of_a_lane() -> None:
    """PTX ISA, mma.m16n8k16, matrix A: of a row, lane q holds columns 2 q + i % 2 + 8 (i // 4), i = 0, 1, 4, 5."""
    words = in_words(torch.arange(128).view(2, 64))
    assert words.shape == (2, 8, 8)
    for row in range(2):
        for word in range(8):
            block, lane = divmod(word, 4)
            of_lane = [16 * k + 2 * lane + i % 2 + 8 * (i // 4) for k in range(2) for i in (0, 1, 4, 5)]
            assert words[row, word].tolist() == [64 * row + 32 * block + column for column in of_lane]


def test_in_columns_is_the_inverse() -> None:
    columns = torch.arange(3 * 96).view(3, 96)
    assert torch.equal(in_columns(in_words(columns)), columns)
