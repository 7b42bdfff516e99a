"""A bound of the negative log-likelihood of text under a writer whose states are vectors, in nats.

The encoder is fixed: q(z_s | x) = N(alpha z(x), sigma^2) at any noise level s. With the generative process that the
denoiser defines in continuous time (Kingma et al. 2021, "Variational diffusion models", section 5.1), for every s

    -log p(x) <=  E[-log p(x | z_s)]  +  1/2 integral over SNR(1)..SNR(s) of E|z - x0(z_t, t)|^2 dSNR  +  KL(q(z_1 | x) || N(0, 1)).

For hidden states this is -log p(x) <= E_q[-log p(x | h)] + KL(q(h | x) || p(h)) with h noised to level s, its second
term bounded in turn by the path. Nothing asks z(x) to be invertible or s to be small: a low s makes tokens easy to
read and their states dear, so the level is a choice (a *cut*), and every choice is a bound. p(x | z_s) may be any
distribution that is a product of conditionals given z_s: the own head's, the frozen stack's (x_i from estimated states
before i), or their normalised mix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.diffusion.process import Process
from dihal.errors import UsageError
from dihal.method_parts import own_dtype
from dihal.random import uniform
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.hidden_state import VectorSpace, gaussian_noise
from dihal.types import Mask, State, Time, TokenIds
from dihal.writing.known import position_keys, settled

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.writer import Writer

__all__ = ["PathBound", "StateErrors", "cut_levels", "nll_bound", "path_bound", "state_errors"]

_RANGE = (-12.0, 6.0)
"""log-SNR between which cuts lie. Below, 600 channels of unit variance are worth 0.002 nats; above, every token is read."""
_LOGITS = 1 << 26
"""Logits of one reading that exist at once (memory, not results)."""


@dataclass(frozen=True, kw_only=True)
class PathBound:
    """The terms of the bound of each sequence, by cut.

    Attributes:
        log_snr: of the cuts, rising.
        path: integral up to each cut.
        prior: KL to the noise that writing starts from.
        reading: -log p(x | z_s) at each cut, by reading.
        tokens: tokens explained.
    """

    log_snr: Float[Tensor, " cuts"]
    path: Float[Tensor, "batch cuts"]
    prior: Float[Tensor, " batch"]
    reading: dict[str, Float[Tensor, "batch cuts"]]
    tokens: Int[Tensor, " batch"]

    def total(self, reading: str) -> Float[Tensor, "batch cuts"]:
        """The bound of each sequence at every cut, nats."""
        return self.reading[reading] + self.path + self.prior[:, None]


def cut_levels(process: Process, cuts: int, device: torch.device | str = "cpu") -> Float[Tensor, " cuts"]:
    """Even log-SNR between the ends of the schedule, or of the range that matters if that is narrower; fp64."""
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    low, high = process.schedule.log_snr(ends).tolist()
    return torch.linspace(max(low, _RANGE[0]), min(high, _RANGE[1]), cuts, dtype=torch.float64, device=device)


@torch.no_grad()
def path_bound(
    process: Process,
    clean: State,
    counted: Mask,
    estimate: Callable[[State, Time], Estimate],
    x0: Callable[[Estimate], State],
    read: Callable[[Estimate], Mapping[str, Float[Tensor, " batch"]]],
    noise: Callable[[str], State],
    shift: Callable[[str], Float[Tensor, " batch"]],
    *,
    cuts: int,
) -> PathBound:
    """Every term by one draw of noise per cut and per stretch between cuts; their means over draws are exact.

    Args:
        process: noise schedule.
        clean: z(x).
        counted: positions that are noised and whose tokens are explained.
        estimate: (noised, t (batch,)) -> estimate.
        x0: clean state that an estimate stands for.
        read: estimate -> nats of all counted tokens of each sequence, by reading.
        noise: purpose -> standard normal numbers like ``clean``.
        shift: purpose -> uniform numbers in [0, 1), one per sequence.
        cuts: noise levels at which the bound is taken.
    """
    schedule = process.schedule
    levels = cut_levels(process, cuts, clean.device)
    end = torch.ones((), dtype=torch.float64, device=clean.device)

    def at(time: Tensor, purpose: str) -> Estimate:
        return estimate(process.noise(clean, time, noise(purpose)).float(), time.float())

    below = torch.exp(schedule.log_snr(end)).expand(len(clean))
    walked = torch.zeros(len(clean), dtype=torch.float64, device=clean.device)
    path, readings = [], []
    for index, level in enumerate(levels):
        above = level.exp()
        if bool((above > below).any()):
            # Uniform in SNR between two cuts: every draw has the same weight.
            snr = below + shift(f"{index}") * (above - below)
            found = x0(at(schedule.time(snr.log()), f"{index}"))
            error = (clean.double() - found.double()).square().sum(-1)
            walked = walked + 0.5 * (above - below) * (error * counted).sum(-1)
        path.append(walked)
        readings.append(read(at(schedule.time(level).expand(len(clean)), f"{index} read")))
        below = above.expand(len(clean))
    signal, variance = schedule.alpha(end) ** 2, schedule.sigma(end) ** 2
    prior = 0.5 * (variance - 1 - variance.log() + signal * clean.double().square()).sum(-1)
    return PathBound(
        log_snr=levels,
        path=torch.stack(path, 1),
        prior=(prior * counted).sum(-1),
        reading={name: torch.stack([found[name].double() for found in readings], 1) for name in readings[0]},
        tokens=counted.sum(-1),
    )


class _Denoised:
    """Real text whose states after a known prefix are noised and denoised, as writing does it.

    Known states are at t = 0 and, where the denoiser conditions on an estimate of its own, it is the one of the same
    noised state (a function of z_t, as the bound requires).
    """

    def __init__(
        self,
        writer: Writer,
        backbone: Backbone,
        input_ids: TokenIds,
        known: Mask,
        *,
        seed: int,
        sample_ids: Int[Tensor, " batch"],
        precision: str,
    ) -> None:
        space = writer.space
        if not isinstance(space, VectorSpace):
            raise UsageError(
                f"the space {writer.config.space!r} has no such bound: its noised state is not noise on a state. "
                "It is defined for hidden, latent and embedding."
            )
        known = known.to(backbone.device)
        if not torch.equal(settled(known), known) or not bool(known[:, 0].all()) or bool(known.all(-1).any()):
            raise UsageError("known= must be a prefix of each row, of at least one token and not the whole row.")
        self.writer, self.backbone, self.space, self.known, self.free = writer, backbone, space, known, ~known
        self.ids, self.seed, self.keys = input_ids.to(backbone.device), seed, sample_ids.to(backbone.device)
        batch, time = self.ids.shape
        self.positions = torch.arange(time, device=self.ids.device).expand(batch, time)
        self.key = NoiseKey(seed=seed, purpose="bound", ids=position_keys(self.keys, self.positions))
        self.precision = precision
        with own_dtype(backbone):
            self.state = backbone.prefix(self.ids, writer.split, position_ids=self.positions)
            self.clean = space.encode(backbone, self.ids, position_ids=self.positions, state=self.state)
            self.condition = writer.condition(backbone, self.ids, self.positions)
        self.known_input = space.known_input(self.clean)

    def noise(self, purpose: str) -> State:
        """Standard normal numbers like the clean states."""
        return gaussian_noise(self.key, self.space.input_dim, purpose=f"bound {purpose}")

    def shift(self, purpose: str) -> Float[Tensor, " batch"]:
        """Uniform numbers in [0, 1), one per sequence; fp64."""
        return uniform(self.seed, self.keys, f"bound/shift {purpose}", dtype=torch.float64, device=self.ids.device)

    def estimate(self, noised: State, t: Time) -> Estimate:
        """What the denoiser makes of noised states at t."""
        writer, free, known = self.writer, self.free, self.known
        inputs = (noised, t, self.known_input, self.condition, free, known, self.positions, None)
        with torch.autocast(noised.device.type, dtype=torch.bfloat16, enabled=self.precision == "bfloat16"):
            previous = None
            if writer.denoiser.self_conditioned:
                previous = self.space.feedback(self.backbone, writer.estimate(*inputs, None)[1])
                previous = previous.masked_fill(known[..., None], 0.0)
            return writer.estimate(*inputs, previous)[1]

    def x0(self, found: Estimate) -> State:
        """The clean state that an estimate stands for."""
        return self.space.clean_estimate(self.backbone, found)

    def read(self, found: Estimate) -> dict[str, Tensor]:
        """Nats of the unknown tokens of each sequence, by reading."""
        backbone, known = self.backbone, self.known
        with own_dtype(backbone), self.writer.reading():
            estimated = self.space.hidden(backbone, found, self.positions).to(self.state.dtype)
            hidden = torch.where(known[..., None], self.state, estimated)
            before = backbone.suffix_features(hidden, self.writer.split, position_ids=self.positions)
            before = before[:, :-1][self.free[:, 1:]]
        return _read(self.writer, backbone, found.features[self.free], before, self.ids[self.free], self.free)


@torch.no_grad()
def nll_bound(
    writer: Writer,
    backbone: Backbone,
    input_ids: TokenIds,
    known: Mask,
    *,
    cuts: int,
    seed: int,
    sample_ids: Int[Tensor, " batch"],
    precision: str = "float32",
) -> PathBound:
    """Bound the negative log-likelihood of the tokens after a known prefix, given the prefix.

    Args:
        writer: trained; in a space of vectors.
        backbone: the frozen model.
        input_ids: whole texts without padding.
        known: a prefix of at least one token per row.
        cuts: noise levels at which the bound is taken, at least 1. Two estimates each.
        seed: of the noise. sample_ids: key of each row's noise: a row's bound does not depend on its batch.
        precision: of the denoiser's products.

    Returns:
        Readings ``own``, ``suffix`` and ``fused`` (p proportional to sqrt(p_own p_suffix)).

    Raises:
        UsageError: a space whose states are not vectors, a known part that is not a prefix, or nothing to explain.
    """
    if cuts < 1:
        raise UsageError(f"cuts is {cuts}; the bound needs at least 1.")
    text = _Denoised(writer, backbone, input_ids, known, seed=seed, sample_ids=sample_ids, precision=precision)
    return path_bound(
        writer.process, text.clean, text.free, text.estimate, text.x0, text.read, text.noise, text.shift, cuts=cuts
    )


@dataclass(frozen=True, kw_only=True)
class StateErrors:
    """How well the states of real text are denoised, summed over the positions of each sequence, by time.

    Attributes:
        squared_error: |z - x0|^2.
        variance: |z|^2; states are normalised by training text, so that its mean is 0.
        cosine: of z and x0.
        tokens: positions.
    """

    squared_error: Float[Tensor, "batch times"]
    variance: Float[Tensor, " batch"]
    cosine: Float[Tensor, "batch times"]
    tokens: Int[Tensor, " batch"]


@torch.no_grad()
def state_errors(
    writer: Writer,
    backbone: Backbone,
    input_ids: TokenIds,
    known: Mask,
    *,
    times: Sequence[float],
    seed: int,
    sample_ids: Int[Tensor, " batch"],
    precision: str = "float32",
) -> StateErrors:
    """Denoise the states after a known prefix, all from the same time. Arguments and errors as for :func:`nll_bound`."""
    text = _Denoised(writer, backbone, input_ids, known, seed=seed, sample_ids=sample_ids, precision=precision)
    clean, free = text.clean.double(), text.free
    errors, cosines = [], []
    for index, time in enumerate(times):
        t = torch.full((len(clean),), time, dtype=torch.float64, device=clean.device)
        noised = writer.process.noise(text.clean, t, text.noise(f"{index} state")).float()
        found = text.x0(text.estimate(noised, t.float())).double()
        errors.append(((clean - found).square().sum(-1) * free).sum(-1))
        cosines.append((torch.cosine_similarity(clean, found, -1) * free).sum(-1))
    return StateErrors(
        squared_error=torch.stack(errors, 1),
        variance=(clean.square().sum(-1) * free).sum(-1),
        cosine=torch.stack(cosines, 1),
        tokens=free.sum(-1),
    )


def _read(
    writer: Writer, backbone: Backbone, own: Tensor, before: Tensor, targets: Tensor, free: Mask
) -> dict[str, Tensor]:
    """Nats of the free tokens of each sequence, by reading; no more logits at once than :data:`_LOGITS`."""
    size = max(1, _LOGITS // backbone.vocab_size)
    found: dict[str, list[Tensor]] = {"own": [], "suffix": [], "fused": []}
    for features, states, wanted in zip(own.split(size), before.split(size), targets.split(size), strict=True):
        with own_dtype(backbone):
            head = writer.space.logits(backbone, features).float()
            stack = backbone.head(states[None])[0].float()
        for name, logits in (("own", head), ("suffix", stack), ("fused", 0.5 * (head + stack))):
            found[name].append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double())
    total = {}
    for name, parts in found.items():
        nats = torch.zeros(free.shape, dtype=torch.float64, device=free.device)
        nats[free] = torch.cat(parts)
        total[name] = nats.sum(-1)
    if not all(math.isfinite(float(value.sum())) for value in total.values()):
        raise UsageError("the logits to be read are NaN or infinite: the checkpoint diverged or is damaged.")
    return total
