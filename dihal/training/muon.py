"""Muon for the matrices of the blocks, AdamW for everything else, as one optimiser.

Muon (Jordan et al. 2024) replaces the momentum of a matrix by the nearest semi-orthogonal matrix,
found with a quintic Newton-Schulz iteration. Updates are scaled by 0.2 sqrt(max(rows, columns)), which
gives them AdamW's typical size, so that one learning rate serves both (Liu et al. 2025, Eq. 4).
Matrices of one shape are orthogonalised together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dihal.nn import parameter_groups

__all__ = ["MuonWithAdamW", "orthogonalise"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95
_MATCH_ADAMW = 0.2


def orthogonalise(matrices: Tensor) -> Tensor:
    """Approximate U V^T of each matrix U S V^T of a (count, rows, columns) stack.

    Five iterations in bf16 bring every singular value to about 1 (0.7 to 1.2), which is all an update needs.
    """
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices.to(torch.bfloat16)
    x = x if wide else x.mT
    x = x / x.float().flatten(1).norm(dim=1).clamp_min(1e-7)[:, None, None].to(x.dtype)
    a, b, c = _COEFFICIENTS
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).to(matrices.dtype)


class MuonWithAdamW(torch.optim.Optimizer):
    """Muon on the two-dimensional weights inside ``blocks``, AdamW on the rest.

    Args:
        module: its trainable parameters; block weights are recognised by their name, except the maps
            from time to modulation, which are tables rather than feature transforms.
        lr: learning rate of both.
        betas: of AdamW.
        weight_decay: decoupled, on matrices only.
    """

    def __init__(self, module: nn.Module, *, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        chosen = {
            id(p)
            for name, p in module.named_parameters()
            if p.requires_grad and p.ndim == 2 and ".blocks." in f".{name}" and "modulation" not in name
        }
        groups: list[dict[str, Any]] = []
        for group in parameter_groups(module, weight_decay):
            for muon in (True, False):
                parameters = [p for p in group["params"] if (id(p) in chosen) == muon]
                if parameters:
                    groups.append({**group, "params": parameters, "muon": muon})
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        assert closure is None, "no closure is evaluated here"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            (self._muon if group["muon"] else self._adamw)(group, parameters)

    def _muon(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        by_shape: dict[tuple[int, ...], list[Tensor]] = {}
        for parameter in parameters:
            by_shape.setdefault(tuple(parameter.shape), []).append(parameter)
        for shape, alike in by_shape.items():
            gradients, momenta = [p.grad for p in alike], []
            for parameter in alike:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momenta.append(state["momentum"])
            torch._foreach_lerp_(momenta, gradients, 1 - _MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, _MOMENTUM)  # Nesterov
            updates = orthogonalise(torch.stack(list(ahead))) * (_MATCH_ADAMW * max(shape) ** 0.5)
            torch._foreach_mul_(alike, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(alike, list(updates.unbind(0)), alpha=-group["lr"])

    def _adamw(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters],
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            [s["step"] for s in states],
            fused=all(p.is_cuda for p in parameters),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
