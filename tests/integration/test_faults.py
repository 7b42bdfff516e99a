"""File systems that refuse: the checkpoint before stays valid, and the run says what happened."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dihal.checkpoint import list_checkpoints, load_checkpoint
from dihal.config import TrainConfig
from dihal.errors import UsageError
from tests import jobs

SIZE = 300_000
"""Numbers in a checkpoint of these tests: 1.2 MB."""


def save(folder: Path, step: int) -> None:
    jobs.save(folder, step, SIZE)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Callable[..., tuple[int | None, str]]:
    """save_elsewhere(folder, step) -> exit code and output of another process that saves."""

    def call(folder: Path, step: int, **rest: str) -> tuple[int | None, str]:
        return jobs.save_elsewhere(folder, step, SIZE, log=tmp_path / "save.log", **rest)

    return call


Elsewhere = Callable[..., tuple[int | None, str]]
Mount = Callable[[str], Path]


def intact(folder: Path, step: int) -> None:
    found = load_checkpoint(folder)
    assert found.state["step"] == step
    assert bool((found.tensors("model")["w"] == step).all())
    assert not list((folder / "checkpoints").glob(".*"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A small file system in memory; where that may not be mounted, the tests that need it are skipped."""
    place = tmp_path / "mounted"
    place.mkdir()
    used = []

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        used.append(place)
        return place

    yield mount
    for path in used:
        subprocess.run(["umount", str(path)], check=True)


def test_a_file_system_without_room(mounted: Mount, elsewhere: Elsewhere) -> None:
    folder = mounted("size=4500k")
    save(folder, 1)
    save(folder, 2)
    code, said = elsewhere(folder, 3)
    assert code == 2
    assert "MiB free" in said
    assert "step-00000002 is intact" in said
    intact(folder, 2)


def test_a_disk_that_fills_up_while_saving(mounted: Mount, monkeypatch: pytest.MonkeyPatch) -> None:
    """As above, but the room was there when it was asked for."""
    folder = mounted("size=4500k")
    save(folder, 1)
    save(folder, 2)
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1 << 40))
    with pytest.raises(UsageError, match=r"No space left on device.*step-00000002 is intact"):
        jobs.save(folder, 3, 2 * SIZE)
    intact(folder, 2)


def test_a_file_system_that_is_read_only(mounted: Mount, elsewhere: Elsewhere) -> None:
    folder = mounted("size=8m")
    save(folder, 1)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    code, said = elsewhere(folder, 2)
    assert code == 2
    assert "Read-only file system" in said
    intact(folder, 1)


def test_a_folder_of_somebody_else(tmp_path: Path, elsewhere: Elsewhere) -> None:
    folder = tmp_path / "run"
    save(folder, 1)
    (folder / "checkpoints").chmod(0o555)
    code, said = elsewhere(folder, 2, how="nobody")
    (folder / "checkpoints").chmod(0o755)
    assert code == 2, said
    assert "Permission denied" in said
    intact(folder, 1)


def test_a_file_that_may_not_grow(tmp_path: Path, elsewhere: Elsewhere) -> None:
    """A quota, seen by the process as a limit on the size of its files, reached in the middle of the tensors."""
    save(tmp_path, 1)
    code, said = elsewhere(tmp_path, 2, how="limited")
    assert code == 2
    assert "File too large" in said
    assert "step-00000001 is intact" in said
    intact(tmp_path, 1)


def test_a_temporary_folder_elsewhere_is_not_used(tmp_path: Path, mounted: Mount, elsewhere: Elsewhere) -> None:
    """Staged on another file system, a rename would be a copy; in a full one, no save at all."""
    full = mounted("size=64k")
    (full / "full").write_bytes(bytes(60_000))
    folder = tmp_path / "run"
    save(folder, 1)
    code, said = elsewhere(folder, 2, TMPDIR=str(full))
    assert code == 0, said
    assert load_checkpoint(folder).state["step"] == 2
    assert [path.name for path in full.iterdir()] == ["full"]


# -- in the middle of a run


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return jobs.prepare(tmp_path_factory.mktemp("faults"))


def test_a_run_on_a_disk_that_fills_up(prepared: Path, mounted: Mount) -> None:
    """The run ends visibly soon after; with room again it goes on."""
    folder = mounted("size=1m")
    config = jobs.configuration(prepared, folder / "run", steps=12, **{"trainer.save_every": 2})
    usual = replace(config, out=str(prepared / "usual"))
    assert jobs.finish(jobs.start(usual)) == [0]
    size = sum(file.stat().st_size for file in list_checkpoints(usual.out)[-1].iterdir())
    # Room for two checkpoints and the third one that replaces the first, less a little.
    subprocess.run(["mount", "-o", f"remount,size={(1 << 20) + 2 * size}", str(folder)], check=True)
    log = prepared / "full.log"
    assert jobs.finish(jobs.start(config, log=log)) == [2]
    assert "is intact" in log.read_text()
    before = load_checkpoint(config.out).state["step"]
    assert 2 <= before < 12
    subprocess.run(["mount", "-o", "remount,size=64m", str(folder)], check=True)
    assert jobs.finish(jobs.start(replace(config, resume=True), log=log)) == [0]
    assert jobs.same(config.out, usual.out)
    assert jobs.losses(config.out) == jobs.losses(usual.out)


@pytest.fixture(scope="module")
def trained(prepared: Path) -> TrainConfig:
    config = jobs.configuration(prepared, prepared / "trained", steps=4, **{"trainer.save_every": 2})
    assert jobs.finish(jobs.start(config)) == [0]
    return config


def test_a_damaged_checkpoint_is_passed_over_loudly(trained: TrainConfig, tmp_path: Path) -> None:
    shutil.copytree(trained.out, tmp_path / "run")
    config = replace(trained, out=str(tmp_path / "run"), resume=True)
    file = list_checkpoints(config.out)[-1] / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    assert jobs.finish(jobs.start(config)) == [0]
    said = (tmp_path / "run.log").read_text()
    assert "optimizer.safetensors was altered" in said
    assert "Falling back to step-00000002" in said
    assert jobs.same(config.out, trained.out)


def test_nothing_is_pickled(trained: TrainConfig) -> None:
    files = {path.name for path in list_checkpoints(trained.out)[-1].iterdir()}
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}
    for path in list_checkpoints(trained.out)[-1].glob("*.json"):
        json.loads(path.read_text())
