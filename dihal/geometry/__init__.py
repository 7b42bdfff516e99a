"""Where should diffusion enter? Geometry of the hidden states, layer by layer.

``proxies``, ``moments``, ``neighbours`` and ``intervals`` are mathematics on tensors; ``windows``
and ``streaming`` run the backbone over text; ``layer`` and ``score`` put the numbers together;
``report``, ``table`` and ``figure`` show them.
"""

from dihal.geometry.report import ScoreReport, read_split
from dihal.geometry.score import score_layers

__all__ = ["ScoreReport", "read_split", "score_layers"]
