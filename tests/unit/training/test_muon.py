"""Muon: the orthogonalisation, what it applies to, and that it learns."""

from __future__ import annotations

import torch
from torch import nn

from dihal.config import DenoiserConfig, OptimConfig
from dihal.nn import DenoiserTransformer
from dihal.training.muon import MuonWithAdamW, orthogonalise
from dihal.training.optim import build_optimizer, load_optimizer_state, optimizer_state


def test_singular_values_come_near_one_and_directions_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((3, 24, 64), (3, 64, 24)):
        matrices = torch.randn(shape, generator=generator)
        found = orthogonalise(matrices)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.3
        assert values.max() < 1.3
        cosine = (found * (u @ v)).flatten(1).sum(1) / (found.flatten(1).norm(dim=1) * (u @ v).flatten(1).norm(dim=1))
        assert cosine.min() > 0.95


def test_block_matrices_get_muon_and_the_rest_adamw() -> None:
    module = nn.ModuleDict({"denoiser": DenoiserTransformer(DenoiserConfig(width=32, depth=2, heads=4), 16, 16)})
    optimizer = build_optimizer(module, OptimConfig(name="muon"))
    assert isinstance(optimizer, MuonWithAdamW)
    names = {id(p): n for n, p in module.named_parameters()}
    muon = {names[id(p)] for g in optimizer.param_groups if g["muon"] for p in g["params"]}
    assert muon == {
        f"denoiser.blocks.{i}.{part}.weight"
        for i in (0, 1)
        for part in ("attention.qkv", "attention.out", "mlp.gate_up", "mlp.down")
    }
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(list(module.parameters()))


def test_it_learns_and_its_state_survives() -> None:
    def run(steps: int, stop: int | None = None) -> tuple[list[float], nn.Module]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"denoiser": DenoiserTransformer(DenoiserConfig(width=32, depth=2, heads=4), 16, 16)})
        module["denoiser"].null_condition.requires_grad_(False)
        optimizer = build_optimizer(module, OptimConfig(name="muon", lr=1e-2))
        z, c = torch.randn(4, 8, 16), torch.randn(4, 8, 16)
        losses = []
        for step in range(steps):
            if step == stop:
                kept = {k: v.clone() for k, v in optimizer_state(module, optimizer).items()}
                optimizer = build_optimizer(module, OptimConfig(name="muon", lr=1e-2))
                load_optimizer_state(module, optimizer, kept)
            loss = (module["denoiser"](z, torch.ones(4), c) - c.cumsum(1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, module

    whole, _ = run(40)
    assert whole[-1] < 0.5 * whole[0]
    resumed, _ = run(40, stop=20)
    assert resumed == whole
