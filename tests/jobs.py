"""Tiny runs in processes of their own, forked from one that has imported everything: a run starts in milliseconds.

For tests and benchmarks of what only processes show: kills, signals, several ranks.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import dihal.random
import dihal.training.run
from dihal.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from dihal.config import ScoreRunConfig, TrainConfig
from dihal.config.convert import from_dict, to_dict
from dihal.errors import UsageError
from dihal.methods import Method
from dihal.training.logs import read_records
from dihal.training.module import BridgeModule
from tests.kit import tiny_model, tiny_tokenizer

__all__ = [
    "configuration",
    "draws",
    "finish",
    "losses",
    "prepare",
    "same",
    "save",
    "save_elsewhere",
    "start",
    "start_scoring",
    "wait_for_step",
]

BATCH, LENGTH = 4, 16
_WORDS = ["the", "a", "state", "bridge", "layer", "noise", "split", "token", "suffix", "prefix", "model"]
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.jobs", "transformers.models.llama.modeling_llama"])


# -- what is trained


def prepare(folder: Path) -> Path:
    """Write a tiny backbone and a little text; return the folder."""
    tiny_model(num_blocks=3, hidden_size=32).save_pretrained(folder / "backbone")
    tiny_tokenizer().save_pretrained(folder / "backbone")
    generator = random.Random(0)
    lines = [json.dumps({"text": " ".join(generator.choices(_WORDS, k=60))}) for _ in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def configuration(prepared: Path, out: Path, *, steps: int, **changes: Any) -> TrainConfig:
    """A run of so many steps of four sequences; ``changes`` are options by dotted name."""
    tiny = {
        "backbone": {"id": str(prepared / "backbone"), "device": "cpu"},
        "data": {"source": str(prepared / "text.jsonl"), "sequence_length": LENGTH, "batch_size": BATCH},
        "method": {"split": 1, "denoiser": {"width": 16, "depth": 1, "heads": 2}, "normalisation_tokens": 256},
        "budget": {"tokens": steps * BATCH * LENGTH},
        "optim": {"ema": 0.9, "lr": 3e-3},
        "trainer": {"accelerator": "cpu", "validate_batches": 0},
        "log": {"every": 1, "progress": False},
        "out": str(out),
    }
    tiny["data"]["validation_fraction"] = 0.2
    plain = to_dict(TrainConfig())

    def put(target: dict[str, Any], source: dict[str, Any]) -> None:
        for name, value in source.items():
            if isinstance(value, dict):
                put(target[name], value)
            else:
                target[name] = value

    put(plain, tiny)
    for name, value in changes.items():
        *path, last = name.split(".")
        part = plain
        for key in path:
            part = part[key]
        part[last] = value
    return from_dict(TrainConfig, plain)


def over_ranks(config: TrainConfig, ranks: int) -> TrainConfig:
    """The same global batch on several processes."""
    size, rest = divmod(config.data.batch_size, ranks)
    assert rest == 0
    trainer = replace(config.trainer, devices=ranks)
    return replace(config, data=replace(config.data, batch_size=size), trainer=trainer)


# -- what is done to it: hooks, run in the process before training


def kill_at(step: int) -> None:
    """kill -9 before this step (counted from 0) counts."""
    finish = BridgeModule._finish_step

    def dies(self: BridgeModule) -> Any:
        if self.spent.step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return finish(self)

    BridgeModule._finish_step = dies  # type: ignore[method-assign]


def poison(rank: int, *steps: int) -> None:
    """A loss that is not a number on one rank in these steps (counted from 0)."""
    loss = Method.loss

    def poisoned(self: Method, backbone: Any, batch: Any, *, step: int, **rest: Any) -> Any:
        out = loss(self, backbone, batch, step=step, **rest)
        bad = step in steps and int(os.environ.get("RANK", "0")) == rank
        return replace(out, total=out.total * float("nan")) if bad else out

    Method.loss = poisoned  # type: ignore[method-assign]


def record_draws(path: str) -> None:
    """Write every random draw of training: step, purpose, id and a digest of the values."""
    generate, training_step = dihal.random._generate, BridgeModule.training_step
    step: list[int] = []
    file = open(f"{path}.{os.environ.get('RANK', 0)}", "w", buffering=1)  # noqa: SIM115 (open until the process ends)

    def recorded(seed: int, ids: Any, purpose: str, shape: Any, device: Any, transform: Any, dtype: Any) -> Any:
        out = generate(seed, ids, purpose, shape, device, transform, dtype)
        if step:
            rows = out.reshape(ids.numel(), -1).cpu().numpy()
            for number, row in zip(ids.flatten().tolist(), rows, strict=True):
                file.write(f"{step[0]} {purpose} {number} {hashlib.sha256(row.tobytes()).hexdigest()[:16]}\n")
        return out

    def counted(self: BridgeModule, batch: Any, batch_idx: int) -> Any:
        step[:] = [self.spent.step]
        for number in batch.sample_ids.tolist():
            digest = hashlib.sha256(batch.input_ids[batch.sample_ids == number].cpu().numpy().tobytes()).hexdigest()[
                :16
            ]
            file.write(f"{step[0]} sample {number} {digest}\n")
        return training_step(self, batch, batch_idx)

    dihal.random._generate = recorded
    BridgeModule.training_step = counted  # type: ignore[method-assign]


def write_final(path: str) -> None:
    """Write this rank's weights, optimiser and average at the end."""
    from dihal.training.callbacks import RunCallback

    end = RunCallback.on_train_end

    def ended(self: Any, trainer: Any, module: Any) -> None:
        end(self, trainer, module)
        torch.save(self._tensors(module), f"{path}.{module.global_rank}")

    RunCallback.on_train_end = ended  # type: ignore[method-assign]


