"""Writing text by diffusion (regime `generate`): what is given, how tokens are read and drawn, the loop, the loss terms."""

from __future__ import annotations

from dihal.writing.checks import check_writing
from dihal.writing.context import Costs
from dihal.writing.sampling import Written, write

__all__ = ["Costs", "Written", "check_writing", "write"]
