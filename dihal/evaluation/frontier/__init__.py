"""Frontier evaluation: likelihood of generated text against its entropy.

``frontier(FrontierConfig)`` writes one JSON per row and derives tables, figure and page from them; ``report`` derives
them again from files. To measure something new of a text, add it to `definitions` and `assemble`; a new kind of
row is a class in `sources` and an entry in `plan`.
"""

from dihal.evaluation.frontier.report import frontier, report

__all__ = ["frontier", "report"]
