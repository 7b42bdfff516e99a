"""Streaming first and second moments of states: one matrix product per chunk, summed in fp64."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from dihal.errors import UsageError

__all__ = ["Moments", "correlation", "spectrum", "spectrum_and_basis", "upper_gram"]


def _native_half(dtype: torch.dtype, device: torch.device) -> bool:
    # Only CUDA multiplies half-precision inputs into an fp32 result; elsewhere the inputs are widened first.
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)


def work_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Precision in which states of ``dtype`` are multiplied on ``device``."""
    if dtype == torch.float64 or _native_half(dtype, device):
        return dtype
    return torch.float32


_BLOCK = 144  # width of a block column of a CPU product
_ROWS = 256  # fewer tokens than this wait for more: many small products cost more than one


def upper_gram(x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "dim dim"]:
    """Upper triangle of X^T X; what stands below the diagonal is unspecified.

    fp32 and fp64 in their own precision; half precision on CUDA with an fp32 result.
    """
    if _native_half(x.dtype, x.device):
        return torch.mm(x.mT, x, out_dtype=torch.float32)
    dim = x.shape[1]
    if x.is_cuda or dim < 2 * _BLOCK:
        return x.mT @ x
    # Block columns on and above the diagonal: a third of the work is saved at d = 576.
    out = x.new_zeros(dim, dim)
    for start in range(0, dim, _BLOCK):
        stop = min(start + _BLOCK, dim)
        torch.mm(x[:, start:stop].mT, x[:, start:], out=out[start:stop, start:])
    return out


class Moments:
    """Count, mean and covariance of token vectors, accumulated chunk by chunk. Final.

    fp32 states are shifted by a fixed vector before the product: a difference of two nearby fp32
    numbers is exact to one rounding, while second moments about the origin lose the digits of
    mean^2 / variance when the mean is subtracted at the end. Half-precision states are *not*
    shifted, because rounding the difference to bf16 costs 1e-3 where the uncentred product is
    good to 1e-6. Products are fp32, sums over chunks fp64.

    Args:
        shift: any vector near the mean, shape (d,); zeros where states are multiplied in half precision.
        dtype: precision of the products.
    """

    def __init__(self, shift: Float[Tensor, "dim"], dtype: torch.dtype) -> None:
        half = _native_half(dtype, shift.device)
        self.shift = torch.zeros_like(shift, dtype=torch.float64) if half else shift.to(dtype).double()
        self._dtype = dtype
        self._shift = None if half else self.shift.to(dtype)
        dim = shift.shape[0]
        self.count = 0
        self._total = torch.zeros(dim, dtype=torch.float64, device=shift.device)
        self._second = torch.zeros(dim, dim, dtype=torch.float64, device=shift.device)
        self._waiting: list[Tensor] = []

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
        if sum(map(len, self._waiting)) >= _ROWS:
            self._flush()

    def _flush(self) -> None:
        if self._waiting:
            y = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
            self._waiting.clear()
            self._total += y.sum(0, dtype=torch.float64 if y.is_cuda else None)
            self._second += upper_gram(y)

    def merged(self, other: Moments) -> Moments:
        """Moments of both sets of tokens. Both must have been made with the same shift."""
        assert torch.equal(self.shift, other.shift), "moments with different shifts cannot be added"
        self._flush()
        other._flush()
        both = Moments(self.shift, self._dtype)
        both.count = self.count + other.count
        both._total = self._total + other._total
        both._second = self._second + other._second
        return both

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
        # In place: five such matrices are made per layer, and each pass over fresh memory costs a millisecond or more.
        cov = (self._second / self.count).addr_(offset, offset, alpha=-1)
        above = cov.triu(1)
        return cov.triu_().add_(above.mT)


def correlation(
    covariance: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, "dim dim"], Float[Tensor, "dim"]]:
    """Covariance in standardized coordinates, and each channel's standard deviation.

    A channel without variance (below 1e-14 of the largest channel variance, which is rounding) has
    standard deviation infinity: it stays constant zero instead of dividing by nothing.
    """
    variance = covariance.diagonal()
    live = variance > 1e-14 * variance.max()
    std = torch.where(live, variance.clamp_min(0).sqrt(), torch.inf)
    return (covariance / std[:, None]).div_(std), std


def _in_backend(cov: Tensor, vectors: bool) -> tuple[Tensor, Tensor | None]:
    # One large symmetric matrix on a GPU: cusolver is several times faster than magma (measured, traps.md).
    chosen = torch.backends.cuda.preferred_linalg_library() if cov.is_cuda else None
    try:
        if cov.is_cuda:
            torch.backends.cuda.preferred_linalg_library("cusolver")
        if vectors:
            values, basis = torch.linalg.eigh(cov)
            return values, basis
        return torch.linalg.eigvalsh(cov), None
    except torch.linalg.LinAlgError as error:
        raise UsageError(
            f"the eigenvalues of a covariance did not converge ({error}). "
            "Check the states for extreme values, or load the backbone with dtype float32."
        ) from error
    finally:
        if chosen is not None:
            torch.backends.cuda.preferred_linalg_library(chosen)


def spectrum(covariance: Float[Tensor, "dim dim"]) -> Float[Tensor, "dim"]:
    """Eigenvalues e_1 >= ... >= e_d, rounding below zero set to zero."""
    return _in_backend(covariance, vectors=False)[0].flip(0).clamp_min(0)


def spectrum_and_basis(
    covariance: Float[Tensor, "dim dim"],
) -> tuple[Float[Tensor, "dim"], Float[Tensor, "dim dim"]]:
    """Eigenvalues as :func:`spectrum`, and the matching eigenvectors in columns."""
    values, basis = _in_backend(covariance, vectors=True)
    assert basis is not None
    return values.flip(0).clamp_min(0), basis.flip(1)
