import pickle

import pytest
from colora.rewards.format import RegexFormat, XmlSections, think_answer_format

GOOD = "<think>\nadd\n</think>\n<answer>4</answer>\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "4",
        "<answer>4</answer>",
        "<answer>4</answer><think>add</think>",
        GOOD + "Bye",
        "Hi " + GOOD,
        GOOD.replace("</think>", "</think> and"),
        GOOD + GOOD,
        GOOD.replace("4", "<answer>4</answer>"),
        GOOD.replace("4", " "),
        "<think>a <answer>4</answer></think>",
        "<think>a<answer></think>4</answer>",
        GOOD.replace("</answer>", ""),
    ],
)
def test_what_is_not_the_two_sections_scores_zero(text):
    message = [{"role": "assistant", "content": GOOD}]
    assert think_answer_format([text, GOOD, message], answer=["4"] * 3) == [0.0, 1.0, 1.0]


def test_other_sections_and_a_tag_that_the_prompt_opened():
    plan = XmlSections(["plan", "code", "test"])
    assert plan(["<plan>a</plan><code>b</code><test>c</test>", "<plan>a</plan><test>c</test><code>b</code>"]) == [1, 0]
    opened = XmlSections(first_is_open=True)
    assert opened(["add</think><answer>4</answer>", GOOD]) == [1.0, 0.0]


def test_the_regular_expression_has_to_match_all_of_it():
    number = pickle.loads(pickle.dumps(RegexFormat(r"thus.*####\s*-?\d+")))
    assert number(["thus\n2 + 2\n#### 4\n", "thus #### 4 or 5", "so thus #### 4"]) == [1.0, 0.0, 0.0]


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        RegexFormat("(")
    for names in ([], ["a", "a"], ["a b"], "think"):
        with pytest.raises(ValueError, match="different tag names"):
            XmlSections(names)
