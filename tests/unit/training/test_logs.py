"""The record holds every step once; mirrors are optional."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dihal.config import LogConfig
from dihal.errors import UsageError
from dihal.training.logs import Record, build_mirrors, check_logs, read_records, write_csv
from dihal.training.progress import TrainingProgress


def test_records_are_on_disk_at_once_and_round_trip(tmp_path: Path) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    record.write({"kind": "train", "step": 1, "loss": 0.1 + 0.2})
    assert read_records(tmp_path / "metrics.jsonl") == [{"kind": "train", "step": 1, "loss": 0.1 + 0.2}]
    record.write({"kind": "train", "step": 2, "loss": math.nan})
    record.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[1])["loss"] is None


def test_resume_cuts_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = Record(path)
    for step in range(1, 6):
        record.write({"kind": "train", "step": step, "loss": step / 7})
    record.close()
    with open(path, "a") as file:
        file.write('{"kind": "train", "step": 3, "lo')
    record = Record(path, resumed_step=3)
    record.write({"kind": "train", "step": 4, "loss": 4 / 7})
    record.close()
    assert [(r["step"], r["loss"]) for r in read_records(path)] == [(s, s / 7) for s in (1, 2, 3, 4)]
    assert path.read_text().endswith("}\n")


def test_a_fresh_record_starts_empty(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 9}\n')  # of a run that died before its first checkpoint
    Record(path).close()
    assert read_records(path) == []


def test_csv_is_the_union_of_columns(tmp_path: Path) -> None:
    record = Record(tmp_path / "m.jsonl")
    record.write({"kind": "train", "step": 1, "loss": 0.5})
    record.write({"kind": "validation", "step": 1, "ema_loss": 0.25})
    record.close()
    write_csv(tmp_path / "m.jsonl", tmp_path / "m.csv")
    with open(tmp_path / "m.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows == [
        {"kind": "train", "step": "1", "loss": "0.5", "ema_loss": ""},
        {"kind": "validation", "step": "1", "loss": "", "ema_loss": "0.25"},
    ]


@pytest.mark.parametrize(
    ("package", "config"), [("tensorboard", LogConfig(tensorboard=True)), ("wandb", LogConfig(wandb="offline"))]
)
def test_a_missing_package_is_named_with_its_command(
    monkeypatch: pytest.MonkeyPatch, package: str, config: LogConfig
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"pip install .*{package}"):
        check_logs(config)
    check_logs(LogConfig())


def test_no_mirror_is_made_unasked(tmp_path: Path) -> None:
    assert build_mirrors(LogConfig(), tmp_path, {}) == []


def test_tensorboard_receives_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (mirror,) = build_mirrors(LogConfig(tensorboard=True), tmp_path, {})
    mirror.write({"kind": "train", "step": 3, "loss": 0.5})
    mirror.write({"kind": "validation", "step": 3, "loss": 0.75})
    mirror.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5)]
    assert [(e.step, e.value) for e in events.Scalars("validation/loss")] == [(3, 0.75)]


def test_progress_off_a_terminal_is_a_line_now_and_then(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        progress = TrainingProgress(True, 4, console=Console(file=file, width=200), interval=1000.0)
        progress.start()
        for step in range(1, 5):
            progress.update(step, step / 4, {"loss": 0.5, "tokens_per_second": 1234.0})
        progress.close()
    lines = (tmp_path / "out").read_text().splitlines()
    assert len(lines) == 2
    assert "step 1/4  25%  loss 0.5000  1,234 tok/s" in lines[0]
    assert "step 4/4  100%" in lines[1]
    assert "ETA 00:00" in lines[1]


def test_progress_on_a_terminal_is_a_bar(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as file:
        console = Console(file=file, force_terminal=True, width=120)
        progress = TrainingProgress(True, 4, console=console)
        progress.start()
        progress.update(2, 0.5, {"loss": 0.5, "tokens_per_second": 10.0})
        progress.close()
    text = (tmp_path / "out").read_text()
    assert "50%" in text
    assert "loss 0.5000" in text


def test_progress_disabled_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress(False, 4)
    progress.start()
    progress.update(1, 0.25, {"loss": 0.5})
    progress.close()
    assert capsys.readouterr() == ("", "")
