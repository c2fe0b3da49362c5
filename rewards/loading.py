"""Finds the callable that a text such as `package.module:function` or `path/to/file.py:function` names."""

import ast
import contextlib
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FORMS = "`package.module:function` or `path/to/file.py:function`"
FILE_MODULE_PREFIX = "colora_reward_"


def load_reward(spec: str) -> Callable:
    """The reward function that `spec` names.

    Args:
        spec: `package.module:function` or `path/to/file.py:function`; a relative path starts at the current directory,
            and so does the search for modules. After the colon stands an attribute, dotted if need be (`judge.score`).

    A file may import the modules beside it. It becomes a module with a name of its own, made from its path and content:
    two files called `reward.py` are two modules, and a file that was edited is loaded anew. Its functions can be
    pickled within this process and those forked from it; a process started otherwise has to call `load_reward` itself.

    Raises:
        ValueError: no colon, no such file or module, an error while importing it, no such attribute, or not a function.
    """
    function = load_named(spec, "reward function")
    if inspect.isclass(function):
        attribute = spec.rpartition(":")[2]
        raise ValueError(
            f"reward function {spec!r} is a class; name a function or an instance, as in `judge = {attribute}()`"
        )
    return function


def load_named(spec: str, what: str) -> Callable:
    """The callable, a class perhaps, that `spec` names in the way of `load_reward`; `what` it is, for messages.

    Raises:
        ValueError: no colon, no such file or module, an error while importing it, no such attribute, or not callable.
    """
    label = f"{what} {spec!r}"
    source, colon, attribute = spec.rpartition(":")
    if not colon or not source or not attribute:
        raise ValueError(f"{label} is not of the form {FORMS}")
    is_file = source.endswith(".py") or "/" in source or "\\" in source
    module = _load_file(label, Path(source).expanduser()) if is_file else _load_module(label, source)
    found = _find_attribute(label, module, attribute)
    if not callable(found):
        raise ValueError(f"{label} is a {type(found).__name__}, which cannot be called")
    return found


def load_reward_file(path: str) -> ModuleType:
    """The module that `load_reward` makes of a file: a process that is not forked needs it to unpickle functions."""
    return _load_file(f"reward function {path!r}", Path(path))


def _load_file(label: str, path: Path) -> ModuleType:
    if not path.is_file():
        with_suffix = path.with_name(path.name + ".py")
        here = [file.name for file in path.parent.glob("*.py")] if path.parent.is_dir() else []
        near = [with_suffix.name] if with_suffix.is_file() else difflib.get_close_matches(path.name, here, n=3)
        hint = f" Did you mean {near}?" if near else ""
        raise ValueError(f"{label}: there is no file {path} (looked in {path.parent.resolve()}).{hint}")
    path = path.resolve()
    source = path.read_bytes()
    name = f"{FILE_MODULE_PREFIX}{path.stem}_{hashlib.sha1(bytes(path) + source).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        tree = ast.parse(source, filename=str(path))
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ValueError(f"{label}: {path}, line {error.lineno}: {error.msg}: {line!r}") from error
    _refuse_mistakable_imports(label, path, tree)
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # before it runs, as for every import: dataclasses and pickle look it up there
    try:
        with _importable_folder(path.parent):
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script ends itself where its main part is not guarded
        del sys.modules[name]
        raise ValueError(f"{label}: importing {path} raised {type(error).__name__}: {error}") from error
    return module


def _load_module(label: str, name: str) -> ModuleType:
    try:
        with _importable_folder(Path.cwd()):
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise ValueError(f"{label}: importing {name} raised {type(error).__name__}: {error}") from error
        raise ValueError(
            f"{label}: there is no module {error.name!r} (looked in {Path.cwd()} and among the "
            f"installed packages). The forms are {FORMS}."
        ) from error
    except (Exception, SystemExit) as error:
        raise ValueError(f"{label}: importing {name} raised {type(error).__name__}: {error}") from error


def _find_attribute(label: str, module: ModuleType, attribute: str) -> Any:
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            there = [name for name in dir(found) if not name.startswith("_")]
            near = difflib.get_close_matches(part, there, n=3)
            functions = [name for name in there if inspect.isroutine(getattr(found, name))]
            hint = f"Did you mean {near}?" if near else f"Its functions are {functions}."
            place = getattr(found, "__file__", None) or found  # a built-in module has none, a mere folder has None
            owner = place if isinstance(found, ModuleType) else f"{type(found).__name__} {attribute!r}"
            raise ValueError(f"{label}: {owner} has no {part!r}. {hint}")
        found = getattr(found, part)
    return found


@contextlib.contextmanager
def _importable_folder(folder: Path) -> Iterator[None]:
    """First on the path while the module is imported, as for a script; last afterwards, where it can shadow nothing.

    It stays, since a function may import a neighbour only when it is called.
    """
    entry = str(folder)
    importlib.invalidate_caches()  # files written a moment ago, as from a notebook
    if entry in sys.path:
        yield
        return
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        sys.path.remove(entry)
        sys.path.append(entry)


def _refuse_mistakable_imports(label: str, path: Path, tree: ast.Module) -> None:
    """Python would silently reuse an already imported module of the same name instead of the file beside `path`."""
    for name in _imported_names(tree):
        neighbour = path.with_name(f"{name}.py")
        loaded = getattr(sys.modules.get(name), "__file__", None)
        if loaded is not None and neighbour.is_file() and Path(loaded).resolve() != neighbour:
            raise ValueError(
                f"{label}: {path} imports {name!r}, which would be {loaded}, already imported, and "
                f"not {neighbour}. Rename {neighbour.name}."
            )


def _imported_names(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names
