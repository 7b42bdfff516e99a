"""What lies in the repository is the same on every machine."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Home and scratch folders of somebody's machine. /tmp, /proc and the like are everybody's.
MACHINE = re.compile(
    r"(?<![\w.~}/])/(?:" + "|".join(["work", "home", "root", "Users", "mnt", "tmp/venv"]) + r")/[\w.-]|[A-Z]:\\\\Users"
)
SKIPPED = {".git", ".venv", "runs", "build", "dist", "wandb", "__pycache__", ".carry", ".whl"}


def repository() -> list[Path]:
    """Files in git and new ones that it does not ignore; without git, everything but outputs."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout:
        found = [ROOT / name for name in done.stdout.splitlines()]
    else:
        found = [path for path in ROOT.rglob("*") if not SKIPPED & set(path.relative_to(ROOT).parts)]
    return [path for path in found if path.is_file()]


def machine_paths(text: str) -> list[str]:
    return [text[match.start() :].split()[0][:60] for match in MACHINE.finditer(text)]


def test_no_machine_paths() -> None:
    found = {}
    for path in repository():
        if path.suffix in (".png", ".gz", ".safetensors", ".parquet"):
            continue
        paths = machine_paths(path.read_text(encoding="utf-8", errors="replace"))
        if paths:
            found[str(path.relative_to(ROOT))] = paths[:3]
    assert not found


@pytest.mark.parametrize("text", ["/" + "work/main/x", "in '/" + "home/me/run'", "=/" + "root/.cache"])
def test_a_machine_path_is_found(text: str) -> None:
    assert machine_paths(text)


@pytest.mark.parametrize("text", ["https://huggingface.co/home/x", "~/.cache", "runs/work/x", "/tmp/x", "a/root/b"])
def test_other_paths_are_none(text: str) -> None:
    assert not machine_paths(text)


def test_the_package_is_typed() -> None:
    assert (ROOT / "dihal" / "py.typed").is_file()
