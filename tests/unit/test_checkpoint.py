"""A checkpoint is whole or it is refused; a failed save never costs the one before."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dihal import checkpoint as module
from dihal.checkpoint import (
    CheckpointWarning,
    has_checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune,
    save_checkpoint,
)
from dihal.errors import UsageError


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weight = torch.randn(7, 5, generator=generator)
    return {
        "model": {"weight": weight, "tied": weight, "transposed": torch.randn(3, 4, generator=generator).t()},
        "ema": {"weight": weight * 0.5},
        "optimizer": {
            "weight/step": torch.tensor(float(step)),
            "weight/exp_avg": torch.randn(7, 5, generator=generator),
        },
    }


def save(folder: Path, step: int) -> Path:
    return save_checkpoint(
        folder,
        tensors=tensors(step),
        state={"step": step, "tokens": 100 * step, "seconds": 0.1 * step},
        config={"seed": 3, "optim": {"lr": 1e-3}},
        manifest_extra={
            "backbone": {"id": "tiny"},
            "data": {"train": "abc"},
            "provenance": {"versions": {"dihal": "9"}},
        },
    )


def same(path: Path, step: int) -> bool:
    found = load_checkpoint(path)
    return all(
        torch.equal(value, found.tensors(name)[key])
        for name, group in tensors(step).items()
        for key, value in group.items()
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step-00000012"
    found = load_checkpoint(tmp_path)
    assert found.path == path
    assert found.state == {"step": 12, "tokens": 1200, "seconds": 0.1 * 12}
    assert found.raw_config == {"seed": 3, "optim": {"lr": 1e-3}}
    assert found.manifest["backbone"] == {"id": "tiny"}
    assert found.names == ("ema", "model", "optimizer")
    assert same(path, 12)
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000012\n"
    loaded = found.tensors("model")
    assert loaded["tied"] is loaded["weight"]
    assert "tied" not in safetensors.torch.load_file(path / "model.safetensors")
    with pytest.raises(UsageError, match="It has: ema, model, optimizer"):
        found.tensors("teacher")


def test_overlapping_views_are_stored_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0)
    save_checkpoint(
        tmp_path,
        tensors={"model": {"a": whole, "b": whole[3:7]}},
        state={"step": 1},
        config={},
        manifest_extra={},
    )
    loaded = load_checkpoint(tmp_path).tensors("model")
    assert torch.equal(loaded["a"], whole)
    assert torch.equal(loaded["b"], whole[3:7])


def test_every_bit_flip_is_detected(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    files = sorted(path.iterdir())
    assert {file.name for file in files} == {
        "config.json", "ema.safetensors", "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    }  # fmt: skip
    rng = random.Random(0)
    for file in files:
        original = file.read_bytes()
        for _ in range(40):
            flipped = bytearray(original)
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            file.write_bytes(flipped)
            with pytest.raises(UsageError, match="not whole"):
                load_checkpoint(path)
        file.write_bytes(original)
    assert same(path, 1)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "config.json", "manifest.json", "ema.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "longer"])
def test_damage_is_named_and_falls_back(tmp_path: Path, name: str, damage: str) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "longer": data + b"x"}[damage])
    with pytest.raises(UsageError, match=f"{name}.*step-00000001"):
        load_checkpoint(newest)
    with pytest.warns(CheckpointWarning, match=f"{name}.*Falling back to step-00000001"):
        found = load_checkpoint(tmp_path)
    assert found.state["step"] == 1
    # Saving the damaged step again replaces it.
    assert save(tmp_path, 2) == newest
    assert same(newest, 2)


def test_nothing_valid_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"no valid checkpoint.*step-00000002.*step-00000001"):
        load_checkpoint(tmp_path)


def test_the_fallback_is_seen_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_text("{}")
    with pytest.warns(CheckpointWarning):
        load_checkpoint(tmp_path)
    assert "Falling back to step-00000001" in capsys.readouterr().err.replace("\n", " ")


def test_pointer_to_a_missing_folder(tmp_path: Path) -> None:
    save(tmp_path, 1)
    shutil.rmtree(save(tmp_path, 2))
    with pytest.warns(CheckpointWarning, match="step-00000002"):
        assert load_checkpoint(tmp_path).state["step"] == 1


def test_a_save_cut_before_its_pointer_still_counts(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "checkpoints" / "latest").write_text("step-00000001\n")
    assert load_checkpoint(tmp_path).state["step"] == 2


def test_leftovers_are_ignored_and_cleaned(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / "checkpoints" / ".staging-abc"
    shutil.copytree(tmp_path / "checkpoints" / "step-00000001", leftover)
    (leftover / "model.safetensors").write_bytes(b"half")
    assert load_checkpoint(tmp_path).state["step"] == 1
    save(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000001", "step-00000002"]


def test_missing_checkpoints_list_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    assert not has_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"holds no checkpoint.*metrics\.jsonl"):
        load_checkpoint(tmp_path)
    with pytest.raises(UsageError, match=r"does not exist.*metrics\.jsonl"):
        load_checkpoint(tmp_path / "other" / "run")
    with pytest.raises(UsageError, match="is a file"):
        load_checkpoint(tmp_path / "metrics.jsonl")


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FORMAT", "dihal.checkpoint/7")
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(UsageError, match=r"dihal.checkpoint/7.*dihal.checkpoint/1"):
        load_checkpoint(tmp_path)


def test_options_of_another_version_are_named(tmp_path: Path) -> None:
    pytest.importorskip("dihal.config.convert")
    save_checkpoint(tmp_path, tensors={}, state={"step": 1}, config={"sedd": 3}, manifest_extra={})
    with pytest.raises(UsageError, match=r"dihal.checkpoint/1.*sedd"):
        _ = load_checkpoint(tmp_path).config


ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES]


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("which", range(5))
def test_a_rename_that_fails_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, which: int
) -> None:
    """A save renames state, config, manifest, folder and pointer; each fails in turn."""
    save(tmp_path, 1)
    count = 0
    real = os.replace

    def replace(source: object, target: object) -> None:
        nonlocal count
        count += 1
        if count == which + 1:
            raise OSError(code, os.strerror(code))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(UsageError, match=f"{os.strerror(code)}.*step-0000000[12] is intact"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert count == which + 1
    # A failed pointer leaves a whole newer checkpoint; anything earlier leaves the first one.
    step = load_checkpoint(tmp_path).state["step"]
    assert step == (2 if which == 4 else 1)
    assert same(tmp_path, step)
    assert not list((tmp_path / "checkpoints").glob(".*"))
    save(tmp_path, 3)
    assert same(tmp_path, 3)


@pytest.mark.parametrize("code", ERRORS)
@pytest.mark.parametrize("call", range(0, 9))
def test_an_fsync_that_fails_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: int
) -> None:
    save(tmp_path, 1)
    count = 0
    real = os.fsync

    def fsync(handle: int) -> None:
        nonlocal count
        count += 1
        if count == call + 1:
            raise OSError(code, os.strerror(code))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UsageError, match=os.strerror(code)):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert same(tmp_path, load_checkpoint(tmp_path).state["step"])
    assert same(tmp_path / "checkpoints" / "step-00000001", 1)


def test_a_full_disk_is_noticed_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    monkeypatch.setattr(module.safetensors.torch, "save_file", lambda *_, **__: pytest.fail("wrote to a full disk"))
    with pytest.raises(UsageError, match=r"MiB free.*step-00000001 is intact"):
        save(tmp_path, 2)
    monkeypatch.undo()
    assert same(tmp_path, 1)


def test_a_write_the_system_refuses(tmp_path: Path) -> None:
    """A real failure in the middle of a tensor file: the process may not write files above 64 KiB."""
    save(tmp_path, 1)
    script = (
        "import torch, sys; from dihal.checkpoint import save_checkpoint; from dihal.errors import UsageError\n"
        "try: save_checkpoint(sys.argv[1], tensors={'model': {'w': torch.zeros(100_000)}}, state={'step': 2},"
        " config={}, manifest_extra={'provenance': {}})\n"
        "except UsageError as error: print(error); sys.exit(2)\n"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65_536, 65_536))

    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stdout
    assert "step-00000001 is intact" in done.stdout
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    assert same(tmp_path, 1)


def test_killed_while_saving(tmp_path: Path) -> None:
    """kill -9 between any two system calls of ours leaves the newest whole checkpoint in place."""
    script = (
        "import os, sys, torch; from dihal.checkpoint import save_checkpoint\n"
        "folder, at = sys.argv[1], int(sys.argv[2]); count = 0\n"
        "real = os.fsync\n"
        "def fsync(handle):\n"
        "    global count; count += 1\n"
        "    if count == at: os.kill(os.getpid(), 9)\n"
        "    real(handle)\n"
        "save_checkpoint(folder, tensors={'model': {'w': torch.ones(4)}}, state={'step': 1}, config={}, manifest_extra={'provenance': {}})\n"
        "os.fsync = fsync\n"
        "save_checkpoint(folder, tensors={'model': {'w': torch.ones(4)}}, state={'step': 2}, config={}, manifest_extra={'provenance': {}})\n"
    )
    for at in (1, 5, 8):
        folder = tmp_path / str(at)
        done = subprocess.run([sys.executable, "-c", script, str(folder), str(at)], check=False)
        assert done.returncode == -9
        assert load_checkpoint(folder).state["step"] in (1, 2)
        save(folder, 3)
        assert not list((folder / "checkpoints").glob(".*"))


def test_prune_keeps_the_newest_valid(tmp_path: Path) -> None:
    paths = [save(tmp_path, step) for step in (1, 2, 3, 4)]
    assert prune(tmp_path, 3, valid=paths[-1]) == [paths[0]]
    for path in paths[2:]:
        (path / "model.safetensors").unlink()
    assert prune(tmp_path, 1) == [paths[2]]
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000004"]
    with pytest.warns(CheckpointWarning):
        assert load_checkpoint(tmp_path).state["step"] == 2
    (paths[1] / "model.safetensors").unlink()
    assert prune(tmp_path, 1) == []


def test_files_add_little_to_what_they_hold(tmp_path: Path) -> None:
    weight = torch.randn(300_000)
    path = save_checkpoint(tmp_path, tensors={"model": {"w": weight}}, state={"step": 1}, config={}, manifest_extra={})
    size = sum(file.stat().st_size for file in path.iterdir())
    assert size <= 1.02 * weight.numel() * 4
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["size"] == (path / "model.safetensors").stat().st_size
