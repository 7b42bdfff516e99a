"""A layer in each kind of coordinates: its covariance, with and without sinks, and its pool tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dihal.geometry.moments import correlation, covariance_of_both
from dihal.geometry.statistics import LayerStatistics, rms_scale

__all__ = ["COORDINATES", "WIDE", "Frame", "View"]

WIDE = 2_048
"""Channels from which spectra are not solved for where a few numbers of them will do: each takes 0.1 s on a GPU."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A layer in one kind of coordinates."""

    covariance: Tensor
    with_sinks: Tensor | None
    """Covariance of kept and dropped tokens together; None: nothing was dropped."""
    make_points: Callable[[], Tensor]

    @property
    def points(self) -> Tensor:
        """Centred kept pool tokens, made when asked for: three kinds of coordinates would hold them three times."""
        return self.make_points()


class Frame:
    """What the coordinates of one layer have in common, made once.

    Args:
        layer: the statistics.
        rows: pool tokens that are kept; None: all.
        lean: covariances in fp32, as the functions of :mod:`dihal.geometry.wide` want them.
    """

    def __init__(self, layer: LayerStatistics, rows: Tensor | None, *, lean: bool) -> None:
        self.layer = layer
        self.lean = lean
        self.norms = layer.pool_norms if rows is None else layer.pool_norms[rows]
        self.states = (layer.pool if rows is None else layer.pool.index_select(0, rows)).to(self.norms.dtype)
        self.covariance, self.variance = self.without_sinks("raw")

    def without_sinks(self, coordinates: str) -> tuple[Tensor, Tensor]:
        """Covariance of the kept tokens, and its diagonal in fp64."""
        moments = self.layer.kept[coordinates]
        if self.lean:
            return moments.narrow_covariance
        covariance = moments.covariance
        return covariance, covariance.diagonal().clone()

    @functools.cached_property
    def centred(self) -> Tensor:
        return self.states - self.layer.kept["raw"].mean.to(self.states.dtype)

    @functools.cached_property
    def raw_with_sinks(self) -> Tensor | None:
        return self.with_sinks("raw", self.covariance)

    def with_sinks(self, coordinates: str, covariance: Tensor) -> Tensor | None:
        kept, dropped = self.layer.kept[coordinates], self.layer.dropped[coordinates]
        if not dropped.count:
            return None
        if self.lean:
            return covariance_of_both(covariance, kept, dropped)
        both = kept.merged(dropped).covariance
        return both.float() if both.shape[0] >= WIDE else both


def _raw(frame: Frame) -> View:
    return View(covariance=frame.covariance, with_sinks=frame.raw_with_sinks, make_points=lambda: frame.centred)


def _rms(frame: Frame) -> View:
    moments = frame.layer.kept["rms"]
    scale = rms_scale(frame.norms, frame.states.shape[1])
    covariance = frame.without_sinks("rms")[0]
    return View(
        covariance=covariance,
        with_sinks=frame.with_sinks("rms", covariance),
        make_points=lambda: torch.addcmul(-moments.mean.to(scale.dtype), frame.states, scale[:, None]),
    )


def _standardized(frame: Frame) -> View:
    corr, std = correlation(frame.covariance, frame.variance)
    both = frame.raw_with_sinks
    return View(
        covariance=corr,
        with_sinks=None if both is None else correlation(both)[0],
        make_points=lambda: frame.centred / std.to(frame.centred.dtype),
    )


COORDINATES = {
    "raw": (_raw, "h as it is"),
    "rms": (_rms, "each token divided by its root mean square: h sqrt(d) / |h|, what the next block sees up to gains"),
    "standardized": (_standardized, "each channel centred and divided by its standard deviation over kept tokens"),
}
"""Name -> (view of a layer, definition)."""
