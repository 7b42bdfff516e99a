"""What attribution costs beside plain forward passes of the same prompts: time, passes, memory, agreement.

    python benchmarks/attribution.py [--stability] [--device auto] [--rounds 7]
    python benchmarks/attribution.py --eight-billion    # Llama-3.1-8B with random weights, made on a GPU in bf16
    python benchmarks/attribution.py --tiny             # random and tiny: only that everything runs

One process, one batch of 10 pairs of 20 random tokens, EAP-IG with 5 points. In every round a plain forward, one point
of the path (forward and backward, without hooks) and the attribution of the batch are timed one after the other; a ratio is
the median of the rounds' ratios, and all seconds are in the file. The plain forward is the library's own, never a graph, and
makes logits at the last position only, as attribution does: with all of them it would be slower, and the ratio smaller.
On a GPU attribution replays CUDA graphs from the third batch of a shape on: that is what the bar is held against, and
the same without graphs, what the batch costs in which they are captured, and passes and contraction alone stand beside it.
`--stability` scores edges again in bf16.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dihal.backbone import Backbone, load_backbone, random_backbone
from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.attribute import attribute, path_points, score_batch
from dihal.circuits.metrics import logit_difference
from dihal.circuits.overlap import edge_values, spearman, top_edges
from dihal.circuits.passes import Passes, Plan, Room
from dihal.circuits.tasks import build_task
from dihal.circuits.types import PairBatch
from dihal.io import write_json
from dihal.provenance import provenance
from dihal.random import random_words

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, TOKENS, STEPS = 10, 20, 5
STABLE_PROMPTS, STABLE_EDGES = 64, 1_000
TINY = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass
class Findings:
    """The rows of the table; `judged`: whether bars of cost mean anything for this model."""

    judged: bool
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(
        self, name: str, value: Any, *, bar: float | None = None, goal: float | None = None, cost: bool = True
    ) -> None:
        """A figure, which should be at most its bar and its goal."""
        judged = not isinstance(value, str) and (self.judged or not cost)
        verdicts = [None if limit is None or not judged else bool(value <= limit) for limit in (bar, goal)]
        self.rows.append(
            {"name": name, "value": value, "bar": bar, "goal": goal, "met": verdicts[0], "goal_met": verdicts[1]}
        )


def random_pairs(vocab: int) -> PairBatch:
    """Prompts of random tokens, corrupted in the middle and read at the end: right for cost, and for nothing else."""
    ids = torch.arange(PROMPTS)
    words = random_words(0, ids, "attribution benchmark", (TOKENS + 3,)) % vocab
    clean = words[:, :TOKENS].contiguous()
    corrupted = clean.clone()
    corrupted[:, TOKENS // 2] = words[:, TOKENS]
    return PairBatch(
        clean=clean, corrupted=corrupted, positions=torch.full((PROMPTS, 1), TOKENS - 1),
        answers=words[:, TOKENS + 1, None, None], foils=words[:, TOKENS + 2, None, None],
        weights=torch.ones(PROMPTS, 1), attention="causal", ids=ids,
    )  # fmt: skip


class Cost:
    """What is timed: all on one batch that lies on the device."""

    def __init__(self, adapter: Adapter, batch: PairBatch) -> None:
        self.adapter = adapter
        self.batch = batch.to(adapter.device)

    def now(self) -> float:
        """Seconds, when all work so far is done."""
        if self.adapter.device.type == "cuda":
            torch.cuda.synchronize(self.adapter.device)
        return time.perf_counter()

    def seconds(self, work: Callable[[], Any], repeats: int = 3) -> float:
        """Median wall seconds."""
        found = []
        for _ in range(repeats):
            started = self.now()
            work()
            found.append(self.now() - started)
        return statistics.median(found)

    @torch.no_grad()
    def forward(self) -> None:
        """The library's own forward pass of the clean prompts."""
        self.adapter.model(input_ids=self.batch.clean, use_cache=False, logits_to_keep=1)

    def point(self) -> None:
        """One forward and backward: gradients of the metric at the embeddings, none of weights."""
        state = self.adapter.states(self.batch.clean, 0, sample_ids=self.batch.ids).requires_grad_()
        logits = self.adapter.logits(state, 0, self.batch.positions)
        torch.autograd.grad(logit_difference(logits.float(), self.batch).sum(), state)

    def attribution(self, graphs: bool) -> list[float]:
        """Seconds of the same batch four times: with the checks of a run, with the capture, and twice as all later ones are."""
        ends = [self.now()]
        attribute(
            self.adapter, [self.batch] * 4, steps=STEPS, batch_size=PROMPTS, graphs=graphs,
            progress=lambda _: ends.append(self.now()),
        )  # fmt: skip
        return [after - before for before, after in itertools.pairwise(ends)]

    def parts(self, graphs: bool) -> tuple[float, float]:
        """Seconds of the seven passes with their hooks and of the contraction, once graphs are captured."""
        adapter = self.adapter
        room = Room(adapter, graphs=graphs)
        room.open()
        with adapter.session():
            plan = Plan(
                adapter=adapter, spec=(spec := adapter.spec()), readers=room.readers(spec),
                points=path_points("eap-ig", STEPS, "midpoint"), metric=logit_difference, contraction="factored",
                noise_seed=0, chunk_bytes=1 << 30,
            )  # fmt: skip
            room.reserve(plan, [self.batch])
            for _ in range(2):
                score_batch(plan, room, self.batch)
            ends = {
                point: adapter.states(ids, spec.seam, sample_ids=self.batch.ids)
                for point, ids in ((0.0, self.batch.corrupted), (1.0, self.batch.clean))
            }
            times = [self.now()]
            passes, call = room.passes(plan, self.batch)
            passes.enter(self.batch, ends)
            for point, state in ends.items():
                passes.run(state, point, None, call)
            for point, weight in plan.points:
                passes.run(torch.lerp(ends[0.0], ends[1.0], point), None, weight, call)
            times.append(self.now())
            passes.contract(call)
            times.append(self.now())
        return times[1] - times[0], times[2] - times[1]

    def rounds(self, count: int) -> dict[str, list[float]]:
        """Seconds of everything, in turn; the first round warms up and is left out."""
        kinds: dict[str, list[float]] = {}
        for index in range(1 + count):
            row = {"forward": self.seconds(self.forward), "point": self.seconds(self.point)}
            for graphs, name in ((True, ""), (False, "_eager")):
                checked, second, *later = self.attribution(graphs)
                row[f"batch{name}"], row[f"batch_with_checks{name}"] = statistics.median(later), checked
                if graphs:
                    row["batch_with_capture"] = second
                row[f"passes{name}"], row[f"contraction{name}"] = self.parts(graphs)
            if index:
                for name, value in row.items():
                    kinds.setdefault(name, []).append(value)
        return kinds


