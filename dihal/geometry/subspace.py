"""The largest eigenvalues of wide covariances: few products with a block of vectors instead of many with one.

A matrix of 4,096 rows is read in 15 us on a large GPU; a launch takes half of that. One vector at a time (Lanczos)
needs a hundred products and ten launches around each. Here a block is filtered by Chebyshev polynomials that are small
on [0, a] and grow above (Zhou and Saad 2007): one product per degree for all matrices. At first a is the mean eigenvalue and
one standard deviation of them, which trace and Frobenius norm tell; then the smallest Ritz value so far. The
Ritz values of the filtered block are solved for on the host, and the next degree follows from what is still missing.

On a GPU a filter multiplies by matrices rounded to bf16, half of the bytes and a third of the time. What that adds is of
the size 2^-9 of the block and is not amplified by the steps after it, as what is looked for is. Where e_1 is wanted to 1e-6,
``_PRECISE`` steps in fp32 follow and the residual is what it would have been (tests). Where 5e-5 is enough, one does: a residual
of 1e-3 e_1, which is what roundings of 2^-9 leave, moves a Ritz value by its square over the distance to what the block leaves
out, at most 4e-5 e_1 at the edge of a bulk (d = 4,096: 2.4 % between the first and the last of the block). Ritz values
and residuals never see the rounded matrices, and from the fourth filter on nothing is rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.random import normal

__all__ = ["Largest", "Size", "largest_values"]

_COLUMNS = 32
"""Vectors of a block: below this the matrices are read more often, above it the products take longer."""
_FILTERS = 8
"""Filters at most; the host looks after each."""
_FIRST = 14
"""Degree of a filter of which nothing but a is known."""
_DEGREES = (4, 24)
"""Least and largest degree of the others."""
_GROWTH = 80.0
"""Largest logarithm of a polynomial's value: it stays within fp32."""
_RESIDUAL = 3e-4
"""Relative residual at which e_1 is taken: it bounds the error, which is of the order of its square."""
_ROUGH_FILTERS = 3
"""Filters whose steps are in bf16, on a GPU."""
_PRECISE = 3
"""Steps in fp32 at the end of a filter where e_1 is wanted to 1e-6; else one, and none in the first filter."""
_PANELS = {"cpu": 1, "cuda": 8}
"""Panels of columns that a matrix is cut into (views). An fp32 product with 32 columns is one tile per 32 rows, each
of which goes through all of d in turn: three matrices of 4,096 rows took 178 us where their bytes need 50 (measured)."""
_LOWEST = 0.02
"""Smallest a in units of e_1."""
_MORE = 2.4
"""Degree in units of what is missing: the block's last Ritz value, which tells how fast e_1 stands out, still grows, and to
look once more costs as much as ten products with rounded matrices."""


class Size:
    """Trace and squared Frobenius norm of each of several matrices, on the host. Final."""

    def __init__(self, matrices: Sequence[Float[Tensor, "dim dim"]]) -> None:
        # A GPU sums as a tree: fp32 is good to 1e-7 there, and takes half the time.
        wide = None if matrices[0].is_cuda else torch.float64
        numbers = [m.diagonal().sum(dtype=torch.float64) for m in matrices]
        numbers += [torch.linalg.vector_norm(m, dtype=wide).double().square() for m in matrices]
        found = torch.stack(numbers).tolist()
        self.traces: list[float] = found[: len(matrices)]
        self.squares: list[float] = found[len(matrices) :]

    def within(self, dim: int) -> list[float]:
        """Mean and one standard deviation of each matrix' eigenvalues: most lie below, e_1 at most sqrt(dim) times higher."""
        means = [trace / dim for trace in self.traces]
        return [
            mean + math.sqrt(max(square / dim - mean**2, 0.0)) for mean, square in zip(means, self.squares, strict=True)
        ]


class Largest:
    """What is known of the largest eigenvalues of several matrices, on the host. Final.

    Attributes:
        values: Ritz values, (matrices, columns), fp64, falling.
        residuals: bound of the distance of each to an eigenvalue.
        settled: whether e_1 of each matrix has converged.
        block: orthonormal vectors, (matrices, dim, columns), on the device.
        filters: number of filters.
        products: products with a block, of all matrices together.
    """

    def __init__(
        self, values: Tensor, residuals: Tensor, settled: Tensor, block: Tensor, filters: int, products: int
    ) -> None:
        self.values, self.residuals, self.settled, self.block = values, residuals, settled, block
        self.filters, self.products = filters, products


