"""Options of the regime `generate` that contradict each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dihal.config.method import MethodConfig
from dihal.config.spaces import KnownConfig, WritingConfig
from dihal.diffusion.samplers import SAMPLERS
from dihal.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from dihal.spaces.base import Space

__all__ = ["check_generate", "check_known", "check_writing"]

READOUTS = ("own", "suffix", "fused")


def _share(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise UsageError(f"{name} is {value}; it must be in [0, 1].")


def check_known(config: KnownConfig, *, self_conditioning: float) -> None:
    """Refuse impossible shares of known tokens.

    Raises:
        UsageError: naming the field.
    """
    if config.prefix_min < 0:
        raise UsageError(f"method.known.prefix_min is {config.prefix_min}; it must not be negative.")
    for name in ("prefix_max", "infill", "scattered", "reencoded"):
        _share(f"method.known.{name}", getattr(config, name))
    if config.infill + config.scattered > 1.0:
        raise UsageError(
            f"method.known.infill {config.infill} and .scattered {config.scattered} are shares of the sequences: "
            "together they must not exceed 1."
        )
    if config.reencoded > 0 and self_conditioning == 0:
        raise UsageError(
            "method.known.reencoded feeds states back by self-conditioning: set method.denoiser.self_conditioning "
            "above 0, or method.known.reencoded to 0."
        )


def check_writing(config: WritingConfig, *, condition_dropout: float, own: bool = True) -> None:
    """Refuse impossible ways of writing.

    Args:
        config: how to write.
        condition_dropout: of the training.
        own: the own head was trained.

    Raises:
        UsageError: naming the field.
    """
    if config.steps < 1:
        raise UsageError(f"writing.steps is {config.steps}; writing needs at least 1.")
    if config.sampler not in SAMPLERS:
        raise unknown_name("sampler", config.sampler, SAMPLERS)
    if config.readout not in READOUTS:
        raise unknown_name("readout", config.readout, READOUTS)
    for name in ("suffix_weight", "project", "project_below"):
        _share(f"writing.{name}", getattr(config, name))
    for name in ("temperature", "temperature_start"):
        value = getattr(config, name)
        if value is not None and not value >= 0:
            raise UsageError(f"writing.{name} is {value}; it must not be negative. 0 is greedy.")
    if not config.log_snr_scale > 0:
        raise UsageError(f"writing.log_snr_scale is {config.log_snr_scale}; it must be positive, e.g. 0.75.")
    usual = WritingConfig()
    for name in ("order", "top_p"):
        if getattr(config, name) != getattr(usual, name):
            raise UsageError(f"writing.{name} belongs to the regime 'mask'. Leave it out under 'generate'.")
    if config.block is not None and config.block < 1:
        raise UsageError(
            f"writing.block is {config.block}; a block has at least 1 position. Leave it out for one block."
        )
    if config.compile and not config.static:
        raise UsageError(
            "writing.compile compiles passes over room of fixed size: set writing.static to true, or leave compile out."
        )
    if config.guidance != 1.0 and condition_dropout == 0.0:
        raise UsageError(
            "writing.guidance needs method.objective.condition_dropout > 0 in training: without it the unconditional "
            "estimate is never trained."
        )
    if not own and (config.readout != "suffix" or config.project > 0 or config.commit != "none"):
        raise UsageError(
            "the own head is not trained with method.objective.own and .read both 0. Set one of them above 0, or read "
            "with writing.readout 'suffix', writing.project 0 and writing.commit 'none'."
        )


def check_generate(config: MethodConfig, space: Space) -> None:
    """Refuse a method of the regime `generate` whose options contradict each other.

    Raises:
        UsageError: naming the options and what to set.
    """
    objective = config.objective
    if config.regime != "generate":
        raise UsageError(f"a Writer has the regime 'generate', not {config.regime!r}. Set method.regime to generate.")
    if config.denoiser.mask != "mixed":
        raise UsageError(
            f"regime 'generate' needs method.denoiser.mask 'mixed', not {config.denoiser.mask!r}: unknown positions see "
            "each other, and what is known must not depend on them."
        )
    check_known(config.known, self_conditioning=config.denoiser.self_conditioning)
    check_writing(
        config.writing,
        condition_dropout=objective.condition_dropout,
        own=not space.predicts_state or max(objective.own, objective.read) > 0,
    )
    weights = {n: getattr(objective, n) for n in ("state", "own", "read", "cross_entropy", "kl")}
    if min(weights.values()) < 0:
        raise UsageError(f"the weights of method.objective must not be negative; got {weights}.")
    if space.predicts_state and max(objective.state, objective.own, objective.cross_entropy, objective.kl) == 0:
        raise UsageError(
            "no loss trains the denoiser: set method.objective.state (or .own, .cross_entropy, .kl) above 0."
        )
    if not space.predicts_state and objective.own == 0:
        raise UsageError(
            f"the space {config.space!r} is trained by the cross-entropy of its own head: set method.objective.own above 0."
        )
    if not space.predicts_state and objective.own_time != "uniform" and not config.embedding.bound:
        raise UsageError(
            f"the space {config.space!r} has no loss but method.objective.own, and own_time 'signal' takes it away wherever "
            "there is noise: set method.objective.own_time to uniform."
        )
    if config.space == "embedding" and config.embedding.bound and max(objective.cross_entropy, objective.kl) > 0:
        raise UsageError(
            "method.embedding.bound replaces the other losses: set method.objective.cross_entropy and .kl to 0."
        )
    if config.lora.rank > 0 and objective.cross_entropy == objective.kl == 0.0:
        raise UsageError(
            "method.lora needs a loss read by the suffix: set method.objective.kl or .cross_entropy above 0, "
            "or method.lora.rank to 0."
        )
    if objective.suffix_every < 1:
        raise UsageError(f"method.objective.suffix_every is {objective.suffix_every}; it must be at least 1.")
    for name, idle in (("corruption", 0.0), ("renaming", 0.0), ("metric", "channel")):
        if getattr(objective, name) != idle:
            raise UsageError(
                f"method.objective.{name} belongs to the regime 'replace'. Set it to {idle!r} under 'generate'."
            )
