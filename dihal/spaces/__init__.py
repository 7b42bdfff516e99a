"""State spaces: what is diffused, and how it becomes tokens again."""

from dihal.spaces.hidden import HiddenSpace
from dihal.spaces.recovery import SuffixLoss, suffix_loss

__all__ = ["HiddenSpace", "SuffixLoss", "suffix_loss"]
