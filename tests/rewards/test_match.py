import json
import pickle
import sys

import pytest
from colora.rewards import match
from colora.rewards.match import JsonSchema, chosen_letter, exact_match, json_schema, multiple_choice

SCHEMA = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}


def test_exact_match_is_normalised():
    completions = ["<answer> new\n york. </answer>", "“New York”", '"New York"', "<think>New York</think>Paris", "New"]
    assert exact_match(completions, ["New  York"] * 5) == [1.0, 0.0, 1.0, 0.0, 0.0]
    assert exact_match(["\uff14\uff12", "42", ""], [42, None, "x"]) == [1.0, None, 0.0]


@pytest.mark.parametrize(
    "text, letter",
    [
        ("B", "B"),
        ("(b)", "B"),
        ("The answer is C.", "C"),
        ("A is wrong. The correct answer is **D**", "D"),
        ("The answer is A. No: the answer is (B).", "B"),
        ("The answer is A, so \\boxed{\\text{C}}", "C"),
        ("Paris is in France, hence\nB) Paris", "B"),
        ("Answer: A", "A"),
        ("A city in France", None),
        ("The answer is Paris", None),
        ("I think so", None),
        ("", None),
    ],
)
def test_the_chosen_letter(text, letter):
    assert chosen_letter(text) == letter


def test_multiple_choice():
    message = [{"role": "assistant", "content": "<think>answer: A</think>The answer is B"}]
    assert multiple_choice([message, "<answer>C</answer>", "?", "A", "A"], ["B", "(c)", "A", "1", None]) == [
        *(1.0, 1.0, 0.0),
        *(None, None),
    ]


def test_json_that_fits_a_schema():
    pytest.importorskip("jsonschema")
    reward = pickle.loads(pickle.dumps(JsonSchema(SCHEMA)))
    completions = ['{"n": 1}', '```json\n{"n": 1}\n```', '{"n": "1"}', "{}", "n = 1", "[" * 100_000, ""]
    assert reward(completions) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    rows = [json.dumps(SCHEMA), json.dumps({"type": "array"}), None]
    assert json_schema(['{"n": 1}', '{"n": 1}', "{}"], rows) == [1.0, 0.0, None]


def test_a_wrong_schema_is_an_error_and_not_a_zero():
    pytest.importorskip("jsonschema")
    with pytest.raises(ValueError, match="not a valid JSON schema"):
        JsonSchema({"type": "number of apples"})
    with pytest.raises(ValueError, match="is not JSON"):
        json_schema(["{}"], ["{type: object}"])


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    match._validator.cache_clear()
    with pytest.raises(ImportError, match=r"pip install colora\[schema\]"):
        JsonSchema(SCHEMA)
