"""Checkpoints that are complete or not there at all, and what an output directory holds.

A checkpoint directory is filled by transformers.Trainer and then sealed: a manifest with every file's size and hash is
written last, atomically. Only sealed checkpoints are resumed from; a run killed at any moment leaves at worst an
unsealed one.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

MANIFEST = "manifest.json"
FINISHED = "run_finished.json"
PREFIX = "checkpoint-"
ABANDONED = "abandoned-"  # before the names of checkpoints that a run resumed from an earlier one left behind
INITIAL = "initial_adapter"
STATE = "trainer_state.json"
ROLLOUTS = "rollouts"
BASE_FILE = "base.json"
CONFIG_FILE = "grpo_config.json"  # beside a saved adapter, also of a run from Python
RUN_FILE = "run.yaml"  # the configuration of a run of `colora train`
OF_OTHERS = "training_args.bin"  # what transformers' own Trainer, and so TRL, leaves in a checkpoint, and this one not


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that it is there whole after a crash, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").hexdigest()


def seal(directory: Path) -> None:
    """Write the manifest of a checkpoint that is complete."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
            files[str(path.relative_to(directory))] = {"bytes": path.stat().st_size, "blake2b": _digest(path)}
    write_durably(directory / MANIFEST, json.dumps({"files": files}, indent=1))
    sync_directory(directory.parent)


def find_damage(directory: Path) -> str | None:
    """What is wrong with a checkpoint, or None where every file is as it was sealed."""
    manifest = directory / MANIFEST
    if not directory.is_dir():
        return "it does not exist"
    if _is_of_others(directory):
        return f"it is of another trainer, such as TRL's (it has {OF_OTHERS} and no {MANIFEST})"
    if (directory / INITIAL).is_dir():
        return f"it is the directory of a run, not one of its checkpoints ({PREFIX}N in there)"
    if not manifest.is_file():
        return "it was not finished writing (it has no manifest.json)"
    try:
        files = json.loads(manifest.read_text())["files"]
    except (json.JSONDecodeError, KeyError):
        return "its manifest.json cannot be read"
    for name, expected in files.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(path) != expected["blake2b"]:
            return f"{name} was changed after it was written"
    return None


def _is_of_others(directory: Path) -> bool:
    return (directory / OF_OTHERS).is_file() and not (directory / MANIFEST).is_file()


def write_base(directory: Path, model: str, base: str) -> None:
    """Note what the adapter was trained on: the base model's name and its `SharedWeights.base`."""
    (directory / BASE_FILE).write_text(json.dumps({"model": model, "format": base}))


def check_base(directory: Path, base: str) -> None:
    """Raise ValueError where a checkpoint's adapter was trained on a base in another format than this run's."""
    path = directory / BASE_FILE
    trained_on = json.loads(path.read_text())["format"] if path.is_file() else base
    if trained_on != base:
        remedy = "leave base at auto and use the unquantised checkpoint"
        if trained_on != "dense":
            remedy = f"set base to {trained_on}"
        raise ValueError(
            f"cannot resume from {directory}: it was trained on a base that is {trained_on}, and this run's is {base}: "
            f"{remedy}"
        )


def check_optimizer(directory: Path, optim: str) -> None:
    """Raise ValueError where a checkpoint has the state of another optimizer than `optim`, this run's."""
    options = directory / CONFIG_FILE
    if not (directory / "optimizer.pt").is_file() or not options.is_file():
        return
    saved = json.loads(options.read_text()).get("optim", optim)
    if _optimizer_state(saved) != _optimizer_state(optim):
        raise ValueError(
            f"cannot resume from {directory}: it has the optimizer state of {saved}, and this run's optim is {optim}: "
            f"set optim to {saved}"
        )


def _optimizer_state(optim: str) -> str:
    """A name for what the state looks like: whether it is paged or its steps are fused makes no difference."""
    name = optim.removeprefix("paged_").removesuffix("_fused")
    return "adamw_8bit" if name == "adamw_bnb_8bit" else name


def checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoint directories by step, oldest first, sealed or not."""
    found = [path for path in output_dir.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The optimizer step after which a checkpoint was made: by its name, or where it was renamed by what it holds."""
    number = path.name.removeprefix(PREFIX)
    return int(number) if number.isdigit() else int(json.loads((path / STATE).read_text())["global_step"])


