"""The denoiser: causality to the bit, masks, padding, cache, conditioning, start of training."""

from __future__ import annotations

import itertools

import pytest
import torch

from dihal.errors import UsageError
from dihal.nn import DenoiserCache, DenoiserTransformer, parameter_groups
from tests.unit.nn.kit import CONDITION, STATE, inputs, tiny

NORMS = ["adaptive", "rms"]
LEFT = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)


def changed(before, after):
    """(batch, time): whether any channel differs in any bit."""
    return (before != after).any(-1)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("padding", [None, LEFT, RIGHT])
@pytest.mark.parametrize("per_position", [False, True])
@torch.no_grad()
def test_outputs_before_a_changed_position_are_bit_unchanged(norm, qk_norm, padding, per_position):
    model = tiny(norm=norm, qk_norm=qk_norm, self_conditioning=0.5)
    z, t, c = inputs()
    t = torch.rand(2, 7, generator=torch.Generator().manual_seed(3)) if per_position else t
    own = torch.randn(2, 7, STATE)
    before = model(z, t, c, attention_mask=padding, self_condition=own)
    for j, which in itertools.product((1, 3, 6), range(4 if per_position else 3)):
        z2, t2, c2, own2 = z.clone(), t.clone(), c.clone(), own.clone()
        (z2, c2, own2, t2)[which][:, j] += 1.5 if which < 3 else 0.3
        after = model(z2, t2, c2, attention_mask=padding, self_condition=own2)
        moved = changed(before, after)
        assert not moved[:, :j].any()
        real = torch.ones(2, 7).bool() if padding is None else padding.bool()
        assert moved[:, j].all()
        assert moved[:, j:][real[:, j:] & real[:, j : j + 1]].all()  # and the rest does depend on it


@torch.no_grad()
def test_causality_holds_at_lengths_where_kernels_work_in_tiles():
    model = tiny(depth=1)
    z, t, c = inputs(batch=1, time=300)
    before = model(z, t, c)
    for j in (1, 63, 64, 65, 255, 299):
        c2 = c.clone()
        c2[:, j] += 1
        moved = changed(before, model(z, t, c2))[0]
        assert not moved[:j].any()
        assert moved[j:].all()


@torch.no_grad()
def test_bidirectional_sees_everything_and_mixed_keeps_known_from_unknown():
    z, t, c = inputs()
    model = tiny(mask="bidirectional")
    c2 = c.clone()
    c2[:, 6] += 1
    assert changed(model(z, t, c), model(z, t, c2)).all()

    model = tiny(mask="mixed")
    known = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1, 0]]).bool()
    before = model(z, t, c, known=known)
    for j in range(7):
        z2 = z.clone()
        z2[:, j] += 1
        moved = changed(before, model(z2, t, c, known=known))
        for b, i in itertools.product(range(2), range(7)):
            expected = not known[b, i] or (bool(known[b, j]) and j <= i)
            assert moved[b, i].item() == expected


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "mixed"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing_for_real_tokens_and_is_never_nan(mask, side):
    model = tiny(mask=mask)
    z, t, c = inputs(batch=1, time=5)
    known = torch.tensor([[1, 1, 0, 1, 0]]).bool() if mask == "mixed" else None
    alone = model(z, t, c, known=known)

    def pad(x, fill):
        extra = torch.full((1, 3, *x.shape[2:]), fill, dtype=x.dtype)
        return torch.cat([extra, x] if side == "left" else [x, extra], 1)

    real = slice(3, 8) if side == "left" else slice(0, 5)
    keep = torch.zeros(1, 8, dtype=torch.bool)
    keep[:, real] = True
    padded = model(
        pad(z, 1e4), t, pad(c, -1e4), attention_mask=keep, known=None if known is None else pad(known, False)
    )
    assert padded.isfinite().all()
    assert torch.allclose(padded[:, real], alone, atol=1e-5)


