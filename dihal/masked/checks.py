"""Options of the regime `mask` that contradict each other."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from dihal.config.method import MethodConfig
from dihal.config.spaces import WritingConfig
from dihal.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["USED_IN_WRITING", "check_masked", "check_masked_writing", "resolve_mask_token"]

ORDERS = ("confidence", "entropy", "random")

USED_IN_WRITING = ("steps", "order", "temperature", "top_p", "common_noise", "block", "precision", "seed")
"""Fields of :class:`~dihal.config.spaces.WritingConfig` that mean something here."""

_ELSEWHERE = ("embedding", "latent", "simplex", "process", "denoiser", "objective", "sampler")


def check_masked(config: MethodConfig) -> None:
    """Refuse a method of the regime `mask` whose options contradict each other.

    Raises:
        UsageError: naming the options and what to set.
    """
    if (config.name, config.regime, config.space) != ("masked", "mask", "tokens"):
        raise UsageError(
            f"method.name {config.name!r}, .regime {config.regime!r} and .space {config.space!r} do not go together: "
            "a masked diffusion LM has name masked, regime mask and space tokens."
        )
    if config.split not in (None, 0):
        raise UsageError(f"method.split is {config.split}; a masked diffusion LM is the whole backbone: set it to 0.")
    usual = MethodConfig()
    usual = dataclasses.replace(
        usual, objective=dataclasses.replace(usual.objective, logit_chunk=config.objective.logit_chunk)
    )
    for name in _ELSEWHERE:
        if getattr(config, name) != getattr(usual, name):
            raise UsageError(
                f"method.{name} belongs to the other regimes: leave it out under 'mask' (of method.objective only "
                "logit_chunk counts)."
            )
    own = config.masked
    for name in ("anneal", "conditional"):
        if not 0.0 <= getattr(own, name) <= 1.0:
            raise UsageError(f"method.masked.{name} is {getattr(own, name)}; it must be in [0, 1].")
    if not 0.0 < own.smallest < 1.0:
        raise UsageError(f"method.masked.smallest is {own.smallest}; it must lie between 0 and 1.")
    if own.weight == "bound" and (config.time.terminal_fraction != 0.0 or config.time.law == "logit_normal"):
        raise UsageError(
            "method.masked.weight 'bound' needs times that are uniform: set method.time.terminal_fraction to 0 and "
            "method.time.law to low_discrepancy, or the weight to uniform."
        )
    check_masked_writing(config.writing)


def check_masked_writing(config: WritingConfig) -> None:
    """Refuse impossible ways of writing.

    Raises:
        UsageError: naming the field.
    """
    usual = WritingConfig()
    for field in dataclasses.fields(config):
        if field.name not in USED_IN_WRITING and getattr(config, field.name) != getattr(usual, field.name):
            raise UsageError(
                f"writing.{field.name} belongs to the regime 'generate': a masked diffusion LM has no use for it. Leave it out."
            )
    if config.steps < 1:
        raise UsageError(f"writing.steps is {config.steps}; writing needs at least 1.")
    if config.order not in ORDERS:
        raise unknown_name("order", config.order, ORDERS)
    if not config.temperature >= 0:
        raise UsageError(f"writing.temperature is {config.temperature}; it must not be negative. 0 is greedy.")
    if not 0.0 < config.top_p <= 1.0:
        raise UsageError(f"writing.top_p is {config.top_p}; it must be above 0 and at most 1.")
    if config.block is not None and config.block < 1:
        raise UsageError(
            f"writing.block is {config.block}; a block has at least 1 position. Leave it out for one block."
        )


def resolve_mask_token(token: str | None, backbone: Backbone) -> int:
    """Return the id that stands for a masked position; None: one above the backbone's vocabulary.

    Raises:
        UsageError: no such token, or one that texts are made of (start or end token).
    """
    if token is None:
        return backbone.vocab_size
    found = backbone.tokenizer.get_vocab().get(token)
    if found is None:
        raise UsageError(
            f"method.masked.mask_token {token!r} is no token of this backbone. Name one that its tokenizer has and no "
            "text uses, or leave it out for a new one."
        )
    if found in (backbone.start_token_id, backbone.end_token_id):
        raise UsageError(
            f"method.masked.mask_token {token!r} is the backbone's start or end token, which texts need. Name another, or "
            "leave it out for a new one."
        )
    return int(found)
