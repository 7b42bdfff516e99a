"""The largest eigenvalues of wide covariances: few products with a block of vectors instead of many with one.

A matrix of 4,096 rows is read in 15 us on a large GPU; a launch takes half of that. One vector at a time (Lanczos)
needs a hundred products and ten launches around each. Here a block is filtered by Chebyshev polynomials that are small
on [0, a], where a is the smallest Ritz value so far, and grow above (Zhou and Saad 2007): one launch per
degree for all matrices. The Ritz values of the filtered block are solved for on the host.

On a GPU the first steps of a stage multiply by matrices rounded to bf16: a quarter of the time. What that adds is of
the size 2^-9 of the block and is not amplified by the steps after it, as what is looked for is; after ``_PRECISE``
steps in fp32 the residual is what it would have been (tests). Ritz values and residuals never see the rounded matrices, and from
the fourth stage on nothing is rounded.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.random import normal

__all__ = ["Largest", "largest_values"]

_COLUMNS = 32
"""Vectors of a block: below this the matrices are read more often, above it the products take longer."""
_DEGREES = (6, 10, 12, 12, 12, 16, 16, 16)
"""Degree of the filter at each stage; the host looks after each."""
_RESIDUAL = 3e-4
"""Relative residual at which e_1 is taken: it bounds the error, which is of the order of its square."""
_ROUGH_STAGES = 3
"""Stages whose first steps are in bf16, on a GPU."""
_PRECISE = 3
"""Steps in fp32 at the end of such a stage."""
_LOWEST = 0.02
"""Smallest a in units of e_1: a polynomial of degree 16 there stays within fp32."""


class Largest:
    """What is known of the largest eigenvalues of several matrices, on the host. Final.

    Attributes:
        values: Ritz values, (matrices, columns), fp64, falling.
        residuals: bound of the distance of each to an eigenvalue.
        block: orthonormal vectors, (matrices, dim, columns), on the device.
    """

    def __init__(self, values: Tensor, residuals: Tensor, block: Tensor) -> None:
        self.values, self.residuals, self.block = values, residuals, block

    @property
    def settled(self) -> Tensor:
        """Whether e_1 of each matrix has converged."""
        return self.residuals[:, 0] <= _RESIDUAL * self.values[:, 0]


@functools.lru_cache(maxsize=4)
def _random_block(dim: int, columns: int) -> Tensor:
    # Kept on the host: a tensor made on one stream may not be used on another without waiting.
    return normal(0, torch.arange(columns), "geometry-subspace", (dim,)).mT.contiguous()


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal basis of each block's span, by Cholesky in fp64: no step of it makes the host wait.

    Columns that a strong filter has made parallel are told apart by their rounding only: what replaces them is
    arbitrary, and orthogonal.
    """
    block = block.double()
    block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(1e-300)
    size = block.shape[2]
    for shift in (1e-11, 1e-15, 0.0):  # the first makes any block definite; two more make it orthonormal
        gram = block.mT @ block
        gram.diagonal(dim1=1, dim2=2).add_(shift * size)
        lower = torch.linalg.cholesky_ex(gram).L
        # The small triangle is inverted: solving with long blocks on the right is slow on a GPU.
        identity = torch.eye(size, dtype=block.dtype, device=block.device).expand_as(lower)
        block = block @ torch.linalg.solve_triangular(lower, identity, upper=False).mT
    return block


def largest_values(
    matrices: Float[Tensor, "matrices dim dim"], start: Float[Tensor, "matrices dim columns"] | None = None
) -> Largest:
    """e_1 of each matrix to about 1e-6 relative, and what else the block has found.

    Args:
        matrices: symmetric, non-negative, not zero, fp32. **Overwritten**: scaled and shifted in place.
        start: vectors to begin with; None: random ones. The last two give way to the columns of the largest variances.
    """
    count, dim = matrices.shape[:2]
    if start is None:
        start = _random_block(dim, _COLUMNS).to(matrices.device).expand(count, -1, -1)
    places = matrices.diagonal(dim1=1, dim2=2).topk(2, dim=1).indices
    columns = matrices.gather(1, places[:, :, None].expand(-1, -1, dim)).mT
    columns = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-30)
    start = torch.cat([start[:, :, :-2], columns.to(start.dtype)], dim=2)
    # The matrices hold S scale - shift I from here on.
    scale, shift = torch.ones(count, dtype=torch.float64), 0.0
    block = _orthonormal(start).to(matrices.dtype)
    for stage, degree in enumerate((*_DEGREES, 0)):
        image = torch.bmm(matrices, block)
        values, residuals = _ritz(block, image, scale, shift)
        found = Largest(values, residuals, block)
        if degree == 0 or bool(found.settled.all()):
            return found
        # From [0, a] to [-2, 2]: the recurrence of twice the polynomial is then one product and one sum.
        highest = torch.maximum(values[:, -1], _LOWEST * values[:, 0])
        change = (4 / highest) / scale
        offset = change * shift - 2.0
        rough = degree - 1 - _PRECISE if stage < _ROUGH_STAGES and _rounds(matrices.device) else 0
        block = _filtered(matrices, block, image, change, offset, degree, rough)
        scale, shift = 4 / highest, 2.0
        block = _orthonormal(block).to(matrices.dtype)
    raise AssertionError("the last stage returns")


def _rounds(device: torch.device) -> bool:
    return device.type == "cuda"


def _rough_product(matrices: Tensor, block: Tensor) -> Tensor:
    return torch.bmm(matrices, block.to(matrices.dtype), out_dtype=torch.float32)


def _filtered(
    matrices: Tensor, block: Tensor, image: Tensor, change: Tensor, offset: Tensor, degree: int, rough: int
) -> Tensor:
    """Chebyshev polynomial of the matrices, rescaled in place, times the block; ``rough`` of its steps in bf16."""
    factor, add = (v.to(matrices.device, matrices.dtype)[:, None, None] for v in (change, offset))
    matrices.mul_(factor).diagonal(dim1=1, dim2=2).add_(add[:, 0])
    before, now = block.clone(), (image * factor + block * add) / 2
    if rough > 0:
        rounded = matrices.bfloat16()
        for _ in range(rough):
            before, now = now, _rough_product(rounded, now).sub_(before)
        del rounded
    for _ in range(degree - 1 - max(rough, 0)):
        before, now = now, before.baddbmm_(matrices, now, beta=-1)
    return now


def _ritz(block: Tensor, image: Tensor, scale: Tensor, shift: float) -> tuple[Tensor, Tensor]:
    """Ritz values of S, falling, and their residuals, on the host."""
    block, image = block.double(), image.double()
    small, square = torch.stack([block.mT @ image, image.mT @ image]).cpu()
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    length = (vectors * (square @ vectors)).sum(1)
    residuals = (length - values.square()).clamp_min(0).sqrt() / scale[:, None]
    return ((values + shift) / scale[:, None]).flip(1), residuals.flip(1)
