"""Methods: the loss, causality, sampling with and without a cache, the controls."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from dihal.config import (
    DenoiserConfig,
    LoraConfig,
    MethodConfig,
    ObjectiveConfig,
    ProcessConfig,
    SamplerConfig,
    TimeConfig,
)
from dihal.controls import Embedding, Identity, MeanState
from dihal.data import Batch
from dihal.errors import UsageError
from dihal.method_parts import corrupt, hide
from dihal.methods import METHODS, build_method, positions_of
from dihal.spaces.recovery import divergence
from tests.kit import tiny_backbone

DENOISER = DenoiserConfig(width=32, depth=2, heads=4)


def config(**changes) -> MethodConfig:
    return dataclasses.replace(MethodConfig(split=2, denoiser=DENOISER), **changes)


def make_batch(batch: int = 4, time: int = 16, vocab: int = 97, seed: int = 0, pad: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocab, (batch, time), generator=generator)
    mask = torch.ones(batch, time, dtype=torch.bool)
    if pad:
        mask[:, -pad:] = False
    loss_mask = mask & mask.roll(-1, 1)
    loss_mask[:, -1] = False
    return Batch(
        input_ids=ids,
        attention_mask=mask,
        document_ids=torch.where(mask, torch.zeros_like(ids), -torch.ones_like(ids)),
        loss_mask=loss_mask,
        sample_ids=torch.arange(batch),
        full=pad == 0,
    )


def randomise(method, seed: int = 0, scale: float = 0.2):
    """Fresh weights are zero at the output: give every weight a value, so that nothing is trivially equal."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return method


def trained(backbone, method, steps: int = 30, **batch):
    method.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    method.attach(backbone)
    optimiser = torch.optim.AdamW(method.parameters(), lr=1e-2)
    losses = []
    for step in range(steps):
        data = make_batch(8, 16, seed=step, **batch)
        out = method.loss(backbone, data, seed=0, step=step, batch_index=torch.arange(8), global_batch=8)
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        losses.append(out.total.item())
    return losses


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"masked"}))
@pytest.mark.parametrize(
    "objective",
    [
        ObjectiveConfig(),
        ObjectiveConfig(state=0.0, kl=1.0),
        ObjectiveConfig(cross_entropy=0.5, kl=0.5, condition_dropout=0.2),
    ],
    ids=["state", "kl", "all"],
)
def test_every_method_learns_with_every_objective(name: str, objective: ObjectiveConfig) -> None:
    backbone = tiny_backbone()
    torch.manual_seed(0)
    losses = trained(backbone, build_method(config(name=name, objective=objective), backbone), 40)
    assert sum(losses[-5:]) < 0.95 * sum(losses[:5])