@functools.lru_cache(maxsize=4)
def _random_block(dim: int, columns: int, pinned: bool) -> Tensor:
    # Kept on the host: a tensor made on one stream may not be used on another without waiting.
    block = normal(0, torch.arange(columns), "geometry-subspace", (dim,)).mT.contiguous().float() / dim**0.5
    return block.pin_memory() if pinned else block


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal basis of each block's span, by Cholesky in fp64: no step of it makes the host wait.

    Columns that a strong filter has made parallel are told apart by their rounding only: what replaces them is
    arbitrary, and orthogonal.
    """
    block = block.double()
    block = block / torch.linalg.vector_norm(block, dim=1, keepdim=True).clamp_min(1e-300)
    size = block.shape[2]
    identity = torch.eye(size, dtype=block.dtype, device=block.device).expand(block.shape[0], -1, -1)
    for shift in (1e-11, 1e-15, 0.0):  # the first makes any block definite; two more make it orthonormal
        gram = block.mT @ block
        gram.diagonal(dim1=1, dim2=2).add_(shift * size)
        lower = torch.linalg.cholesky_ex(gram).L
        # The small triangle is inverted: solving with long blocks on the right is slow on a GPU.
        block = block @ torch.linalg.solve_triangular(lower, identity, upper=False).mT
    return block


def largest_values(
    matrices: Sequence[Float[Tensor, "dim dim"]],
    start: Float[Tensor, "matrices dim columns"] | None = None,
    *,
    size: Size | None = None,
    error: float | None = None,
) -> Largest:
    """e_1 of each matrix to about 1e-6 relative, or as precisely as asked for, and what else the block has found.

    Args:
        matrices: symmetric, non-negative, not zero, fp32.
        start: vectors to begin with; None: random ones. The last two give way to the columns of the largest variances.
        size: of the matrices, where it is known.
        error: relative error of e_1 that is enough, from 5e-5. It is then also taken where that is its error to first order,
            the square of its residual over the distance to the last value of the block. Whatever the block has
            missed, an eigenvalue lies within the residual: some 1e-3 of e_1 at the edge of a bulk.
    """
    count, dim = len(matrices), matrices[0].shape[0]
    rounds, rounded = _rounds(matrices[0].device), None
    block, filters, products = _begun(matrices, start), 0, 0
    if start is None:
        below = torch.tensor((Size(matrices) if size is None else size).within(dim), dtype=torch.float64)
        rounded = _rounded(matrices) if rounds else None
        degree = min(_FIRST, int(_GROWTH / math.log(4 * dim**0.5)))  # e_1 is at most sqrt(dim) a
        block = _filtered(matrices, rounded, block, None, below, degree, degree)
        products = count * degree
    values = torch.zeros(count, block.shape[2], dtype=torch.float64)
    residuals, settled, blocks = torch.zeros_like(values), torch.zeros(count, dtype=torch.bool), torch.empty_like(block)
    active = slice(0, count)
    while True:
        block = _orthonormal(block).to(block.dtype)
        image = _products(matrices[active], block)
        values[active], residuals[active] = _ritz(block, image)
        settled[active], missing = _judged(values[active], residuals[active], error)
        blocks[active] = block
        products += len(block)
        if bool(settled.all()) or filters == _FILTERS or not bool(values.isfinite().all()):
            return Largest(values, residuals, settled, blocks, filters + (start is None), products)
        # Settled matrices are not multiplied any more, but for one between two others.
        within = _span((~settled[active]).nonzero().flatten().tolist())
        block, image, missing = block[within], image[within], missing[within]
        active = _span(range(count)[active][within])
        lowest = torch.maximum(values[active, -1], _LOWEST * values[active, 0])
        degree = _degree(values[active, 0] / lowest, missing)
        exact = _PRECISE if error is None or filters == _ROUGH_FILTERS - 1 else 1
        if rounds and rounded is None:
            rounded = _rounded(matrices)
        own = None if rounded is None or filters >= _ROUGH_FILTERS else rounded[active]
        block = _filtered(matrices[active], own, block, image, lowest, degree, degree - 1 - exact)
        products += len(block) * (degree - 1)
        filters += 1


def _span(places: Sequence[int]) -> slice:
    """The places, and what is between where they have no common step: a view, not a copy, of what is indexed by it."""
    step = places[1] - places[0] if len(places) == 2 else 1
    return slice(places[0], places[-1] + 1, step)


def _begun(matrices: Sequence[Tensor], start: Tensor | None) -> Tensor:
    """Vectors to begin with, (matrices, dim, columns)."""
    dim, device = matrices[0].shape[0], matrices[0].device
    if start is None:
        block = _random_block(dim, _COLUMNS, device.type == "cuda").to(device, non_blocking=True)
        start = block.to(matrices[0].dtype).expand(len(matrices), -1, -1)
    columns = torch.stack([m.index_select(0, m.diagonal().topk(2).indices) for m in matrices]).mT
    columns = columns / torch.linalg.vector_norm(columns, dim=1, keepdim=True).clamp_min(1e-30)
    # And a little of what they replace: a matrix of one channel has no second column.
    return torch.cat([start[:, :, :-2], columns.add_(start[:, :, -2:], alpha=1e-3)], dim=2)


def _judged(values: Tensor, residuals: Tensor, error: float | None) -> tuple[Tensor, Tensor]:
    """Whether e_1 of each matrix has converged, and the factor by which its residual must fall."""
    first, residual = values[:, 0], residuals[:, 0]
    missing = residual / (_RESIDUAL * first)
    if error is not None:
        apart = torch.maximum(first - values[:, -1], residual)
        missing = torch.minimum(missing, residual / (error * first * apart).sqrt())
    return missing <= 1, missing


def _degree(reach: Tensor, missing: Tensor) -> int:
    """Degree after which e_1, ``reach`` times the end of the interval, stands out by what is missing, for all matrices."""
    rate = torch.acosh((2 * reach - 1).clamp_min(1 + 1e-9))
    needed = float((_MORE * missing.clamp_min(1).log() / rate).max())
    least, largest = _DEGREES
    return min(max(math.ceil(min(needed, largest)) + 1, least), largest, int(_GROWTH / float(rate.max())))


def _rounds(device: torch.device) -> bool:
    return device.type == "cuda"


def _rounded(matrices: Sequence[Tensor]) -> Tensor:
    found = torch.empty(len(matrices), *matrices[0].shape, dtype=torch.bfloat16, device=matrices[0].device)
    for matrix, out in zip(matrices, found, strict=True):
        out.copy_(matrix)
    return found


def _rough_product(matrices: Tensor, block: Tensor) -> Tensor:
    return torch.bmm(matrices, block.to(matrices.dtype), out_dtype=torch.float32)


def _products(matrices: Sequence[Tensor], block: Tensor) -> Tensor:
    """Each matrix times its block, in their own precision."""
    panels = math.gcd(_PANELS["cuda" if block.is_cuda else "cpu"], block.shape[1])
    found = torch.empty_like(block)
    for matrix, part, out in zip(matrices, block, found, strict=True):
        if panels == 1:
            torch.mm(matrix, part, out=out)
        else:
            left = matrix.unflatten(1, (panels, -1)).transpose(0, 1)
            torch.sum(torch.bmm(left, part.unflatten(0, (panels, -1))), dim=0, out=out)
    return found


def _filtered(
    matrices: Sequence[Tensor],
    rounded: Tensor | None,
    block: Tensor,
    image: Tensor | None,
    lowest: Tensor,
    degree: int,
    rough: int,
) -> Tensor:
    """Chebyshev polynomial of 2 S / a - 1 times the block; the first ``rough`` products with the rounded matrices.

    Args:
        matrices: S.
        rounded: the same in bf16, in one; None: all products are exact.
        block: (matrices, dim, columns).
        image: S times it; None: one more product.
        lowest: a, (matrices,).
        degree: of the polynomial.
        rough: of the products.
    """
    # Scaled blocks are cheaper than scaled matrices.
    factor = (4 / lowest).to(block.dtype).to(block.device, non_blocking=True)[:, None, None]
    before, now = block, None if image is None else torch.addcmul(-block, image, factor, value=0.5)
    steps = degree if now is None else degree - 1
    for step in range(steps):
        near = before if now is None else now
        if rounded is not None and step < rough:
            product = _rough_product(rounded, _times(near, factor, rounded.dtype))
        else:
            product = _products(matrices, near * factor)
        if now is None:
            now = product.mul_(0.5).sub_(before)
        else:
            before, now = now, product.sub_(now, alpha=2).sub_(before)
    assert now is not None
    return now


def _times(block: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.mul(block, factor, out=torch.empty_like(block, dtype=dtype))


def _ritz(block: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
    """Ritz values, falling, and their residuals, on the host."""
    block, image = block.double(), image.double()
    small, square = torch.stack([block.mT @ image, image.mT @ image]).cpu()
    values, vectors = torch.linalg.eigh((small + small.mT) / 2)
    length = (vectors * (square @ vectors)).sum(1)
    residuals = (length - values.square()).clamp_min(0).sqrt()
    return values.flip(1), residuals.flip(1)