def time_steps(path: str) -> None:
    """Write, for every step, its number, wall seconds since the one before, and those of them that saving held it up."""
    from dihal.training.callbacks import RunCallback

    last, held = time.perf_counter(), 0.0
    file = open(path, "w", buffering=1)  # noqa: SIM115 (open until the process ends)

    def timed(name: str) -> None:
        method = getattr(RunCallback, name)

        def call(self: Any, *arguments: Any, **rest: Any) -> Any:
            nonlocal held
            started = time.perf_counter()
            try:
                return method(self, *arguments, **rest)
            finally:
                held += time.perf_counter() - started

        setattr(RunCallback, name, call)

    timed("_save")
    timed("_settle")
    batch_end = RunCallback.on_train_batch_end

    def ended(self: Any, trainer: Any, module: Any, *rest: Any) -> None:
        nonlocal last, held
        batch_end(self, trainer, module, *rest)
        now = time.perf_counter()
        file.write(f"{module.spent.step} {now - last} {held}\n")
        last, held = now, 0.0

    RunCallback.on_train_batch_end = ended  # type: ignore[method-assign]


_HOOKS: dict[str, Callable[..., None]] = {
    hook.__name__: hook for hook in (kill_at, poison, record_draws, time_steps, write_final)
}
Hook = tuple[str, tuple[Any, ...]]