def test_loss_terms_equal_a_direct_computation() -> None:
    backbone = tiny_backbone()
    objective = ObjectiveConfig(state=1.0, cross_entropy=0.3, kl=0.7, logit_chunk=5)
    method = randomise(build_method(config(objective=objective, time=TimeConfig(terminal_fraction=1.0)), backbone))
    batch = make_batch(pad=3)
    method.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    out = method.loss(backbone, batch, seed=0, step=0, batch_index=torch.arange(4), global_batch=4)

    positions = positions_of(batch.attention_mask)
    clean = backbone.prefix(batch.input_ids, 2, attention_mask=batch.attention_mask)
    z = method.space.normalise(clean, positions)
    from dihal.random import normal

    eps = normal(0, batch.sample_ids, "noise", (16, 32))
    condition = method.condition_space.normalise(backbone.embed(batch.input_ids), torch.ones_like(positions))
    x0 = method.denoiser(
        method.space.squash(eps, 4.0),
        torch.ones(4),
        condition,
        position_ids=positions,
        attention_mask=batch.attention_mask,
    )
    real = batch.attention_mask.float()
    weight = method.space.outlier_weight(z, 4.0)
    state = ((x0 - z).square().mean(-1) * weight * real).sum() / real.sum()
    state_hat = method.space.denormalise(x0, positions)
    log_p = backbone.forward(batch.input_ids, attention_mask=batch.attention_mask).double().log_softmax(-1)
    log_q = backbone.suffix(state_hat, 2, attention_mask=batch.attention_mask).double().log_softmax(-1)
    kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * real).sum() / real.sum()
    nll = -log_q[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    counted = batch.loss_mask[:, :-1]
    ce = nll[counted].mean()
    torch.testing.assert_close(out.terms["state"].double(), state.double().detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.terms["kl"].double(), kl.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(out.terms["cross_entropy"].double(), ce.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.total.double(), (state + 0.3 * ce + 0.7 * kl).detach(), rtol=1e-5, atol=1e-6)
    assert out.tokens == int(real.sum())


def test_state_error_alone_never_runs_the_suffix() -> None:
    backbone = tiny_backbone()
    calls = []
    for block in backbone.blocks[2:]:
        block.register_forward_pre_hook(lambda *_: calls.append("block"))
    backbone.output_embedding.register_forward_pre_hook(lambda *_: calls.append("head"))
    method = build_method(config(objective=ObjectiveConfig(kl=1.0, suffix_start=0.5)), backbone)
    method.fit_normalisation(backbone, [make_batch()])
    arguments = {"seed": 0, "step": 0, "batch_index": torch.arange(4), "global_batch": 4}
    method.loss(backbone, make_batch(), progress=0.4, **arguments)
    assert calls == []
    method.loss(backbone, make_batch(), progress=0.5, **arguments)
    assert "head" in calls


def test_corrupted_tokens_keep_exact_targets() -> None:
    backbone = tiny_backbone()
    seen = []
    prefix = backbone.prefix
    backbone.prefix = lambda ids, *args, **kwargs: seen.append(ids.clone()) or prefix(ids, *args, **kwargs)
    method = build_method(config(objective=ObjectiveConfig(kl=1.0, corruption=0.2)), backbone)
    method.fit_normalisation(backbone, [make_batch(8, 32)])
    seen.clear()
    batch = make_batch(64, 64)
    arguments = {"seed": 0, "step": 0, "batch_index": torch.arange(64), "global_batch": 64}
    method.loss(backbone, batch, **arguments)
    changed = seen[0] != batch.input_ids
    assert 0.15 < changed.float().mean() < 0.25
    assert not changed[:, 0].any()
    shares = changed.float().mean(1)
    assert shares.min() < 0.05
    assert shares.max() > 0.33
    method.loss(backbone, batch, **arguments)
    assert torch.equal(seen[0], seen[1])


CAUSAL = [
    config(),
    config(denoiser=dataclasses.replace(DENOISER, norm="rms", qk_norm=False)),
    config(denoiser=dataclasses.replace(DENOISER, self_conditioning=0.5)),
    config(process=ProcessConfig(schedule="linear", parametrisation="flow")),
    config(process=ProcessConfig(schedule="log_linear", parametrisation="eps")),
    config(
        process=ProcessConfig(parametrisation="v"),
        sampler=SamplerConfig(guidance=1.5),
        objective=ObjectiveConfig(condition_dropout=0.1),
    ),
    config(name="regression"),
]


@pytest.mark.parametrize("case", range(len(CAUSAL)))
@pytest.mark.parametrize(
    ("sampler", "steps"), [("ddim", 1), ("ddim", 3), ("ancestral", 3), ("heun", 2), ("dpmpp_2m", 3)]
)
@pytest.mark.parametrize("padding", [False, True])
def test_a_later_token_never_changes_an_earlier_logit(case: int, sampler: str, steps: int, padding: bool) -> None:
    chosen = CAUSAL[case]
    if chosen.name == "regression" and steps != 1:
        pytest.skip("one step by definition")
    backbone = tiny_backbone()
    method = randomise(build_method(chosen, backbone))
    method.fit_normalisation(backbone, [make_batch()])
    ids = make_batch(3, 12).input_ids
    mask = torch.ones(3, 12, dtype=torch.bool)
    if padding:
        mask[1, :4] = False
    first = method.states(backbone, ids, attention_mask=mask, steps=steps, sampler=sampler)
    logits = backbone.suffix(first, 2, attention_mask=mask)
    for j in (5, 11):
        changed = ids.clone()
        changed[:, j] = (changed[:, j] + 1) % 97
        state = method.states(backbone, changed, attention_mask=mask, steps=steps, sampler=sampler)
        other = backbone.suffix(state, 2, attention_mask=mask)
        assert torch.equal(first[:, :j][mask[:, :j]], state[:, :j][mask[:, :j]])
        assert torch.equal(logits[:, :j][mask[:, :j]], other[:, :j][mask[:, :j]])
        assert not torch.equal(logits[:, j:], other[:, j:])


@pytest.mark.parametrize("case", range(len(CAUSAL)))
@pytest.mark.parametrize(("sampler", "steps"), [("ddim", 1), ("ddim", 3), ("heun", 2), ("ancestral", 2)])
def test_token_by_token_with_a_cache_equals_all_at_once(case: int, sampler: str, steps: int) -> None:
    chosen = CAUSAL[case]
    if chosen.name == "regression" and steps != 1:
        pytest.skip("one step by definition")
    backbone = tiny_backbone()
    method = randomise(build_method(chosen, backbone))
    method.fit_normalisation(backbone, [make_batch()])
    ids = make_batch(2, 9).input_ids
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, :3] = False
    whole = method.states(backbone, ids, attention_mask=mask, steps=steps, sampler=sampler)
    cache = method.new_cache(backbone)
    parts = [
        method.states(backbone, ids[:, a:b], attention_mask=mask[:, :b], steps=steps, sampler=sampler, cache=cache)
        for a, b in ((0, 4), (4, 5), (5, 6), (6, 9))
    ]
    assert cache.length == 9
    assert len(cache.caches) == method.evaluations(steps, sampler)
    # Another kernel sums in another order; eps at small alpha enlarges that by 1 / alpha = 150.
    assert (torch.cat(parts, 1) - whole)[mask].norm() <= 1e-4 * whole[mask].norm()


def test_noise_depends_on_position_not_on_the_batch() -> None:
    backbone = tiny_backbone()
    method = randomise(build_method(config(), backbone))
    method.fit_normalisation(backbone, [make_batch()])
    ids = make_batch(3, 8).input_ids
    together = method.states(backbone, ids)
    alone = method.states(backbone, ids[1:2])
    assert (together[1:2] - alone).norm() <= 1e-4 * alone.norm()  # a batch of another size sums in another order
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.int64), ids[1:2]], 1)
    mask = torch.tensor([[False] * 3 + [True] * 8])
    moved = method.states(backbone, padded, attention_mask=mask)[:, 3:]
    assert (moved - alone).norm() <= 1e-4 * alone.norm()
    other = method.states(backbone, ids, sample_ids=torch.arange(3))
    assert torch.equal(other[0], together[0])
    assert not torch.allclose(other[1], together[1])


