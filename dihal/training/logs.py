"""The record of a run: ``metrics.jsonl``, one JSON object per line; everything else mirrors it."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dihal.config import LogConfig
from dihal.errors import UsageError
from dihal.io import write_text

__all__ = ["Mirror", "Record", "build_mirrors", "check_logs", "read_records", "write_csv"]


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Records of a ``metrics.jsonl``, in order; a line cut by a crash is left out."""
    records = []
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class Record:
    """Appends records to ``metrics.jsonl``, each one on disk when :meth:`write` returns.

    Args:
        path: the file.
        resumed_step: records of later steps are cut, so that a resumed run's stream holds each step once.
    """

    def __init__(self, path: str | Path, *, resumed_step: int = 0) -> None:
        self.path = Path(path)
        kept = [record for record in read_records(self.path) if record["step"] <= resumed_step]
        # Also where nothing is cut: the last line may lack its end.
        write_text(self.path, "".join(_line(record) for record in kept))
        try:
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise UsageError(
                f"cannot write {str(self.path)!r}: {error.strerror}. Choose another run folder."
            ) from error

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record and flush it.

        Raises:
            UsageError: the file system refuses.
        """
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise UsageError(
                f"cannot write {str(self.path)!r}: {error.strerror}. Free some space, then go on with resume=true."
            ) from error

    def close(self) -> None:
        """Flush to the device and close."""
        if not self._file.closed:
            os.fsync(self._file.fileno())
            self._file.close()


def _line(record: Mapping[str, Any]) -> str:
    # repr of a float round-trips; JSON has no NaN, so a number that is not finite is null.
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(plain, allow_nan=False) + "\n"


def write_csv(record: str | Path, target: str | Path) -> None:
    """Write the records as one table; columns are the union of their keys, in order of appearance."""
    records = read_records(record)
    columns = list(dict.fromkeys(key for entry in records for key in entry))
    buffer = io.StringIO(newline="")
    writer = csv.DictWriter(buffer, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    write_text(target, buffer.getvalue())


@runtime_checkable
class Mirror(Protocol):
    """Somewhere else the records go."""

    def write(self, record: Mapping[str, Any]) -> None:
        """Take one record."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    prefix = record.get("kind", "train")
    return {
        f"{prefix}/{key}": float(value)
        for key, value in record.items()
        if isinstance(value, (int, float)) and key not in ("step", "kind")
    }


class _TensorBoard:
    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step drops what a resumed run will write again
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in _numbers(record).items():
            self._writer.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, config: LogConfig, folder: Path, resolved: dict[str, Any]) -> None:
        import wandb

        # Offline runs cannot be resumed in place: a resumed run is another wandb run of the same group.
        self._run = wandb.init(
            project=config.wandb_project,
            group=folder.name,
            dir=str(folder),
            mode=config.wandb,
            config=resolved,
            settings=wandb.Settings(silent=True),
        )

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(_numbers(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def check_logs(config: LogConfig) -> None:
    """Refuse options that cannot work before anything is loaded.

    Raises:
        UsageError: interval out of range, or a package is missing, with the command that installs it.
    """
    if config.every < 1:
        raise UsageError(f"log.every is {config.every}; it must be at least 1.")
    if config.tensorboard:
        try:
            import tensorboard  # noqa: F401
        except ImportError as error:
            raise UsageError(
                "log.tensorboard needs the package tensorboard: pip install 'dihal[tensorboard]'."
            ) from error
    if config.wandb != "off":
        try:
            import wandb  # noqa: F401
        except ImportError as error:
            raise UsageError("log.wandb needs the package wandb: pip install wandb.") from error


def build_mirrors(config: LogConfig, folder: Path, resolved: dict[str, Any], *, step: int = 0) -> list[Mirror]:
    """The mirrors asked for; the packages behind them are imported here and nowhere else.

    Args:
        config: which.
        folder: run folder.
        resolved: configuration shown beside the curves.
        step: step the run goes on from.
    """
    mirrors: list[Mirror] = []
    if config.wandb != "off":
        mirrors.append(_Wandb(config, folder, resolved))
    if config.tensorboard:
        mirrors.append(_TensorBoard(folder / "tensorboard", step))
    return mirrors
