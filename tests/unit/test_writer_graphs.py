"""Writing by captured functions: what a graph replays depends on nothing but what it is given.

A CPU captures no CUDA graph, so a tape stands in for it: like a graph it keeps the operations on tensors and their
memory, and holds every number of the host as a constant; like a capture it fails where a number is asked of the device.
"""

from __future__ import annotations

import dataclasses
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dihal.config import ProcessConfig
from dihal.config.spaces import WritingConfig
from dihal.writing import graphs, static
from dihal.writing.graphs import Graphs
from dihal.writing.static import StaticContext, reach_of
from tests.kit import tiny_backbone
from tests.unit.test_methods import make_batch
from tests.unit.test_writer import WAYS, build, prefixes


class _Tape(TorchDispatchMode):
    """Keeps every operation that is carried out, with its operands."""

    def __init__(self, host: tuple[torch.dtype, ...]) -> None:
        super().__init__()
        self.host = host
        self.operations: list[tuple] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype not in self.host:
            raise RuntimeError("operation not permitted when stream is capturing: a number is asked of the device")
        if function is torch.ops.aten.copy_.default and args[0].dim() == args[1].dim() == 0:
            # `tensor[3] = True`: on a GPU the number is copied from the host's pageable memory, and waited for.
            raise RuntimeError("operation not permitted when stream is capturing: a number of the host is copied")
        out = function(*args, **(kwargs or {}))
        aliases = [value.alias_info for value in function._schema.returns]
        if not any(alias is not None and not alias.is_write for alias in aliases):
            written = any(alias is not None for alias in aliases)
            self.operations.append((function, args, kwargs or {}, () if written else tree_leaves(out)))
        return out


class Tracer:
    """Captures as CUDA does: the same operations, on the same memory, with the numbers of the host as they were."""

    def __init__(self) -> None:
        self.replays = 0
        # Coefficients of solvers are computed in fp64 from times of the host; they are no values of the device.
        self.host: tuple[torch.dtype, ...] = (torch.float64,)

    def warm(self, function, given):
        return function(*given)

    def capture(self, function, given):
        held = [value.clone() for value in given]
        with _Tape(self.host) as tape:
            found = function(*held)

        def replay(*values):
            self.replays += 1
            for own, value in zip(held, values, strict=True):
                own.copy_(value)
            for operation, args, kwargs, outputs in tape.operations:
                made = tree_leaves(operation(*args, **kwargs))
                for output, value in zip(outputs, made if outputs else (), strict=True):
                    if isinstance(output, torch.Tensor):
                        output.copy_(value)
            return tuple(output.clone() for output in found)

        return torch.no_grad()(replay)


@pytest.fixture
def tracer(monkeypatch: pytest.MonkeyPatch) -> Tracer:
    made = Tracer()
    monkeypatch.setattr(graphs, "recorder", lambda device: made)
    # The backbone looks at token ids on a CPU only.
    monkeypatch.setattr("dihal.backbone.model.require_token_ids", lambda ids, vocab: None)
    return made


def texts(writer, backbone, how: WritingConfig, *, time: int = 16):
    """Two texts, one after the other, of different prompts and samples; blocks of 4, the last one shorter."""
    found = []
    for number in range(2):
        ids = make_batch(2, time, seed=number).input_ids
        written = writer.write(
            backbone, ids, prefixes(6, 6, time=time), writing=how, sample_ids=torch.tensor([1, 2]) + number, end=False
        )
        found.append(written)
    return found


def same(some, others) -> None:
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.tokens, other.tokens)
        assert torch.equal(one.own_tokens, other.own_tokens)
        assert torch.equal(one.suffix_tokens, other.suffix_tokens)
        for name in ("nfe", "encodes", "reads", "blocks"):
            assert getattr(one, name) == getattr(other, name), name


@pytest.mark.parametrize(
    ("space", "way"), [("hidden", "project"), ("hidden", "commit"), ("hidden", "fused"), ("embedding", "blocks")]
)
def test_captured_blocks_write_the_same(space: str, way: str, tracer: Tracer) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, space)
    how = dataclasses.replace(WAYS[way], block=4)
    plain = texts(writer, backbone, how)
    captured = texts(writer, backbone, dataclasses.replace(how, static=True))
    same(captured, plain)
    # Two whole blocks and a shorter one in each text, and two blocks taken in: all but the first of a kind are replayed.
    assert tracer.replays == 3 + 3 + 1 + 1
    first, second = captured
    assert first.flops == pytest.approx(second.flops), "a replay costs what the first run did"
    assert not static.room_of(writer).graphs.failed