def _work(plain: dict[str, Any], hooks: tuple[Hook, ...], environment: dict[str, str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    for name, arguments in hooks:
        _HOOKS[name](*arguments)
    try:
        dihal.training.run.train(from_dict(TrainConfig, plain))
    except UsageError as error:
        print(error, file=sys.stderr)
        sys.exit(getattr(error, "exit_status", 2))


def _score(plain: dict[str, Any], environment: dict[str, str], log: str) -> None:
    from dihal.geometry.command import run_score

    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    torch.set_num_threads(1)
    run_score(from_dict(ScoreRunConfig, plain))


def start_scoring(config: ScoreRunConfig, ranks: int) -> list[BaseProcess]:
    """Start so many processes of `dihal score`, as torchrun would."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    log = f"{config.out}.log"
    processes = []
    for rank in range(ranks):
        environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank), "HF_HUB_OFFLINE": "1"}
        process = _CONTEXT.Process(target=_score, args=(to_dict(config), environment, log))
        process.start()
        processes.append(process)
    return processes


def _leave_an_orphan(path: str) -> None:
    from dihal.training.children import ending_with_parent

    os.environ["DIHAL_PARENT"] = str(os.getpid())
    child = os.fork()
    if child == 0:
        with ending_with_parent():
            Path(path).write_text(str(os.getpid()))
            time.sleep(120)  # as in a collective that nobody will join
        os._exit(0)
    while not Path(path).exists():
        time.sleep(0.01)
    os._exit(0)


def leave_an_orphan(path: Path) -> int:
    """A process that another one started as its rank, and that is alone now; return its id."""
    process = _CONTEXT.Process(target=_leave_an_orphan, args=(str(path),))
    process.start()
    assert finish([process]) == [0]
    return int(path.read_text())


def _save(folder: str, step: int, size: int, how: str, environment: dict[str, str], log: str) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(environment)
    os.chdir(folder)  # who has no rights may not even walk there
    if how == "nobody" and os.getuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if how == "limited":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    try:
        save(".", step, size)
    except UsageError as error:
        print(error, flush=True)
        sys.exit(2)


def save(folder: str | Path, step: int, size: int) -> None:
    """Save a checkpoint of ``size`` numbers that are all the step."""
    save_checkpoint(
        folder,
        tensors={"model": {"w": torch.full((size,), float(step))}},
        state={"step": step},
        config={},
        manifest_extra={"provenance": {}},
    )


def save_elsewhere(
    folder: Path, step: int, size: int, *, log: Path, how: str = "", **environment: str
) -> tuple[int | None, str]:
    """Exit code and output of a process that saves.

    Args:
        folder: the run folder.
        step: of the checkpoint.
        size: numbers in it.
        log: where its output goes.
        how: ``nobody``: without root's rights; ``limited``: no file may exceed ``size`` bytes.
        environment: more variables.
    """
    process = _CONTEXT.Process(target=_save, args=(str(folder), step, size, how, environment, str(log)))
    process.start()
    (code,) = finish([process])
    return code, log.read_text()


def free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


_STALE: dict[int | None, int] = {}


def _file(config: TrainConfig) -> int:
    """Which file the record is: a run that starts writes it anew."""
    try:
        return (Path(config.out) / "metrics.jsonl").stat().st_ino
    except FileNotFoundError:
        return 0


def start(config: TrainConfig, *hooks: Hook, log: Path | None = None, **environment: str) -> list[BaseProcess]:
    """Start every rank of a run, as srun would; return their processes. What they print goes to ``log``."""
    ranks = int(config.trainer.devices)
    path = log or Path(config.out).parent / f"{Path(config.out).name}.log"
    common = {"DIHAL_CACHE": str(Path(config.data.source).parent / "cache"), "HF_HUB_OFFLINE": "1", **environment}
    if ranks > 1:
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks)}
    processes: list[BaseProcess] = []
    stale = _file(config)
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"} if ranks > 1 else {}
        process = _CONTEXT.Process(target=_work, args=(to_dict(config), hooks, common | own, str(path)))
        process.start()
        processes.append(process)
    _STALE[processes[0].pid] = stale
    return processes


def finish(processes: list[BaseProcess], seconds: float = 200.0) -> list[int | None]:
    """Exit codes; -N for signal N. What still runs after so many seconds is killed and counts as None."""
    deadline = time.monotonic() + seconds
    codes: list[int | None] = []
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        codes.append(process.exitcode)
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def wait_for_step(config: TrainConfig, step: int, processes: list[BaseProcess], seconds: float = 200.0) -> int:
    """Wait until these processes have recorded a step; return the newest one."""
    deadline, stale = time.monotonic() + seconds, _STALE[processes[0].pid]
    while time.monotonic() < deadline:
        records = [] if _file(config) == stale else read_records(Path(config.out) / "metrics.jsonl")
        if records and records[-1]["step"] >= step:
            return int(records[-1]["step"])
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.005)
    raise AssertionError(f"no progress: exit codes {finish(processes, 0)}")


# -- what came of it


def losses(out: str | Path) -> list[tuple[int, int, float, float]]:
    """Step, samples seen, loss and gradient norm of every record of training."""
    records = [record for record in read_records(Path(out) / "metrics.jsonl") if record["kind"] == "train"]
    return [(r["step"], r["samples_seen"], r["loss"], r["grad_norm"]) for r in records]


def draws(path: str | Path, ranks: int) -> set[tuple[str, ...]]:
    """What :func:`record_draws` wrote on all ranks."""
    lines = (line for rank in range(ranks) for line in Path(f"{path}.{rank}").read_text().splitlines())
    return {tuple(line.split(" ")) for line in lines}


def differences(one: Checkpoint, two: Checkpoint) -> Iterator[str]:
    """Names of tensors that are not bit-identical."""
    for name in sorted({*one.names, *two.names}):
        if not (name in one.names and name in two.names):
            yield name
            continue
        left, right = one.tensors(name), two.tensors(name)
        for key in sorted({*left, *right}):
            if key not in left or key not in right or not torch.equal(left[key], right[key]):
                yield f"{name}/{key}"


def same(one: str | Path, two: str | Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same bits."""
    return not list(differences(load_checkpoint(one), load_checkpoint(two)))
