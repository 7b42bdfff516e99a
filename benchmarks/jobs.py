"""Run a list of commands over the GPUs of a machine, the finished ones left out.

    python benchmarks/jobs.py benchmarks/comparison.yaml [FILE ...] [--gpus 4] [--slots 2] [--seconds 1500]
        [--only NAME ...] [--set KEY=VALUE ...]

A file is a mapping of job names, each with `run` (a command line, or a list of them), `done` (a file that exists when
the job is finished) and, if it needs others, `after` (their names in that file) or `needs` (files, which a job of
another file may make). Jobs start in the order of the file, one per GPU
(--slots: so many, for small models leave a GPU idle half the time), as soon as what they need is there; `seconds`
(expected) keeps a job from starting when less time is left. A job with `gpus` has so many GPUs to itself, as timings
need; it waits until that many are idle, so put it first. `{name}` and whatever `--set` gives are put into the commands.
An entry with `each` stands for a job per combination of the values listed there, the last name fastest:

    train-{space}-{seed}:
      each: {seed: [0, 1], space: {hidden: --method.split 3, embedding: --method.space embedding}}
      run: dihal train {space.options} --seed {seed} --out runs/{name}
      done: runs/{name}/config.yaml

`after` may hold patterns (train-*) of jobs that stand before.
Output goes to runs/jobs/NAME.log. A table at the end says what is done, failed, skipped and why; the exit status is
that of the worst.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import os
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
LOGS = Path("runs") / "jobs"


@dataclass
class Job:
    """One entry of the file, and what became of it."""

    name: str
    run: list[str]
    done: Path
    after: tuple[str, ...] = ()
    needs: tuple[Path, ...] = ()
    seconds: float = 0.0
    gpus: int = 0
    """Whole GPUs; 0: a slot of one."""
    state: str = "waiting"
    took: float = field(default=0.0)

    @property
    def finished(self) -> bool:
        """Its result is there, from this run or an earlier one."""
        return self.done.exists()


class _Value(str):
    """A value of `each`: its name, and in a mapping what stands beside it as `options`."""

    options: str = ""


def _values(listed: Any) -> list[_Value]:
    found = []
    for item in listed:
        value = _Value(item)
        value.options = str(listed[item]) if isinstance(listed, dict) else ""
        found.append(value)
    return found


def _combinations(path: Path, name: str, entry: dict[str, Any], given: dict[str, str]) -> list[dict[str, str]]:
    """What each job of an entry has put into its text, beyond what was given."""
    each = entry.get("each", {})
    if not isinstance(each, dict) or not all(isinstance(listed, (list, dict)) and listed for listed in each.values()):
        sys.exit(f"{path}: `each` of job {name!r} maps names to lists, or mappings, of at least one value.")
    if taken := sorted({"name", *given} & set(each)):
        sys.exit(f"{path}: `each` of job {name!r} uses {', '.join(taken)}, which means something already.")
    return [dict(zip(each, values, strict=True)) for values in itertools.product(*(_values(each[key]) for key in each))]


def _earlier(path: Path, name: str, patterns: list[str], before: list[str]) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for pattern in patterns:
        matched = fnmatch.filter(before, pattern)
        if not matched:
            sys.exit(f"{path}: job {name!r} comes after {pattern!r}, which does not stand before it.")
        found |= dict.fromkeys(matched)
    return tuple(found)


def read_jobs(path: Path, values: dict[str, str]) -> list[Job]:
    """The jobs of a file, with values put into their text.

    Raises:
        SystemExit: an unknown field, a missing one, an unknown name in `after`, or a value not given.
    """
    jobs: list[Job] = []
    for title, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        if not isinstance(title, str):
            sys.exit(f"{path}: {title!r} is no name for a job; YAML reads null, yes, 1 and the like as values.")
        unknown = set(entry) - {"run", "done", "each", "after", "needs", "seconds", "gpus"}
        if unknown or not {"run", "done"} <= set(entry):
            sys.exit(
                f"{path}: job {title!r} has run and done, and may have each, after, needs, seconds and gpus; "
                f"found {sorted(entry)}."
            )
        for chosen in _combinations(path, title, entry, values):
            jobs.append(_job(path, title, entry, values | chosen, [job.name for job in jobs]))
    return jobs


def _job(path: Path, title: str, entry: dict[str, Any], values: dict[str, str], before: list[str]) -> Job:
    run = [entry["run"]] if isinstance(entry["run"], str) else entry["run"]
    try:
        name = title.format_map(values)
        values = {"name": name, **values}
        after = [pattern.format_map(values) for pattern in entry.get("after", ())]
        return Job(
            name,
            run=[line.format_map(values) for line in run],
            done=Path(entry["done"].format_map(values)),
            after=_earlier(path, name, after, before),
            needs=tuple(Path(need.format_map(values)) for need in entry.get("needs", ())),
            seconds=float(entry.get("seconds", 0)),
            gpus=int(entry.get("gpus", 0)),
        )
    except KeyError as error:
        sys.exit(f"{path}: job {title!r} needs --set {error.args[0]}=...")
    except AttributeError as error:
        sys.exit(f"{path}: job {title!r}: {error}. A value of `each` has its name and, from a mapping, .options.")


def _command(lines: list[str]) -> list[str]:
    # "dihal ..." and "python ..." mean this interpreter and this checkout, wherever the package is installed.
    own = {"dihal": [sys.executable, "-m", "dihal"], "python": [sys.executable]}
    words = [shlex.split(line) for line in lines]
    return ["bash", "-c", " && ".join(shlex.join([*own.get(line[0], line[:1]), *line[1:]]) for line in words)]


def _free(load: list[int], slots: int, whole: int) -> list[int]:
    # Whole GPUs that are idle, or the one with the most room; empty: none.
    if whole:
        idle = [gpu for gpu, taken in enumerate(load) if not taken]
        return idle[:whole] if len(idle) >= whole else []
    least = min(range(len(load)), key=load.__getitem__)
    return [least] if load[least] < slots else []


def run(jobs: list[Job], *, gpus: int, slots: int, seconds: float, console: Console) -> None:
    """Run until nothing is left that may start."""
    begin = time.monotonic()
    running: dict[str, tuple[Job, Any, Any, float]] = {}
    load = [0] * gpus  # slots taken on each GPU
    places: dict[str, list[int]] = {}
    by_name = {job.name: job for job in jobs}
    LOGS.mkdir(parents=True, exist_ok=True)
    for job in jobs:
        if job.finished:
            job.state = "done before"
    while True:
        for name, (job, process, log, started) in list(running.items()):
            if process.poll() is None:
                continue
            log.close()
            del running[name]
            for gpu in places.pop(name):
                load[gpu] -= slots if job.gpus else 1
            job.took = time.monotonic() - started
            job.state = "done" if process.returncode == 0 and job.finished else f"failed ({process.returncode})"
            console.print(f"{time.monotonic() - begin:6.0f} s  {job.state}: {name} ({job.took:.0f} s)")
        for job in jobs:
            if job.state != "waiting":
                continue
            needed = [by_name[name] for name in job.after]
            needed += [other for other in jobs if other.done in job.needs]
            made = {other.done for other in needed}
            missing = [str(path) for path in job.needs if path not in made and not path.exists()]
            if missing:
                job.state = f"not started: no {', '.join(missing)}"
            elif any(other.state.startswith(("failed", "not started")) for other in needed):
                job.state = "not started: what it needs failed"
            elif job.gpus > gpus:
                job.state = f"not started: needs {job.gpus} GPUs"
            elif all(other.finished and other.state.startswith("done") for other in needed):
                if time.monotonic() - begin + job.seconds > seconds:
                    job.state = "not started: too little time"
                    continue
                chosen = _free(load, slots, job.gpus)
                if not chosen:
                    continue
                for gpu in chosen:
                    load[gpu] += slots if job.gpus else 1
                log = (LOGS / f"{job.name}.log").open("w", encoding="utf-8")
                visible = ",".join(map(str, chosen))
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": visible, "PYTHONUNBUFFERED": "1"}
                process = subprocess.Popen(_command(job.run), stdout=log, stderr=subprocess.STDOUT, env=environment)
                running[job.name], places[job.name] = (job, process, log, time.monotonic()), chosen
                job.state = "running"
        if not running:
            break
        time.sleep(0.5)


def main() -> None:
    """Read the file, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="one queue, in this order")
    parser.add_argument("--gpus", type=int, default=1, help="jobs at once, one per GPU")
    parser.add_argument("--slots", type=int, default=1, help="jobs at once on each GPU")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no job starts that would not end in time")
    parser.add_argument("--only", nargs="*", help="these jobs (sweep*: all that begin so) and what they need")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    values = dict(item.split("=", 1) for item in arguments.set)
    jobs = [job for file in arguments.files for job in read_jobs(file, values)]
    twice = sorted({job.name for job in jobs if sum(other.name == job.name for other in jobs) > 1})
    if twice:
        sys.exit(f"several jobs of one name: {', '.join(twice)}. Rename them, or run their files one after the other.")
    if arguments.only:
        by_name = {job.name: job for job in jobs}
        wanted: set[str] = set()
        queue: list[str] = []
        for pattern in arguments.only:
            found = fnmatch.filter(by_name, pattern)
            if not found:
                sys.exit(f"no job {pattern!r}; there are: {', '.join(by_name)}.")
            queue.extend(found)
        while queue:
            name = queue.pop()
            wanted.add(name)
            queue.extend(by_name[name].after)
        jobs = [job for job in jobs if job.name in wanted]
    console = Console()
    run(jobs, gpus=arguments.gpus, slots=arguments.slots, seconds=arguments.seconds, console=console)
    table = Table("job", "state", "seconds", "result")
    for job in jobs:
        table.add_row(job.name, job.state, f"{job.took:.0f}" if job.took else "", str(job.done))
    console.print(table)
    sys.exit(any(not job.state.startswith("done") for job in jobs))


if __name__ == "__main__":
    main()
