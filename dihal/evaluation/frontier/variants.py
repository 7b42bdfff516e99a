"""Ways to write with one checkpoint: `LABEL: KEY=VALUE ...` over the fields of `method.writing`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from dihal.config.cli import parse
from dihal.config.spaces import WritingConfig
from dihal.errors import UsageError
from dihal.masked.checks import USED_IN_WRITING

__all__ = ["Variant", "label_of", "parse_variant", "parse_variants", "variants_for"]

_OF_MASK = {"order", "top_p"}
"""Options that only the regime `mask` has; those it shares with `generate` are `dihal.masked.checks.USED_IN_WRITING`."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Options that differ from the checkpoint's own."""

    label: str
    """Shown in the row's name; empty for the checkpoint's own way."""
    options: dict[str, Any]

    def writing(self, own: WritingConfig, *, steps: int, temperature: float, seed: int) -> WritingConfig:
        """The options in full: those of the variant, then those of the grid, then the checkpoint's."""
        return dataclasses.replace(own, **{"steps": steps, "temperature": temperature, "seed": seed, **self.options})

    def grid(self, steps: tuple[int, ...], temperatures: tuple[float, ...]) -> list[tuple[int, float]]:
        """Steps and temperatures of its points: an option that the variant names has that value only."""
        chosen = (self.options["steps"],) if "steps" in self.options else tuple(sorted(set(steps)))
        at = (self.options["temperature"],) if "temperature" in self.options else tuple(sorted(set(temperatures)))
        return [(count, temperature) for count in chosen for temperature in at]


def label_of(text: str) -> str:
    """What a row's name says of a variant: its label, without one the options."""
    label, colon, _ = text.partition(":")
    return label.strip() if colon else text.strip()


def parse_variant(text: str) -> Variant:
    """Read `LABEL: KEY=VALUE KEY=VALUE ...`; without a label the options are the label.

    Raises:
        UsageError: an unknown key (near match suggested), a wrong value, `seed` (it is `seeds`), or no option at all.
    """
    _, colon, rest = text.partition(":")
    words = (rest if colon else text).split()
    keys = [word.partition("=")[0] for word in words]
    if not words or not all("=" in word for word in words):
        raise UsageError(f"variant {text!r}: expected `LABEL: KEY=VALUE ...`, e.g. 'fused: readout=fused project=0.5'.")
    if "seed" in keys:
        raise UsageError(f"variant {text!r}: the seeds of all rows are `seeds`; leave `seed` out.")
    try:
        parsed = parse(WritingConfig, words, prog="variant")
    except UsageError as error:
        raise UsageError(f"variant {text!r}: {error}") from error
    return Variant(label=label_of(text), options={key: getattr(parsed, key) for key in keys})


def parse_variants(texts: tuple[str, ...]) -> list[Variant]:
    """Read all variants; none: the checkpoint's own way, without a label.

    Raises:
        UsageError: a variant that cannot be read, or two of one label.
    """
    found = [parse_variant(text) for text in texts] or [Variant(label="", options={})]
    labels = [variant.label for variant in found]
    if len(set(labels)) < len(labels):
        raise UsageError(f"two variants share a label: {', '.join(labels)}. Give each its own.")
    return found


def variants_for(regime: str, variants: list[Variant]) -> list[Variant]:
    """The variants whose options a regime has; where it has none of them all, the checkpoint's own way without a label.

    Checkpoints of both regimes that write share one list: each takes what is meant for it.
    """

    def fits(variant: Variant) -> bool:
        named = set(variant.options)
        return named <= set(USED_IN_WRITING) if regime == "mask" else not named & _OF_MASK

    return [variant for variant in variants if fits(variant)] or [Variant(label="", options={})]