def timed(found: Findings, cost: Cost, count: int, goal_seconds: float | None) -> dict[str, list[float]]:
    """Rows of time."""
    seconds = cost.rounds(count)

    def ratio(name: str, forwards: int = 0, times: int = 1) -> float:
        pairs = zip(seconds[name], seconds["forward"], strict=True)
        return statistics.median(forwards + times * one / plain for one, plain in pairs)

    found.add("plain forward, seconds", statistics.median(seconds["forward"]))
    found.add("attribution, seconds", statistics.median(seconds["batch"]), goal=goal_seconds)
    found.add("attribution, x plain forward", ratio("batch"), bar=16.0, goal=13.0)
    found.add("its passes, x plain forward", ratio("passes"))
    found.add("its contraction, x plain forward", ratio("contraction"))
    found.add("without graphs, x plain forward", ratio("batch_eager"))
    found.add("its passes without graphs, x plain forward", ratio("passes_eager"))
    found.add("its contraction without graphs, x plain forward", ratio("contraction_eager"))
    found.add("bare passes without hooks or graphs, x plain forward", ratio("point", 2, STEPS))
    found.add("with the checks of a run, x plain forward", ratio("batch_with_checks"))
    if cost.adapter.device.type == "cuda":
        extra = [a - b for a, b in zip(seconds["batch_with_capture"], seconds["batch"], strict=True)]
        found.add("capture, once per shape, seconds", statistics.median(extra))
    else:
        found.add("capture, once per shape, seconds", "no graphs on a CPU")
    return seconds


class Masked(Room):
    """Nothing is captured, but attention is given its mask, as captured passes have it, instead of being told that it is causal."""

    def passes(self, plan: Plan, batch: PairBatch) -> tuple[Passes, Any]:
        device = batch.clean.device
        take = lambda *shape, dtype: torch.empty(shape, dtype=dtype, device=device)  # noqa: E731
        return Passes(plan, batch, take, static=True), lambda _, function: function()


