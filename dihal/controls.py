"""Controls: sources of h^l that nobody trained. They share the contract of :class:`dihal.methods.Method`."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from dihal.backbone.weights import named_weights
from dihal.methods import Method, positions_of
from dihal.random import normal
from dihal.spaces.hidden import HiddenSpace
from dihal.types import Padding, State, TokenIds

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Embedding", "Identity", "MeanState", "Oracle", "RandomSuffix", "Shuffled"]

_MAX_POSITIONS = 1 << 20
"""Positions that a noise key leaves room for: key = sample id * this + position."""


class Identity(nn.Module):
    """The backbone's own prefix: the hybrid must equal the backbone exactly."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.split = split
        # The only tensor it has: transformers neither writes nor reads a model without one.
        self.register_buffer("blocks_replaced", torch.tensor(split))

    def new_cache(self, backbone: Backbone) -> Any:
        """Keys and values of the replaced blocks."""
        return backbone.new_cache(0, self.split)

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        cache: Any = None,
        **_: Any,
    ) -> State:
        """h^l itself."""
        return backbone.prefix(
            input_ids, self.split, attention_mask=attention_mask, position_ids=position_ids, cache=cache
        )


class MeanState(nn.Module):
    """The same vector everywhere: the mean state (position 0 has its own mean)."""

    def __init__(self, space: HiddenSpace) -> None:
        super().__init__()
        self.split = space.split
        self.space = space

    def new_cache(self, backbone: Backbone) -> None:
        """Nothing to keep."""
        return None

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> State:
        """E[h^l] at every position."""
        positions = _positions(input_ids, attention_mask, position_ids)
        z = torch.zeros(*input_ids.shape, self.space.dim, device=input_ids.device)
        return self.space.denormalise(z, positions).to(backbone.dtype)


class Embedding(nn.Module):
    """The token embeddings h^0, passed to block l as if the replaced blocks were not there."""

    def __init__(self, split: int) -> None:
        super().__init__()
        self.split = split

    def new_cache(self, backbone: Backbone) -> None:
        """Nothing to keep."""
        return None

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> State:
        """h^0 in the place of h^l."""
        return backbone.embed(input_ids, position_ids=_positions(input_ids, attention_mask, position_ids))


class Oracle(nn.Module):
    """The true state, plus Gaussian noise as large as a method's own error: is that error only noise?

    At every token the noise is isotropic in normalised coordinates and scaled to the squared error |h_hat - h|^2
    that the method makes at this token. State error and its distribution over tokens are those of the method;
    what remains different is where the error points. The suffix reads it without the method's adapters.

    Args:
        method: the method whose error is matched.
    """

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.split = method.split
        self.method = method

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it is."""
        return contextlib.nullcontext()

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        seed: int = 0,
        sample_ids: Int[Tensor, " batch"] | None = None,
        **sampling: Any,
    ) -> State:
        """h^l plus noise keyed by (seed, sample id, position); ``sampling`` goes to the method."""
        positions = _positions(input_ids, attention_mask, position_ids)
        given: dict[str, Any] = {"attention_mask": attention_mask, "position_ids": positions}
        truth = backbone.prefix(input_ids, self.split, **given)
        estimate = self.method.states(backbone, input_ids, seed=seed, sample_ids=sample_ids, **given, **sampling)
        error = (estimate.float() - truth.float()).square().sum(-1, keepdim=True)
        rows = torch.zeros_like(input_ids[:, 0]) if sample_ids is None else sample_ids.to(input_ids.device)
        eps = normal(seed, rows.unsqueeze(-1) * _MAX_POSITIONS + positions, "oracle", (truth.shape[-1],))
        space = self.method.space
        noise = space.denormalise(eps, positions) - space.denormalise(torch.zeros_like(eps), positions)
        size = noise.square().sum(-1, keepdim=True)
        return (truth.float() + noise * (error / size).sqrt()).to(backbone.dtype)


class Shuffled(nn.Module):
    """A method that is given another document's tokens: does it use its condition?

    Args:
        method: the method.
        tokens: (windows, time) what each evaluation window is given instead, position by position.
    """

    def __init__(self, method: Method, tokens: TokenIds) -> None:
        super().__init__()
        self.split = method.split
        self.method = method
        self.tokens = tokens

    def reading(self) -> contextlib.AbstractContextManager[None]:
        """The suffix as it reads the method's states."""
        return self.method.reading()

    @torch.no_grad()
    def states(
        self, backbone: Backbone, input_ids: TokenIds, *, sample_ids: Int[Tensor, " batch"], **keywords: Any
    ) -> State:
        """The method's h^l of the windows' other tokens; mask and positions stay those of the windows themselves."""
        other = self.tokens[sample_ids.to(self.tokens.device), : input_ids.shape[1]].to(input_ids.device)
        return self.method.states(backbone, other, sample_ids=sample_ids, **keywords)


class RandomSuffix(nn.Module):
    """The true states, read by blocks whose weights are drawn afresh: what does the pretrained suffix contribute?

    Every weight tensor of blocks l..L-1 is replaced by normal numbers of its own mean and deviation. The final norm
    and the head stay: where the head is tied, it is the embedding that the states are made of.

    Args:
        backbone: the backbone; its weights are exchanged while its suffix reads, and put back.
        split: the split.
        seed: seed of the weights.
    """

    def __init__(self, backbone: Backbone, split: int, *, seed: int) -> None:
        super().__init__()
        self.split = split
        self.seed = seed
        parts = named_weights(backbone, split, embedding=False, head=False)
        self._own = [(name, weight) for name, weight in parts if isinstance(weight, nn.Parameter)]
        self._drawn: list[Tensor] = []

    def _draw(self, name: str, trained: Tensor) -> Tensor:
        # Billions of weights: the counter-based generator would take minutes. One stream per tensor is as repeatable.
        key = hashlib.sha256(f"{self.seed}\0random suffix\0{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        drawn = torch.randn(trained.shape, generator=generator)
        deviation = trained.float().std(correction=0)
        return (drawn.to(trained.device) * deviation + trained.float().mean()).to(trained.dtype)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Scope in which the backbone's blocks from the split on have the random weights."""
        if not self._drawn:
            self._drawn = [self._draw(name, parameter.data) for name, parameter in self._own]
        trained = [parameter.data for _, parameter in self._own]
        try:
            for (_, parameter), drawn in zip(self._own, self._drawn, strict=True):
                parameter.data = drawn
            yield
        finally:
            for (_, parameter), weight in zip(self._own, trained, strict=True):
                parameter.data = weight

    @torch.no_grad()
    def states(
        self,
        backbone: Backbone,
        input_ids: TokenIds,
        *,
        attention_mask: Padding | None = None,
        position_ids: Int[Tensor, "batch time"] | None = None,
        **_: Any,
    ) -> State:
        """h^l itself."""
        return backbone.prefix(input_ids, self.split, attention_mask=attention_mask, position_ids=position_ids)


def _positions(
    input_ids: TokenIds, attention_mask: Padding | None, position_ids: Int[Tensor, "batch time"] | None
) -> Int[Tensor, "batch time"]:
    if position_ids is not None:
        return position_ids
    mask = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    return positions_of(mask)[:, -input_ids.shape[1] :]
