"""The converted network: attention, shift, loss, and what stays as it was."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from dihal.config import KnownConfig, LoraConfig, MaskedConfig, MethodConfig, ObjectiveConfig, TimeConfig
from dihal.errors import UsageError
from dihal.masked.attention import annealed, full, openness
from dihal.masked.noise import mask_count, mask_rate
from dihal.methods import build_method
from tests.kit import tiny_backbone
from tests.unit.masked.kit import VOCAB, config, converted, with_token
from tests.unit.test_methods import make_batch, randomise

WITHOUT_WINDOW = ("llama", "qwen3", "gpt2", "gpt_neox", "olmo2")
WITH_WINDOW = ("mistral", "qwen2", "gemma2", "gemma3_text", "phi3")


def loss_of(backbone, method, batch, *, progress: float = 1.0, rows: slice = slice(None), step: int = 0):
    whole = len(batch)
    part = type(batch)(
        input_ids=batch.input_ids[rows],
        attention_mask=batch.attention_mask[rows],
        document_ids=batch.document_ids[rows],
        loss_mask=batch.loss_mask[rows],
        sample_ids=batch.sample_ids[rows],
        full=batch.full,
    )
    index = torch.arange(whole)[rows]
    return method.loss(backbone, part, seed=0, step=step, batch_index=index, global_batch=whole, progress=progress)


# -- attention


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", WITHOUT_WINDOW)
def test_closed_attention_is_the_causal_model_to_the_bit(family: str, tied: bool) -> None:
    backbone, method = converted(family, tied=tied)
    ids = make_batch(2, 12).input_ids
    visible = annealed(torch.ones_like(ids, dtype=torch.bool), 0.0, seed=0, sample_ids=torch.arange(2))
    assert visible is None
    assert torch.equal(method.head(backbone, method.features(backbone, ids, visible)), backbone.forward(ids))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", [*WITHOUT_WINDOW, *WITH_WINDOW])
def test_a_mask_of_the_lower_triangle_is_the_causal_model(family: str, attention: str) -> None:
    backbone, method = converted(family, attention=attention)
    ids = make_batch(2, 5).input_ids  # no longer than the windows of tests/kit.py
    lower = torch.ones(5, 5, dtype=torch.bool).tril()[None, None].expand(2, 1, 5, 5)
    found = method.head(backbone, method.features(backbone, ids, lower))
    torch.testing.assert_close(found, backbone.forward(ids), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", WITHOUT_WINDOW)
def test_open_attention_sees_what_follows_and_closed_does_not(family: str, attention: str) -> None:
    backbone, method = converted(family, attention=attention)
    ids = make_batch(1, 12).input_ids
    changed = ids.clone()
    changed[0, 8] = (ids[0, 8] + 1) % VOCAB
    everything = full(torch.ones_like(ids, dtype=torch.bool))
    for visible, earlier_moves in ((everything, True), (None, False)):
        before, after = (method.features(backbone, given, visible)[0, :8] for given in (ids, changed))
        moved = (before != after).any(-1)
        assert bool(moved.all()) if earlier_moves else not bool(moved.any())


@pytest.mark.parametrize("family", WITH_WINDOW)
def test_a_sequence_beyond_the_sliding_window_is_refused(family: str) -> None:
    backbone, method = converted(family)
    with pytest.raises(UsageError, match="windows of 5 tokens"):
        method.features(backbone, make_batch(1, 6).input_ids, None)


def test_pairs_open_with_the_given_probability_and_stay_open() -> None:
    mask, keys = torch.ones(40, 24, dtype=torch.bool), torch.arange(40)
    upper = torch.ones(24, 24, dtype=torch.bool).triu(1)
    before = torch.zeros(40, 24, 24, dtype=torch.bool)
    for share in (0.1, 0.4, 0.9):
        visible = annealed(mask, share, seed=3, sample_ids=keys)
        assert visible is not None
        pairs = visible[:, 0]
        assert bool(pairs[:, ~upper].all()), "what a causal model sees stays visible"
        opened = pairs[:, upper].double().mean().item()
        assert opened == pytest.approx(share, abs=4 * (share * (1 - share) / (40 * 276)) ** 0.5)
        assert not bool((before & ~pairs).any())
        before = pairs
    assert bool(annealed(mask, 1.0, seed=3, sample_ids=keys).all())
    one = annealed(mask[7:8], 0.4, seed=3, sample_ids=keys[7:8])
    assert torch.equal(one, annealed(mask, 0.4, seed=3, sample_ids=keys)[7:8]), "keyed by sample, not by place"


def test_openness_rises_over_its_share_of_the_budget() -> None:
    assert [openness(p, 0.2) for p in (0.0, 0.1, 0.2, 1.0)] == [0.0, 0.5, 1.0, 1.0]
    assert openness(0.0, 0.0) == 1.0


def test_nobody_sees_padding() -> None:
    backbone, method = converted()
    batch = make_batch(2, 12, pad=4)
    other = batch.input_ids.clone()
    other[:, 8:] = 5
    visible = full(batch.attention_mask)
    left, right = (method.features(backbone, ids, visible)[:, :8] for ids in (batch.input_ids, other))
    assert torch.equal(left, right)
    short = method.features(backbone, batch.input_ids[:, :8], full(batch.attention_mask[:, :8]))
    torch.testing.assert_close(left, short, atol=1e-5, rtol=1e-4)


# -- shift and loss


def test_a_masked_token_is_read_one_position_earlier() -> None:
    """At closed attention, with one token masked, its nats are the backbone's own of that token given those before."""
    backbone, method = converted()
    ids = make_batch(1, 10).input_ids
    log_p = backbone.forward(ids).log_softmax(-1)
    for place in (1, 4, 9):
        hidden = torch.zeros_like(ids, dtype=torch.bool)
        hidden[0, place] = True
        features = method.features(backbone, ids.masked_fill(hidden, method.mask_token_id), None)
        nats, _ = method._read(backbone, features, ids, hidden)
        expected = -log_p[0, place - 1, ids[0, place]]
        torch.testing.assert_close(nats, expected[None], atol=1e-5, rtol=1e-5)
        itself = -log_p[0, place, ids[0, place]]
        assert abs(nats.detach().item() - itself.item()) > 1e-3, "and not of the position itself"


