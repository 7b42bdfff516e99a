"""Writing on compiled blocks: the same texts, whole graphs, and nothing left to compile when a graph is captured."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import warnings

import pytest
import torch

from dihal.config.spaces import WritingConfig
from dihal.nn import compiled
from dihal.writing import graphs, static
from dihal.writing.static import room_of
from tests.kit import tiny_backbone
from tests.unit.test_methods import make_batch
from tests.unit.test_writer import build, prefixes

pytestmark = pytest.mark.skipif(
    os.environ.get("DIHAL_NO_JAXTYPING") != "1" or shutil.which("g++") is None,
    reason="needs DIHAL_NO_JAXTYPING=1 (make test sets it) and a C++ compiler",
)

WAYS = {
    "own": {},
    "projected": {"readout": "fused", "project": 0.5},
    "guided": {"guidance": 1.5},
    "bf16": {"readout": "fused", "project": 0.5, "precision": "bfloat16"},
}


def variants() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def backend(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Another backend, and nothing kept of the one before."""
    real = torch.compile
    monkeypatch.setattr(compiled.torch, "compile", lambda function, **how: real(function, backend=name, **how))
    monkeypatch.setattr(compiled, "_MADE", {})


class Strict:
    """Captures nothing, but as a capture does refuses to compile; what it is given to warm, it runs."""

    def __init__(self) -> None:
        self.captures = 0

    def warm(self, function, given):
        return function(*given)

    def capture(self, function, given):
        self.captures += 1
        held = tuple(value.clone() for value in given)
        before = variants()
        with torch.compiler.set_stance("fail_on_recompile"):
            function(*held)
        assert variants() == before
        return function


def texts(writer, backbone, how: WritingConfig, batch: int = 2):
    found = []
    for number in range(3):
        ids = make_batch(batch, 24, seed=number).input_ids
        known = prefixes(*[10] * batch, time=24)
        samples = torch.arange(batch) + number
        found.append(writer.write(backbone, ids, known, writing=how, sample_ids=samples, end=False).tokens)
    return torch.stack(found)


@pytest.fixture
def strict(monkeypatch: pytest.MonkeyPatch) -> Strict:
    made = Strict()
    monkeypatch.setattr(graphs, "recorder", lambda device: made)
    # The backbone looks at token ids on a CPU only.
    monkeypatch.setattr("dihal.backbone.model.require_token_ids", lambda ids, vocab: None)
    backend(monkeypatch, "aot_eager")
    return made


@pytest.mark.parametrize("way", sorted(WAYS))
def test_nothing_is_compiled_while_a_graph_is_captured(way: str, strict: Strict) -> None:
    backbone = tiny_backbone(num_blocks=12)  # more blocks than torch's limit of variants
    writer = build(backbone)
    how = WritingConfig(steps=3, block=4, static=True, **WAYS[way])
    expected = texts(writer, backbone, how)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = texts(writer, backbone, dataclasses.replace(how, compile=True))
    room = room_of(writer)
    assert room.compiles
    assert not room.graphs.failed
    assert strict.captures >= 2 * 3
    # The whole block, the shorter last one and, of what is taken in, the block: two sizes of each of five functions.
    # Known columns taken in have no earlier estimate to read.
    assert 0 < variants() <= 14, variants()
    assert (found == expected).float().mean() > (0.8 if way == "bf16" else 0.999)


def test_compiled_by_inductor_keys_are_written_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.utils import run_and_get_code

    backend(monkeypatch, "inductor")
    backbone = tiny_backbone(num_blocks=3)
    writer = build(backbone)
    how = WritingConfig(steps=2, block=4, static=True, readout="fused")
    ids, known = make_batch(2, 14).input_ids, prefixes(10, 10, time=14)

    def text(compile: bool) -> torch.Tensor:
        return writer.write(backbone, ids, known, writing=dataclasses.replace(how, compile=compile), end=False).tokens

    expected = text(compile=False)
    found, codes = run_and_get_code(text, compile=True)
    assert room_of(writer).compiles
    assert torch.equal(found, expected)
    assert codes
    # There is room for 64 positions: no kernel makes keys or values for all of them anew.
    made = re.compile(r"empty_strided_cpu\(\(\d+, \d+, 64, \d+\)")
    assert not [found for code in codes for found in made.findall(code)]


def test_what_does_not_compile_runs_uncompiled_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(function):
        def call(*args, **kwargs):
            raise RuntimeError("no compiler\nmore")

        return call

    backbone = tiny_backbone()
    writer = build(backbone)
    how = WritingConfig(steps=2, block=4, static=True)
    expected = texts(writer, backbone, how)
    monkeypatch.setattr("dihal.nn.transformer.for_its_shapes", refused)
    with pytest.warns(UserWarning, match="it runs uncompiled: no compiler") as seen:
        found = texts(writer, backbone, dataclasses.replace(how, compile=True))
    assert sum("uncompiled" in str(one.message) for one in seen) == 1
    assert torch.equal(found, expected)


def test_a_capture_that_fails_is_tried_again_uncompiled(strict: Strict, monkeypatch: pytest.MonkeyPatch) -> None:
    captures = strict.capture

    def refused(function, given):
        if static.room_of(writer) is None and holder[0].compiles:
            raise RuntimeError("operation failed due to a previous error during capture")
        return captures(function, given)

    backbone = tiny_backbone()
    writer = build(backbone)
    holder = []
    made = static.Room.__init__

    def remembered(self, *args, **kwargs):
        made(self, *args, **kwargs)
        holder.append(self)

    monkeypatch.setattr(static.Room, "__init__", remembered)
    monkeypatch.setattr(strict, "capture", refused)
    how = WritingConfig(steps=2, block=4, static=True, compile=True)
    with pytest.warns(UserWarning, match="it runs uncompiled: operation failed"):
        found = texts(writer, backbone, how)
    assert not room_of(writer).graphs.failed
    assert len(room_of(writer).graphs) >= 3
    assert torch.equal(found, texts(writer, backbone, dataclasses.replace(how, compile=False)))