def latest_complete(output_dir: Path) -> Path | None:
    """The newest checkpoint that is whole, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if find_damage(path) is None), None)


def resolve_resume(output_dir: Path, resume: str | bool | None) -> Path | None:
    """The checkpoint to go on from, or None to start at step 0.

    Args:
        resume: True: the newest whole checkpoint of `output_dir`, if there is one; a path: that one; None or False:
            none.

    Raises:
        ValueError: the named checkpoint is damaged; or `output_dir` holds a run and `resume` was not given, or names a
            checkpoint that lies elsewhere; or it holds checkpoints of another trainer.
    """
    if isinstance(resume, (str, os.PathLike)):
        damage = find_damage(Path(resume))
        if damage:
            newest = latest_complete(output_dir)
            hint = f"the newest whole checkpoint is {newest}" if newest else f"{output_dir} has no whole checkpoint"
            raise ValueError(f"cannot resume from {resume}: {damage}; {hint}")
        if Path(resume).resolve().parent != output_dir.resolve() and _holds_run(output_dir):
            raise ValueError(
                f"output_dir {output_dir} holds a run already, whose rollouts would make way for those that follow "
                f"{resume}: choose another output_dir"
            )
        return Path(resume)
    others = next((path for path in checkpoints(output_dir) if _is_of_others(path)), None)
    if others is not None:
        raise ValueError(
            f"output_dir {output_dir} holds a run of another trainer, such as TRL's ({others.name} has {OF_OTHERS}), "
            "which cannot be gone on with: choose another output_dir"
        )
    finished = output_dir / FINISHED
    if finished.is_file():
        raise ValueError(
            f"output_dir {output_dir} holds a finished run ({json.loads(finished.read_text())['steps']} steps): "
            "choose another output_dir, or give the path of a checkpoint to go on from it"
        )
    if resume:
        return latest_complete(output_dir)
    if _holds_run(output_dir):
        newest = latest_complete(output_dir)
        state = f"its newest whole checkpoint is {newest.name}" if newest else "without a whole checkpoint"
        raise ValueError(
            f"output_dir {output_dir} holds an unfinished run ({state}): pass resume_from_checkpoint=True to go on "
            "with it (on the command line: --resume true), or choose another output_dir"
        )
    return None


def _holds_run(output_dir: Path) -> bool:
    return bool(checkpoints(output_dir)) or any((output_dir / ROLLOUTS).glob("*.parquet"))


def mark_finished(output_dir: Path, steps: int) -> None:
    """Note that the run reached its end."""
    write_durably(output_dir / FINISHED, json.dumps({"steps": steps}))


def prepare_directory(output_dir: Path, start: Path | None) -> None:
    """Make `output_dir` ready to run from `start` (None: step 0): away with what a killed run left half done.

    Rollouts of steps that will be made again go, so that none is double; unsealed checkpoints go, and the mark of an
    end. What else someone has put beside the rollouts stays. Whole checkpoints of later steps are renamed, so that none
    is taken for one of the run that now begins.
    """
    step = step_of(start) if start else 0
    rollouts = output_dir / ROLLOUTS
    rollouts.mkdir(parents=True, exist_ok=True)
    for path in rollouts.iterdir():
        number = path.stem.removeprefix("step_")
        half_written = path.name.startswith(".step_") and path.suffix == ".tmp"
        if half_written or (path.suffix == ".parquet" and number.isdigit() and int(number) > step):
            path.unlink()
    for path in checkpoints(output_dir):
        if not (path / MANIFEST).is_file():
            shutil.rmtree(path)
        elif step_of(path) > step:
            aside = path.with_name(ABANDONED + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    for name in (FINISHED, STATE):
        (output_dir / name).unlink(missing_ok=True)


def check_disk(
    output_dir: Path, trainable_parameters: int, checkpoints_kept: int | None, free_bytes: int | None = None
) -> None:
    """Raise OSError where the disk cannot hold the checkpoints to come.

    A checkpoint has the fp32 adapter and two fp32 moments of Adam: 12 bytes a trainable parameter. Room for one more
    than are kept is needed, as the oldest is deleted after the newest is sealed; where all are kept, room for two is
    asked for.

    Args:
        free_bytes: for tests; by default what the file system of `output_dir` has free.
    """
    if free_bytes is None:
        parent = next(path for path in (output_dir.absolute(), *output_dir.absolute().parents) if path.exists())
        free_bytes = shutil.disk_usage(parent).free
    one = 12 * trainable_parameters + 2**20
    needed = one * ((checkpoints_kept or 1) + 1)
    if free_bytes < needed:
        raise OSError(
            f"output_dir {output_dir}: {free_bytes / 2**20:.0f} MiB are free, the checkpoints need "
            f"{needed / 2**20:.0f} MiB ({one / 2**20:.0f} MiB each): free some space, choose another output_dir, or "
            "lower save_total_limit"
        )
