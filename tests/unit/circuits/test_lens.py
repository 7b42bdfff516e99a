"""The lens ends at the model's own logits, and reads components that write a known token."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dihal.circuits.adapters import open_model
from dihal.circuits.lens import logit_lens, project
from dihal.circuits.metrics import answer_rank
from dihal.circuits.types import PairBatch
from dihal.errors import UsageError
from tests.kit import tiny_backbone


def _pairs(vocab: int = 97, batches: int = 2) -> list[PairBatch]:
    made = []
    for index in range(batches):
        generator = torch.Generator().manual_seed(index)

        def draw(*shape: int, generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randint(4, vocab, shape, generator=generator)

        clean = draw(3, 7 + index)
        corrupted = clean.clone()
        corrupted[:, 2] = (corrupted[:, 2] + 1) % vocab
        made.append(
            PairBatch(
                clean=clean,
                corrupted=corrupted,
                positions=torch.tensor([[4, 6]] * 3),
                answers=draw(3, 2, 1),
                foils=draw(3, 2, 1),
                weights=torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]),
                attention="causal",
                ids=torch.arange(3) + 3 * index,
            )
        )
    return made


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_last_layer_is_the_models_own_distribution(family: str) -> None:
    backbone, pairs = tiny_backbone(family), _pairs()
    found = logit_lens(backbone, pairs)
    assert found.layers == tuple(range(backbone.num_blocks + 1))
    ranks, chances = [], []
    for batch in pairs:
        with torch.no_grad():
            logits = backbone.model(batch.clean).logits[torch.arange(3)[:, None], batch.positions]
        used = batch.weights > 0
        ranks.append(answer_rank(logits, batch)[used])
        chances.append(logits.softmax(-1).gather(-1, batch.answers)[..., 0][used])
    assert found.rank[-1] == pytest.approx(float(torch.cat(ranks).double().quantile(0.5)))
    assert found.probability[-1] == pytest.approx(float(torch.cat(chances).mean()), rel=1e-4)


def test_batching_does_not_matter() -> None:
    backbone, pairs = tiny_backbone(), _pairs(batches=1)
    one = logit_lens(backbone, pairs, ["a1.h2", "m3", "input"])
    split = logit_lens(backbone, [pairs[0].rows(0, 1), pairs[0].rows(1, 3)], ["a1.h2", "m3", "input"])
    assert np.allclose(one.probability, split.probability, rtol=1e-4)
    assert np.allclose(one.component_entropy, split.component_entropy, rtol=1e-4)


def test_a_component_that_writes_one_token_is_specialised() -> None:
    backbone = tiny_backbone(tied=False)
    adapter = open_model(backbone)
    token = 11
    head = backbone.output_embedding.weight
    with torch.no_grad():
        # Block 2's MLP writes the row of one token, whatever it reads; every other row is orthogonal to it.
        head -= head @ head[token][:, None] / head[token].norm() ** 2 * head[token]
        head[token] = 0.0
        head[token, 0] = 20.0
        head[:token, 0] = 0.0
        head[token + 1 :, 0] = 0.0
        down = backbone.blocks[2].mlp.down_proj
        down.register_forward_hook(lambda *_: 3.0 * torch.eye(backbone.hidden_size)[0].expand(3, 7, -1))
    found = logit_lens(adapter, _pairs(batches=1), ["m2", "m1", "a3.h1"])
    special = dict(zip(found.components, found.specialisation, strict=True))
    assert special["m2"] > 0.99
    assert found.component_top[0] > 0.99
    assert max(special["m1"], special["a3.h1"]) < 0.9
    # A state of zeros gives the uniform distribution: specialisation 0.
    flat = project(adapter, torch.zeros(1, backbone.hidden_size)).softmax(-1)
    assert float(flat.max()) == pytest.approx(1 / backbone.vocab_size)
    assert 1 - math.log(backbone.vocab_size) / math.log(found.vocabulary) == 0.0


def test_what_cannot_be_looked_at() -> None:
    backbone = tiny_backbone()
    with pytest.raises(UsageError, match="no pairs"):
        logit_lens(backbone, [])
    with pytest.raises(UsageError, match=r"no writer 'a9\.h0'"):
        logit_lens(backbone, _pairs(), ["a9.h0"])


def test_no_hook_is_left_behind() -> None:
    backbone = tiny_backbone()
    logit_lens(backbone, _pairs(), ["m1"])
    hooks = [m for m in backbone.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
