"""Random numbers that depend on what they are for, not on when or where they are drawn.

A counter-based generator (Philox4x32-10; Salmon et al. 2011, "Parallel random numbers: as easy
as 1, 2, 3") maps (seed, purpose, id, index) to a value. So noise and times of a sample are the
same on one device or eight, in any batch, in any order, and after any resume; there is no state
to save.

Words are 32-bit unsigned integers held in int64 tensors. Integer results are identical on every
device; normals agree between devices up to the last bits of their log, sine and cosine.
"""

from __future__ import annotations

import functools
import hashlib
import math
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["fuse_normals", "normal", "philox4x32", "random_words", "uniform"]

_MASK = 0xFFFFFFFF
# The multipliers D2511F53 and CD9E8D57 less 2^32: then |word * multiplier| < 2^62 and nothing overflows.
_MULTIPLIER_0 = 0xD2511F53 - 2**32
_MULTIPLIER_1 = 0xCD9E8D57 - 2**32
_WEYL_0 = 0x9E3779B9
_WEYL_1 = 0xBB67AE85
_ROUNDS = 10
# Counters per pass on a CPU: about one hundred integer operations then stay in the cache.
_CPU_CHUNK = 1 << 14


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    # word * (multiplier + 2^32) = product + word * 2^32; the arithmetic shift is a floor, so this is exact.
    product = word * multiplier
    return ((product >> 32) + word) & _MASK, product & _MASK


