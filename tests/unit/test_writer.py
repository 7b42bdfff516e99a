"""The regime `generate`: what is known, the loss, writing in blocks and at once, the readouts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from dihal.config import DenoiserConfig, MethodConfig, ObjectiveConfig, ProcessConfig, TimeConfig
from dihal.config.spaces import EmbeddingConfig, KnownConfig, LatentConfig, WritingConfig
from dihal.errors import UsageError
from dihal.method_parts import positions_of
from dihal.spaces.build import SPACES
from dihal.types import Time
from dihal.writer import Writer
from dihal.writing.block import Block
from dihal.writing.checks import check_writing
from dihal.writing.draw import TokenNoise, gumbel, splitmix64
from dihal.writing.known import draw_known, position_keys, settled
from tests.kit import tiny_backbone
from tests.unit.test_methods import make_batch, randomise

VOCAB = 97
DENOISER = DenoiserConfig(width=32, depth=2, heads=4, mask="mixed", self_conditioning=0.5)
OBJECTIVE = ObjectiveConfig(state=1.0, own=0.5, own_time="uniform", read=0.2, condition_dropout=0.1)
KNOWN = KnownConfig(infill=0.3)


def config(space: str = "hidden", **changes) -> MethodConfig:
    parts = {
        "split": 0 if space == "embedding" else 2,
        "regime": "generate",
        "space": space,
        "denoiser": DENOISER,
        "objective": OBJECTIVE,
        "known": KNOWN,
        "latent": LatentConfig(dim=16, hidden=32),
    }
    return dataclasses.replace(MethodConfig(), **{**parts, **changes})


def build(backbone, space: str = "hidden", *, random: bool = True, **changes) -> Writer:
    torch.manual_seed(0)
    writer = Writer(config(space, **changes), dim=backbone.hidden_size, vocab=backbone.vocab_size)
    writer.fit_normalisation(backbone, [make_batch(8, 32, seed=9)])
    return randomise(writer).eval() if random else writer


def prefixes(*lengths: int, time: int = 16) -> torch.Tensor:
    return torch.arange(time)[None] < torch.tensor(lengths)[:, None]


def loss_of(writer, backbone, batch, **changes):
    arguments = {"seed": 0, "step": 0, "batch_index": torch.arange(len(batch)), "global_batch": len(batch)}
    return writer.loss(backbone, batch, **{**arguments, **changes})


# -- random tokens


def test_splitmix64_gives_the_published_outputs() -> None:
    found = [word % 2**64 for word in splitmix64(torch.tensor([1234567]), 5)[0].tolist()]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_gumbel_noise_has_its_moments_and_its_keys() -> None:
    noise = gumbel(0, torch.arange(40), "token", 5000)
    assert noise.dtype == torch.float64
    assert noise.isfinite().all()
    assert abs(noise.mean().item() - 0.5772156649) < 0.02
    assert abs(noise.var().item() - torch.pi**2 / 6) < 0.04
    assert abs(torch.corrcoef(noise[:2])[0, 1].item()) < 0.06
    assert torch.equal(noise[7:9], gumbel(0, torch.arange(7, 9), "token", 5000))
    assert torch.equal(noise[:, :100], gumbel(0, torch.arange(40), "token", 100))
    assert not torch.equal(noise[:1], gumbel(1, torch.arange(1), "token", 5000))
    assert not torch.equal(noise[:1], gumbel(0, torch.arange(1), "token 1", 5000))


def test_gumbel_maxima_follow_the_distribution() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -6.0], dtype=torch.float64)
    counts = torch.bincount((logits + gumbel(3, torch.arange(200_000), "token", 5)).argmax(-1), minlength=5)
    expected = logits.softmax(0) * 200_000
    assert ((counts - expected) ** 2 / expected).sum() < 18.5  # chi-squared, 4 degrees of freedom, p = 0.001


def test_kept_noise_is_the_noise_made_again() -> None:
    keys = position_keys(torch.tensor([3, 5]), torch.arange(4).expand(2, 4))
    kept, fresh = (TokenNoise(0, keys, 50, common=common, most_bytes=1 << 20) for common in (True, False))
    first = kept.rows(0, 5, 0).clone()
    assert torch.equal(kept.rows(0, 5, 7), first)
    kept._keeps = False
    assert torch.equal(kept.rows(0, 5, 3), first)
    assert not torch.equal(fresh.rows(0, 5, 0), fresh.rows(0, 5, 1))


# -- what is known


def test_a_state_is_known_where_all_tokens_up_to_it_are() -> None:
    tokens = torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    assert settled(tokens).tolist() == [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("side", ["left", "right", None])
def test_known_lengths_are_uniform_and_something_is_always_unknown(side: str | None) -> None:
    mask = torch.ones(4000, 16, dtype=torch.bool)
    if side:
        mask[:, slice(0, 3) if side == "left" else slice(13, 16)] = False
    length = int(mask[0].sum())
    ids = torch.arange(4000)
    real = positions_of(mask)
    for scattered in (0.0, 0.5):
        setting = KnownConfig(prefix_min=2, prefix_max=0.5, infill=0.25, scattered=scattered)
        known, given = draw_known(setting, mask, real, ids, seed=0)
        assert not (known & given).any()
        assert not ((known | given) & ~mask).any()
        free = mask & ~known & ~given
        assert free.any(-1).all()
        assert torch.equal(known, settled(known | given | ~mask) & mask)
        again = draw_known(setting, mask[7:9], real[7:9], ids[7:9], seed=0)
        assert torch.equal(again[0], known[7:9])
        assert torch.equal(again[1], given[7:9])
        last = (real == length - 1) & mask
        assert 0.22 < given[last].float().mean() < 0.28  # infill; single tokens never include the last one
        if scattered:
            assert 0.55 < given.any(-1).float().mean() < 0.75
            continue
        counts = torch.bincount(known.sum(-1), minlength=length + 1).float()
        most = length // 2
        assert counts[:2].sum() == counts[most + 1 :].sum() == 0
        assert (counts[2 : most + 1] / counts[2 : most + 1].mean()).min() > 0.85
        gaps = free.sum(-1)[given.any(-1)]
        assert gaps.min() == 1
        assert gaps.max() == length - 3
        # prefix, gap, end: seen from the left, free turns on once and off once
        turns = (free[:, 1:] != free[:, :-1]).sum(-1)
        assert set(turns[given.any(-1)].tolist()) <= {2}


def test_short_rows_and_all_known_settings_leave_one_token_to_write() -> None:
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]).bool()
    known, given = draw_known(
        KnownConfig(prefix_min=9, prefix_max=1.0, infill=1.0), mask, positions_of(mask), torch.arange(3), seed=0
    )
    assert known.sum(-1).tolist() == [0, 1, 3]
    assert not given.any()


# -- the loss


def test_loss_terms_equal_a_direct_computation() -> None:
    backbone = tiny_backbone()
    objective = ObjectiveConfig(
        state=1.0, own=0.3, own_time="signal", read=0.1, cross_entropy=0.2, kl=0.7, logit_chunk=5
    )
    writer = build(
        backbone,
        objective=objective,
        denoiser=dataclasses.replace(DENOISER, self_conditioning=0.0),
        process=ProcessConfig(parametrisation="v"),
        time=TimeConfig(terminal_fraction=0.0),
    )
    batch = make_batch(6, 16, pad=3)
    out = loss_of(writer, backbone, batch)

    from dihal.diffusion import sample_times
    from dihal.random import normal

    ids, mask, space, process = batch.input_ids, batch.attention_mask, writer.space, writer.process
    positions = positions_of(mask)
    state = backbone.prefix(ids, 2, attention_mask=mask)
    clean = space.normaliser.normalise(state, positions)
    known, given = draw_known(KNOWN, mask, positions, batch.sample_ids, seed=0)
    t: Time = sample_times(
        writer.config.time,
        seed=0,
        step=0,
        sample_ids=batch.sample_ids,
        batch_index=torch.arange(6),
        batch_size=6,
    )
    eps = normal(0, position_keys(batch.sample_ids, positions), "noise", (32,))
    z = process.noise(clean, t, eps)
    inputs = torch.where(known[..., None], space.normaliser.squash(clean, 4.0), space.normaliser.squash(z, 4.0))
    condition = writer.condition_space.normalise(backbone.embed(ids), torch.ones_like(positions))
    got = writer.denoiser(
        inputs,
        torch.where(known, 0.0, t[:, None]),
        condition,
        known=known,
        drop_condition=~(known | given),
        attention_mask=mask,
        position_ids=positions,
    )
    real, unknown, free = mask.sum(), mask & ~known, mask & ~known & ~given
    weight = space.normaliser.outlier_weight(clean, 4.0)
    error = (got - process.target(clean, eps, t)).square().mean(-1) * weight
    x0 = process.to_x0(got, z, t)
    own = -space.logits(backbone, space.readout(x0)).double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    read = -space.logits(backbone, space.readout(clean)).double().log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    mixed = torch.where(known[..., None], state, space.normaliser.denormalise(x0, positions))
    log_q = backbone.suffix(mixed, 2, attention_mask=mask).double().log_softmax(-1)
    log_p = backbone.forward(ids, attention_mask=mask).double().log_softmax(-1)
    counted = free.roll(-1, 1) & batch.loss_mask
    ce = -log_q.gather(-1, ids.roll(-1, 1)[..., None])[..., 0][counted].mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean()
    terms = {
        "state": error[unknown].sum() / unknown.sum(),
        "own": own[free].mean(),
        "read": read[mask].mean(),
        "cross_entropy": ce,
        "kl": kl,
    }
    for name, value in terms.items():
        torch.testing.assert_close(out.terms[name].double(), value.double().detach(), rtol=2e-4, atol=1e-5)
    alpha = writer.process.schedule.alpha(t)[:, None] ** 2
    total = error[unknown].sum() / real + 0.3 * (own * alpha)[free].sum() / real + 0.1 * read[mask].sum() / real
    total = total + 0.2 * ce + 0.7 * kl
    torch.testing.assert_close(out.total.double(), total.double().detach(), rtol=2e-4, atol=1e-5)
    assert out.tokens == int(real)


@pytest.mark.parametrize("space", sorted(SPACES))
def test_total_does_not_depend_on_how_a_global_batch_is_cut(space: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    batch = make_batch(6, 16)
    whole = loss_of(writer, backbone, batch).total
    parts = []
    for rows in (slice(0, 3), slice(3, 6)):
        part = batch._map(lambda tensor, rows=rows: tensor[rows])
        parts.append(loss_of(writer, backbone, part, batch_index=torch.arange(6)[rows], global_batch=6).total)
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("space", sorted(SPACES))
def test_every_trained_parameter_has_a_gradient_from_the_first_step(space: str) -> None:
    """Else a distributed run waits for ever, and a resumed optimiser looks for a state that is not there."""
    backbone = tiny_backbone()
    writer = build(backbone, space, random=False)
    first = 0.0 if writer.space.stage_share() else 1.0
    loss_of(writer.train(), backbone, make_batch(6, 16), progress=first).total.backward()
    assert not [n for n, p in writer.named_parameters() if p.requires_grad and p.grad is None]


def test_two_stages_and_what_each_of_them_trains() -> None:
    backbone = tiny_backbone()
    writer = build(backbone, "latent", random=False).train()
    share = writer.space.stage_share()

    def gradients(progress: float) -> tuple[set[str], dict]:
        writer.zero_grad(set_to_none=True)
        out = loss_of(writer, backbone, make_batch(6, 16), progress=progress)
        out.total.backward()
        return {n for n, p in writer.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}, out.terms

    before = writer.space.latent_mean.clone()
    moved, terms = gradients(0.9 * share)
    assert all(name.startswith("space.") for name in moved)
    assert all(name.startswith("autoencoder/") for name in terms)
    assert not writer.stages.done
    # Evaluated now, the first stage is what there is to evaluate, whatever share of the budget a caller names.
    assert "state" not in loss_of(writer.eval(), backbone, make_batch(6, 16)).terms
    moved, terms = gradients(share) if writer.train() else (set(), {})
    assert writer.stages.done
    assert "state" in terms
    assert any(name.startswith("denoiser.") for name in moved)
    assert not any(name.startswith(("space.encoder", "space.decoder")) for name in moved)
    fitted = writer.space.latent_mean.clone()
    assert not torch.equal(fitted, before)
    # A resumed run knows its stage, and does not measure again.
    again = Writer(config("latent"), dim=32, vocab=VOCAB)
    again.load_state_dict(writer.state_dict())
    loss_of(again.train(), backbone, make_batch(6, 16), progress=share)
    assert torch.equal(again.space.latent_mean, fitted)
    # One that stops before needs batches for it.
    early = Writer(config("latent"), dim=32, vocab=VOCAB).train()
    early.load_state_dict(build(backbone, "latent", random=False).state_dict())
    with pytest.raises(UsageError, match="second stage measures the space again"):
        loss_of(early, backbone, make_batch(6, 16), progress=share)
    early.fit_metric(backbone, [make_batch(8, 32, seed=9)], seed=0)
    assert "state" in loss_of(early, backbone, make_batch(6, 16), progress=share).terms


@pytest.mark.parametrize("space", sorted(SPACES))
@torch.no_grad()
def test_known_positions_never_see_unknown_ones(space: str) -> None:
    """What the denoiser returns at known positions does not move when anything unknown does."""
    backbone = tiny_backbone()
    writer = build(backbone, space)
    seen = []
    writer.denoiser.register_forward_hook(lambda module, inputs, out: seen.append(out))
    known = prefixes(5, 9)
    ids = make_batch(2, 16).input_ids
    other = torch.where(known, ids, (ids + 1) % VOCAB)
    outputs = []
    for tokens, seed in ((ids, 0), (other, 1)):
        seen.clear()
        writer.write(backbone, tokens, known, writing=WritingConfig(steps=2, seed=seed), cached=False)
        outputs.append([out[known] for out in seen])
        assert len(seen) == 2
    for first, second in zip(*outputs, strict=True):
        assert torch.equal(first, second)


# -- writing

WAYS = {
    "own": WritingConfig(steps=3),
    "suffix": WritingConfig(steps=3, readout="suffix", sampler="euler"),
    "fused": WritingConfig(steps=3, readout="fused", temperature=1.0, sampler="ancestral"),
    "project": WritingConfig(
        steps=3, readout="fused", project=0.5, temperature=0.5, temperature_start=1.0, sampler="dpmpp_2m"
    ),
    "fresh noise": WritingConfig(steps=3, project=1.0, temperature=1.0, common_noise=False),
    "late": WritingConfig(steps=4, readout="suffix", project=1.0, project_below=0.5),
    "commit": WritingConfig(steps=4, readout="fused", commit="confidence", sampler="heun"),
    "commit and project": WritingConfig(steps=3, project=1.0, commit="confidence", temperature=1.0),
    "guided": WritingConfig(steps=3, guidance=2.0),
    "levels": WritingConfig(steps=4, project=0.5, log_snr_center=-2.0, sampler="dpmpp_2m"),
    "blocks": WritingConfig(steps=3, readout="fused", project=1.0, block=4, guidance=1.5, temperature=0.7),
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("space", sorted(SPACES))
def test_what_is_known_stays_and_what_is_not_is_never_read(space: str, way: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    # The noise of `simplex` is drawn in runs from where the unknown part of the batch begins: equal prefixes there.
    known = prefixes(5, 5, 5) if space == "simplex" else prefixes(5, 1, 9)
    ids = make_batch(3, 16).input_ids
    keys = {"writing": WAYS[way], "sample_ids": torch.arange(3)}
    written = writer.write(backbone, ids, known, **keys)
    assert torch.equal(written.tokens[known], ids[known])
    assert torch.equal(written.own_tokens[known], ids[known])
    hidden = torch.where(known, ids, (ids + 7) % VOCAB)
    again = writer.write(backbone, hidden, known, **keys)
    assert torch.equal(again.tokens, written.tokens)
    assert torch.equal(again.lengths, written.lengths)
    # and a row's text does not depend on the batch it is in
    for row in range(3):
        keys["sample_ids"] = torch.tensor([row])
        alone = writer.write(backbone, ids[row : row + 1], known[row : row + 1], **keys)
        if WAYS[way].block is None:  # blocks begin where the shortest prefix of the batch ends
            assert torch.equal(alone.tokens[0], written.tokens[row])
            assert alone.agreement[0] == written.agreement[row]


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("space", sorted(SPACES))
def test_caches_change_nothing(space: str, way: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    seen: list[torch.Tensor] = []
    known, ids = prefixes(5, 3), make_batch(2, 16).input_ids
    results = []
    for cached in (True, False):
        seen.clear()
        handle = writer.denoiser.register_forward_hook(lambda module, inputs, out: seen.append(out[:, -1:].clone()))
        written = writer.write(
            backbone, ids, known, writing=WAYS[way], sample_ids=torch.arange(2), cached=cached, end=False
        )
        handle.remove()
        results.append((written, seen[-1]))
    assert torch.equal(results[0][0].tokens, results[1][0].tokens)
    assert (results[0][0].nfe, results[0][0].encodes) == (results[1][0].nfe, results[1][0].encodes)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-4, atol=1e-4)
    assert sum(results[0][0].flops.values()) < sum(results[1][0].flops.values())


@pytest.mark.parametrize(
    ("space", "way"),
    [*(("hidden", way) for way in sorted(WAYS)), *((space, "blocks") for space in sorted(SPACES) if space != "hidden")],
)
def test_room_of_fixed_size_changes_nothing(space: str, way: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    seen: list[torch.Tensor] = []
    writer.denoiser.register_forward_hook(lambda module, inputs, out: seen.append(out[:, -1:].clone()))
    # In the second batch no column is known in both rows.
    for known in (prefixes(5, 3), prefixes(4, 0)) if space != "simplex" else (prefixes(5, 5),):
        ids, results = make_batch(2, 16).input_ids, []
        for static in (True, False):
            how = dataclasses.replace(WAYS[way], static=static)
            written = writer.write(backbone, ids, known, writing=how, sample_ids=torch.arange(2), end=False)
            results.append((written, len(seen), seen[-1]))
            seen.clear()
        (one, calls, last), (other, others, end) = results
        assert torch.equal(one.tokens, other.tokens)
        assert calls == others
        assert sum(one.flops.values()) >= sum(other.flops.values()), "all of the room is attended to, and masked"
        torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-4)


def test_room_of_fixed_size_is_refused_where_it_cannot_be() -> None:
    windowed = tiny_backbone("mistral")
    known, ids = prefixes(4), make_batch(1, 16).input_ids
    static = WritingConfig(steps=2, static=True)
    with pytest.raises(UsageError, match=r"writing\.static to false"):
        build(windowed, "hidden").write(windowed, ids, known, writing=static)
    backbone = tiny_backbone()
    with pytest.raises(UsageError, match="cached=True"):
        build(backbone, "hidden").write(backbone, ids, known, writing=static, cached=False)


@pytest.mark.parametrize("way", ["fused", "project", "commit", "guided"])
@pytest.mark.parametrize("space", sorted(SPACES))
def test_a_gap_is_filled_between_what_is_given(space: str, way: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    known, ids = prefixes(4, 4), make_batch(2, 16).input_ids
    given = torch.arange(16)[None].expand(2, 16) >= 11
    keys = {"given": given, "writing": WAYS[way], "sample_ids": torch.arange(2), "end": False}
    written = writer.write(backbone, ids, known, **keys)
    fixed = known | given
    assert torch.equal(written.tokens[fixed], ids[fixed])
    again = writer.write(backbone, torch.where(fixed, ids, 5), known, **keys)
    assert torch.equal(again.tokens, written.tokens)
    # The right context is read: another token there moves what the denoiser says of the gap.
    seen: list[torch.Tensor] = []
    writer.denoiser.register_forward_hook(lambda module, inputs, out: seen.append(out[:, 4:11]))
    for row in (ids, torch.where(torch.arange(16) == 12, (ids + 40) % VOCAB, ids)):
        writer.write(backbone, row, known, cached=False, **keys)
    half = len(seen) // 2
    assert any(not torch.equal(first, second) for first, second in zip(seen[:half], seen[half:], strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1.3])
@pytest.mark.parametrize("block", [None, 5])
@pytest.mark.parametrize("space", sorted(SPACES))
def test_projection_with_the_suffix_readout_ends_at_the_frozen_models_own_text(
    space: str, block: int | None, temperature: float
) -> None:
    """Jacobi iteration: whatever the denoiser says, so many steps as positions reach the ancestral sample."""
    backbone = tiny_backbone()
    writer = build(backbone, space)
    known, ids = prefixes(6, 4), make_batch(2, 16).input_ids
    sample_ids = torch.tensor([3, 8])
    writing = WritingConfig(
        steps=13,
        readout="suffix",
        project=1.0,
        block=block,
        temperature=temperature,
        seed=5,
    )
    written = writer.write(backbone, ids, known, writing=writing, sample_ids=sample_ids, end=False)
    text = torch.where(known, ids, 0)
    noise = gumbel(5, position_keys(sample_ids, torch.arange(16).expand(2, 16)).flatten(), "token", VOCAB)
    noise = noise.view(2, 16, VOCAB) * (temperature > 0)
    for place in range(4, 16):
        scores = backbone.forward(text)[:, place - 1].double() / (temperature or 1.0)
        scores[:, backbone.end_token_id] = -torch.inf
        drawn = (scores + noise[:, place]).argmax(-1)
        text[:, place] = torch.where(known[:, place], ids[:, place], drawn)
    assert torch.equal(written.tokens, text)
    assert torch.equal(written.suffix_tokens, text)


def test_costs_are_counted() -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    known, ids = prefixes(4, 4), make_batch(2, 16).input_ids

    def cost(**options) -> tuple[int, ...]:
        compare = options.pop("compare", False)
        writing = WritingConfig(**options)
        calls = []
        handle = writer.denoiser.register_forward_hook(lambda *_: calls.append(1))
        found = writer.write(backbone, ids, known, writing=writing, end=False, compare=compare)
        handle.remove()
        branches = 2 if writing.guidance not in (0.0, 1.0) else 1
        assert len(calls) == found.nfe + branches * found.blocks  # and once over known text, per block
        assert found.nfe == writer.evaluations(writing) * found.blocks
        return found.nfe, found.encodes, found.reads, found.blocks

    assert cost(steps=5) == (5, 0, 0, 1)
    assert cost(steps=5, compare=True) == (5, 0, 1, 1)
    assert cost(steps=5, sampler="heun") == (9, 0, 0, 1)
    assert cost(steps=5, guidance=3.0) == (10, 0, 0, 1)
    assert cost(steps=5, guidance=0.0) == (5, 0, 0, 1)
    assert cost(steps=5, readout="fused") == (5, 0, 1, 1)
    assert cost(steps=5, project=0.5) == (5, 5, 0, 1)
    assert cost(steps=5, project=0.5, readout="fused") == (5, 5, 6, 1)
    assert cost(steps=4, project=0.5, project_below=0.5, readout="suffix") == (4, 2, 3, 1)
    assert cost(steps=3, block=4) == (9, 0, 0, 3)
    assert cost(steps=3, block=5, readout="suffix", guidance=2.0) == (18, 0, 3, 3)


def test_comparison_changes_no_token_and_can_be_left_out() -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    known, ids = prefixes(4, 4), make_batch(2, 16).input_ids
    keys = {"writing": WAYS["project"], "sample_ids": torch.arange(2)}
    full, bare = (writer.write(backbone, ids, known, compare=c, **keys) for c in (True, False))
    assert torch.equal(full.tokens, bare.tokens)
    assert bare.own_tokens is bare.suffix_tokens is bare.agreement is None
    same = (full.own_tokens == full.suffix_tokens) & ~known
    assert torch.allclose(full.agreement, same.sum(-1) / 12)
    own = writer.write(backbone, ids, known, writing=dataclasses.replace(WAYS["own"], readout="own"))
    suffix = writer.write(backbone, ids, known, writing=dataclasses.replace(WAYS["own"], readout="suffix"))
    assert torch.equal(own.tokens, own.own_tokens)
    assert torch.equal(suffix.tokens, suffix.suffix_tokens)
    assert torch.equal(suffix.own_tokens, own.tokens)
    fused = dataclasses.replace(WAYS["own"], readout="fused", suffix_weight=0.0)
    assert torch.equal(writer.write(backbone, ids, known, writing=fused).tokens, own.tokens)


@pytest.mark.parametrize("block", [None, 3])
def test_texts_end_where_the_model_ends_them(block: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    end = backbone.end_token_id
    known, ids = prefixes(4, 4), make_batch(2, 16).input_ids
    ids[0, 2] = end  # in the prefix: another document's end, not this text's
    plan = torch.full((2, 16), 50)
    plan[0, 9] = plan[0, 12] = plan[1, 6] = end

    def read(self, estimate, weights, temperature, step):
        part = plan[:, self.context.length : self.context.length + self.tokens.shape[1]]
        found = torch.where(self.free, part, self.tokens)
        return [found.clone() for _ in weights], torch.zeros(found.shape)

    with monkeypatch.context() as patch:
        patch.setattr(Block, "_read", read)
        written = writer.write(backbone, ids, known, writing=WritingConfig(steps=2, block=block))
    assert written.lengths.tolist() == [9, 6]
    if block is not None:  # columns 4-6, 7-9; then every row has ended and nothing more is computed
        assert written.blocks == 2
        assert (written.tokens[:, 10:] == end).all()
    # With end=False the end token is banned, however likely.
    unbanned = writer.write(backbone, ids, known, writing=WritingConfig(steps=2, temperature=30.0), end=True)
    banned = writer.write(backbone, ids, known, writing=WritingConfig(steps=2, temperature=30.0), end=False)
    assert banned.lengths.tolist() == [16, 16]
    assert not ((banned.tokens == end) & ~known).any()
    assert unbanned.tokens.shape == (2, 16)


def test_committed_tokens_grow_linearly_and_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    known, ids = prefixes(4, 8), make_batch(2, 16).input_ids
    history = []
    project = Block.project

    def spy(self, estimate, t):
        found = project(self, estimate, t)
        history.append((self.committed.clone(), self.tokens.clone(), self.known.clone(), self.given.clone()))
        return found

    monkeypatch.setattr(Block, "project", spy)
    writing = WritingConfig(steps=4, commit="confidence", temperature=1.0, common_noise=False)
    written = writer.write(backbone, ids, known, writing=writing, end=False)
    assert [step[0].sum(-1).tolist() for step in history] == [[3, 2], [6, 4], [9, 6], [12, 8]]
    for before, after in itertools.pairwise(history):
        assert (after[0] | ~before[0]).all()
        assert torch.equal(after[1][before[0]], before[1][before[0]])
    for committed, _, state_known, given in history:
        fixed = committed | known[:, 4:]
        assert torch.equal(state_known, settled(fixed))
        assert torch.equal(given, fixed & ~state_known)
    assert torch.equal(written.tokens[:, 4:], history[-1][1])


def test_self_conditioning_and_fed_back_projection_reach_the_denoiser() -> None:
    backbone = tiny_backbone()
    plain = build(backbone, known=dataclasses.replace(KNOWN, reencoded=0.0))
    fed = build(backbone, known=dataclasses.replace(KNOWN, reencoded=1.0))
    fed.load_state_dict(plain.state_dict())
    known, ids = prefixes(4, 4), make_batch(2, 16).input_ids
    seen: list = []
    for writer in (plain, fed):
        writer.denoiser.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["self_condition"]), with_kwargs=True
        )
    writing = WritingConfig(steps=2, project=1.0)
    plain.write(backbone, ids, known, writing=writing)
    fed.write(backbone, ids, known, writing=writing)
    assert [entry is None for entry in seen] == [True, True, False] * 2
    assert not torch.equal(seen[2], seen[5])
    # In training, too.
    first, second = (loss_of(w, backbone, make_batch(6, 16)).total for w in (plain, fed))
    assert first != second


def test_writing_does_not_move_a_method_out_of_training() -> None:
    backbone = tiny_backbone()
    writer = build(backbone).train()
    writer.write(backbone, make_batch(1, 8).input_ids, prefixes(3, time=8), writing=WritingConfig(steps=1))
    assert writer.training
    assert writer.denoiser.training


@pytest.mark.parametrize("space", sorted(SPACES))
def test_a_handful_of_sequences_is_learned_by_heart(space: str) -> None:
    backbone = tiny_backbone()
    writer = build(
        backbone,
        space,
        random=False,
        objective=ObjectiveConfig(own=1.0, own_time="uniform"),
        known=KnownConfig(prefix_min=4, prefix_max=0.3, infill=0.0),
        denoiser=dataclasses.replace(DENOISER, width=64, self_conditioning=0.0),
    ).train()
    batch = make_batch(6, 16, seed=3)
    optimiser = torch.optim.AdamW(writer.parameters(), lr=5e-3, weight_decay=0.0)
    steps = 200
    for step in range(steps):
        data = dataclasses.replace(batch, sample_ids=torch.arange(6) + 6 * step)
        out = loss_of(writer, backbone, data, step=step, progress=step / steps)
        optimiser.zero_grad()
        out.total.backward()
        torch.nn.utils.clip_grad_norm_(writer.parameters(), 1.0)
        optimiser.step()
    known = prefixes(4).expand(6, 16)
    for readout in ("own", "fused"):
        writing = WritingConfig(steps=8, readout=readout, suffix_weight=0.1)
        written = writer.write(backbone, batch.input_ids, known, writing=writing)
        right = (written.tokens == batch.input_ids)[~known].float().mean()
        assert right > 0.95, (readout, out.terms)


# -- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"regime": "replace"}, "regime to generate"),
        ({"denoiser": DenoiserConfig(width=32, heads=4)}, "mask 'mixed'"),
        ({"objective": ObjectiveConfig(state=0.0)}, "own head is not trained"),
        ({"objective": ObjectiveConfig(state=0.0, read=1.0)}, "no loss trains the denoiser"),
        ({"objective": ObjectiveConfig(own=-1.0, read=0.1)}, "must not be negative"),
        ({"space": "simplex", "objective": ObjectiveConfig(own=1.0)}, "own_time to uniform"),
        ({"objective": ObjectiveConfig(own=1.0, corruption=0.1)}, "corruption belongs to the regime 'replace'"),
        ({"objective": ObjectiveConfig(own=1.0, metric="fisher")}, "metric belongs to the regime 'replace'"),
        ({"writing": WritingConfig(guidance=2.0), "objective": ObjectiveConfig(own=1.0)}, "condition_dropout > 0"),
        ({"known": KnownConfig(infill=0.7, scattered=0.7)}, "together"),
        ({"known": KnownConfig(prefix_max=1.5)}, "prefix_max"),
        ({"known": KnownConfig(prefix_min=-1)}, "prefix_min"),
        (
            {"known": KnownConfig(reencoded=0.5), "denoiser": dataclasses.replace(DENOISER, self_conditioning=0.0)},
            "reencoded feeds states back",
        ),
    ],
)
def test_methods_that_contradict_themselves(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Writer(config(**changes), dim=32, vocab=VOCAB)


@pytest.mark.parametrize("space", sorted(SPACES))
def test_steps_are_taken_at_the_levels_asked_for(space: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    known, seen = prefixes(4, 4), []
    forward = writer.denoiser.forward

    def spy(noised: torch.Tensor, t: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        seen.append(float(t.max()))
        return forward(noised, t, *args, **options)

    monkeypatch.setattr(writer.denoiser, "forward", spy)
    ids, texts = make_batch(2, 16).input_ids, []
    for center in (None, -2.0):
        seen.clear()
        writing = WritingConfig(steps=5, log_snr_center=center, log_snr_scale=0.5)
        written = writer.write(backbone, ids, known, writing=writing, cached=False, compare=False)
        assert written.nfe == 5
        texts.append(list(seen))
    assert texts[0] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert texts[1][0] == 1.0
    levels = writer.process.schedule.log_snr(torch.tensor(texts[1][1:], dtype=torch.float64)).tolist()
    # Quantiles 0.2, 0.4, 0.6, 0.8 of a logistic law.
    assert levels == pytest.approx([-2.6931, -2.2027, -1.7973, -1.3069], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps"),
        ({"readout": "owm"}, "Did you mean 'own'"),
        ({"sampler": "ddimm"}, "Did you mean 'ddim'"),
        ({"project": 1.2}, "project"),
        ({"suffix_weight": -0.1}, "suffix_weight"),
        ({"temperature": -1.0}, "temperature"),
        ({"block": 0}, "block"),
        ({"log_snr_scale": 0.0}, "log_snr_scale"),
    ],
)
def test_impossible_ways_of_writing(options: dict, message: str) -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    writing = WritingConfig()
    for name, value in options.items():
        object.__setattr__(writing, name, value)
    with pytest.raises(UsageError, match=message):
        writer.write(backbone, make_batch(1, 8).input_ids, prefixes(3, time=8), writing=writing)


def test_texts_that_cannot_be_written() -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    ids = make_batch(1, 8).input_ids

    def attempt(known, **options):
        return writer.write(backbone, ids, known, **{"writing": WritingConfig(steps=1), **options})

    with pytest.raises(UsageError, match="nothing is left to write"):
        attempt(torch.ones(1, 8, dtype=torch.bool))
    with pytest.raises(UsageError, match="must be a prefix"):
        attempt(torch.tensor([[1, 0, 1, 0, 0, 0, 0, 0]]).bool())
    given = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1]]).bool()
    with pytest.raises(UsageError, match=r"leave writing\.block out"):
        attempt(prefixes(3, time=8), given=given, writing=WritingConfig(block=2))
    with torch.no_grad():
        writer.denoiser.head.bias.fill_(float("nan"))
    with pytest.raises(UsageError, match="NaN or infinite"):
        attempt(prefixes(3, time=8))


def test_a_text_from_nothing_is_read_by_the_own_head_first() -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    nothing = torch.zeros(2, 8, dtype=torch.bool)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    written = writer.write(backbone, ids, nothing, writing=WritingConfig(steps=2, readout="suffix"), end=False)
    assert torch.equal(written.tokens[:, 0], written.own_tokens[:, 0])


def test_bound_is_trained_where_asked_for() -> None:
    backbone = tiny_backbone()
    process = ProcessConfig(schedule="log_linear")
    time = TimeConfig(terminal_fraction=0.0)
    writer = build(backbone, "embedding", embedding=EmbeddingConfig(bound=True), process=process, time=time)
    batch = make_batch(6, 16)
    out = loss_of(writer, backbone, batch)
    terms = {name: value.item() for name, value in out.terms.items()}
    parts = sum(terms[f"bound/{name}"] for name in ("reconstruction", "diffusion", "prior"))
    assert terms["bound"] == pytest.approx(parts, rel=1e-4)
    known, given = draw_known(KNOWN, batch.attention_mask, torch.arange(16).expand(6, 16), batch.sample_ids, seed=0)
    free = 1 - (known | given).float().mean().item()
    assert out.total.item() == pytest.approx(OBJECTIVE.own * terms["bound"] * free, rel=1e-4)
    out.total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in writer.parameters())
    with pytest.raises(UsageError, match="replaces the other losses"):
        build(
            backbone,
            "embedding",
            embedding=EmbeddingConfig(bound=True),
            process=process,
            time=time,
            objective=dataclasses.replace(OBJECTIVE, kl=0.1),
        )


@pytest.mark.parametrize("changes", [{"schedule": "gumbel"}, {"warp": True}], ids=["gumbel", "warp"])
@pytest.mark.parametrize("space", ["hidden", "embedding"])
def test_learned_schedules_are_trained_by_their_fit_alone(space: str, changes: dict) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space, random=False, process=ProcessConfig(**changes)).train()
    assert writer.schedule is not None
    out = loss_of(writer, backbone, make_batch(6, 16))
    assert "schedule" in out.terms
    out.total.backward()
    fitted = {n for n, p in writer.named_parameters() if n.startswith("schedule")}
    assert fitted
    assert all(p.grad is not None for n, p in writer.named_parameters() if n in fitted)
    assert "schedule" not in loss_of(writer.eval(), backbone, make_batch(6, 16)).terms
    written = writer.write(backbone, make_batch(2, 8).input_ids, prefixes(3, 3, time=8), writing=WritingConfig(steps=3))
    assert written.tokens.shape == (2, 8)


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("space", ["hidden", "latent"])
def test_the_own_head_reads_no_estimate_that_nobody_asks_it_for(
    space: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    ids, known, how = make_batch(2, 12).input_ids, prefixes(5, 5, time=12), WAYS[way]
    blocks = -(-7 // (how.block or 7))
    calls: list[int] = []
    writer.space.readout.register_forward_hook(lambda *_: calls.append(1))
    found = []
    for always in (False, True):
        if always:
            monkeypatch.setattr(Block, "_read_own", lambda self: frozenset(range(self.estimates)))
        calls.clear()
        found.append(writer.write(backbone, ids, known, writing=how, sample_ids=torch.arange(2), end=False))
        found.append(len(calls))
    fewer, few, every, many = found
    assert torch.equal(fewer.tokens, every.tokens)
    assert torch.equal(fewer.own_tokens, every.own_tokens)
    estimates = writer.evaluations(how) // (2 if how.guidance != 1.0 else 1)
    assert many == blocks * estimates
    asked = how.readout != "suffix" and (how.project > 0 or how.commit != "none")
    assert few == (blocks * estimates if asked else blocks)


def test_compiled_passes_need_room_of_fixed_size() -> None:
    with pytest.raises(UsageError, match=r"writing\.static"):
        check_writing(WritingConfig(compile=True), condition_dropout=0.0)
    check_writing(WritingConfig(compile=True, static=True), condition_dropout=0.0)
