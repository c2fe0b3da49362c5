"""load_reward: the forms it takes, and what it says about the others."""

import pickle
import sys

import pytest
from colora.rewards.loading import load_reward

REWARD = "def reward(completions, **kwargs):\n    return [{value}] * len(completions)\n"


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    """Each test starts in an empty folder; the import state is put back afterwards."""
    path, modules = list(sys.path), set(sys.modules)
    monkeypatch.chdir(tmp_path)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_file_relative_and_absolute(tmp_path):
    path = write(tmp_path / "sub" / "reward.py", REWARD.format(value=1))
    assert load_reward("sub/reward.py:reward")(completions=["a", "b"]) == [1, 1]
    assert load_reward(f"{path}:reward") is load_reward("./sub/../sub/reward.py:reward")


def test_two_files_of_one_name_and_an_edited_one(tmp_path):
    write(tmp_path / "a" / "reward.py", REWARD.format(value=1))
    write(tmp_path / "b" / "reward.py", REWARD.format(value=2))
    first, second = load_reward("a/reward.py:reward"), load_reward("b/reward.py:reward")
    write(tmp_path / "a" / "reward.py", REWARD.format(value=3))
    third = load_reward("a/reward.py:reward")
    assert [function(completions=["x"]) for function in (first, second, third)] == [[1], [2], [3]]


def test_file_imports_its_neighbours_now_and_later(tmp_path):
    write(tmp_path / "lab" / "neighbour_now.py", "VALUE = 1\n")
    write(tmp_path / "lab" / "neighbour_later.py", "VALUE = 2\n")
    source = (
        "from neighbour_now import VALUE\n\n"
        "def reward(completions):\n    import neighbour_later\n    return [VALUE + neighbour_later.VALUE]\n"
    )
    write(tmp_path / "lab" / "reward.py", source)
    first_entry = sys.path[0]
    assert load_reward("lab/reward.py:reward")(["x"]) == [3]
    assert sys.path[0] == first_entry  # a neighbour called like an installed package shadows nothing from now on


def test_neighbour_that_python_would_mistake_for_another(tmp_path):
    for folder in ("a", "b"):
        write(tmp_path / folder / "helper_of_rewards.py", f"NAME = {folder!r}\n")
        source = "import helper_of_rewards\n\ndef reward(completions):\n    return helper_of_rewards.NAME\n"
        write(tmp_path / folder / "reward.py", source)
    assert load_reward("a/reward.py:reward")([]) == "a"
    with pytest.raises(ValueError, match="imports 'helper_of_rewards', which would be .*Rename helper_of_rewards.py"):
        load_reward("b/reward.py:reward")


def test_module_and_dotted_attribute(tmp_path):
    source = (
        REWARD.format(value=4)
        + "\nclass Judge:\n    def score(self, completions):\n        return [5]\n\njudge = Judge()\n"
    )
    write(tmp_path / "package_of_rewards" / "inner.py", source)
    write(tmp_path / "package_of_rewards" / "__init__.py", "")
    assert load_reward("package_of_rewards.inner:reward")(completions=["x"]) == [4]
    assert load_reward("package_of_rewards.inner:judge.score")(["x"]) == [5]
    assert load_reward("package_of_rewards/inner.py:judge.score")(["x"]) == [5]


def test_functions_of_a_file_can_be_pickled(tmp_path):
    write(tmp_path / "reward.py", REWARD.format(value=1))
    function = load_reward("reward.py:reward")
    assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize("spec", ["reward.py", "reward", ":reward", "reward.py:", ""])
def test_not_of_the_form(spec):
    with pytest.raises(ValueError, match="not of the form `package.module:function` or `path/to/file.py:function`"):
        load_reward(spec)


def test_missing_file_and_module(tmp_path):
    write(tmp_path / "rewards.py", "")
    write(tmp_path / "sub" / "judge.py", "")
    with pytest.raises(ValueError, match=r"no file reward.py.*mean \['rewards.py'\]"):
        load_reward("reward.py:f")
    with pytest.raises(ValueError, match=r"no file sub/judge .*mean \['judge.py'\]"):
        load_reward("sub/judge:f")
    with pytest.raises(ValueError, match="no file nowhere/x.py"):
        load_reward("nowhere/x.py:f")
    with pytest.raises(ValueError, match="no module 'not_there_at_all'"):
        load_reward("not_there_at_all.inner:f")
    with pytest.raises(ValueError, match="no module 'json.not_there'"):
        load_reward("json.not_there:f")


def test_errors_inside_the_file(tmp_path):
    write(tmp_path / "syntax.py", "x = 1\n\ndef reward(:\n    pass\n")
    with pytest.raises(ValueError, match=r"syntax.py, line 3: .*'def reward\(:'") as caught:
        load_reward("syntax.py:reward")
    assert isinstance(caught.value.__cause__, SyntaxError)
    write(tmp_path / "raising.py", "import not_there_at_all\n")
    for spec in ("raising.py:reward", "raising:reward"):
        with pytest.raises(ValueError, match="raised ModuleNotFoundError: No module named 'not_there_at_all'"):
            load_reward(spec)
    write(tmp_path / "script.py", "import sys\n\nsys.exit('usage: script.py FILE')\n")
    for spec in ("script.py:reward", "script:reward"):
        with pytest.raises(ValueError, match="importing .*script.* raised SystemExit: usage: script.py FILE"):
            load_reward(spec)
    write(tmp_path / "raising.py", REWARD.format(value=1))
    assert load_reward("raising.py:reward")(completions=[0]) == [1]  # nothing half-imported is left behind


def test_wrong_attribute(tmp_path):
    write(tmp_path / "reward.py", REWARD.format(value=1) + "\nclass Judge:\n    pass\n\nlimit = 3\n")
    with pytest.raises(ValueError, match=r"reward.py has no 'rewards'. Did you mean \['reward'\]"):
        load_reward("reward.py:rewards")
    with pytest.raises(ValueError, match=r"has no 'xyz'. Its functions are \['reward'\]"):
        load_reward("reward.py:xyz")
    (tmp_path / "folder_of_rewards").mkdir()
    for spec in ("sys:xyz", "folder_of_rewards:xyz"):  # modules without a file
        with pytest.raises(ValueError, match=f"<module '{spec.partition(':')[0]}' .*> has no 'xyz'"):
            load_reward(spec)
    with pytest.raises(ValueError, match="is a int, which cannot be called"):
        load_reward("reward.py:limit")
    with pytest.raises(ValueError, match="is a class"):
        load_reward("reward.py:Judge")