def philox4x32(
    counter: tuple[Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"]], key: tuple[int, int]
) -> tuple[Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"], Int[Tensor, "*n"]]:
    """Return the four 32-bit output words of Philox4x32-10 for each counter.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2^32).
        key: two integers in [0, 2^32).

    Source: Salmon et al. 2011; checked against the known answers published with Random123.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0 = (k0 + _WEYL_0) & _MASK
        k1 = (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def _key(seed: int, purpose: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"{seed}\0{purpose}".encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def _blocks(seed: int, ids: Tensor, purpose: str, blocks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Four words for every (id, block), flat. Counter = (block, id low, id high, 0).
    ids = ids.reshape(-1, 1).to(torch.int64)
    block = torch.arange(blocks, device=ids.device).expand(ids.shape[0], blocks).reshape(-1)
    low = (ids & _MASK).expand(-1, blocks).reshape(-1)
    high = ((ids >> 32) & _MASK).expand(-1, blocks).reshape(-1)
    return philox4x32((block, low, high, torch.zeros_like(block)), _key(seed, purpose))


def _generate(seed: int, ids: Tensor, purpose: str, shape: tuple[int, ...], device, transform, dtype) -> Tensor:
    # transform: four flat word tensors -> (n, 4) values. Value j of an id is word j % 4 of its block j // 4.
    ids = ids if device is None else ids.to(device)
    count = math.prod(shape)
    blocks = -(-count // 4)
    flat = ids.reshape(-1)
    out = torch.empty((flat.numel(), blocks, 4), dtype=dtype, device=ids.device)
    if out.numel():
        rows = flat.numel() if ids.device.type != "cpu" else max(1, _CPU_CHUNK // blocks)
        for start in range(0, flat.numel(), rows):
            part = flat[start : start + rows]
            out[start : start + rows] = transform(*_blocks(seed, part, purpose, blocks)).view(-1, blocks, 4)
    return out.view(flat.numel(), blocks * 4)[:, :count].reshape(*ids.shape, *shape)


def random_words(
    seed: int,
    ids: Int[Tensor, "..."],
    purpose: str,
    shape: tuple[int, ...] = (),
    *,
    device: torch.device | str | None = None,
) -> Int[Tensor, "..."]:
    """Return uniform integers in [0, 2^32) as int64, of shape ``ids.shape + shape``."""
    return _generate(seed, ids, purpose, shape, device, lambda *words: torch.stack(words, -1), torch.int64)


def _unit(word: Tensor, dtype: torch.dtype) -> Tensor:
    # Open interval, symmetric about 1/2, every value exact: 32 bits in fp64, 23 in fp32 (24 would round up to 1).
    if dtype == torch.float64:
        return (word.to(dtype) + 0.5) * 2.0**-32
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def uniform(
    seed: int,
    ids: Int[Tensor, "..."],
    purpose: str,
    shape: tuple[int, ...] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Return uniform numbers in the open interval (0, 1), of shape ``ids.shape + shape``.

    A value depends only on (seed, purpose, id, index within ``shape``).

    Args:
        seed: seed of the run.
        ids: what each row is for, e.g. the global index of a sample; any int64.
        purpose: name of the stream; different names are independent.
        shape: shape drawn per id.
        dtype: float32 (resolution 2^-23) or float64 (2^-32).
        device: where; default: the device of ``ids``.

    Raises:
        ValueError: any other dtype (rounding could reach 1).
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform() draws float32 or float64, not {dtype}; convert the result.")
    return _generate(
        seed, ids, purpose, shape, device, lambda *words: torch.stack([_unit(w, dtype) for w in words], -1), dtype
    )


@functools.cache  # never dropped: a captured CUDA graph goes on reading them
def _round_keys(seed: int, purpose: str, device: torch.device) -> Tensor:
    k0, k1 = _key(seed, purpose)
    keys = [((k0 + i * _WEYL_0) & _MASK, (k1 + i * _WEYL_1) & _MASK) for i in range(_ROUNDS)]
    return torch.tensor(keys, dtype=torch.int64, device=device)


def _normals(ids: Tensor, keys: Tensor, block: Tensor) -> Tensor:
    """Four fp32 normals for every (id, block): (n, blocks, 4). The same arithmetic as `normal`, in one piece."""
    # All int64 values come in from memory: what a compiler makes itself (arange, zeros) it multiplies in 32 bits.
    c0 = block[None].expand(ids.shape[0], -1)
    c1 = (ids & _MASK)[:, None].expand(-1, block.shape[0])
    c2 = ((ids >> 32) & _MASK)[:, None].expand(-1, block.shape[0])
    c3 = c1 ^ c1
    for index in range(_ROUNDS):
        high_0, low_0 = _multiply(c0, _MULTIPLIER_0)
        high_1, low_1 = _multiply(c2, _MULTIPLIER_1)
        c0, c1, c2, c3 = high_1 ^ c1 ^ keys[index, 0], low_1, high_0 ^ c3 ^ keys[index, 1], low_0
    values = []
    for first, second in ((c0, c1), (c2, c3)):
        radius = torch.sqrt(-2.0 * torch.log((first.float() + 0.5) * 2.0**-32))
        angle = (2.0 * math.pi) * _unit(second, torch.float32)
        values += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(values, -1)


_fused: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None


def fuse_normals(backend: str = "inductor") -> None:
    """Compile the generator of normals for GPUs, process-wide: one kernel in place of two hundred.

    Each of the two hundred passes a quarter of the drawn numbers through memory, as int64. Compiled values agree with
    the others up to the last bits of logarithm, sine and cosine, as those of two devices do.
    """
    global _fused
    if _fused is None:
        _fused = torch.compile(_normals, dynamic=True, backend=backend)


def _normal_fused(seed: int, ids: Tensor, purpose: str, shape: tuple[int, ...], place: torch.device) -> Tensor:
    assert _fused is not None
    flat, count = ids.to(place, torch.int64).reshape(-1), math.prod(shape)
    drawn = _fused(flat, _round_keys(seed, purpose, place), torch.arange(-(-count // 4), device=place))
    return drawn.view(flat.numel(), -1)[:, :count].reshape(*ids.shape, *shape)


@functools.cache
def _fused_is_right(place: torch.device) -> bool:
    """Whether the compiled generator gives this device the numbers of the other one; wrong integers would be no noise at all."""
    ids = torch.tensor([0, 1, 12_345, 2**31, 2**40 + 7, -3])
    drawn = _normal_fused(0, ids, "fused", (67,), place).cpu()
    if torch.allclose(drawn, normal(0, ids, "fused", (67,), device="cpu"), atol=1e-4):
        return True
    warnings.warn(
        "this compiler gets the integers of the noise generator wrong; the generator runs uncompiled.", stacklevel=4
    )
    return False


def normal(
    seed: int,
    ids: Int[Tensor, "..."],
    purpose: str,
    shape: tuple[int, ...] = (),
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "..."]:
    """Return standard normal numbers of shape ``ids.shape + shape``.

    A value depends only on (seed, purpose, id, index within ``shape``). Box-Muller in float64 for
    ``dtype`` float64, else in float32 and then converted; no value exceeds 6.7 in size.
    Arguments as for ``uniform``.
    """
    work = torch.float64 if dtype == torch.float64 else torch.float32
    place = ids.device if device is None else torch.device(device)
    if place.type == "cuda" and work == torch.float32 and _fused is not None and _fused_is_right(place):
        return _normal_fused(seed, ids, purpose, shape, place).to(dtype)

    def transform(*words: Tensor) -> Tensor:
        values = []
        for first, second in (words[:2], words[2:]):
            # All 32 bits: the tail of the normal is in the small u. Rounding up to 1 gives radius 0, which is fine.
            radius = torch.sqrt(-2.0 * torch.log((first.to(work) + 0.5) * 2.0**-32))
            angle = (2.0 * math.pi) * _unit(second, work)
            values += [radius * torch.cos(angle), radius * torch.sin(angle)]
        return torch.stack(values, -1)

    return _generate(seed, ids, purpose, shape, device, transform, work).to(dtype)
