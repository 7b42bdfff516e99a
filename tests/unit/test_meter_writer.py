"""The meter against torch's own counter under the regime `generate`: every space, its operations, loss and writing."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import DenoiserConfig, LoraConfig, MethodConfig, ObjectiveConfig
from dihal.config.spaces import EmbeddingConfig, KnownConfig, LatentConfig, WritingConfig
from dihal.diffusion.process import build_process
from dihal.meter import PARTS, Meter
from dihal.spaces.base import Estimate, NoiseKey
from dihal.spaces.build import SPACES, build_space
from dihal.spaces.cost import OPERATIONS, SPACE_COSTS
from dihal.writer import Writer
from tests.kit import tiny_backbone
from tests.unit.test_meter import SHAPE, counted
from tests.unit.test_methods import make_batch

BATCH, TIME = 4, 48
OBJECTIVE = ObjectiveConfig(state=1.0, own=0.5, own_time="uniform", read=0.2, condition_dropout=0.1)
DENOISER = DenoiserConfig(width=64, depth=2, heads=4, mask="mixed", self_conditioning=0.5)
SPACE = {
    "hidden": {"split": 2},
    "embedding": {"split": 0},
    "latent": {"split": 2, "latent": LatentConfig(dim=16, hidden=48, stage=0.3)},
    "simplex": {"split": 2},
}


def config(space: str, **changes) -> MethodConfig:
    parts = {"regime": "generate", "space": space, "denoiser": DENOISER, "objective": OBJECTIVE, **SPACE[space]}
    return dataclasses.replace(MethodConfig(), **{**parts, **changes})


def writer_of(space: str, **changes):
    backbone = tiny_backbone(**SHAPE)
    torch.manual_seed(0)
    writer = Writer(config(space, **changes), dim=backbone.hidden_size, vocab=backbone.vocab_size)
    writer.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    writer.attach(backbone)
    return backbone, writer


def loss_of(writer, backbone, *, progress: float = 1.0):
    def run():
        out = writer.loss(
            backbone,
            make_batch(BATCH, TIME),
            seed=0,
            step=0,
            batch_index=torch.arange(BATCH),
            global_batch=BATCH,
            progress=progress,
        )
        out.total.backward()
        return out

    return run


VARIANTS = {
    "plain": {},
    "state only": {"objective": ObjectiveConfig(own=0.0), "writing": WritingConfig(readout="suffix")},
    "no self-conditioning": {"denoiser": dataclasses.replace(DENOISER, self_conditioning=0.0)},
    "suffix": {"objective": dataclasses.replace(OBJECTIVE, cross_entropy=0.2, kl=0.2)},
    "suffix on every second": {"objective": dataclasses.replace(OBJECTIVE, kl=0.2, suffix_every=2)},
    "re-encoded": {"known": KnownConfig(reencoded=0.5)},
    "suffix later": {"objective": dataclasses.replace(OBJECTIVE, kl=0.2, suffix_start=0.9)},
    "no gradient of the own head": {"objective": dataclasses.replace(OBJECTIVE, own=0.0)},
    "adapters": {"lora": LoraConfig(rank=2), "objective": dataclasses.replace(OBJECTIVE, kl=0.2)},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("space", sorted(SPACES))
def test_a_training_step_costs_what_torch_counts(space: str, variant: str) -> None:
    if variant in ("state only", "no gradient of the own head") and space in ("embedding", "simplex"):
        pytest.skip("no state error to train")
    backbone, writer = writer_of(space, **VARIANTS[variant])
    loss_of(writer, backbone)()  # tables and stages are made once
    found, out = counted(loss_of(writer, backbone))
    assert set(out.flops) <= set(PARTS)
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


def test_the_first_stage_of_the_autoencoder_costs_what_torch_counts() -> None:
    backbone, writer = writer_of("latent")
    found, out = counted(loss_of(writer, backbone, progress=0.1))
    assert "autoencoder" in out.flops
    assert "denoiser_forward" not in out.flops
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


def test_narrow_embeddings() -> None:
    backbone, writer = writer_of("embedding", embedding=EmbeddingConfig(dim=24))
    loss_of(writer, backbone)()
    found, out = counted(loss_of(writer, backbone))
    assert sum(out.flops.values()) == pytest.approx(found, rel=0.02)


WRITING = {
    "own": WritingConfig(steps=3),
    "suffix": WritingConfig(steps=3, readout="suffix"),
    "fused, projected": WritingConfig(steps=3, readout="fused", project=0.5),
    "blocks": WritingConfig(steps=2, block=8),
    "guided": WritingConfig(steps=2, guidance=1.5),
    "heun": WritingConfig(steps=2, sampler="heun"),
    "committed": WritingConfig(steps=3, commit="confidence"),
    "static": WritingConfig(steps=3, readout="fused", project=0.5, block=8, static=True),
}


# Without caches, what is kept of the text before costs again: in all ways of one space, and in two ways of every space.
EVERYWHERE = ("fused, projected", "blocks")


@pytest.mark.parametrize(
    ("space", "writing", "cached"),
    [
        *((space, name, True) for space in sorted(SPACES) for name in WRITING),
        *(
            (space, name, False)
            for space in sorted(SPACES)
            for name in WRITING
            if name != "static" and (space == "hidden" or name in EVERYWHERE)
        ),
    ],
)
def test_writing_costs_what_torch_counts(space: str, writing: str, cached: bool) -> None:
    backbone, writer = writer_of(space)
    ids, known = make_batch(2, 40).input_ids, (torch.arange(40) < 12).expand(2, -1)

    def run():
        return writer.write(backbone, ids, known, writing=WRITING[writing], end=False, cached=cached)

    run()
    found, written = counted(run)
    assert sum(written.flops.values()) == pytest.approx(found, rel=0.02)


# -- operations of the spaces, one by one


def operations(space_name: str):
    """Operation -> (a function that runs it, whether it has a gradient)."""
    backbone = tiny_backbone(**SHAPE)
    given = config(space_name)
    torch.manual_seed(0)
    space = build_space(given, dim=backbone.hidden_size, vocab=backbone.vocab_size)
    batch = make_batch(BATCH, TIME)
    space.fit(backbone, [batch])
    process = build_process(given.process)
    positions = torch.arange(TIME).expand(BATCH, TIME)
    t = torch.linspace(0.1, 0.9, BATCH)
    state = backbone.prefix(batch.input_ids, space.split)
    key = NoiseKey(seed=0, purpose="noise", ids=torch.arange(BATCH * TIME).view(BATCH, TIME))
    clean = space.encode(backbone, batch.input_ids, state=state)
    noised = space.noised(process, clean, t, key)
    out = torch.randn(BATCH, TIME, space.output_dim, requires_grad=True)

    def detached() -> Estimate:
        estimate = space.interpret(process, out.detach(), noised, t, positions)
        x0 = None if estimate.x0 is None else estimate.x0.detach().requires_grad_(True)
        return Estimate(features=estimate.features.detach().requires_grad_(True), x0=x0)

    held = detached()
    space.feedback(backbone, held)  # tables are made once
    fresh = space.interpret(process, out.detach(), noised, t, positions)
    fresh = Estimate(features=fresh.features.detach(), x0=fresh.x0)
    runs = {
        "encode": lambda: space.encode(backbone, batch.input_ids, state=state),
        "noised": lambda: space.noised(process, clean, t, key),
        "interpret": lambda: space.interpret(process, out, noised, t, positions).features,
        "logits": lambda: space.logits(backbone, held.features),
        "clean_features": lambda: space.clean_features(clean, positions),
        "feedback": lambda: space.feedback(backbone, fresh),
        "hidden": lambda: space.hidden(backbone, held, positions),
    }
    return backbone, space, runs


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name not in ("auxiliary_loss", "solver", "draw")])
@pytest.mark.parametrize("space", sorted(SPACES))
def test_an_operation_costs_what_torch_counts(space: str, operation: str) -> None:
    backbone, built, runs = operations(space)
    found, outcome = counted(runs[operation])
    meter = Meter(backbone)
    meter.space(built, operation, batch=BATCH, new=TIME)
    assert meter.total == pytest.approx(found, rel=0.005)
    if outcome is None or not outcome.requires_grad:
        return
    whole, _ = counted(lambda: runs[operation]().float().sum().backward())
    meter = Meter(backbone)
    meter.space(built, operation, batch=BATCH, new=TIME, backward=True)
    assert meter.total == pytest.approx(whole, rel=0.005)


def test_every_space_has_its_costs() -> None:
    backbone = tiny_backbone(**SHAPE)
    built = {type(build_space(config(name), dim=64, vocab=backbone.vocab_size)) for name in SPACES}
    assert built == set(SPACE_COSTS)


def test_an_unknown_operation_is_an_error() -> None:
    backbone, writer = writer_of("hidden")
    with pytest.raises(AssertionError, match="no operation of a space"):
        Meter(backbone).space(writer.space, "dream", batch=1, new=1)