def test_the_loss_is_the_weighted_cross_entropy_of_the_masked_tokens() -> None:
    backbone, method = converted(given=config(masked=MaskedConfig(smallest=0.01)))
    batch = make_batch(8, 20)
    out = loss_of(backbone, method, batch, step=2)
    from dihal.diffusion.timesteps import sample_times

    t = sample_times(
        method.config.time,
        seed=0,
        step=2,
        sample_ids=batch.sample_ids,
        batch_index=torch.arange(8),
        batch_size=8,
    )
    t = 0.01 + 0.99 * t
    free = torch.ones(8, 20, dtype=torch.bool)
    free[:, 0] = False
    hidden = mask_rate(free, t, seed=0, sample_ids=batch.sample_ids)
    noised = batch.input_ids.masked_fill(hidden, method.mask_token_id)
    logits = method.head(backbone, method.features(backbone, noised, full(torch.ones(8, 20, dtype=torch.bool))))
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.input_ids[:, 1:].flatten(), reduction="none")
    nats = nats.view(8, 19) * hidden[:, 1:]
    torch.testing.assert_close(out.total, (nats / t[:, None]).sum() / (8 * 19))
    torch.testing.assert_close(out.terms["bound"], out.total.detach())
    torch.testing.assert_close(out.terms["cross_entropy"], nats.sum() / hidden.sum())
    assert out.tokens == 160


@pytest.mark.parametrize("chunk", [3, 1024])
def test_chunks_change_memory_and_not_the_gradient(chunk: int) -> None:
    gradients = []
    for size in (chunk, 50):
        backbone, method = converted(given=config(objective=ObjectiveConfig(logit_chunk=size)), tied=False)
        loss_of(backbone, method, make_batch(4, 16)).total.backward()
        gradients.append([p.grad for p in method.parameters()])
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("progress", [0.05, 1.0])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(progress: float) -> None:
    backbone, method = converted(given=config(masked=MaskedConfig(conditional=0.5)))
    batch = make_batch(6, 16)
    whole = loss_of(backbone, method, batch, progress=progress).total
    parts = [loss_of(backbone, method, batch, progress=progress, rows=slice(i, i + 2)).total for i in (0, 2, 4)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())


@pytest.mark.parametrize("lora", [0, 2])
def test_every_weight_has_a_gradient_even_where_nothing_is_masked(lora: int) -> None:
    backbone, method = converted(given=config(lora=LoraConfig(rank=lora)), tied=False)
    batch = make_batch(2, 1)  # one token: the first, which is never masked
    out = loss_of(backbone, method, batch)
    assert float(out.total.detach()) == 0.0
    out.total.backward()
    trained = [p for p in method.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trained)


def inputs_of(method):
    """What the network is given from now on."""
    seen, original = [], method.features

    def spy(backbone, ids, visible):
        seen.append(ids)
        return original(backbone, ids, visible)

    method.features = spy
    return seen


def test_only_masks_reach_the_network() -> None:
    """What a masked token was changes the target and nothing else."""
    backbone, method = converted()
    seen = inputs_of(method)
    batch = make_batch(4, 16)
    first = loss_of(backbone, method, batch).total
    hidden = seen[0] == method.mask_token_id
    assert bool(hidden.any())
    batch.input_ids[hidden] = (batch.input_ids[hidden] + 3) % VOCAB
    second = loss_of(backbone, method, batch).total
    assert torch.equal(seen[0], seen[1])
    assert first != second