def agreement(found: Findings, cost: Cost) -> None:
    """Largest differences of scores, relative to the largest score: with and without graphs, and what is in the mask alone.

    A mask that is given has the library choose other kernels for attention than one that is implied, which round in another order:
    what that changes without any graph is the scale for what graphs change.
    """

    def scored(room: Room, times: int = 1) -> np.ndarray:
        options: dict[str, Any] = {"steps": STEPS, "batch_size": PROMPTS, "room": room}
        return [attribute(cost.adapter, [cost.batch], **options) for _ in range(times)][-1].scores

    def difference(one: np.ndarray, other: np.ndarray) -> float:
        return float(abs(one - other).max() / abs(other).max())

    plain, masked = scored(Room(cost.adapter, graphs=False)), scored(Masked(cost.adapter, graphs=False))
    names = [f"scores with and without graphs, {about}relative" for about in ("", "both with a mask, ")]
    if cost.adapter.device.type == "cuda":
        # The third time, so that all of it is replayed.
        replayed = scored(Room(cost.adapter), 3)
        values: list[Any] = [difference(replayed, plain), difference(replayed, masked)]
    else:
        values = ["no graphs on a CPU"] * 2
    found.add(names[0], values[0])
    found.add("scores without graphs, mask given or implied, relative", difference(masked, plain))
    found.add(names[1], values[1])


def counted(found: Findings, cost: Cost) -> None:
    """Rows of passes."""
    scores = attribute(cost.adapter, [cost.batch], steps=STEPS, batch_size=PROMPTS)
    found.add("edges", scores.spec.n_edges)
    found.add("forward passes", scores.passes["forward"], bar=STEPS + 2, cost=False)
    found.add("backward passes", scores.passes["backward"], bar=STEPS, cost=False)


def released(device: torch.device) -> int:
    """Give back what earlier work left allocated, and return its bytes: workspaces that cuBLAS keeps for every stream."""
    gc.collect()
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()  # the way that torch's notes on CUDA give
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return before - torch.cuda.memory_allocated(device)


def memory(found: Findings, cost: Cost, weights: int) -> dict[str, int] | None:
    """Rows of memory; nothing on a CPU, whose allocations are not counted.

    Each of the three begins without the workspaces of those before it, or of the rounds of time: they would be counted on both
    sides of the bar, and hide what attribution takes.
    """
    adapter, name = cost.adapter, "peak memory, x weights + one point + writers"
    device = adapter.device
    if device.type != "cuda":
        found.add(name, "not measured on a CPU", bar=1.2)
        return None
    sizes = {"weights": weights, "left_by_rounds": released(device), "before": torch.cuda.memory_allocated(device)}
    cost.point()
    sizes["forward_backward"] = one = torch.cuda.max_memory_allocated(device) - weights
    sizes["workspaces_forward_backward"] = released(device)
    # Three times, so that graphs are captured and replayed: their pool counts.
    scores = attribute(adapter, [cost.batch] * 3, steps=STEPS, batch_size=PROMPTS)
    sizes["reserved"] = torch.cuda.memory_reserved(device)
    sizes["workspaces"] = released(device)
    eager = attribute(adapter, [cost.batch], steps=STEPS, batch_size=PROMPTS, graphs=False)
    assert scores.peak_bytes is not None
    assert eager.peak_bytes is not None
    item = torch.finfo(adapter.dtype).bits // 8
    # What every writer writes, in the model's type.
    sizes["writer_store"] = store = PROMPTS * TOKENS * scores.spec.n_writers * adapter.width * item
    found.add(name, scores.peak_bytes / (weights + one + store), bar=1.2)
    found.add("peak memory, x the same without weights", (scores.peak_bytes - weights) / (one + store))
    found.add("peak memory without graphs, x weights + one point + writers", eager.peak_bytes / (weights + one + store))
    return {**sizes, "peak": scores.peak_bytes, "peak_eager": eager.peak_bytes}


def invariance(found: Findings, cost: Cost) -> None:
    """Largest difference of scores between batch sizes, relative to the largest score."""
    name = "scores between batch sizes, relative"
    if cost.adapter.dtype != torch.float32:
        found.add(name, "a bar of fp32", bar=1e-5)
        return
    tables = [attribute(cost.adapter, [cost.batch], steps=STEPS, batch_size=size).scores for size in (PROMPTS, 3, 1)]
    worst, largest = max(float(abs(table - tables[0]).max()) for table in tables[1:]), float(abs(tables[0]).max())
    assert largest > 0
    found.add(name, worst / largest, bar=1e-5, cost=False)