def test_padded_rows_have_finite_gradients():
    model = tiny()
    z, t, c = inputs()
    z.requires_grad_()
    out = model(z, t, c, attention_mask=torch.cat([torch.zeros(2, 6), torch.ones(2, 1)], 1).long())
    out[:, 6].sum().backward()
    assert z.grad.isfinite().all()
    assert (z.grad[:, :6] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("padding", [None, LEFT])
@pytest.mark.parametrize("chunks", [[1] * 7, [3, 4], [4, 1, 1, 1], [7]])
@torch.no_grad()
def test_cached_equals_full_pass(norm, padding, chunks):
    """Equal to 1e-5, not to the bit: single rows and whole sequences are summed in different orders."""
    model = tiny(norm=norm)
    z, t, c = inputs()
    full = model(z, t, c, attention_mask=padding)
    cache, parts, start = DenoiserCache(), [], 0
    for n in chunks:
        end = start + n
        mask = None if padding is None else padding[:, :end]
        parts.append(model(z[:, start:end], t, c[:, start:end], attention_mask=mask, cache=cache))
        start = end
        assert cache.length == end
    real = torch.ones(2, 7).bool() if padding is None else padding.bool()
    difference = (torch.cat(parts, 1) - full).abs().amax(-1)[real].max()
    assert difference < 1e-5 * full.abs().max()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("padding", [None, LEFT])
@torch.no_grad()
def test_a_cache_of_known_positions_equals_the_full_pass_in_every_evaluation(norm, padding):
    """Two rows with prefixes of 3 and 5: the 3 leading columns are cached, the rest goes through each call."""
    model = tiny(norm=norm, mask="mixed", self_conditioning=0.5)
    z, _, c = inputs()
    known = torch.tensor([[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0, 0]]).bool()
    real = torch.ones(2, 7).bool() if padding is None else padding.bool()
    cache = DenoiserCache()
    for evaluation, level in enumerate((0.9, 0.5, 0.1)):
        z = torch.where(known[..., None], z, torch.randn(z.shape, generator=torch.Generator().manual_seed(evaluation)))
        t = torch.where(known, 0.0, level)
        own = torch.where(known[..., None], 0.0, z.flip(0))
        full = model(z, t, c, known=known, self_condition=own, attention_mask=padding)
        if evaluation == 0:
            new = {"known": known[:, :3], "self_condition": own[:, :3], "keep": 3}
            first = model(
                z[:, :3],
                t[:, :3],
                c[:, :3],
                cache=cache,
                attention_mask=real[:, :3] if padding is not None else None,
                **new,
            )
            assert torch.allclose(first[real[:, :3]], full[:, :3][real[:, :3]], atol=1e-5 * full.abs().max().item())
        rest = model(
            z[:, 3:],
            t[:, 3:],
            c[:, 3:],
            known=known[:, 3:],
            self_condition=own[:, 3:],
            attention_mask=padding,
            cache=cache,
            keep=0,
        )
        assert cache.length == 3
        difference = (rest - full[:, 3:]).abs().amax(-1)[real[:, 3:]].max()
        assert difference < 1e-5 * full.abs().max()


@torch.no_grad()
def test_a_cache_refuses_unknown_positions():
    model = tiny(mask="mixed")
    z, t, c = inputs()
    known = torch.arange(7).expand(2, 7) < 3
    with pytest.raises(UsageError, match="keeps known positions only"):
        model(z, t, c, known=known, cache=DenoiserCache())
    cache = DenoiserCache()
    out = model(z, t, c, known=known, cache=cache, keep=3)
    assert cache.length == 3
    assert torch.equal(out, model(z, t, c, known=known))


@torch.no_grad()
def test_an_output_of_its_own_size():
    model = tiny(output_dim=5)
    z, t, c = inputs()
    assert model(z, t, c).shape == (2, 7, 5)
    assert tiny().output_dim == STATE


@torch.no_grad()
def test_condition_dropped_per_position():
    model = tiny(mask="bidirectional")
    z, t, c = inputs()
    drop = torch.tensor([[0, 1, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1]]).bool()
    out = model(z, t, c, drop_condition=drop)
    c2 = torch.where(drop[..., None], c + 3, c)
    assert torch.equal(out, model(z, t, c2, drop_condition=drop))
    assert not torch.equal(out, model(z, t, c))
    rows = torch.tensor([True, False])
    each = model(z, t, c, drop_condition=rows[:, None].expand(2, 7))
    assert torch.allclose(each, model(z, t, c, drop_condition=rows), atol=1e-6)


@torch.no_grad()
def test_cache_crops_and_reorders():
    model = tiny()
    z, t, c = inputs()
    full = model(z, t, c)
    cache = DenoiserCache()
    model(z, t, c, cache=cache)
    cache.crop(4)
    cache.reorder(torch.tensor([1, 0, 1]))
    rows = torch.tensor([1, 0, 1])
    again = model(z[rows, 4:], t[rows], c[rows, 4:], cache=cache)
    assert torch.allclose(again, full[rows, 4:], atol=1e-5 * full.abs().max().item())


@torch.no_grad()
def test_positions_count_real_tokens_and_can_be_given():
    model = tiny()
    z, t, c = inputs()
    default = model(z, t, c)
    assert torch.equal(model(z, t, c, position_ids=torch.arange(7).expand(2, 7)), default)
    # rotary positions are relative, but not invisible
    assert torch.allclose(model(z, t, c, position_ids=torch.arange(5, 12).expand(2, 7)), default, atol=1e-4)
    assert not torch.allclose(model(z, t, c, position_ids=2 * torch.arange(7).expand(2, 7)), default, atol=1e-3)


@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_time_per_sequence_equals_the_same_time_at_every_position_on_square_data(norm):
    model = tiny(norm=norm, state_dim=6, condition_dim=6, width=24, heads=2)
    z, t, c = inputs(batch=6, time=6, state_dim=6, condition_dim=6)
    per_sequence = model(z, t, c)
    assert torch.allclose(per_sequence, model(z, t[:, None].expand(6, 6), c), atol=1e-5)
    assert not torch.allclose(per_sequence, model(z, t[None].expand(6, 6), c), atol=1e-2)
    one_by_one = torch.cat([model(z[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(6)])
    assert torch.allclose(per_sequence, one_by_one, atol=1e-5)


@torch.no_grad()
def test_dropped_condition_is_the_null_vector_and_no_skip():
    model = tiny()
    z, t, c = inputs()
    drop = torch.tensor([True, False])
    out = model(z, t, c, drop_condition=drop)
    other = model(z, t, c + 1, drop_condition=drop)
    assert torch.equal(out[0], other[0])
    assert not torch.equal(out[1], other[1])
    kept = model(z, t, c, drop_condition=torch.tensor([False, False]))
    assert torch.equal(kept, model(z, t, c))
    null = model.null_condition.expand(2, 7, CONDITION)
    assert torch.allclose(out[0], (model(z, t, null) - model.skip(null))[0], atol=1e-5)


@torch.no_grad()
def test_absent_self_condition_counts_as_zeros():
    model = tiny(self_conditioning=0.5)
    z, t, c = inputs()
    assert torch.equal(model(z, t, c), model(z, t, c, self_condition=torch.zeros_like(z)))
    assert not torch.equal(model(z, t, c), model(z, t, c, self_condition=torch.ones_like(z)))


@pytest.mark.parametrize("mask", ["causal", "bidirectional", "mixed"])
@pytest.mark.parametrize("norm", NORMS)
def test_starts_at_zero_and_learns_from_the_first_steps(norm, mask):
    model = tiny(norm=norm, mask=mask, disturb=False).train()
    z, t, c = inputs(batch=4)
    known = torch.arange(7).expand(4, 7) < 3 if mask == "mixed" else None
    goal = c @ torch.randn(CONDITION, STATE, generator=torch.Generator().manual_seed(1)) / CONDITION**0.5
    optimiser = torch.optim.AdamW(parameter_groups(model, 0.01), lr=1e-2)
    losses = []
    for step in range(8):
        out = model(z, t, c, known=known)
        if step == 0:
            assert (out == 0).all()
        loss = (out - goal).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < 0.95 * losses[0]
    assert losses[-1] < 0.7 * losses[0]
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == ["null_condition"]  # nothing was dropped


def test_blocks_start_as_the_identity():
    for norm in NORMS:
        model = tiny(norm=norm, disturb=False)
        x = torch.randn(2, 5, 32)
        angles = (torch.ones(1, 1, 5, 4), torch.zeros(1, 1, 5, 4))
        out, _ = model.blocks[0](x, torch.randn(2, 1, 32), angles, None, True)
        assert torch.equal(out, x)


def test_dropout_acts_in_training_only():
    model = tiny(dropout=0.5)
    z, t, c = inputs()
    assert torch.equal(model(z, t, c), model(z, t, c))
    model.train()
    assert not torch.equal(model(z, t, c), model(z, t, c))


@pytest.mark.parametrize("norm", NORMS)
def test_dtypes(norm):
    z, t, c = inputs()
    with torch.autocast("cpu", torch.bfloat16):
        model = tiny(norm=norm)
        reference, out = tiny(norm=norm)(z, t, c), model(z, t, c)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    exact = tiny(norm=norm)(z, t, c)
    low = tiny(norm=norm).bfloat16()(z.bfloat16(), t, c.bfloat16())
    assert low.dtype == torch.bfloat16
    for rough in (reference, low.float()):
        assert (rough - exact).square().mean() < 0.01 * exact.square().mean()


def test_unconditional_model():
    model = tiny(condition_dim=None)
    z, t, c = inputs()
    assert model(z, t).shape == z.shape
    with pytest.raises(UsageError, match="no condition"):
        model(z, t, c)


def test_meta_device_builds_without_memory():
    with torch.device("meta"):
        model = DenoiserTransformer(tiny().config, STATE, CONDITION)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in tiny().parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 5}, "5 heads do not divide the width 32; try heads: 4"),
        ({"width": 36, "heads": 12}, "even number"),
        ({"depth": 0}, "must be positive"),
        ({"mlp_ratio": 0.0}, "must be positive"),
        ({"dropout": 1.0}, "probability"),
        ({"self_conditioning": 2.0}, "probability"),
    ],
)
def test_impossible_shapes(options, message):
    with pytest.raises(UsageError, match=message):
        tiny(**options)


@pytest.mark.parametrize(("field", "value", "near"), [("mask", "casual", "causal"), ("norm", "adaptiv", "adaptive")])
def test_unknown_names(field, value, near):
    config = tiny().config
    object.__setattr__(config, field, value)
    with pytest.raises(UsageError, match=f"Did you mean '{near}'"):
        DenoiserTransformer(config, STATE, CONDITION)


def test_inputs_that_the_configuration_does_not_have():
    z, t, c = inputs()
    known = torch.ones(2, 7).bool()
    with pytest.raises(UsageError, match="conditional: pass condition="):
        tiny()(z, t)
    with pytest.raises(UsageError, match="needs known="):
        tiny(mask="mixed")(z, t, c)
    with pytest.raises(UsageError, match="no meaning"):
        tiny()(z, t, c, known=known)
    with pytest.raises(UsageError, match="self_conditioning: 0"):
        tiny()(z, t, c, self_condition=z)
    with pytest.raises(UsageError, match="cache needs the mask 'causal' or 'mixed'"):
        tiny(mask="bidirectional")(z, t, c, cache=DenoiserCache())
    with pytest.raises(UsageError, match="covers cached and new"):
        tiny()(z, t, c, attention_mask=torch.ones(2, 9).bool())
