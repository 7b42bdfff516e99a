"""What a run survives: kills, signals, dead ranks, damaged files; and what its checkpoints cost.

    python benchmarks/robustness.py [--kills 200] [--steps 20] [--flips 1000] [--signals 20]
    python benchmarks/robustness.py --device cuda --kills 0 --flips 0 --signals 0 --out results/h200/robustness.json

Every run is a real one on a tiny random backbone, in processes of its own on a CPU (two of them under
gloo where ranks are in question), or on one GPU in deterministic mode. Needs the repository: the tiny runs are those
of its tests.

- steps: kill -9 before a random step counts; the resumed run must end with the bits of the uninterrupted one
  (weights, optimiser, average) and the same losses.
- kills: kill -9 at a random moment around a save, again and again on one run; every resume must work, the work lost
  is counted in steps recorded after the checkpoint that was resumed, and the run must end with the same bits.
- flips: one random bit of a random file of a checkpoint; loading must refuse it.
- signals: SIGTERM to both ranks of two, and to one of them; both must end with status 143 and a valid checkpoint.
- dead ranks: kill -9 to one rank of two; seconds until the other has ended.
- saving: seconds for which training stood still (the copy, and waiting for the writing), in ordinary steps; beside
  them the wall time of the step at which a save begins and of the next one, in which on a CPU the writing thread
  takes its share of the cores; bytes of a checkpoint beside those of its tensors; seconds of the decision about a
  step (the guard) beside the step.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402
from rich.progress import track  # noqa: E402
from rich.table import Table  # noqa: E402

from dihal.checkpoint import has_checkpoint, list_checkpoints, load_checkpoint  # noqa: E402
from dihal.config import TrainConfig, TrainerConfig  # noqa: E402
from dihal.errors import UsageError  # noqa: E402
from dihal.io import write_json  # noqa: E402
from dihal.provenance import provenance  # noqa: E402
from dihal.training.budget import Spent  # noqa: E402
from dihal.training.guard import judge  # noqa: E402
from tests import jobs  # noqa: E402

EVERY = 5
"""Steps between checkpoints."""
FOREVER = 1_000_000
ON_GPU = {"backbone.device": "cuda", "trainer.accelerator": "gpu", "trainer.deterministic": True}
console = Console(stderr=True)


def saved(config: TrainConfig) -> int:
    return load_checkpoint(config.out).state["step"] if has_checkpoint(config.out) else 0


def whole_run(prepared: Path, name: str, steps: int, place: dict[str, Any]) -> TrainConfig:
    changes = {**place, "trainer.save_every": EVERY, "method.denoiser.dropout": 0.1, "method.objective.kl": 0.5}
    config = jobs.configuration(prepared, prepared / name, steps=steps, **changes)
    assert jobs.finish(jobs.start(config), 3600) == [0], name
    return config


def killed_at_steps(prepared: Path, count: int, seed: int, place: dict[str, Any]) -> dict[str, Any]:
    length = EVERY + 3 * count
    whole = whole_run(prepared, "steps", length, place)
    identical, steps = 0, sorted(random.Random(seed).sample(range(EVERY, length), count))
    for step in track(steps, "killed at a step", console=console):
        cut = replace(whole, out=str(prepared / f"cut-{step}"))
        killed = jobs.finish(jobs.start(cut, ("kill_at", (step,))))
        resumed = jobs.finish(jobs.start(replace(cut, resume=True)))
        identical += (
            killed == [-signal.SIGKILL]
            and resumed == [0]
            and jobs.same(cut.out, whole.out)
            and jobs.losses(cut.out) == jobs.losses(whole.out)
        )
        shutil.rmtree(cut.out)
    return {"kills": count, "steps": steps, "bit_identical": identical}


def killed_around_saves(prepared: Path, count: int, seed: int, place: dict[str, Any]) -> dict[str, Any]:
    generator = random.Random(seed)
    whole = whole_run(prepared, "whole", 20 * count, place)
    cut = replace(whole, out=str(prepared / "killed"))
    lost, resumed, while_writing = [], 0, 0
    for _ in track(range(count), "killed around a save", console=console):
        expects = has_checkpoint(cut.out)
        process = jobs.start(replace(cut, resume=expects))
        try:
            jobs.wait_for_step(cut, saved(cut) + EVERY, process)
        except AssertionError:
            continue
        resumed += expects
        time.sleep(generator.uniform(0.0, 0.06))
        process[0].kill()
        jobs.finish(process)
        while_writing += any((Path(cut.out) / "checkpoints").glob(".staging-*"))
        lost.append(jobs.losses(cut.out)[-1][0] - saved(cut))
    last = jobs.finish(jobs.start(replace(cut, resume=True)), 3600)
    return {
        "kills": count,
        "of_a_resumed_run": resumed,
        "continued": len(lost),
        "while_a_checkpoint_was_written": while_writing,
        "interval": EVERY,
        "lost_steps": {str(steps): number for steps, number in sorted(Counter(lost).items())},
        "most_lost": max(lost),
        "ended": last == [0],
        "bit_identical": jobs.same(cut.out, whole.out) and jobs.losses(cut.out) == jobs.losses(whole.out),
    }


def flipped_bits(prepared: Path, count: int, seed: int) -> dict[str, Any]:
    generator = random.Random(seed)
    path = list_checkpoints(prepared / "steps")[-1]
    detected: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    files = sorted(path.iterdir())
    for number in track(range(count), "bits flipped", console=console):
        # Every file in turn: by size, the small ones would hardly be met.
        file = files[number % len(files)]
        original = file.read_bytes()
        damaged = bytearray(original)
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
        file.write_bytes(damaged)
        tried[file.name] += 1
        try:
            load_checkpoint(path)
        except UsageError:
            detected[file.name] += 1
        finally:
            file.write_bytes(original)
    load_checkpoint(path)
    return {"flips": count, "detected": detected.total(), "by_file": {n: [detected[n], tried[n]] for n in tried}}


def signalled(prepared: Path, count: int, seed: int) -> dict[str, Any]:
    generator, found = random.Random(seed), {}
    for name, ranks in (("all", (0, 1)), ("one", None)):
        good = 0
        for number in track(range(count), f"SIGTERM to {name} of two ranks", console=console):
            config = jobs.configuration(prepared, prepared / f"signal-{name}-{number}", steps=FOREVER)
            config = jobs.over_ranks(config, 2)
            processes = jobs.start(config)
            seen = jobs.wait_for_step(config, generator.randrange(2, 20), processes)
            for rank in ranks or (number % 2,):
                processes[rank].terminate()
            good += jobs.finish(processes) == [143, 143] and saved(config) >= seen
            shutil.rmtree(config.out)
        found[name] = {"runs": count, "status_143_and_valid": good}
    return found


def dead_ranks(prepared: Path) -> dict[str, Any]:
    seconds = []
    for number in range(6):
        config = jobs.over_ranks(jobs.configuration(prepared, prepared / f"dead-{number}", steps=FOREVER), 2)
        processes = jobs.start(config)
        jobs.wait_for_step(config, 5, processes)
        processes[number % 2].kill()
        started = time.perf_counter()
        codes = jobs.finish(processes, 60)
        seconds.append(time.perf_counter() - started if None not in codes and 0 not in codes else None)
    return {"killed_rank": [0, 1] * 3, "seconds_until_the_other_ended": seconds}


def saving(prepared: Path, place: dict[str, Any]) -> dict[str, Any]:
    """A denoiser of several million weights, so that a checkpoint has some weight, too."""
    # Steps of a GPU are short: a second or two between saves, as few as anybody would have.
    every = 40 if place else 12
    changes = {
        **place,
        "method.denoiser.width": 384,
        "method.denoiser.depth": 6,
        "method.denoiser.heads": 6,
        "data.sequence_length": 128,
        "budget.tokens": 4 * every * jobs.BATCH * 128,
        "trainer.save_every": every,
    }
    config = jobs.configuration(prepared, prepared / "saving", steps=1, **changes)
    assert jobs.finish(jobs.start(config, ("time_steps", (str(prepared / "times"),))), 3600) == [0]
    rows = [[float(word) for word in line.split()] for line in (prepared / "times").read_text().splitlines()]
    wall = {int(step): seconds for step, seconds, _ in rows}
    held = {int(step): seconds for step, _, seconds in rows}
    # The last save is waited for: the run is over. The first steps warm up.
    saves = [step for step in wall if step % every == 0 and step + 1 in wall]
    touched = {s for step in saves for s in (step, step + 1)}
    usual = statistics.median(seconds for step, seconds in wall.items() if step not in touched and step > 3)
    path = list_checkpoints(config.out)[-1]
    checkpoint = load_checkpoint(path)
    bytes_held = sum(
        t.numel() * t.element_size() for name in checkpoint.names for t in checkpoint.tensors(name).values()
    )
    spent, settings = Spent(), TrainerConfig(skip_spike=3.0)
    started = time.perf_counter()
    for _ in range(1000):
        judge(1.0, 1.0, spent, settings)
    guard = (time.perf_counter() - started) / 1000
    return {
        "checkpoint_bytes": sum(file.stat().st_size for file in path.iterdir()),
        "tensor_bytes": bytes_held,
        "bytes_ratio": sum(file.stat().st_size for file in path.iterdir()) / bytes_held,
        "ordinary_step_s": usual,
        "stall_in_steps": [(held[step] + held[step + 1]) / usual for step in saves],
        "both_steps_in_steps": [(wall[step] + wall[step + 1]) / usual for step in saves],
        "guard_s": guard,
        "guard_share_of_a_step": guard / usual,
    }


def show(result: dict[str, Any]) -> None:
    table = Table("what", "found", "of", title="what a run survives")
    if "steps" in result:
        found = result["steps"]
        table.add_row(
            "killed at a random step: bit-identical after resume", f"{found['bit_identical']}", f"{found['kills']}"
        )
    if "kills" in result:
        found = result["kills"]
        table.add_row("killed around a save: went on", f"{found['continued']}", f"{found['kills']}")
        table.add_row("  while a checkpoint was being written", f"{found['while_a_checkpoint_was_written']}", "")
        table.add_row("  most steps lost (interval)", f"{found['most_lost']}", f"{found['interval']}")
        table.add_row("  bit-identical in the end", str(found["bit_identical"]), "")
    if "flips" in result:
        table.add_row("bits flipped: detected", f"{result['flips']['detected']}", f"{result['flips']['flips']}")
    for name, found in result.get("signals", {}).items():
        table.add_row(f"SIGTERM to {name}: 143 and valid", f"{found['status_143_and_valid']}", f"{found['runs']}")
    if "dead_ranks" in result:
        seconds = result["dead_ranks"]["seconds_until_the_other_ended"]
        ended = [s for s in seconds if s is not None]
        table.add_row("a rank killed: the other ended", f"{len(ended)}", f"{len(seconds)}")
        table.add_row("  longest, s", f"{max(ended, default=float('nan')):.1f}", "60")
    if "saving" in result:
        found = result["saving"]
        table.add_row("stall of a save, steps, largest", f"{max(found['stall_in_steps']):.2f}", "1")
        table.add_row("bytes of a checkpoint / of its tensors", f"{found['bytes_ratio']:.4f}", "1.02")
        table.add_row("decision about a step / step", f"{found['guard_share_of_a_step']:.1e}", "0.01")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="kills at random steps; 0: none")
    parser.add_argument("--kills", type=int, default=200, help="kills around saves; 0: none")
    parser.add_argument("--flips", type=int, default=1000, help="bits flipped (needs --steps); 0: none")
    parser.add_argument("--signals", type=int, default=20, help="runs signalled, each kind; 0: none, and no dead ranks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of all but the runs of two ranks")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=str(ROOT / "results" / "benchmark_robustness.json"))
    arguments = parser.parse_args()
    result: dict[str, Any] = {"device": arguments.device}
    place = ON_GPU if arguments.device == "cuda" else {}
    with tempfile.TemporaryDirectory() as folder:
        prepared = jobs.prepare(Path(folder))
        if arguments.steps:
            result["steps"] = killed_at_steps(prepared, arguments.steps, arguments.seed, place)
        if arguments.kills:
            result["kills"] = killed_around_saves(prepared, arguments.kills, arguments.seed, place)
        if arguments.flips and arguments.steps:
            result["flips"] = flipped_bits(prepared, arguments.flips, arguments.seed)
        if arguments.signals:
            result["signals"] = signalled(prepared, arguments.signals, arguments.seed)
            result["dead_ranks"] = dead_ranks(prepared)
        result["saving"] = saving(prepared, place)
    result["provenance"] = provenance()
    write_json(arguments.out, result)
    show(result)


if __name__ == "__main__":
    main()
