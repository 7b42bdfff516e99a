"""Everything about a run that can be checked or decided before anything is loaded."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import lightning as L
import torch

from dihal.checkpoint import has_checkpoint, load_checkpoint
from dihal.config import TrainConfig
from dihal.errors import UsageError
from dihal.geometry.report import read_split
from dihal.training.logs import check_logs
from dihal.training.optim import check_optim
from dihal.training.sharding import ShardedStrategy

__all__ = ["build_trainer", "check_run_folder", "deterministic", "resolve"]


def _at_least(config: TrainConfig) -> None:
    trainer = config.trainer
    for name, value, lowest in (
        ("nodes", trainer.nodes, 1),
        ("accumulate", trainer.accumulate, 1),
        ("keep", trainer.keep, 1),
        ("validate_every", trainer.validate_every, 0),
        ("validate_batches", trainer.validate_batches, 0),
        ("save_every", trainer.save_every, 0),
        ("max_nonfinite", trainer.max_nonfinite, 1),
    ):
        if value < lowest:
            raise UsageError(f"trainer.{name} is {value}; it must be at least {lowest}.")
    if trainer.skip_spike != 0 and not 1 < trainer.skip_spike < math.inf:
        raise UsageError(
            f"trainer.skip_spike is {trainer.skip_spike}; it is a multiple of the median gradient norm: above 1, or 0 (off)."
        )
    if trainer.devices != "auto" and trainer.devices < 1:
        raise UsageError(f"trainer.devices is {trainer.devices}; it must be at least 1, or auto.")


def _split(config: TrainConfig) -> int:
    split, source = config.method.split, config.method.split_from
    if split is not None and source is not None:
        raise UsageError(f"method.split ({split}) and method.split_from ({source!r}) are both given. Give one of them.")
    if split is None and source is None:
        raise UsageError(
            "method.split is not set. Give method.split=L, or method.split_from=scores.json of `dihal score`."
        )
    if split is not None:
        return split
    return read_split(str(source))


def _hardware(config: TrainConfig) -> TrainConfig:
    trainer, device = config.trainer, config.backbone.device
    accelerator: str = trainer.accelerator
    if accelerator == "auto":
        on_gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        accelerator = "gpu" if on_gpu else "cpu"
    if (accelerator == "gpu" and device == "cpu") or (accelerator == "cpu" and device.startswith("cuda")):
        raise UsageError(
            f"trainer.accelerator={trainer.accelerator} and backbone.device={device} contradict each other: "
            "bridge and backbone train on one device. Leave backbone.device at auto."
        )
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise UsageError(
            "a GPU was asked for (trainer.accelerator or backbone.device) and PyTorch sees none. "
            "Use trainer.accelerator=cpu backbone.device=cpu, or install a CUDA build of PyTorch and check nvidia-smi."
        )
    devices = trainer.devices
    if devices == "auto":
        devices = torch.cuda.device_count() if accelerator == "gpu" else 1
    if accelerator == "gpu" and devices > torch.cuda.device_count():
        raise UsageError(
            f"trainer.devices is {devices}, this machine has {torch.cuda.device_count()} GPUs. "
            "Lower trainer.devices; for several machines set trainer.nodes."
        )
    if device.startswith("cuda:") and devices * trainer.nodes > 1:
        raise UsageError(
            f"backbone.device={device} names one GPU, but there are {devices * trainer.nodes} processes. "
            "Set backbone.device=auto: each process takes its own GPU."
        )
    precision: str = trainer.precision
    if precision == "auto":
        precision = "bf16-mixed" if accelerator == "gpu" or config.backbone.dtype == "bfloat16" else "32-true"
    if config.backbone.dtype == "float16":
        raise UsageError("backbone.dtype=float16 overflows in the states of many models. Use bfloat16 or float32.")
    if precision == "32-true" and config.backbone.dtype == "bfloat16":
        raise UsageError(
            "trainer.precision=32-true with backbone.dtype=bfloat16 mixes types in the suffix. "
            "Use trainer.precision=bf16-mixed (weights stay fp32), or backbone.dtype=float32."
        )
    return replace(config, trainer=replace(trainer, accelerator=accelerator, devices=int(devices), precision=precision))


def _check_launch(config: TrainConfig) -> None:
    """A launcher (torchrun, srun) that started another number of processes would train something else, or hang."""
    expected = int(config.trainer.devices) * config.trainer.nodes
    if "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        found, launcher = int(os.environ["WORLD_SIZE"]), "WORLD_SIZE"
        fix = "Start torchrun with --nnodes and --nproc-per-node of that product"
    elif "SLURM_STEP_NUM_TASKS" in os.environ:
        found, launcher = int(os.environ["SLURM_STEP_NUM_TASKS"]), "SLURM_STEP_NUM_TASKS"
        fix = "Give srun --nodes and --ntasks-per-node of that product"
    elif expected > 1 and "SLURM_NTASKS" in os.environ and _in_batch():
        # Not inside srun: Lightning would still wait for as many tasks as SLURM has granted.
        found, launcher = 0, "the number of tasks that srun started"
        fix = "Start the command with srun, as configs/slurm/train.sbatch does, or with torchrun"
    else:
        return
    if found != expected:
        raise UsageError(
            f"{launcher} is {found}, but trainer.devices={config.trainer.devices} x trainer.nodes="
            f"{config.trainer.nodes} is {expected}. {fix}, or set trainer.devices and trainer.nodes to match."
        )


def _check_partial(config: TrainConfig) -> None:
    """Part of a backbone is enough only where nothing reads more."""
    if not config.trainer.partial_backbone:
        return
    method, objective = config.method, config.method.objective
    needs = {
        f"method.regime {method.regime}": method.regime != "replace",
        "method.objective.cross_entropy": objective.cross_entropy > 0,
        "method.objective.kl": objective.kl > 0,
        "method.objective.metric fisher": objective.metric == "fisher",
        "method.lora": method.lora.rank > 0,
        "data.own": config.data.own > 0,
    }
    found = [name for name, needed in needs.items() if needed]
    if found:
        raise UsageError(
            f"trainer.partial_backbone holds no suffix, which {' and '.join(found)} needs. Train on state error alone, or "
            "load the backbone whole."
        )


def _check_strategy(config: TrainConfig) -> None:
    if config.trainer.strategy != "fsdp":
        return
    if int(config.trainer.devices) * config.trainer.nodes == 1:
        warnings.warn("trainer.strategy=fsdp has no effect with one process.", stacklevel=3)
    if config.method.regime != "replace":
        raise UsageError(
            f"trainer.strategy=fsdp shards the denoiser of the regime 'replace', not of {config.method.regime!r}. "
            "Use trainer.strategy=ddp."
        )
    if config.optim.name == "muon":
        raise UsageError("optim.name=muon needs whole matrices, which trainer.strategy=fsdp does not hold. Use adamw.")


def _in_batch() -> bool:
    return os.environ.get("SLURM_JOB_NAME") not in (None, "bash", "interactive")


def resolve(config: TrainConfig) -> TrainConfig:
    """Check the options against each other and this machine; fill in what was left to choose.

    ``method.split_from`` becomes ``method.split``; ``auto`` accelerator, devices and precision become
    what they are. ``backbone.device`` stays as given: where the weights lay is no property of the result.

    Raises:
        UsageError: naming the option.
    """
    _at_least(config)
    check_optim(config.optim)
    check_logs(config.log)
    config = replace(config, method=replace(config.method, split=_split(config), split_from=None))
    if config.method.regime == "mask" and config.optim.name == "muon":
        raise UsageError(
            "optim.name muon is for the denoiser's matrices; the regime 'mask' trains the backbone's own weights. Set "
            "optim.name to adamw, with a learning rate for fine-tuning (1e-4)."
        )
    _check_partial(config)
    config = _hardware(config)
    _check_launch(config)
    _check_strategy(config)
    return config


def check_run_folder(config: TrainConfig) -> None:
    """A fresh run refuses a folder with checkpoints; a resumed one refuses a folder without.

    Raises:
        UsageError: with the option to set.
    """
    held = has_checkpoint(config.out)
    if held and not config.resume:
        raise UsageError(
            f"{config.out!r} holds checkpoints of an earlier run. Go on with resume=true, or choose another out folder."
        )
    if config.resume and not held:
        load_checkpoint(config.out)  # raises, listing what is there


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside the block only kernels that give the same bits every time run, where ``wanted``."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def build_trainer(config: TrainConfig, callbacks: list[L.Callback]) -> L.Trainer:
    """A Lightning trainer that only moves, synchronises and loops: no checkpoints, loggers or bars of its own."""
    from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy

    for name in ("pytorch.utilities.rank_zero", "pytorch.accelerators.cuda", "fabric.utilities.distributed"):
        logging.getLogger(f"lightning.{name}").setLevel(logging.WARNING)
    trainer = config.trainer
    devices = int(trainer.devices)
    plugins: list[Any] = []
    if TorchElasticEnvironment.detect():
        plugins.append(TorchElasticEnvironment())  # otherwise torchrun inside a SLURM job is taken for srun
    elif devices * trainer.nodes > 1 and SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # its requeue saves a pickled checkpoint
    strategy: Any = "auto"
    if devices * trainer.nodes > 1:
        # torch 2.13 renamed the option. Either way RunCallback broadcasts the buffers, once.
        known = inspect.signature(torch.nn.parallel.DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        strategy = DDPStrategy(**{buffers: False}, gradient_as_bucket_view=True)
        if trainer.strategy == "fsdp":
            strategy = ShardedStrategy()
    chosen = config.backbone.device
    return L.Trainer(
        accelerator=trainer.accelerator,
        devices=[int(chosen.removeprefix("cuda:"))] if chosen.startswith("cuda:") else devices,
        num_nodes=trainer.nodes,
        precision=trainer.precision,
        strategy=strategy,
        plugins=plugins or None,
        callbacks=callbacks,
        max_epochs=-1,
        limit_val_batches=0,  # validation is BridgeModule.validate, at optimiser steps
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=config.out,
    )
