"""The own head: tokens of a state x_i from the state of position i, through the backbone's frozen output table.

Only a d x d map is trained. A V x d head of its own would have as many weights as the denoiser and would learn
what the backbone's table already knows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dihal.errors import UsageError

if TYPE_CHECKING:
    from dihal.backbone import Backbone
    from dihal.data.batch import Batch

__all__ = ["OwnReadout", "TableCache", "expected_rows", "head_logits", "token_shares"]


class OwnReadout(nn.Module):
    """Normalised state z -> features f, such that the backbone's head makes logits of x_i of f_i.

    f = A z / max(rms(z), 1) + b. The division bounds outliers (sinks), whose norm says nothing about their token.
    It only ever shortens: an estimate E[z | z_t] is shorter than a clean state by how little is known, and a full
    RMS normalisation would blow that up to the length, and so to the confidence, of a clean state.

    A and b start at zero. The table is another space than z (not the one, had the backbone a split there), so no
    identity would be right; from zero the first loss is exactly log V, and the gradient of A is not zero.

    Args:
        dim: hidden size d.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, z: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape dim"]:
        """Features of normalised states."""
        z = z.float()
        rms = z.square().mean(-1, keepdim=True).clamp_min(1.0).sqrt()
        return self.linear(z / rms)


def head_logits(backbone: Backbone, features: Float[Tensor, "*shape dim"]) -> Float[Tensor, "*shape vocab"]:
    """Logits of features of any leading shape, by the backbone's head in the backbone's dtype."""
    flat = features.reshape(1, -1, features.shape[-1]).to(backbone.dtype)
    with torch.autocast(backbone.device.type, enabled=False):
        logits = backbone.head(flat)
    return logits.reshape(*features.shape[:-1], logits.shape[-1])


def expected_rows(
    logits: Callable[[Tensor], Tensor], features: Float[Tensor, "*shape k"], table: Tensor, chunk: int
) -> Float[Tensor, "*shape width"]:
    """Mean of a table's rows under softmax(logits(features)), in fp32, never more than ``chunk`` positions' logits at once.

    Differentiable in the features; the probabilities are computed again for that, not kept.
    """

    def one(part: Tensor) -> Tensor:
        with torch.autocast(part.device.type, enabled=False):
            return (logits(part).float().softmax(-1).to(table.dtype) @ table).float()

    flat = features.flatten(0, -2)
    grad = torch.is_grad_enabled() and flat.requires_grad
    parts = [checkpoint(one, part, use_reentrant=False) if grad else one(part) for part in flat.split(chunk)]
    return torch.cat(parts).reshape(*features.shape[:-1], table.shape[-1])


class TableCache:
    """Tables made of the backbone's input embedding, made again when it or what they are made with changes.

    They are the backbone's in another form: neither buffers nor parameters, and in no checkpoint.
    """

    def __init__(self) -> None:
        self._held: dict[str, tuple[tuple, Tensor]] = {}

    def __call__(
        self, backbone: Backbone, name: str, depends: tuple[Tensor, ...], make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """``make(input embedding in fp32)`` in the backbone's dtype; ``depends``: the buffers that it uses."""
        weight = backbone.input_embedding.weight
        key = (weight.data_ptr(), weight.dtype, weight.device, *(buffer._version for buffer in depends))
        held = self._held.get(name)
        if held is None or held[0] != key:
            with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
                held = (key, make(weight.detach().float()).to(backbone.dtype))
            self._held[name] = held
        return held[1]


def token_shares(backbone: Backbone, batches: Iterable[Batch]) -> tuple[Float[Tensor, "vocab 1"], int]:
    """Share of each token in a text, in fp64, and the tokens counted.

    Raises:
        UsageError: fewer than two tokens.
    """
    device = backbone.input_embedding.weight.device
    count = torch.zeros(backbone.vocab_size, dtype=torch.float64, device=device)
    for item in batches:
        count += torch.bincount(item.input_ids[item.attention_mask].to(device), minlength=len(count))
    seen = int(count.sum())
    if seen < 2:
        raise UsageError("too few tokens to measure the mean of the embeddings; give more text.")
    return (count / seen)[:, None], seen
