"""Output folders: made before the work, gone after it fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dihal.errors import UsageError
from dihal.io import output_dir


def failing(folder: Path, work: Callable[[Path], object], error: type[BaseException] = ZeroDivisionError) -> None:
    with output_dir(folder) as made:
        assert made.is_dir()
        work(made)
        raise error


@pytest.mark.parametrize("error", [ZeroDivisionError, UsageError, KeyboardInterrupt])
def test_folders_made_for_work_that_fails_are_removed_and_others_are_not(
    tmp_path: Path, error: type[BaseException]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for folder in (own / "a" / "b", own):
        with pytest.raises(error):
            failing(folder, lambda made: None, error)
        assert [path.name for path in tmp_path.rglob("*")] == ["own"]


def test_what_was_written_before_the_failure_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(tmp_path / "a" / "b", lambda made: (made.parent / "row.json").write_text("{}"))
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["row.json"]


def test_work_that_succeeds_keeps_its_folder(tmp_path: Path) -> None:
    with output_dir(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b").is_dir()


def test_a_folder_that_cannot_be_made_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write to the output folder"):
        failing(tmp_path / "file" / "a", lambda made: pytest.fail("the work must not begin"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
