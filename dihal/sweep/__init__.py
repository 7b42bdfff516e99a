"""Does a layer score predict where diffusion should enter? The truth, trained; the predictors, side by side.

``run`` trains the same method at every split under one budget (``truth``, ``written``) and measures
every predictor in one pass over the backbone (``assess``: ``predictors``, ``states``, ``suffix``;
``transfer`` for weights fitted on another model). ``statistics`` compares the two; ``report``,
``table`` and ``figure`` show it.
"""

from dihal.sweep.report import SweepReport
from dihal.sweep.run import sweep

__all__ = ["SweepReport", "sweep"]
