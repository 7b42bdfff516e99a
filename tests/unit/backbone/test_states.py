"""Capture: the right tensors, nothing deeper, nothing kept, gradients only where they belong."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from dihal.backbone.views import prefix_view
from dihal.errors import UsageError
from tests.kit import FAMILIES, tiny_backbone


def make_ids(batch: int = 2, time: int = 9) -> torch.Tensor:
    return torch.randint(4, 97, (batch, time), generator=torch.Generator().manual_seed(3))


def inputs_of_blocks(backbone, **inputs) -> list[torch.Tensor]:
    """States entering each block in the model's own forward, captured by hooks: an independent witness."""
    seen: list[torch.Tensor] = []

    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(hook, with_kwargs=True) for block in backbone.blocks]
    backbone.model(**inputs, use_cache=False)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_enter_the_blocks_of_the_own_forward(family: str) -> None:
    backbone, ids = tiny_backbone(family), make_ids()
    mask = torch.ones(ids.shape, dtype=torch.bool)
    mask[0, :4] = False
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    witness = inputs_of_blocks(backbone, input_ids=ids, attention_mask=mask, position_ids=positions)
    for splits in ([0, 1, 2, 3], [2], [3, 0], (1, 1)):
        states = backbone.states(ids, splits, attention_mask=mask)
        assert sorted(states) == sorted(set(splits))
        for split, state in states.items():
            assert torch.equal(state, witness[split])
    plain = inputs_of_blocks(backbone, input_ids=ids)
    assert torch.equal(backbone.embed(ids), plain[0])
    for split in range(4):
        assert torch.equal(backbone.prefix(ids, split), plain[split])


@torch.no_grad()
def test_nothing_above_the_deepest_split_runs() -> None:
    backbone, ran = tiny_backbone(num_blocks=4), []
    for index, block in enumerate(backbone.blocks):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    for name, module in (("norm", backbone.model.model.norm), ("head", backbone.model.lm_head)):
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
    backbone.states(make_ids(), [0, 2])
    assert ran == [0, 1]
    ran.clear()
    backbone.embed(make_ids())
    assert ran == []
    state = backbone.prefix(make_ids(), 1)
    ran.clear()
    backbone.suffix_features(state, 3)
    assert ran == [3, "norm"]


@torch.no_grad()
def test_other_layers_are_not_kept() -> None:
    backbone = tiny_backbone(num_blocks=4)
    outputs: list[weakref.ref] = []
    for block in backbone.blocks:
        block.register_forward_hook(lambda _module, _args, output: outputs.append(weakref.ref(output)))
    states = backbone.states(make_ids(), [1, 3])
    alive = [output() is not None for output in outputs]
    assert alive == [True, False, True]  # h^1, h^2, h^3
    assert outputs[0]() is states[1]


def test_the_model_is_left_as_it_was() -> None:
    backbone = tiny_backbone("gpt2")
    before = dict(backbone.model.named_modules())
    hooks = [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in backbone.model.modules()]
    backbone.suffix(backbone.states(make_ids(), [1, 2])[2], 2)
    assert dict(backbone.model.named_modules()) == before
    assert hooks == [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in backbone.model.modules()]


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_state_and_no_weight(family: str) -> None:
    backbone, ids = tiny_backbone(family), make_ids()
    state = backbone.prefix(ids, 2).requires_grad_(True)
    backbone.suffix(state, 2).square().mean().backward()
    assert state.grad is not None
    assert state.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in backbone.model.parameters())
    assert not backbone.model.training


def test_gradient_of_the_suffix_is_right() -> None:
    backbone, ids = tiny_backbone("gpt2", dtype="float64"), make_ids(1, 4)
    state = backbone.prefix(ids, 2).requires_grad_(True)
    direction = torch.randn(state.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))

    # GPT-2, because the other families compute their norms in float32 whatever the dtype.
    def loss(at: torch.Tensor) -> torch.Tensor:
        return backbone.suffix(at, 2)[..., 7].sum()

    (slope,) = torch.autograd.grad(loss(state), state)
    step = 1e-5
    numeric = (loss(state + step * direction) - loss(state - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), numeric, rtol=1e-5, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_suffix_is_causal(family: str) -> None:
    backbone, ids = tiny_backbone(family), make_ids()
    state = backbone.prefix(ids, 2)
    logits = backbone.suffix(state, 2)
    changed = state.clone()
    changed[:, 5] += 1.0
    after = backbone.suffix(changed, 2)
    assert torch.equal(after[:, :5], logits[:, :5])
    assert not torch.equal(after[:, 5:], logits[:, 5:])


@torch.no_grad()
def test_state_of_another_dtype_is_cast() -> None:
    backbone, ids = tiny_backbone(), make_ids()
    state = backbone.prefix(ids, 2)
    assert torch.equal(backbone.suffix(state.double(), 2), backbone.suffix(state, 2))


@torch.no_grad()
def test_compiled_blocks_and_a_compiled_model_are_respected() -> None:
    # An in-place compiled decoder must not run whole when a part is asked for.
    backbone, ids = tiny_backbone(), make_ids()
    state = backbone.prefix(ids, 2)
    logits = backbone.suffix(state, 2)
    backbone.model.model.compile(backend="eager")
    assert torch.equal(backbone.prefix(ids, 2), state)
    for block in backbone.blocks:
        block.compile(backend="eager")
    torch.testing.assert_close(backbone.suffix(state, 2), logits, atol=1e-5, rtol=0)


def test_blocks_that_return_tuples() -> None:
    # transformers before 5 returned (state, ...) from a block and its decoder read output[0].
    class Tupled(nn.Module):
        def __init__(self, block: nn.Module):
            super().__init__()
            self.inner = block

        def forward(self, hidden: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor]:
            return (self.inner(hidden, *args, **kwargs),)

    class Decoder(nn.Module):
        def __init__(self, blocks: list[nn.Module]):
            super().__init__()
            self.layers = nn.ModuleList(blocks)
            self.norm = nn.LayerNorm(6)

        def forward(self, inputs_embeds: torch.Tensor) -> tuple[torch.Tensor]:
            hidden = inputs_embeds
            for layer in self.layers:
                hidden = layer(hidden)[0]
            return (self.norm(hidden),)

    from dihal.backbone.layout import Layout
    from dihal.backbone.views import suffix_view

    torch.manual_seed(0)
    decoder = Decoder([Tupled(nn.Linear(6, 6)) for _ in range(4)])
    layout, shown, h0 = Layout(), {}, torch.randn(2, 3, 6)
    whole = decoder(h0)[0]
    for split in range(4):
        state = prefix_view(decoder, layout, split, {0: lambda h: shown.update({0: h})} if split else None)(h0)[0]
        assert torch.equal(suffix_view(decoder, layout, split, state)(state)[0], whole)
    assert torch.equal(shown[0], h0)


def test_splits_are_checked() -> None:
    backbone = tiny_backbone(num_blocks=3)
    ids = make_ids()
    for split in (3, -1, 99, True):
        with pytest.raises(UsageError, match="3 blocks, valid splits are 0 to 2"):
            backbone.prefix(ids, split)
        with pytest.raises(UsageError, match="valid splits are 0 to 2"):
            backbone.suffix(torch.zeros(2, 9, 32), split)
        with pytest.raises(UsageError, match="valid splits are 0 to 2"):
            backbone.states(ids, [0, split])
    with pytest.raises(UsageError, match="no split given"):
        backbone.states(ids, [])