@pytest.mark.parametrize("changes", [{"schedule": "gumbel"}, {"warp": True}], ids=["gumbel", "warp"])
def test_learned_schedules_are_captured_as_they_are_now(changes: dict, tracer: Tracer) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, "hidden", process=ProcessConfig(**changes))
    tracer.host = (torch.float64, torch.int64)  # bins of the schedule's copy on the host
    how = WritingConfig(steps=2, block=4, readout="fused")
    static_way = dataclasses.replace(how, static=True)
    same(texts(writer, backbone, static_way), texts(writer, backbone, how))
    with torch.no_grad():
        for parameter in writer.schedule.parameters():
            parameter.add_(0.03)
    same(texts(writer, backbone, static_way), texts(writer, backbone, how))
    assert not static.room_of(writer).graphs.failed


def test_single_passes_are_captured_where_a_block_cannot_be(tracer: Tracer) -> None:
    backbone = tiny_backbone()
    writer = build(backbone, "simplex")
    how = WritingConfig(steps=2, block=8, readout="fused", project=0.5)
    same(texts(writer, backbone, dataclasses.replace(how, static=True)), texts(writer, backbone, how))
    assert tracer.replays > 5


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_graphs_and_room_are_kept_until_weights_change(
    precision: str, tracer: Tracer, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    how = WritingConfig(steps=2, block=4, precision=precision, static=True)

    def uncaptured():
        """Without graphs, and with autocast casting the weights in every pass."""
        with monkeypatch.context() as patch:
            patch.setattr(static, "_low_weights", lambda network: {})
            patch.setattr(graphs, "recorder", lambda device: None)
            kept = static._ROOMS.pop(writer, None)
            found = texts(writer, backbone, how)
            static._ROOMS.pop(writer)
            if kept is not None:
                static._ROOMS[writer] = kept
        return found

    expected = uncaptured()
    same(texts(writer, backbone, how), expected)
    room = static.room_of(writer)
    same(texts(writer, backbone, how), expected)
    assert static.room_of(writer) is room
    assert bool(room.weights) == (precision == "bfloat16")
    with torch.no_grad():
        for parameter in writer.denoiser.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    changed = texts(writer, backbone, how)
    assert static.room_of(writer) is not room
    same(changed, uncaptured())
    assert not torch.equal(changed[0].tokens, expected[0].tokens)


def test_room_goes_with_its_writer(tracer: Tracer) -> None:
    backbone = tiny_backbone()
    writer = build(backbone)
    texts(writer, backbone, WritingConfig(steps=1, block=4, static=True))
    gone = weakref.ref(static.room_of(writer))
    del writer
    gc.collect()
    assert gone() is None


def test_what_cannot_be_captured_runs_with_one_warning(tracer: Tracer, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(function, given):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(tracer, "capture", refused)
    backbone = tiny_backbone()
    writer = build(backbone)
    how = WritingConfig(steps=2, block=4, project=0.5)
    plain = texts(writer, backbone, how)
    with pytest.warns(UserWarning, match="runs without one: operation not permitted") as seen:
        found = texts(writer, backbone, dataclasses.replace(how, static=True))
    assert sum("CUDA graph" in str(one.message) for one in seen) == 1
    same(found, plain)
    assert found[0].flops == pytest.approx(found[1].flops)


def test_a_function_that_asks_the_device_cannot_be_captured() -> None:
    made = Graphs(Tracer())

    def asks(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x * float(x[0]),)

    made("asks", asks, torch.ones(2))
    with pytest.warns(UserWarning, match="cannot be a CUDA graph"):
        assert made("asks", asks, torch.full((2,), 3.0))[0].tolist() == [9.0, 9.0]
    assert made.failed
    assert len(made) == 0


def test_old_functions_make_room_for_new_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MOST", 2)
    made = Graphs(Tracer())
    for number in (1, 2, 3, 1):
        for value in (1.0, 2.0, 4.0):
            (found,) = made(number, lambda x, number=number: (x * number,), torch.tensor([value]))
            assert found.item() == number * value
        assert len(made) <= 2


def test_a_pass_reads_at_most_a_quarter_more_than_is_there() -> None:
    assert [reach_of(n) for n in (1, 64, 65, 144, 192, 193, 1025)] == [64, 64, 128, 192, 192, 256, 1280]
    for positions in range(64, 5000, 7):
        assert positions <= reach_of(positions) <= max(1.25 * positions, positions + 63)
    # Passes over an early block of a long text read little of its room.
    backbone = tiny_backbone()
    writer = build(backbone)
    reaches = []
    keys = StaticContext._keys

    def seen(self, count):
        reaches.append(keys(self, count))
        return reaches[-1]

    StaticContext._keys = seen
    try:
        texts(writer, backbone, WritingConfig(steps=1, block=40, static=True), time=140)
    finally:
        StaticContext._keys = keys
    assert {reaches[0], reaches[-1]} == {64, 192}
