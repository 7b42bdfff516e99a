"""Memory of a training step, counted before it runs; and what to change where it does not fit.

What a backward pass keeps was counted tensor by tensor (``torch.autograd.graph.saved_tensors_hooks``; the tests
count again). In bytes per position, with w the denoiser's width, m its MLP's, d the state's:

- a block of the denoiser, eager: under bf16-mixed 50 w + 8 m, of which residual stream and norms are fp32; in fp32
  68 w + 16 m. Compiled, norms and activations are computed again instead: 32 w + 4 m, or 59 w + 8 m. The norm `rms`
  keeps 2 w to 8 w less.
- around the blocks 11 d + 12 w (fp32: 16 d + 13 w) for the backward pass, and while the loss is made up to 30 d that it does not keep:
  condition, clean and noised state, noise, what ``explained`` compares.
- a frozen block of the suffix: input gradients only, so no linear layer's input is kept. In elements: 6 d + 3 i + 2 k
  with i the MLP's width and k the channels of keys, and 2 d + 2 k more where queries and keys are normalised.

Gradients appear while activations go: the larger of both counts, unless gradients outlive a micro-batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from dihal.backbone import Backbone
from dihal.config import TrainConfig
from dihal.masked import MaskedLM
from dihal.methods import AnyMethod
from dihal.nn import count_parameters
from dihal.nn.layers import mlp_width
from dihal.spaces.recovery import plain_rows

__all__ = ["Fit", "Memory", "estimate_memory", "out_of_memory", "reads_suffix", "settings_that_fit"]

_GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one process while it trains."""

    backbone: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    """What a micro-batch holds at its peak, with the bf16 copies of the weights that it is computed with."""
    gradients_stay: bool
    """Gradients outlive a micro-batch: accumulation, or the buckets of data-parallel training."""

    @property
    def total(self) -> int:
        """Peak: what is always there, and gradients or activations, or both where gradients stay."""
        always = self.backbone + self.weights + self.optimizer + self.average
        if self.gradients_stay:
            return always + self.gradients + self.activations
        return always + max(self.gradients, self.activations)

    @property
    def parts(self) -> dict[str, int]:
        """Bytes by part."""
        return {name: value for name, value in vars(self).items() if name != "gradients_stay"}


def reads_suffix(config: TrainConfig) -> bool:
    """Whether a loss term is read by the backbone's upper blocks."""
    return config.method.objective.cross_entropy > 0 or config.method.objective.kl > 0


def _denoiser_bytes(config: TrainConfig, dim: int) -> float:
    """Kept per position by the denoiser and the loss around it."""
    net, mixed = config.method.denoiser, config.trainer.precision == "bf16-mixed"
    width, hidden = net.width, mlp_width(net.width, net.mlp_ratio)
    if config.trainer.compile:
        block, norms = (32 * width + 4 * hidden, 2) if mixed else (59 * width + 8 * hidden, 4)
    else:
        block, norms = (50 * width + 8 * hidden, 4) if mixed else (68 * width + 16 * hidden, 8)
    if net.norm == "rms":
        block -= norms * width
    times = 1 + (net.self_conditioning > 0)
    return float(net.depth * block + (12 if mixed else 13) * width + ((11 if mixed else 16) + 26 + 4 * times) * dim)