def stability(found: Findings, backbone: Backbone, task: str, pairs: Sequence[PairBatch]) -> dict[str, Any]:
    """The top edges of the same weights in bf16 and fp32."""
    values = {}
    for dtype in ("float32", "bfloat16"):
        # A live model is converted where it is: nothing that follows may need it as it was.
        held = load_backbone(backbone.model, dtype=dtype, device=backbone.device)
        scores = attribute(held, pairs, steps=STEPS, batch_size=PROMPTS)
        values[dtype] = edge_values(scores.spec, scores.scores)
    one, other = values["float32"], values["bfloat16"]
    k = min(STABLE_EDGES, len(one) // 4)
    top, rounded = top_edges(one, k), top_edges(other, k)
    either = top | rounded
    found.add(f"bf16: share of the fp32 top {k:,}", float((top & rounded).sum() / k))
    found.add("bf16: Spearman on the union", spearman(one[either], other[either]))
    return {
        "task": task,
        "pairs": sum(len(batch) for batch in pairs),
        "k": k,
        "relative_difference": float(np.linalg.norm(other - one) / np.linalg.norm(one)),
    }


def opened(arguments: argparse.Namespace) -> Backbone:
    """The model that is measured."""
    if arguments.eight_billion:
        if not torch.cuda.is_available():
            raise SystemExit("--eight-billion makes 16 GB of weights and needs a GPU; --tiny runs on a CPU.")
        return random_backbone("llama-3.1-8b", device=arguments.device, dtype="bfloat16")
    if arguments.tiny:
        return random_backbone(TINY, device=arguments.device, dtype="float32")
    return load_backbone("embedded", device=arguments.device)


def show(result: dict[str, Any]) -> None:
    about = result["subject"]
    table = Table(
        "what", "found", "bar", "goal", "verdict",
        title=f"EAP-IG, {STEPS} points, {PROMPTS} x {TOKENS} tokens: {about['id']}, {about['dtype']}, {about['device']}",
    )  # fmt: skip
    for row in result["rows"]:
        value = row["value"]
        shown = f"{value:.3g}" if isinstance(value, float) else value if isinstance(value, str) else f"{value:,}"
        limits = ["" if row[name] is None else f"<= {row[name]:g}" for name in ("bar", "goal")]
        words = [
            {True: "met", False: "MISSED"}.get(row["met"]),
            {True: "goal met", False: "goal missed"}.get(row["goal_met"]),
        ]
        table.add_row(row["name"], shown, *limits, ", ".join(word for word in words if word))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--tiny", action="store_true", help="a random tiny model: only to see that everything runs")
    which.add_argument("--eight-billion", action="store_true", help="Llama-3.1-8B with random weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads; default: torch's own")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stability", action="store_true", help="also the top edges in bf16 against fp32")
    parser.add_argument("--out", default=None, help="result file; default: results/benchmark_attribution*.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    backbone = opened(arguments)
    adapter = open_model(backbone)
    batch = random_pairs(backbone.vocab_size)
    cost, found = Cost(adapter, batch), Findings(judged=not arguments.tiny)
    subject = {
        **backbone.reference.to_dict(),
        "device": adapter.device.type,
        "weight_bytes": backbone.weight_bytes,
        "prompts": PROMPTS,
        "tokens": TOKENS,
        "steps": STEPS,
    }
    counted(found, cost)
    seconds = timed(found, cost, arguments.rounds, 1.0 if arguments.eight_billion else None)
    result: dict[str, Any] = {
        "subject": subject,
        "rows": found.rows,
        "seconds": seconds,
        "memory": memory(found, cost, backbone.weight_bytes),
    }
    agreement(found, cost)
    invariance(found, cost)
    if arguments.stability:
        # Which edges are on top means something for a model that can read, and runs without it for another.
        task, pairs = "random tokens", [batch]
        if not (arguments.tiny or arguments.eight_billion):
            task = "ioi"
            pairs = build_task(task, [backbone.tokenizer], batch_size=PROMPTS).pairs(STABLE_PROMPTS, seed=0)
        result["stability"] = stability(found, backbone, task, pairs)
    kind = "_eight_billion" if arguments.eight_billion else "_tiny" if arguments.tiny else ""
    place = "_cuda" if adapter.device.type == "cuda" else ""
    out = arguments.out or ROOT / "results" / f"benchmark_attribution{kind}{place}.json"
    write_json(out, {**result, "provenance": provenance()})
    show(result)


if __name__ == "__main__":
    main()
