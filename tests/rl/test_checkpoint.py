"""Checkpoints are whole or refused; an output directory's past is respected."""

import json
from pathlib import Path

import pytest
from colora.rl import checkpoint


def make_checkpoint(directory: Path, step: int, sealed: bool = True) -> Path:
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "adapter_model.safetensors").write_bytes(b"weights" * step)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    if sealed:
        checkpoint.seal(path)
    return path


def test_a_sealed_checkpoint_is_whole(tmp_path: Path) -> None:
    assert checkpoint.find_damage(make_checkpoint(tmp_path, 3)) is None


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: (p / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"short"), "5 bytes instead of 21"),
        (lambda p: (p / "adapter_model.safetensors").write_bytes(b"Weights" * 3), "was changed"),
        (lambda p: (p / "manifest.json").unlink(), "not finished writing"),
        (lambda p: (p / "manifest.json").write_text("{"), "cannot be read"),
    ],
)
def test_damage_is_found_and_resuming_refused(tmp_path: Path, harm, message: str) -> None:
    older, newer = make_checkpoint(tmp_path, 2), make_checkpoint(tmp_path, 3)
    harm(newer)
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.resolve_resume(tmp_path, str(newer))
    assert str(older) in str(error.value)
    assert checkpoint.resolve_resume(tmp_path, True) == older


def test_resume_true_without_a_checkpoint_starts_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5, sealed=False)
    assert checkpoint.resolve_resume(tmp_path, True) is None


def test_an_unfinished_run_is_not_written_over(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 5)
    with pytest.raises(ValueError, match="unfinished run.*checkpoint-5.*resume"):
        checkpoint.resolve_resume(tmp_path, None)


def test_a_finished_run_is_not_written_over(tmp_path: Path) -> None:
    last = make_checkpoint(tmp_path, 8)
    checkpoint.mark_finished(tmp_path, 8)
    for resume in (None, True):
        with pytest.raises(ValueError, match=r"finished run \(8 steps\).*another output_dir"):
            checkpoint.resolve_resume(tmp_path, resume)
    assert checkpoint.resolve_resume(tmp_path, str(last)) == last


def test_preparing_removes_what_will_be_made_again(tmp_path: Path) -> None:
    start = make_checkpoint(tmp_path, 2)
    make_checkpoint(tmp_path, 4, sealed=False)
    rollouts = tmp_path / checkpoint.ROLLOUTS
    rollouts.mkdir()
    names = ["step_00000001.parquet", "step_00000002.parquet", "step_00000003.parquet", ".step_00000004.parquet.tmp"]
    for name in names:
        (rollouts / name).touch()
    checkpoint.prepare_directory(tmp_path, start)
    assert sorted(path.name for path in rollouts.iterdir()) == names[:2]
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["checkpoint-2"]


def test_too_little_disk_says_how_much_is_needed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"10 MiB are free, the checkpoints need 3\d\d MiB.*save_total_limit"):
        checkpoint.check_disk(tmp_path / "not" / "there", 10_000_000, checkpoints_kept=2, free_bytes=10 * 2**20)
    checkpoint.check_disk(tmp_path, 1000, checkpoints_kept=1)


@pytest.mark.parametrize("name", ["my-best", "abandoned-checkpoint-3"])
def test_a_checkpoint_that_was_renamed_can_be_gone_on_from(tmp_path: Path, name: str) -> None:
    renamed = make_checkpoint(tmp_path, 3).rename(tmp_path / name)
    assert checkpoint.resolve_resume(tmp_path, str(renamed)) == renamed
    assert checkpoint.step_of(renamed) == 3


def test_a_run_is_not_written_over_by_one_that_goes_on_from_elsewhere(tmp_path: Path) -> None:
    elsewhere, output = make_checkpoint(tmp_path / "first", 2), tmp_path / "second"
    assert checkpoint.resolve_resume(output, str(elsewhere)) == elsewhere
    rollouts = output / checkpoint.ROLLOUTS
    rollouts.mkdir(parents=True)
    (rollouts / "step_00000003.parquet").touch()
    with pytest.raises(ValueError, match=r"second holds a run already.*first/checkpoint-2.*another output_dir"):
        checkpoint.resolve_resume(output, str(elsewhere))


@pytest.mark.parametrize("resume", [None, True])
def test_the_checkpoints_of_another_trainer_are_left_alone(tmp_path: Path, resume: bool | None) -> None:
    theirs = make_checkpoint(tmp_path, 500, sealed=False)
    (theirs / "training_args.bin").touch()
    with pytest.raises(ValueError, match=r"of another trainer.*checkpoint-500 has training_args.bin.*another output_d"):
        checkpoint.resolve_resume(tmp_path, resume)
    with pytest.raises(ValueError, match=r"cannot resume from .*checkpoint-500: it is of another trainer"):
        checkpoint.resolve_resume(tmp_path / "new", str(theirs))


def test_the_directory_of_a_run_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / checkpoint.INITIAL).mkdir()
    with pytest.raises(ValueError, match="directory of a run, not one of its checkpoints"):
        checkpoint.resolve_resume(tmp_path, str(tmp_path))


def test_preparing_leaves_what_others_put_beside_the_rollouts(tmp_path: Path) -> None:
    rollouts = tmp_path / checkpoint.ROLLOUTS
    (rollouts / "plots").mkdir(parents=True)
    for name in ("notes.txt", "step_00000003.csv", "step_00000001.parquet"):
        (rollouts / name).touch()
    checkpoint.prepare_directory(tmp_path, None)
    assert sorted(path.name for path in rollouts.iterdir()) == ["notes.txt", "plots", "step_00000003.csv"]