def _suffix_bytes(config: TrainConfig, backbone: Backbone, split: int) -> float:
    """Kept per position by frozen blocks from ``split`` on that pass a gradient to their input."""
    shape = backbone.config
    dim = backbone.hidden_size
    inner = getattr(shape, "intermediate_size", None) or getattr(shape, "n_inner", None) or 4 * dim
    heads = shape.num_attention_heads
    keys = (getattr(shape, "num_key_value_heads", None) or heads) * (getattr(shape, "head_dim", None) or dim // heads)
    normed = any("q_norm" in name for name, _ in backbone.blocks[-1].named_modules())
    elements = (6 + 2 * normed) * dim + 3 * inner + (2 + 2 * normed) * keys
    if config.trainer.compile:
        elements = (4 + normed) * dim + 2 * inner + (2 + normed) * keys
    size = 2 if config.backbone.dtype == "bfloat16" else 4
    return float((backbone.num_blocks - split) * elements * size)


def _logit_bytes(config: TrainConfig, positions: int, vocab: int) -> float:
    """Logits of one chunk, their gradient, and what stands between."""
    objective = config.method.objective
    size = 2 if config.backbone.dtype == "bfloat16" else 4
    chunk = min(objective.logit_chunk, positions)
    kl = objective.kl > 0
    between = 0 if config.trainer.compile else min(chunk, plain_rows(vocab)) * (21 + 16 * kl)
    return float((chunk * (2 + kl) * size + between) * vocab)


def _masked_bytes(config: TrainConfig, backbone: Backbone, positions: int) -> float:
    """Under `mask` the backbone's own blocks are trained: linear layers keep their inputs, too."""
    dim = backbone.hidden_size
    weights = backbone.parameter_count(0, embedding=False, head=False) / max(1, backbone.num_blocks)
    inner = max(dim, (weights - 4 * dim * dim) / (3 * dim))
    mixed = 3 if config.trainer.precision == "bf16-mixed" else 4
    return float(positions * backbone.num_blocks * (12 * dim + 3 * inner) * mixed)


def estimate_memory(config: TrainConfig, backbone: Backbone, method: AnyMethod) -> Memory:
    """Estimate the peak memory of a training step, per process; see the module.

    Weights, gradients, the optimiser's moments and the average are counted exactly (fp32), the backbone by what is
    held of it.
    """
    trainable, objective = count_parameters(method), config.method.objective
    positions = config.data.batch_size * config.data.sequence_length
    activations = 2.0 * trainable if config.trainer.precision == "bf16-mixed" else 0.0
    if isinstance(method, MaskedLM):
        activations += _masked_bytes(config, backbone, positions)
        activations += _logit_bytes(config, positions, backbone.vocab_size)
    else:
        activations += positions * _denoiser_bytes(config, backbone.hidden_size)
        if reads_suffix(config):
            read = positions // objective.suffix_every
            activations += read * _suffix_bytes(config, backbone, config.method.split or 0)
            activations += _logit_bytes(config, read, backbone.vocab_size)
    devices = config.trainer.nodes * (1 if config.trainer.devices == "auto" else int(config.trainer.devices))
    return Memory(
        backbone=backbone.weight_bytes,
        weights=4 * trainable,
        gradients=4 * trainable,
        optimizer=8 * trainable,
        average=4 * trainable if config.optim.ema > 0 else 0,
        activations=int(activations),
        gradients_stay=devices > 1 or config.trainer.accumulate > 1,
    )


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings under which a step is expected to fit."""

    settings: dict[str, float | int | bool]
    """Option -> value, for the command line."""
    config: TrainConfig
    memory: Memory

    def __str__(self) -> str:
        words = " ".join(f"--{name} {str(value).lower()}" for name, value in self.settings.items())
        return f"{words} (estimate {self.memory.total / _GIB:.1f} GiB)"


_MARGIN = 0.88
"""Share of the memory that an estimate may fill: it is good to a tenth."""


def _variants(config: TrainConfig) -> Iterator[tuple[float, dict[str, float | int | bool], TrainConfig]]:
    """(cost, settings, config): the same step with less memory; first what changes no result."""
    trainer, data, objective = config.trainer, config.data, config.method.objective
    parts = [2**i for i in range(12) if data.batch_size % 2**i == 0]
    # With the suffix read from every n-th sequence, a micro-batch must hold a multiple of them.
    parts = [n for n in parts if (data.batch_size // n) % objective.suffix_every == 0]
    chunks = [objective.logit_chunk]
    if reads_suffix(config):
        chunks += [n for n in (512, 256, 128) if n < objective.logit_chunk]
    compiled = (False, True) if not trainer.compile else (True,)
    averages = (config.optim.ema, 0.0) if config.optim.ema > 0 else (0.0,)
    for n, chunk, compile_, ema in product(parts, chunks, compiled, averages):
        settings: dict[str, float | int | bool] = {}
        if n > 1:
            settings |= {"data.batch_size": data.batch_size // n, "trainer.accumulate": trainer.accumulate * n}
        if chunk != objective.logit_chunk:
            settings["method.objective.logit_chunk"] = chunk
        if compile_ != trainer.compile:
            settings["trainer.compile"] = True
        if ema != config.optim.ema:
            settings["optim.ema"] = 0
        if not settings:
            continue
        # Smaller products each time; a minute of compiling; a run without an average is another run.
        cost = (
            0.03 * (n.bit_length() - 1) + 0.01 * (chunk != objective.logit_chunk) + 0.02 * (compile_ != trainer.compile)
        )
        cost += 1.0 * (ema != config.optim.ema)
        yield (
            cost,
            settings,
            replace(
                config,
                data=replace(data, batch_size=data.batch_size // n),
                trainer=replace(trainer, accumulate=trainer.accumulate * n, compile=compile_),
                optim=replace(config.optim, ema=ema),
                method=replace(config.method, objective=replace(objective, logit_chunk=chunk)),
            ),
        )


def settings_that_fit(config: TrainConfig, backbone: Backbone, method: AnyMethod, limit: int | float) -> list[Fit]:
    """The two cheapest settings whose estimate fits into ``limit`` bytes; fewer where there are fewer."""
    found: list[Fit] = []
    for _, settings, changed in sorted(_variants(config), key=lambda item: item[0]):
        memory = estimate_memory(changed, backbone, method)
        # What another setting already does need not be done beside something else.
        needless = any(other.settings.items() <= settings.items() for other in found)
        if memory.total <= _MARGIN * limit and not needless:
            found.append(Fit(settings=settings, config=changed, memory=memory))
        if len(found) == 2:
            break
    return found


def out_of_memory(config: TrainConfig, backbone: Backbone, method: AnyMethod, *, peak: int, limit: int) -> str:
    """What to tell somebody whose training step ran out of memory.

    Args:
        config, backbone, method: of the run.
        peak: bytes allocated at the most before it failed.
        limit: bytes that the process may use.
    """
    estimate = estimate_memory(config, backbone, method)
    largest = ", ".join(f"{name} {size / _GIB:.1f}" for name, size in estimate.parts.items())
    text = (
        f"a training step does not fit into {limit / _GIB:.1f} GiB: estimate {estimate.total / _GIB:.1f} GiB "
        f"({largest}), peak when it failed {peak / _GIB:.1f} GiB."
    )
    fits = settings_that_fit(config, backbone, method, limit)
    if not fits:
        return f"{text} No size of micro-batch fits: use a smaller denoiser, or a device with more memory."
    return f"{text} What would fit, cheapest first: {'; or '.join(map(str, fits))}."
