"""Models whose circuits are known, and the self-test that holds the package against them.

*Linear net*: fixed attention patterns, no norm, no activation. The metric is linear in the input of every
component, so that every method is exact.

*Induction circuit*: two attention-only layers of two heads on the prompt "A B C D E A", which B
continues. Head a0.h0 copies the previous token, head a1.h0 looks for the position whose previous token is
the current one and copies its token to the logits; the second heads are decoys that write where only
decoys read. With another token in the first A's place exactly three edges change the metric. Attention is soft:
where it saturates the gradient at the clean prompt vanishes although the edge matters.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dihal.backbone.layout import Layout
from dihal.circuits.adapters import Adapter
from dihal.circuits.attribute import attribute
from dihal.circuits.exact import exact_scores
from dihal.circuits.types import EdgeScores, PairBatch
from dihal.random import normal

__all__ = ["INDUCTION_EDGES", "ToyModel", "induction_model", "induction_pair", "linear_net", "linear_pairs", "selftest"]

INDUCTION_EDGES = ("input->a0.h0<v>", "a0.h0->a1.h0<k>", "a1.h0->logits")
"""The live edges of the induction circuit."""

_TIME = 6
_TOKENS = 6
"""A B C D E, and the token that replaces the first A."""

_LAYOUT = Layout(
    decoder="decoder",
    embeddings=("embedding",),
    blocks="blocks",
    norm="norm",
    attention_output="output",
    projections=("query", "key", "value"),
    attention_norm="attention_norm",
    mlp="mlp",
    mlp_norm="mlp_norm",
    norm_kind="none",
)


class ToyBlock(nn.Module):
    """Causal attention, and a linear MLP if there is one. ``pattern`` (time, time) replaces the softmax."""

    def __init__(self, dim: int, heads: int, size: int, *, mlp: bool, pattern: Tensor | None) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(dim, heads * size, bias=False) for _ in range(3))
        self.output = nn.Linear(heads * size, dim, bias=False)
        self.attention_norm, self.mlp_norm = nn.Identity(), nn.Identity()
        self.mlp = nn.Linear(dim, dim) if mlp else None
        self.register_buffer("pattern", pattern)

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The residual stream after the block."""
        x = self.attention_norm(hidden)
        query, key, value = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        if self.pattern is not None:
            mixed = self.pattern @ value
        else:
            mixed = nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=attention_mask, is_causal=attention_mask is None, scale=1.0
            )
        hidden = hidden + self.output(mixed.transpose(1, 2).flatten(2))
        return hidden if self.mlp is None else hidden + self.mlp(self.mlp_norm(hidden))


