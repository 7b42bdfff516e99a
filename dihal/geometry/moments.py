"""Streaming first and second moments of states: one matrix product per chunk, summed in fp64."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dihal.errors import UsageError

__all__ = [
    "Moments",
    "add_upper_gram",
    "correlation",
    "covariance_of_both",
    "cusolver",
    "half_product",
    "native_half",
    "spectrum",
    "spectrum_and_basis",
]


def native_half(dtype: torch.dtype, device: torch.device) -> bool:
    # Only CUDA multiplies half-precision inputs into an fp32 result; elsewhere the inputs are widened first.
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def work_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which states of ``dtype`` are multiplied on ``device``."""
    if dtype == torch.float64 or native_half(dtype, device):
        return dtype
    return torch.float32


_BLOCK = 144  # width of a block column of a CPU product
# From this width on a CUDA product is made in two block columns: three quarters of work and memory. Not in four: at
# d = 4,096 two are three full waves of 128 x 256 tiles on 132 processors, four are four waves, the last ones empty.
_HALVES = 2_048
_RECENT = 64  # fp32 sums before they go to fp64: their rounding stays at 2e-7 of the sum
_ROWS = 256  # fewer tokens than this wait for more: many small products cost more than one


def _columns(dim: int, device: torch.device) -> list[tuple[int, int]]:
    """First and last channel of each block column."""
    if device.type == "cuda":
        width = -(-dim // 2) if dim >= _HALVES else dim
    else:
        width = _BLOCK if dim >= 2 * _BLOCK else dim
    return [(start, min(start + width, dim)) for start in range(0, dim, width)]


def _packed(dim: int, flat: Tensor) -> list[tuple[int, int, Tensor]]:
    """Block columns of an upper triangle held in a row: first and last channel, view (stop - start, dim - start)."""
    found, offset = [], 0
    for start, stop in _columns(dim, flat.device):
        size = (stop - start) * (dim - start)
        found.append((start, stop, flat[offset : offset + size].view(stop - start, dim - start)))
        offset += size
    return found


def _packed_size(dim: int, device: torch.device) -> int:
    return sum((stop - start) * (dim - start) for start, stop in _columns(dim, device))


def half_product(a: Tensor, b: Tensor) -> Tensor:
    """Product of half-precision matrices with an fp32 result; on CUDA only."""
    return torch.mm(a, b, out_dtype=torch.float32)


def _add_half_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


@functools.cache
def _adds_in_place(device: torch.device) -> bool:
    """Whether a product of half precision can be added to an fp32 sum as it is made; asked of the device, once.

    Not every release of torch that multiplies into fp32 also adds there. Else the product is made, read and added:
    half as many bytes again.
    """
    x = torch.arange(64 * 32, device=device).remainder(7).view(64, 32).bfloat16()
    total = torch.ones(32, 32, device=device)
    try:
        _add_half_product(total, x.mT, x)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.equal(total, half_product(x.mT, x) + 1)  # small whole numbers: both are exact


def add_upper_gram(x: Float[Tensor, "tokens dim"], total: Float[Tensor, "packed"]) -> None:
    """Add the upper triangle of X^T X to a sum of such (fp32 or fp64), block column by block column.

    fp32 and fp64 are multiplied in their own precision, half precision on CUDA with an fp32 result.
    """
    half = native_half(x.dtype, x.device)
    in_place = half and total.dtype == torch.float32 and _adds_in_place(x.device)
    product = half_product if half else torch.mm
    for start, stop, block in _packed(x.shape[1], total):
        left, right = x[:, start:stop].mT, x[:, start:]
        if in_place:
            _add_half_product(block, left, right)
        else:
            block += product(left, right)


class Moments:
    """Count, mean and covariance of token vectors, accumulated chunk by chunk. Final.

    fp32 states are shifted by a fixed vector before the product: a difference of two nearby fp32
    numbers is exact to one rounding, while second moments about the origin lose the digits of
    mean^2 / variance when the mean is subtracted at the end. Half-precision states are *not*
    shifted, because rounding the difference to bf16 costs 1e-3 where the uncentred product is
    good to 1e-6. Products are fp32, sums over chunks fp64; on a GPU the products of up to 64 chunks of half precision
    are summed in fp32 first, which moves a third of the bytes and, with no more chunks than that, holds half of them.

    Args:
        shift: any vector near the mean, shape (d,); zeros where states are multiplied in half precision.
        dtype: precision of the products.
        wait: tokens that are collected before they are multiplied; with few tokens in all, no matrix is ever held.
    """

    def __init__(self, shift: Float[Tensor, "dim"], dtype: torch.dtype, *, wait: int = _ROWS) -> None:
        half = native_half(dtype, shift.device)
        self.shift = torch.zeros_like(shift, dtype=torch.float64) if half else shift.to(dtype).double()
        self._dtype = dtype
        self._shift = None if half else self.shift.to(dtype)
        dim = shift.shape[0]
        self.count = 0
        self._total = torch.zeros(dim, dtype=torch.float64, device=shift.device)
        self._sums: Tensor | None = None
        self._recent: Tensor | None = None
        self._recent_chunks = 0
        self._wait = wait
        self._waiting: list[Tensor] = []

    @property
    def _second(self) -> Float[Tensor, "packed"]:
        """Sum of products of the tokens multiplied so far, upper triangle in block columns; made on first use."""
        if self._sums is None:
            dim, device = self._total.shape[0], self._total.device
            self._sums = torch.zeros(_packed_size(dim, device), dtype=torch.float64, device=device)
        if self._recent is not None:
            self._sums += self._recent
            self._recent, self._recent_chunks = None, 0
        return self._sums

    def add(self, x: Float[Tensor, "tokens dim"], scale: Float[Tensor, "tokens"] | None = None) -> None:
        """Add token vectors, each times its ``scale`` if given; the caller's tensor is not changed."""
        if x.shape[0] == 0:
            return
        if scale is None:
            y = x.to(self._dtype)
            y = y if self._shift is None else y - self._shift
        elif self._shift is None:
            y = (x.to(scale.dtype) * scale[:, None]).to(self._dtype)
        else:
            y = torch.addcmul(-self._shift, x.to(self._dtype), scale.to(self._dtype)[:, None])
        self.count += x.shape[0]
        self._waiting.append(y)
        if sum(map(len, self._waiting)) >= self._wait:
            self._flush()

    def add_chosen(
        self,
        x: Float[Tensor, "tokens dim"],
        where: Int[Tensor, "left_out"],
        scale: Float[Tensor, "tokens"] | None = None,
    ) -> None:
        """:meth:`add` all tokens but ``x[where]``.

        The others are gathered; where nothing is shifted, :meth:`add_beside_zeros` does without.
        """
        chosen = torch.ones(x.shape[0], dtype=torch.bool, device=x.device).index_fill_(0, where, False)
        rows = chosen.nonzero().squeeze(1)
        self.add(x.index_select(0, rows), None if scale is None else scale[rows])

    @property
    def unshifted(self) -> bool:
        """Whether tokens are multiplied as they are: then a token of zeros adds nothing to any sum."""
        return self._shift is None

    def add_beside_zeros(self, y: Float[Tensor, "tokens dim"], count: int) -> None:
        """Add ``count`` tokens; the other rows of ``y`` are zero. Only where :attr:`unshifted`."""
        assert self.unshifted, "where tokens are shifted, a token of zeros is one"
        self.count += count
        self._multiply(y.to(self._dtype))

    def _flush(self) -> None:
        if self._waiting:
            y = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting.clear()
            self._multiply(y)

    def _multiply(self, y: Tensor) -> None:
        if not native_half(y.dtype, y.device):
            self._total += y.sum(0, dtype=torch.float64 if y.is_cuda else None)
            add_upper_gram(y, self._second)
            return
        # The device sums a chunk of bf16 as a tree, a few dozen terms a thread: good to a few 1e-7 in fp32, as the products
        # are, and in half the time of fp64 (the chunks are summed in that).
        self._total += y.sum(0, dtype=torch.float32)
        if self._recent is None:
            self._recent = torch.zeros(_packed_size(y.shape[1], y.device), dtype=torch.float32, device=y.device)
        add_upper_gram(y, self._recent)
        self._recent_chunks += 1
        if self._recent_chunks == _RECENT:
            _ = self._second

    def settle(self) -> None:
        """Multiply what waits: products then do not depend on what comes after."""
        self._flush()

    def sums(self) -> tuple[Float[Tensor, "dim"], Float[Tensor, "packed"]]:
        """Sum of the tokens and of their products so far, fp64, to be added to those of other tokens in place."""
        self._flush()
        return self._total, self._second

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of tokens. Both must have been made with the same shift."""
        assert torch.equal(self.shift, other.shift), "moments with different shifts cannot be added"
        self._flush()
        other._flush()
        both = Moments(self.shift, self._dtype)
        both.count = self.count + other.count
        both._total = self._total + other._total
        both._sums = self._second + other._second
        return both

    @property
    def waiting(self) -> Float[Tensor, "tokens dim"] | None:
        """The tokens, less the shift, where they are so few that they have not been multiplied yet."""
        if self._sums is not None or self._recent is not None or not self._waiting:
            return None
        return torch.cat(self._waiting)

    @property
    def mean(self) -> Float[Tensor, "dim"]:
        """Mean, fp64."""
        self._flush()
        return self.shift + self._total / self.count

    @property
    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Population covariance (divisor N), fp64, symmetric."""
        self._flush()
        offset = self._total / self.count
        dim = offset.shape[0]
        # In place: five such matrices are made per layer, and each pass over fresh memory costs a millisecond or more.
        cov = torch.empty(dim, dim, dtype=torch.float64, device=offset.device)
        recent = self._recent if self._sums is None else None
        for start, stop, block in _packed(dim, self._second if recent is None else recent):
            if recent is not None:
                block = cov[start:stop, start:].copy_(block)
            torch.div(block, self.count, out=cov[start:stop, start:])
            cov[start:stop, :start] = 0
        cov.addr_(offset, offset, alpha=-1)
        above = cov.triu(1)
        return cov.triu_().add_(above.mT)

    @property
    def narrow_covariance(self) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim"]]:
        """The covariance in fp32, and its diagonal in fp64.

        Sums that are fp32 themselves are not widened: taking off the mean's part rounds by 1e-7 of it, less than the
        sums have been, and fp64 matrices take four times as long to pass over.
        """
        self._flush()
        if self._recent is None or self._sums is not None:
            covariance = self.covariance
            return covariance.float(), covariance.diagonal().clone()
        offset = self._total / self.count
        near, dim = offset.float(), offset.shape[0]
        cov = torch.empty(dim, dim, dtype=torch.float32, device=offset.device)
        diagonal = []
        for start, stop, block in _packed(dim, self._recent):
            upper = cov[start:stop, start:]
            torch.addr(block, near[start:stop], near[start:], beta=1 / self.count, alpha=-1, out=upper)
            # A block on the diagonal is whole, and symmetric as its product is.
            cov[stop:, start:stop] = cov[start:stop, stop:].mT
            diagonal.append(block.diagonal())
        return cov, torch.cat(diagonal).double() / self.count - offset.square()


def covariance_of_both(covariance: Float[Tensor, "dim dim"], kept: Moments, few: Moments) -> Float[Tensor, "dim dim"]:
    """Covariance of two sets of tokens together, from that of the first, in its precision.

    A second set of fewer tokens than have been multiplied adds a matrix of low rank: no other one is made.
    """
    both = kept.count + few.count
    rows = few.waiting
    mean = few.mean - few.shift if rows is None else rows.mean(0)
    apart = (mean - (kept.mean - kept.shift)) * (kept.count * few.count) ** 0.5
    if rows is None:
        spread = (few.covariance * few.count).addr_(apart / both**0.5, apart / both**0.5)
        return torch.add(spread.to(covariance.dtype), covariance, alpha=kept.count).div_(both)
    factor = torch.cat([(rows - mean) / both**0.5, apart[None] / both]).to(covariance.dtype)
    return torch.addmm(covariance, factor.mT, factor, beta=kept.count / both)


def correlation(
    covariance: Float[Tensor, "dim dim"], variance: Float[Tensor, "dim"] | None = None
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim"]]:
    """Covariance in standardized coordinates, and each channel's standard deviation.

    A channel without variance (below 1e-14 of the largest channel variance, which is rounding) has
    standard deviation infinity: it stays constant zero instead of dividing by nothing.

    Args:
        covariance: of the states.
        variance: its diagonal, where that is known more precisely than the matrix.
    """
    variance = covariance.diagonal() if variance is None else variance
    live = variance > 1e-14 * variance.max()
    std = torch.where(live, variance.clamp_min(0).sqrt(), torch.inf)
    near = std.to(covariance.dtype)
    return (covariance / near[:, None]).div_(near), std


@contextlib.contextmanager
def cusolver(device: torch.device) -> Iterator[None]:
    """Scope of one large symmetric eigenproblem, or of several at a time, on a GPU.

    cusolver is several times faster there than magma (measured, traps.md). The choice is process-wide: threads that
    solve side by side are put into one such scope together.
    """
    if device.type != "cuda":
        yield
        return
    chosen = torch.backends.cuda.preferred_linalg_library()
    torch.backends.cuda.preferred_linalg_library("cusolver")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_linalg_library(chosen)


def _eigen(cov: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    try:
        with cusolver(cov.device):
            if vectors:
                values, basis = torch.linalg.eigh(cov)
                return values, basis
            return torch.linalg.eigvalsh(cov), None
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"the eigenvalues of a covariance did not converge ({error}). "
            "Check the states for extreme values, or load the backbone with dtype float32."
        ) from error


def spectrum(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim"]:
    """Eigenvalues e_1 >= ... >= e_d, rounding below zero set to zero."""
    return _eigen(covariance, vectors=False)[0].flip(0).clamp_min(0)


def spectrum_and_basis(
    covariance: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim dim"]]:
    """Eigenvalues as :func:`spectrum`, and the matching eigenvectors in columns."""
    values, basis = _eigen(covariance, vectors=True)
    assert basis is not None
    return values.flip(0).clamp_min(0), basis.flip(1)