def test_lora_leaves_the_backbone_as_it_is_and_learns() -> None:
    backbone = tiny_backbone()
    ids = make_batch().input_ids
    before, print_before = backbone.forward(ids), backbone.fingerprint(2)
    method = build_method(config(objective=ObjectiveConfig(kl=1.0), lora=LoraConfig(rank=2)), backbone)
    losses = trained(backbone, method, 20)
    assert losses[-1] < losses[0]
    assert all(p.abs().sum() > 0 for p in method.lora)
    assert torch.equal(backbone.forward(ids), before)
    assert backbone.fingerprint(2) == print_before
    state = backbone.prefix(ids, 2)
    with method.reading():
        assert not torch.equal(backbone.suffix(state, 2), before)
    assert torch.equal(backbone.suffix(state, 2), before)
    assert not any("lora" in name and f".{i}." in name for i in (0, 1) for name, _ in backbone.model.named_parameters())


def test_controls() -> None:
    backbone = tiny_backbone()
    batch = make_batch()
    method = build_method(config(), backbone)
    method.fit_normalisation(backbone, [batch])
    logits = backbone.suffix(Identity(2).states(backbone, batch.input_ids), 2)
    assert torch.equal(logits, backbone.forward(batch.input_ids))
    mean = MeanState(method.space).states(backbone, batch.input_ids)
    torch.testing.assert_close(mean[:, 1:], method.space.mean.expand(4, 15, 32))
    torch.testing.assert_close(mean[:, 0], method.space.mean_first.expand(4, 32))
    assert torch.equal(Embedding(2).states(backbone, batch.input_ids), backbone.embed(batch.input_ids))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "brigde"}, "Did you mean 'bridge'"),
        ({"split": 9}, "split 9 is out of range.*0 to 3"),
        ({"split": None}, "method.split is not set"),
        ({"denoiser": dataclasses.replace(DENOISER, mask="bidirectional")}, "needs method.denoiser.mask 'causal'"),
        ({"denoiser": dataclasses.replace(DENOISER, heads=5)}, "heads"),
        ({"sampler": SamplerConfig(guidance=2.0)}, "condition_dropout"),
        ({"objective": ObjectiveConfig(state=0.0)}, "one must be positive"),
        ({"name": "regression", "sampler": SamplerConfig(steps=4)}, "one step"),
        ({"process": ProcessConfig(parametrisation="eps")}, "eps"),
        ({"objective": ObjectiveConfig(corruption=0.1, cross_entropy=1.0)}, "next tokens random"),
        ({"lora": LoraConfig(rank=2)}, "needs a loss read by the suffix"),
        ({"objective": ObjectiveConfig(corruption=0.7)}, "in \\[0, 0.5\\]"),
    ],
)
def test_bad_methods_are_refused(changes, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_method(config(**changes), tiny_backbone())


def test_renamed_tokens_are_renamed_alike_within_a_sequence() -> None:
    ids = torch.randint(0, 20, (64, 50), generator=torch.Generator().manual_seed(0))
    changed = corrupt(ids, torch.arange(64), scattered=0.0, renamed=0.25, seed=0, vocab=100_000)
    assert torch.equal(changed[:, 0], ids[:, 0])
    for before, after in zip(ids[:, 1:].tolist(), changed[:, 1:].tolist(), strict=True):
        assert len(set(zip(before, after, strict=True))) == len(set(before))
    assert 0.15 < (changed != ids).float().mean() < 0.35
    assert not torch.equal(
        changed[0], corrupt(ids[:1], torch.tensor([9]), scattered=0.0, renamed=0.25, seed=0, vocab=100_000)[0]
    )


def test_the_teacher_of_the_kl_is_the_frozen_suffix_whatever_the_adapters_learned() -> None:
    backbone = tiny_backbone("llama")
    batch = make_batch(2, 12)
    wanted = backbone.suffix_features(backbone.prefix(batch.input_ids, 2), 2)
    method = build_method(config(objective=ObjectiveConfig(kl=1.0), lora=LoraConfig(rank=2)), backbone)
    method.attach(backbone)
    method.fit_normalisation(backbone, [batch])
    for weight in method.lora:
        weight.data.normal_(generator=torch.Generator().manual_seed(0))
    teachers = []

    def spy(logits, teacher, *rest):
        teachers.append(teacher)
        return divergence(logits, teacher, *rest)

    method.kernel = spy
    method.loss(backbone, batch, seed=0, step=0, batch_index=torch.arange(2), global_batch=2)
    torch.testing.assert_close(torch.cat(teachers), backbone.head(wanted).flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_hidden_tokens_are_not_seen() -> None:
    backbone = tiny_backbone("llama")
    batch = make_batch(3, 12)
    method = build_method(config(objective=ObjectiveConfig(hidden=0.3)), backbone)
    method.fit_normalisation(backbone, [batch])
    randomise(method)
    hidden = hide(batch.sample_ids, 12, 0.3, 0)
    assert not hidden[:, 0].any()
    assert hidden.any()
    other = torch.where(hidden, (batch.input_ids + 7) % 97, batch.input_ids)
    shown = method.states(backbone, batch.input_ids, hidden=hidden)
    assert torch.equal(shown, method.states(backbone, other, hidden=hidden))
    assert not torch.equal(shown, method.states(backbone, batch.input_ids))
    out = method.loss(backbone, batch, seed=0, step=0, batch_index=torch.arange(3), global_batch=3)
    out.total.backward()
    assert method.denoiser.null_condition.grad.abs().max() > 0
    with pytest.raises(UsageError, match="hidden= needs"):
        build_method(config(), backbone).states(backbone, batch.input_ids, hidden=hidden)
