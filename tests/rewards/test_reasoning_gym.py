"""reasoning-gym tasks as a dataset and a reward, with the real package."""

import sys

import pytest
from colora.rewards.reasoning_gym import extract_answer, reasoning_gym_dataset, reasoning_gym_reward
from colora.rewards.runner import RewardRunner
from datasets import concatenate_datasets

reasoning_gym = pytest.importorskip("reasoning_gym")
DATASETS = reasoning_gym.factory.DATASETS


def rewards(dataset, completions):
    runner = RewardRunner([reasoning_gym_reward])
    columns = {name: dataset[name][:] for name in dataset.column_names}
    scores = runner.score(dataset["prompt"][:], completions, [[]] * len(completions), columns)
    return scores.values[:, 0].tolist()


def test_the_dataset_is_the_tasks_and_repeats_by_seed():
    dataset = reasoning_gym_dataset("basic_arithmetic", size=5, seed=3, max_digits=2)
    assert dataset.column_names == ["prompt", "answer", "entry", "task", "task_options"]
    entries = reasoning_gym.create_dataset("basic_arithmetic", size=5, seed=3, max_digits=2)
    assert dataset["prompt"][:] == [entry["question"] for entry in entries]
    assert dataset["answer"][:] == [entry["answer"] for entry in entries]
    assert reasoning_gym_dataset("basic_arithmetic", 5, 3, max_digits=2).to_list() == dataset.to_list()
    assert reasoning_gym_dataset("basic_arithmetic", 5, 4, max_digits=2).to_list() != dataset.to_list()


def test_every_task_scores_as_its_own_verifier_does():
    """All of them, since JSON would change some entries (tuples, integer keys) and verifiers are of many kinds."""
    raising = {("prime_factorization", "x")}
    for task in sorted(set(DATASETS) - {"composite"}):
        dataset = reasoning_gym_dataset(task, size=1, seed=1)
        original = reasoning_gym.create_dataset(task, size=1, seed=1)
        entry = original[0]
        for answer in ("x", entry["answer"] or ""):
            expected = 0.0 if (task, answer) in raising else float(original.score_answer(answer, entry))
            assert rewards(dataset, [f"because ... #### {answer}"]) == [pytest.approx(expected)], (task, answer)


def test_verifiers_see_the_tasks_options():
    options = {"min_num_decimal_places": 1, "max_num_decimal_places": 1, "precision": 3}
    coarse = reasoning_gym_dataset("decimal_arithmetic", size=1, seed=0, **options)
    original = reasoning_gym.create_dataset("decimal_arithmetic", size=1, seed=0, **options)
    nearly = str(float(original[0]["answer"]) + 0.05)  # equal to one decimal place, not to the default of three
    default = reasoning_gym.create_dataset("decimal_arithmetic", size=1, seed=0)
    assert original.score_answer(nearly, original[0]) == 1.0 > default.score_answer(nearly, original[0])
    assert rewards(coarse, [nearly]) == [1.0]


def test_several_tasks_in_one_dataset():
    dataset = concatenate_datasets([reasoning_gym_dataset(task, 1, 0) for task in ("basic_arithmetic", "leg_counting")])
    first, second = dataset["answer"][:]
    assert rewards(dataset, [first, f"<answer>{second}</answer>"]) == [1.0, 1.0]
    assert rewards(dataset, ["no idea", "no idea"]) != [1.0, 1.0]


def test_verifier_that_raises_on_what_the_model_wrote_scores_zero():
    dataset = reasoning_gym_dataset("prime_factorization", size=1, seed=0)
    original = reasoning_gym.create_dataset("prime_factorization", size=1, seed=0)
    with pytest.raises(ValueError):
        original.score_answer("2 x three", original[0])
    assert rewards(dataset, ["2 x three"]) == [0.0]
    assert rewards(dataset, dataset["answer"][:]) == [1.0]


def test_broken_entry_is_an_error_and_not_a_zero():
    (row,) = reasoning_gym_dataset("prime_factorization", size=1, seed=0)
    with pytest.raises(ValueError, match="invalid literal"):
        reasoning_gym_reward(["2 x three"], ['{"answer": "six"}'], [row["task"]], [row["task_options"]])


@pytest.mark.parametrize(
    "completion, answer",
    [
        (" 42 \n", "42"),
        ("so #### 41, no: #### 42 ", "42"),
        ("<answer>41</answer> rather <answer>\n42</answer> done", "42"),
        ("cut off <answer>42", "42"),
        ("#### 41 <answer>42</answer>", "42"),
        ("<answer>41</answer>\n#### 42", "42"),
        ("####\n1 2\n3 4", "1 2\n3 4"),
        ([{"role": "assistant", "content": "#### 41"}, {"role": "assistant", "content": "#### 42"}], "42"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "42"}]}], "42"),
        ([{"role": "assistant", "content": None}], ""),
        ([], ""),
    ],
)
def test_extract_answer(completion, answer):
    assert extract_answer(completion) == answer


def test_bad_names_and_options():
    with pytest.raises(ValueError, match="no task 'basic_arithmetics'. Did you mean .*'basic_arithmetic'"):
        reasoning_gym_dataset("basic_arithmetics", 1, 0)
    with pytest.raises(ValueError, match="The tasks are .*'countdown'"):
        reasoning_gym_dataset("#", 1, 0)
    with pytest.raises(ValueError, match="refused .*digits.*Options: .*'max_digits'"):
        reasoning_gym_dataset("basic_arithmetic", 1, 0, digits=2)
    with pytest.raises(ValueError, match="refused size=1"):
        reasoning_gym_dataset("basic_arithmetic", 1, 0, min_digits=0)
    with pytest.raises(ValueError, match="plain values"):
        reasoning_gym_dataset("basic_arithmetic", 1, 0, max_digits=object())
    with pytest.raises(ValueError, match="concatenate_datasets"):
        reasoning_gym_dataset("composite", 1, 0)


def test_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ImportError, match=r"pip install colora\[tasks\]"):
        reasoning_gym_dataset("basic_arithmetic", 1, 0)
