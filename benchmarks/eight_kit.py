"""What the sections of eight_billion.py have in common: sizes, clocks, the growing table."""

from __future__ import annotations

import gc
import json
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dihal.backbone import Backbone, random_backbone  # noqa: E402
from dihal.config import DenoiserConfig, MethodConfig, ObjectiveConfig, OptimConfig  # noqa: E402
from dihal.data.batch import Batch  # noqa: E402
from dihal.io import write_json  # noqa: E402
from dihal.methods import build_method  # noqa: E402
from dihal.provenance import provenance  # noqa: E402
from dihal.training.ema import Ema  # noqa: E402
from dihal.training.optim import build_optimizer  # noqa: E402

__all__ = ["Bench", "Sizes", "Step", "make_batch", "measured", "sizes"]

_TINY_SHAPE = {
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; two instances: the real one, and one that a CPU runs in seconds."""

    shape: Any
    score_tokens: int
    score_length: int
    score_batch: int
    pool: int
    anchors: int
    length: int
    batch: int
    suffix_batch: int
    splits: tuple[int, int]
    small: DenoiserConfig
    large: DenoiserConfig
    product: int
    prompt: int
    new_tokens: int
    batches: tuple[int, ...]
    steps: tuple[int, ...]
    blocks: tuple[int, ...]
    loop_steps: int
    equal_steps: int
    dtype: str = "bfloat16"


def sizes(tiny: bool, shape: str) -> Sizes:
    if tiny:
        net = DenoiserConfig(width=32, depth=2, heads=2)
        return Sizes(
            shape=_TINY_SHAPE, score_tokens=512, score_length=64, score_batch=256, pool=200, anchors=32, length=32,
            batch=2, suffix_batch=2, splits=(2, 3), small=net, large=net, product=256, prompt=8, new_tokens=4,
            batches=(1, 2), steps=(1, 2), blocks=(4,), loop_steps=4, equal_steps=4, dtype="float32",
        )  # fmt: skip
    net = DenoiserConfig(width=2048, depth=5, heads=16)
    return Sizes(
        shape=shape, score_tokens=65_536, score_length=2_048, score_batch=8_192, pool=6_144, anchors=512, length=2_048,
        batch=8, suffix_batch=4, splits=(4, 12), small=net, large=replace(net, depth=8), product=8_192, prompt=128,
        new_tokens=48, batches=(1, 64), steps=(1, 4, 16), blocks=(16, 64), loop_steps=24, equal_steps=100,
    )  # fmt: skip


class SectionTimeout(Exception):
    """A section took longer than it may."""


@dataclass
class Bench:
    """A run: the device, the options, and the table that grows on screen and on disk."""

    device: torch.device
    sizes: Sizes
    compile: bool
    out: Path
    tiny: bool
    rows: list[dict[str, Any]] = field(default_factory=list)
    section: str = ""
    held: Backbone | None = None

    def row(self, name: str, value: Any, unit: str = "", *, bar: str = "", ok: bool | None = None, **more: Any) -> None:
        """Print a row of the table and write the file again."""
        # On a tiny model a bar of the 8B one means nothing.
        ok = None if self.tiny else ok
        verdict = "" if ok is None else ("met" if ok else "MISSED")
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        print(f"| {self.section} | {name} | {shown} {unit} | {bar} | {verdict} |", flush=True)
        self.rows.append(
            {"section": self.section, "name": name, "value": value, "unit": unit, "bar": bar, "met": ok, **more}
        )
        self.write()

    def write(self) -> None:
        shown = {key: str(value) if key == "shape" else value for key, value in vars(self.sizes).items()}
        plain = json.loads(json.dumps({"sizes": shown, "rows": self.rows}, default=str))
        write_json(self.out, {**plain, "compile": self.compile, "tiny": self.tiny, "provenance": provenance()})

    @contextmanager
    def guarded(self, name: str, seconds: int) -> Iterator[None]:
        """A section: its own time limit, its own failures."""
        self.section, started = name, time.perf_counter()

        def late(*_: Any) -> None:
            raise SectionTimeout(f"longer than {seconds} s")

        before = signal.signal(signal.SIGALRM, late)
        signal.alarm(seconds)
        try:
            yield
        except Exception as error:
            signal.alarm(0)
            self.row("failed", f"{type(error).__name__}: {str(error)[:300]}", trace=traceback.format_exc()[-3000:])
            traceback.print_exc()
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
            self.row("seconds of this section", time.perf_counter() - started, "s")
            free()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Part of a section: a failure is a row, and the section goes on."""
        try:
            yield
        except SectionTimeout:
            raise
        except Exception as error:
            self.row(
                f"{name}: failed", f"{type(error).__name__}: {str(error)[:300]}", trace=traceback.format_exc()[-3000:]
            )
            traceback.print_exc()
        finally:
            free()

    # -- what is measured with

    def sync(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work: Callable[[], Any], *, repeats: int = 3, warmup: int = 1) -> float:
        """Median wall seconds, the device idle before and after."""
        for _ in range(warmup):
            work()
        found = []
        for _ in range(repeats):
            self.sync()
            started = time.perf_counter()
            work()
            self.sync()
            found.append(time.perf_counter() - started)
        return statistics.median(found)

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def reset_peak(self) -> None:
        free()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def matmul_rate(self) -> float:
        """FLOP/s of one large product in the backbone's dtype, measured now."""
        size, dtype = self.sizes.product, getattr(torch, self.sizes.dtype)
        a = torch.randn(size, size, device=self.device).to(dtype)
        b = torch.randn(size, size, device=self.device).to(dtype)
        repeats = 20

        def work() -> None:
            for _ in range(repeats):
                torch.mm(a, b)

        rate = 2.0 * size**3 * repeats / self.seconds(work, repeats=3)
        self.row("matmul rate", rate / 1e12, "TFLOP/s")
        return rate

    def copy_rate(self) -> float:
        """Bytes per second of device memory, read and written, measured now."""
        source = torch.empty(1 << (20 if self.tiny else 31), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate = 2.0 * source.numel() / self.seconds(lambda: target.copy_(source), repeats=5)
        self.row("memory rate", rate / 1e12, "TB/s")
        return rate

    def fuse_noise(self) -> None:
        """Compile the generator of noise and check it: what is compiled must draw the same numbers."""
        from dihal.random import _normals, _round_keys, fuse_normals, normal

        if not self.compile or self.device.type != "cuda":
            return
        ids = torch.arange(5, device=self.device) + 2**33
        plain = torch.stack([normal(3, ids.cpu(), "noise", (64, 30))])[0]
        fuse_normals()
        fused = normal(3, ids, "noise", (64, 30))
        worst = float((fused.cpu() - plain).abs().max())
        again = _normals(ids, _round_keys(3, "noise", self.device), torch.arange(480, device=self.device))
        eager = float((again.view(5, 64, 30).cpu() - plain).abs().max())
        self.row("fused noise, largest difference", worst, bar="<= 1e-4", ok=worst <= 1e-4, eager=eager)

    # -- what is measured

    def backbone(self, blocks: int | None = None, *, tokenizer: Any = None) -> Backbone:
        """A random backbone on the device; the last one is forgotten first."""
        self.held = None
        free()
        started = time.perf_counter()
        made = random_backbone(
            self.sizes.shape, device=self.device, dtype=self.sizes.dtype, blocks=blocks, tokenizer=tokenizer
        )
        self.sync()
        self.row(
            f"backbone made ({'all' if blocks is None else blocks} blocks)", time.perf_counter() - started, "s",
            gib=made.weight_bytes / 2**30,
        )  # fmt: skip
        self.held = made
        return made

    def autocast(self) -> Any:
        if self.device.type != "cuda":
            return nullcontext()
        return torch.autocast("cuda", torch.bfloat16)


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def make_batch(vocab: int, batch: int, length: int, device: torch.device, *, first: int = 0) -> Batch:
    """Random tokens, one document a row."""
    generator = torch.Generator().manual_seed(1 + first)
    ids = torch.randint(2, vocab, (batch, length), generator=generator)
    whole = torch.ones(batch, length, dtype=torch.bool)
    counted = whole.clone()
    counted[:, -1] = False
    documents = torch.arange(batch)[:, None].expand(batch, length).contiguous()
    made = Batch(
        input_ids=ids, attention_mask=whole, document_ids=documents, loss_mask=counted,
        sample_ids=torch.arange(first, first + batch), full=True,
    )  # fmt: skip
    return made.to(device)


class Step:
    """A training step without a loop around it: loss, backward, clipping, AdamW, average."""

    def __init__(
        self, bench: Bench, backbone: Backbone, split: int, net: DenoiserConfig, *, compiled: bool | None = None,
        objective: ObjectiveConfig | None = None,
    ) -> None:  # fmt: skip
        self.bench, self.backbone, self.number = bench, backbone, 0
        self.config = MethodConfig(split=split, denoiser=net, objective=objective or ObjectiveConfig())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.method = build_method(self.config, backbone).to(bench.device)
        self.method.fit_normalisation(backbone, [make_batch(backbone.vocab_size, 2, bench.sizes.length, bench.device)])
        self.optim = OptimConfig()
        self.optimizer = build_optimizer(self.method, self.optim)
        self.ema = Ema(self.method, self.optim.ema)
        self.flops: dict[str, float] = {}
        # After the normalisation, whose batches have another size: one shape, one graph.
        if bench.compile if compiled is None else compiled:
            self.method.compile_parts()
            for block in backbone.blocks[: backbone.held]:
                block.compile()

    def __call__(self, batch: Batch) -> torch.Tensor:
        with self.bench.autocast():
            out = self.method.loss(
                self.backbone, batch, seed=0, step=self.number, batch_index=torch.arange(len(batch), device=self.bench.device),
                global_batch=len(batch),
            )  # fmt: skip
        out.total.backward()
        torch.nn.utils.clip_grad_norm_(self.method.parameters(), self.optim.clip, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.number += 1
        self.flops = out.flops
        return out.total.detach()

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.method.parameters() if p.requires_grad)

    def counted_flops(self, batch: Batch) -> float:
        """FLOPs of the step as metered, but causal attention counted as half of the dense one."""
        tokens, length = batch.input_ids.numel(), batch.input_ids.shape[1]
        net, split, whole = self.config.denoiser, self.config.split or 0, self.backbone.num_blocks
        prefix = self.backbone.flops_per_token(0, split, (length + 1) / 2) * tokens
        unseen = length - (length + 1) / 2
        own = self.flops["denoiser_forward"] + self.flops["denoiser_backward"]
        own -= 3 * 4.0 * net.depth * net.width * unseen * tokens
        total = prefix + own
        if "suffix_forward" in self.flops:
            suffix = self.backbone.flops_per_token(split, whole, (length + 1) / 2) * tokens
            backward = suffix + (suffix - self.backbone.flops_per_token(split, whole, 0) * tokens)
            total += suffix + backward + self.flops["head"]
        return total


def measured(bench: Bench, step: Step, batch: Batch, *, repeats: int = 5, warmup: int = 3) -> tuple[float, int]:
    """Median seconds of a step, and the peak of allocated bytes after warm-up."""
    bench.reset_peak()
    for _ in range(warmup):
        step(batch)
    peak = bench.peak()
    return bench.seconds(lambda: step(batch), repeats=repeats, warmup=0), peak
