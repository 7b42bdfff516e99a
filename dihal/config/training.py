"""Optimiser, loop, logs; the whole of a training run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dihal.config.method import MethodConfig
from dihal.config.parts import BackboneConfig, BudgetConfig, DataConfig

__all__ = ["LogConfig", "OptimConfig", "TrainConfig", "TrainerConfig"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimiser and its schedule, in shares of the budget."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon on the block matrices, AdamW on the rest, at one learning rate."""
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.98)
    """AdamW betas."""
    weight_decay: float = 0.01
    """Decoupled weight decay, on matrices only."""
    warmup: float = 0.02
    """Share of the budget with linear warm-up."""
    decay: Literal["cosine", "linear", "constant"] = "cosine"
    """Schedule after the warm-up."""
    final: float = 0.02
    """Learning rate at the end, relative to the peak."""
    clip: float = 1.0
    """Largest gradient norm; 0: no clipping."""
    ema: float = 0.999
    """Decay per optimiser step of the averaged weights; 0: none."""


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """The Lightning loop."""

    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where the bridge trains."""
    devices: int | Literal["auto"] = 1
    """Processes per node."""
    nodes: int = 1
    """Nodes."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` replicates the bridge; `fsdp` shards it (FSDP2), for a bridge that does not fit."""
    precision: Literal["auto", "32-true", "bf16-mixed"] = "auto"
    """`auto`: bf16-mixed on GPUs, 32-true on CPUs."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    compile: bool = False
    """Compile the denoiser and the frozen blocks in place."""
    partial_backbone: bool = False
    """Read and hold the embedding and the blocks below the split only: enough for state error alone under `replace`. The checkpoint then vouches for those weights, not for the suffix it will be read with."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: on a GPU a resumed run then equals the uninterrupted one exactly, at some cost. A CPU needs nothing."""
    validate_every: int = 0
    """Optimiser steps between validations; 0: only at the end."""
    validate_batches: int = 8
    """Micro-batches per validation."""
    save_every: int = 0
    """Optimiser steps between checkpoints, written beside the steps that follow; 0: only at the end and when stopped."""
    keep: int = 2
    """Checkpoints kept; the newest valid one is never deleted."""
    max_nonfinite: int = 10
    """Steps in a row whose loss or gradient is not finite after which the run ends with exit status 3. Each of them is skipped on all devices."""
    skip_spike: float = 0.0
    """Skip a step whose gradient norm exceeds this multiple of the running median; 0: off."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """Where numbers go. metrics.jsonl in the run folder is the record; the rest mirrors it."""

    every: int = 10
    """Optimiser steps between records."""
    tensorboard: bool = False
    """Mirror to TensorBoard (needs the extra `tensorboard`)."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Mirror to Weights & Biases."""
    wandb_project: str = "dihal"
    """Project name there."""
    progress: bool = True
    """Progress bar."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """`dihal train`: train a diffusion bridge that replaces the lower blocks of a backbone."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """The backbone."""
    data: DataConfig = field(default_factory=DataConfig)
    """The text."""
    method: MethodConfig = field(default_factory=MethodConfig)
    """The method."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """The budget."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """The optimiser."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """The loop."""
    log: LogConfig = field(default_factory=LogConfig)
    """The logs."""
    seed: int = 0
    """Seed of initial weights, times and noise."""
    out: str = "runs/train"
    """Run folder."""
    resume: bool = False
    """Go on from the newest valid checkpoint in the run folder (a fresh run refuses a folder that holds one)."""
    dry_run: bool = False
    """Print the resolved configuration, parameters, budget and memory estimate, then stop."""