class ToyDecoder(nn.Module):
    """Embeddings of tokens and positions, blocks, no final norm."""

    def __init__(self, blocks: list[ToyBlock], tokens: int, time: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, dim)
        self.places = nn.Embedding(time, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.Identity()

    def forward(
        self,
        input_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = False,
    ) -> tuple[Tensor]:
        """Features of every position, as the first of a tuple: the convention of the library's decoders."""
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        hidden = hidden + self.places.weight[: hidden.shape[1]]
        for block in self.blocks:
            hidden = block(hidden, attention_mask=attention_mask)
        return (self.norm(hidden),)


class ToyModel(nn.Module):
    """A decoder with a linear head."""

    def __init__(self, decoder: ToyDecoder, tokens: int, dim: int, heads: int) -> None:
        super().__init__()
        self.decoder = decoder
        self.head = nn.Linear(dim, tokens, bias=False)
        self.config = SimpleNamespace(model_type="toy", num_attention_heads=heads, num_key_value_heads=heads)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def adapter(self) -> Adapter:
        """The model as a graph."""
        has_mlp = self.decoder.blocks[0].mlp is not None
        layout = _LAYOUT if has_mlp else Layout(**{**vars(_LAYOUT), "mlp": None})
        return Adapter(self, layout, name="toy")


def _batch(clean: list[list[int]], corrupted: list[list[int]], answers: list[int], foils: list[int]) -> PairBatch:
    n, time = len(clean), len(clean[0])
    return PairBatch(
        torch.tensor(clean),
        torch.tensor(corrupted),
        torch.full((n, 1), time - 1),
        torch.tensor(answers).view(n, 1, 1),
        torch.tensor(foils).view(n, 1, 1),
        torch.ones(n, 1),
        "causal",
        torch.arange(n),
    )


def linear_net(seed: int = 0, *, layers: int = 3, heads: int = 2, dim: int = 12) -> ToyModel:
    """A linear net with random weights, in float64."""
    time, tokens, size = 5, 11, 4

    def draw(purpose: str, *shape: int) -> Tensor:
        return normal(seed, torch.tensor(0), f"linear net {purpose}", shape, dtype=torch.float64)

    pattern = draw("pattern", time, time).tril().softmax(-1).tril()
    blocks = [ToyBlock(dim, heads, size, mlp=True, pattern=pattern) for _ in range(layers)]
    model = ToyModel(ToyDecoder(blocks, tokens, time, dim), tokens, dim, heads).double().eval()
    for name, parameter in model.named_parameters():
        parameter.data.copy_(0.4 * draw(name, *parameter.shape))
    return model


def linear_pairs() -> list[PairBatch]:
    """Two pairs of prompts for `linear_net`."""
    return [_batch([[1, 2, 3, 4, 5], [2, 9, 3, 1, 4]], [[6, 2, 7, 4, 5], [2, 5, 3, 1, 10]], [1, 2], [8, 0])]


def induction_model(sharpness: float) -> ToyModel:
    """The induction circuit in float64; ``sharpness``: logit by which a matching key leads."""
    size = _TOKENS + 1
    # Spaces of the residual stream: token, position, previous token, output, and two that decoys write.
    token, place, before, out, first, second = (slice(i * size, (i + 1) * size) for i in range(6))
    dim = 6 * size
    blocks = [ToyBlock(dim, 2, size, mlp=False, pattern=None) for _ in range(2)]
    model = ToyModel(ToyDecoder(blocks, _TOKENS, _TIME, dim), _TOKENS, dim, 2).double().eval()
    for parameter in model.parameters():
        parameter.data.zero_()
    eye = torch.eye(size, dtype=torch.float64)

    def put(linear: nn.Module, head: int, source: slice, matrix: Tensor) -> None:
        linear.weight.data[head * size : (head + 1) * size, source] = matrix  # type: ignore[index,union-attr]

    def write(block: ToyBlock, head: int, target: slice) -> None:
        block.output.weight.data[target, head * size : (head + 1) * size] = eye

    decoder = model.decoder
    decoder.embedding.weight.data[:, token] = eye[:_TOKENS]
    decoder.places.weight.data[:, place] = eye[:_TIME]
    lower, upper = blocks
    for head in (0, 1):
        put(lower.query, head, place, sharpness * eye)
        put(lower.key, head, place, eye.roll(1, 0))  # position j answers to the query of j + 1
        put(lower.value, head, token, eye)
    write(lower, 0, before)
    write(lower, 1, first)
    put(upper.query, 0, token, sharpness * eye)
    put(upper.key, 0, before, eye)
    put(upper.value, 0, token, eye)
    write(upper, 0, out)
    for linear in (upper.query, upper.key, upper.value):
        put(linear, 1, first, eye)
    write(upper, 1, second)
    model.head.weight.data[:, out] = eye[:_TOKENS]
    return model


def induction_pair() -> list[PairBatch]:
    """A B C D E A -> B against D; in the corrupted prompt another token stands for the first A."""
    return [_batch([[0, 1, 2, 3, 4, 0]], [[5, 1, 2, 3, 4, 0]], [1], [3])]


def _values(scores: EdgeScores) -> Float[Any, " live"]:
    return scores.scores[tuple(zip(*(scores.spec.edge_index(name) for name in INDUCTION_EDGES)))]


def selftest() -> list[dict[str, Any]]:
    """Hold the package against models whose circuits are known; a second or two.

    Returns one record per claim: ``name``, ``expected``, ``found`` (or the largest error), ``tolerance``, ``passed``.
    """
    records: list[dict[str, Any]] = []

    def claim(name: str, expected: float, found: float, tolerance: float) -> None:
        passed = abs(found - expected) <= tolerance
        records.append({"name": name, "expected": expected, "found": found, "tolerance": tolerance, "passed": passed})

    net = linear_net(layers=2).adapter()
    exact = exact_scores(net, linear_pairs()).scores
    for method, rule in (("eap", "midpoint"), ("eap-ig", "midpoint"), ("eap-ig", "left"), ("clean-corrupted", "")):
        found = attribute(net, linear_pairs(), method=method, rule=rule or "midpoint", steps=3).scores  # type: ignore[arg-type]
        claim(f"linear net: {method} {rule} = exact (largest error)", 0.0, float(abs(found - exact).max()), 1e-12)
    soft, sharp, pairs = induction_model(3.0).adapter(), induction_model(40.0).adapter(), induction_pair()
    exact_soft = exact_scores(soft, pairs)
    claim("induction: edges", 29.0, float(soft.spec().n_edges), 0.0)
    claim("induction: live edges", 3.0, float((abs(exact_soft.scores) > 1e-12).sum()), 0.0)
    for name, value in zip(INDUCTION_EDGES, _values(exact_soft)):
        claim(f"induction: exact effect of {name}", -0.3859, float(value), 1e-4)
    plain, integrated = attribute(soft, pairs, method="eap"), attribute(soft, pairs)
    claim("induction: EAP understates the first edge", -0.165, float(_values(plain)[0]), 1e-3)
    claim("induction: EAP-IG, 5 steps", -0.3873, float(_values(integrated)[0]), 1e-4)
    claim(
        "induction: EAP-IG, 5 steps, left rule", -0.4111, float(_values(attribute(soft, pairs, rule="left"))[0]), 1e-4
    )
    claim("induction, saturated: exact effect", -0.5, float(_values(exact_scores(sharp, pairs))[0]), 1e-4)
    missed = max(abs(_values(attribute(sharp, pairs, method="eap"))[:2]))
    claim("induction, saturated: EAP misses two true edges (largest score)", 0.0, float(missed), 1e-12)
    found = float(_values(attribute(sharp, pairs, steps=30))[0])
    claim("induction, saturated: EAP-IG, 30 steps, finds them", -0.5046, found, 1e-4)
    return records