def test_conditional_sequences_are_given_their_prefix() -> None:
    prefix = KnownConfig(prefix_min=8, prefix_max=0.5, infill=0.0)
    given = config(masked=MaskedConfig(conditional=1.0, smallest=0.999), known=prefix)
    backbone, method = converted(given=given)
    seen = inputs_of(method)
    loss_of(backbone, method, make_batch(4, 16))
    masked = seen[0] == method.mask_token_id
    assert not bool(masked[:, :8].any())
    assert bool(masked[:, 8:].float().mean() > 0.9)
    method.eval()
    loss_of(backbone, method, make_batch(4, 16))
    assert bool((seen[1] == method.mask_token_id)[:, 1:8].float().mean() > 0.9), "evaluation is of whole texts"


def test_masks_of_a_count_have_that_count() -> None:
    free = torch.ones(200, 9, dtype=torch.bool)
    free[:, 0] = False
    count = torch.arange(200) % 8 + 1
    hidden = mask_count(free, count, seed=1, sample_ids=torch.arange(200), purpose="x")
    assert torch.equal(hidden.sum(-1), count)
    assert not bool(hidden[:, 0].any())
    each = hidden[:, 1:].double().mean(0)
    assert float((each - each.mean()).abs().max()) < 0.15, "no place is preferred"


# -- the mask token


def test_a_new_mask_token_is_one_above_the_vocabulary() -> None:
    backbone, method = converted()
    assert method.mask_token_id == VOCAB
    ids = make_batch(1, 6).input_ids
    assert method.head(backbone, method.features(backbone, ids, None)).shape[-1] == VOCAB


def test_a_mask_token_of_the_vocabulary_is_never_predicted() -> None:
    backbone, method = converted(given=with_token("<pad>"))
    assert method.mask_token_id == 2
    ids = make_batch(1, 6).input_ids
    logits = method.head(backbone, method.features(backbone, ids, None))
    assert bool(torch.isneginf(logits[..., 2]).all())
    batch = make_batch(4, 16)
    batch.input_ids[:, 5] = 2  # a text that holds the mask token: read as masked, predicted by nobody
    out = loss_of(backbone, method, batch)
    assert torch.isfinite(out.total)


@pytest.mark.parametrize(
    ("token", "message"), [("<nosuch>", "no token of this backbone"), ("</s>", "start or end token")]
)
def test_bad_mask_tokens(token: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        converted(given=with_token(token))


# -- the backbone stays


@pytest.mark.parametrize("lora", [0, 2])
def test_training_leaves_the_backbone_alone(lora: int) -> None:
    backbone, method = converted(given=config(lora=LoraConfig(rank=lora)))
    ids = make_batch(2, 12).input_ids
    before, fingerprint = backbone.forward(ids), backbone.fingerprint()
    optimiser = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    first = last = None
    for _ in range(20):
        out = loss_of(backbone, method, make_batch(8, 16))
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        first, last = first or float(out.total.detach()), float(out.total.detach())
    assert last < 0.9 * first, "it learns"
    assert backbone.fingerprint() == fingerprint
    assert torch.equal(backbone.forward(ids), before)
    assert all(not p.requires_grad for n, p in backbone.model.named_parameters() if "lora_" not in n)
    kinds = list(method.state_dict())
    if lora:
        assert all("lora" in name or name == "mask_embedding" for name in kinds), "a frozen backbone is not stored"
    else:
        assert "mask_embedding" in kinds
        assert sum(p.numel() for p in method.parameters()) == backbone.parameter_count() + backbone.hidden_size


def test_adapters_of_another_method_are_refused() -> None:
    backbone, _ = converted(given=config(lora=LoraConfig(rank=2)))
    with pytest.raises(UsageError, match="adapters of another method"):
        build_method(config(), backbone)


def test_the_copy_of_a_model_with_dropout_has_none() -> None:
    backbone, method = converted("gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    method.train()
    ids = make_batch(1, 8).input_ids
    assert torch.equal(method.features(backbone, ids, None), method.features(backbone, ids, None))
    assert method.training


# -- options


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "bridge"}, "go together|has the method 'masked' only"),
        ({"space": "hidden"}, "go together"),
        ({"split": 1}, "set it to 0"),
        ({"time": TimeConfig()}, "terminal_fraction"),
        ({"objective": ObjectiveConfig(kl=1.0)}, "method.objective belongs"),
        ({"masked": MaskedConfig(anneal=1.5)}, "method.masked.anneal"),
        ({"masked": MaskedConfig(smallest=0.0)}, "method.masked.smallest"),
    ],
)
def test_bad_options(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_method(config(**changes), tiny_backbone())


def test_the_regime_of_other_methods_is_theirs() -> None:
    with pytest.raises(UsageError, match="go together"):
        build_method(MethodConfig(name="masked", split=0), tiny_backbone())
    with pytest.raises(UsageError, match="cannot be loaded as a hybrid"):
        build_method(config(), 32)


def test_uniform_weights_count_every_masked_token_alike() -> None:
    given = config(masked=MaskedConfig(weight="uniform"), time=TimeConfig(terminal_fraction=1.0))
    backbone, method = converted(given=given)
    randomise(method, scale=0.05)
    out = loss_of(backbone, method, make_batch(4, 16))
    torch.testing.assert_close(out.total.detach(), out.terms["cross_entropy"])
