"""The queue of benchmarks/jobs.py."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dihal.cli import COMMANDS
from dihal.config.cli import parse

ROOT = Path(__file__).parents[2]


def queue(folder: Path, jobs: dict, *options: str) -> subprocess.CompletedProcess[str]:
    (folder / "jobs.yaml").write_text(yaml.safe_dump(jobs, sort_keys=False))
    command = [sys.executable, str(ROOT / "benchmarks" / "jobs.py"), "jobs.yaml", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def touch(name: str, **more) -> dict:
    return {"run": ["sleep 0.1", f"touch {name}"], "done": name, **more}


def test_order_failures_and_a_second_call(tmp_path: Path) -> None:
    jobs = {
        "a": touch("a.out"),
        "b": {"run": "false", "done": "b.out"},
        "c": touch("c.out", after=["b"]),
        "d": {"run": "cp a.out d.out", "done": "d.out", "after": ["a"]},
        "e": {"run": "true", "done": "never"},
    }
    first = queue(tmp_path, jobs, "--gpus", "2")
    assert first.returncode == 1
    assert (tmp_path / "d.out").exists()
    assert not (tmp_path / "c.out").exists()
    assert "what it needs failed" in first.stdout
    assert "failed (0)" in first.stdout  # ended well, but without its result
    jobs["b"] = touch("b.out")
    del jobs["e"]
    second = queue(tmp_path, jobs)
    assert second.returncode == 0, second.stdout + second.stderr
    assert second.stdout.count("done before") == 2


def test_time_values_and_selection(tmp_path: Path) -> None:
    jobs = {"a": touch("{where}"), "long": touch("long.out", seconds=100), "z": touch("z.out")}
    found = queue(tmp_path, jobs, "--seconds", "50", "--set", "where=x.out", "--only", "a", "long")
    assert found.returncode == 1
    assert (tmp_path / "x.out").exists()
    assert not (tmp_path / "z.out").exists()
    assert "too little time" in found.stdout
    assert "--set where=" in queue(tmp_path, jobs).stderr
    assert "None is no name" in queue(tmp_path, {None: touch("a.out")}).stderr


def test_whole_gpus_and_slots(tmp_path: Path) -> None:
    def alone(name: str, **more) -> dict:
        # What is running while this job does, and on which GPUs it is.
        script = f"sleep 0.3; ls *.on > {name}.beside; echo $CUDA_VISIBLE_DEVICES > {name}.gpus; rm {name}.on"
        return {"run": [f"touch {name}.on", f"bash -c '{script}'"], "done": f"{name}.gpus", **more}

    jobs = {"whole": alone("whole", gpus=2), "a": alone("a"), "b": alone("b"), "many": alone("many", gpus=4)}
    found = queue(tmp_path, jobs, "--gpus", "2", "--slots", "2")
    assert found.returncode == 1
    assert "needs 4 GPUs" in found.stdout
    assert (tmp_path / "whole.gpus").read_text().strip() == "0,1"
    assert (tmp_path / "whole.beside").read_text().split() == ["whole.on"]
    assert {(tmp_path / f"{name}.gpus").read_text().strip() for name in "ab"} == {"0", "1"}


def test_files_that_other_jobs_make(tmp_path: Path) -> None:
    copy = {"run": "cp a.out c.out", "done": "c.out", "needs": ["a.out"]}
    lost = touch("lost.out", needs=["nowhere"])
    found = queue(tmp_path, {"c": copy, "lost": lost, "a": touch("a.out")}, "--gpus", "2")
    assert found.returncode == 1
    assert (tmp_path / "c.out").exists()  # waited for a, which stands after it
    assert "no nowhere" in found.stdout
    assert not (tmp_path / "lost.out").exists()


def test_several_files_are_one_queue_and_names_may_be_patterns(tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text(
        yaml.safe_dump({"x-1": touch("x1.out"), "x-2": touch("x2.out"), "y": touch("y")})
    )
    found = queue(tmp_path, {"a": touch("a.out"), "b": touch("b.out")}, "more.yaml", "--only", "a", "x-*")
    assert found.returncode == 0, found.stdout + found.stderr
    assert {path.name for path in tmp_path.glob("*.out")} == {"a.out", "x1.out", "x2.out"}
    assert not (tmp_path / "y").exists()
    assert "no job 'z*'" in queue(tmp_path, {"a": touch("a.out")}, "--only", "z*").stderr
    (tmp_path / "same.yaml").write_text(yaml.safe_dump({"a": touch("other.out")}))
    assert "jobs of one name: a" in queue(tmp_path, {"a": touch("a.out")}, "same.yaml").stderr


def test_an_entry_stands_for_every_combination_of_its_values(tmp_path: Path) -> None:
    each = {"seed": [0, 1], "space": {"a": "one two", "b": ""}}
    jobs = {
        "make-{space}-{seed}": {
            "each": each,
            "run": "bash -c 'echo {space.options} {seed} > {name}.out'",
            "done": "{name}.out",
        },
        "read-{seed}": {
            "each": {"seed": [0, 1]},
            "run": "cp make-a-{seed}.out {name}.out",
            "done": "{name}.out",
            "after": ["make-a-{seed}"],
        },
        "all": {"run": "bash -c 'cat *.out > all.txt'", "done": "all.txt", "after": ["make-*", "read-*"]},
    }
    found = queue(tmp_path, jobs, "--gpus", "2")
    assert found.returncode == 0, found.stdout + found.stderr
    lines = ["one two 0", "one two 1", "0", "1", "one two 0", "one two 1"]
    assert (tmp_path / "all.txt").read_text().split("\n")[:-1] == lines
    wrong = [
        ({"a": touch("a", each={"seed": []})}, "at least one value"),
        ({"a": touch("a", each={"name": [1]})}, "means something already"),
        ({"a": touch("a", each={"seed": [0, 1]})}, "jobs of one name: a"),
        ({"a-{seed}": touch("a", each={"space": [0]})}, "--set seed="),
        ({"a": touch("{seed.opitons}", each={"seed": [0]})}, "no attribute 'opitons'"),
        ({"a": touch("a", after=["b*"])}, "does not stand before it"),
    ]
    for entries, message in wrong:
        assert message in queue(tmp_path, entries).stderr


@pytest.mark.parametrize("file", ["comparison.yaml", "circuits.yaml", "pilots.yaml", "eight_billion.yaml"])
def test_the_shipped_files_read_and_name_configurations_that_exist(file: str) -> None:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from jobs import read_jobs
    finally:
        sys.path.pop(0)
    jobs = read_jobs(ROOT / "benchmarks" / file, {"docs": "docs.jsonl.gz"})
    assert len(jobs) >= 7
    words = {word for job in jobs for line in job.run for word in line.split()}
    files = {word for word in words if word.startswith(("configs/", "benchmarks/"))}
    assert files
    assert [file for file in files if not (ROOT / file).exists()] == []
    for line in (shlex.split(line) for job in jobs for line in job.run):
        if line[0] == "dihal":
            command = next(name for name in (" ".join(line[1:3]), line[1]) if name in COMMANDS)
            parse(COMMANDS[command].config, line[1 + len(command.split()) :], prog="dihal")
