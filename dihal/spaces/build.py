"""Name of a state space -> state space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from dihal.config.method import MethodConfig
from dihal.diffusion.process import build_process
from dihal.diffusion.schedule import build_schedule
from dihal.errors import UsageError, unknown_name
from dihal.spaces.base import Space
from dihal.spaces.embedding import EmbeddingSpace, check_bound_schedule
from dihal.spaces.hidden_state import HiddenStateSpace
from dihal.spaces.latent import LatentSpace
from dihal.spaces.simplex import SimplexSpace

__all__ = ["SPACES", "build_space"]


def _hidden(config: MethodConfig, dim: int, vocab: int) -> Space:
    return HiddenStateSpace(config.split, dim, clip=config.objective.norm_clip)


def _embedding(config: MethodConfig, dim: int, vocab: int) -> Space:
    _own_split(config)
    if config.embedding.bound:
        check_bound_schedule(build_process(config.process).schedule)
        if config.time.law == "logit_normal" or config.time.terminal_fraction > 0:
            raise UsageError(
                "method.embedding.bound needs times uniform over [0, 1]: set method.time.law to low_discrepancy "
                "and method.time.terminal_fraction to 0."
            )
    return EmbeddingSpace(config.embedding, dim, vocab, chunk=config.objective.logit_chunk)


def _latent(config: MethodConfig, dim: int, vocab: int) -> Space:
    # Times of the decoder's noise are those of the schedule as it starts: it is trained before a warp is learned.
    schedule = build_schedule(replace(config.process, warp=False))
    objective = config.objective
    return LatentSpace(
        config.latent, schedule, config.split, dim, clip=objective.norm_clip, chunk=objective.logit_chunk
    )


def _simplex(config: MethodConfig, dim: int, vocab: int) -> Space:
    return SimplexSpace(config.simplex, config.split, dim, vocab, chunk=config.objective.logit_chunk)


def _own_split(config: MethodConfig) -> None:
    if config.split != 0:
        raise UsageError(
            f"space {config.space!r} enters below block 0: set method.split to 0, not {config.split}. "
            "The whole stack is then its suffix."
        )


SPACES: dict[str, Callable[[MethodConfig, int, int], Space]] = {
    "hidden": _hidden,
    "embedding": _embedding,
    "latent": _latent,
    "simplex": _simplex,
}
"""Name -> builder(config, hidden size, vocabulary)."""


def build_space(config: MethodConfig, *, dim: int, vocab: int) -> Space:
    """Build the state space of a method, its buffers not yet measured.

    Args:
        config: the method; ``split`` resolved.
        dim: hidden size d of the backbone.
        vocab: its vocabulary size V.

    Raises:
        UsageError: unknown name, no split, or options that contradict each other.
    """
    if config.space not in SPACES:
        raise unknown_name("space", config.space, SPACES)
    if config.split is None:
        raise UsageError("method.split is not set. Give method.split, or method.split_from a scores.json.")
    return SPACES[config.space](config, dim, vocab)
