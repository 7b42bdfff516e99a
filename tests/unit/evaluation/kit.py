"""A tiny trained run on disk (real checkpoint, real data, real backbone folder), and results made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dihal.backbone import load_backbone
from dihal.checkpoint import save_checkpoint
from dihal.config import (
    BackboneConfig,
    BudgetConfig,
    DataConfig,
    DenoiserConfig,
    LoraConfig,
    MethodConfig,
    ObjectiveConfig,
    TrainConfig,
)
from dihal.data.module import TextDataModule
from dihal.evaluation.assemble import estimates
from dihal.evaluation.bootstrap import document_weights
from dihal.evaluation.definitions import METRIC_VERSION, SUMS
from dihal.evaluation.result import SCHEMA, BudgetTerms, Comparable, Cost, Result, TextResult, TextTerms
from dihal.methods import build_method
from dihal.training.budget import Spent
from tests.kit import tiny_model, tiny_tokenizer

LENGTH = 32


def backbone_folder(folder: Path, *, seed: int = 0, family: str = "llama") -> Path:
    if not folder.exists():
        tiny_model(family, seed=seed, vocab=270).save_pretrained(folder)
        tiny_tokenizer(270).save_pretrained(folder)
    return folder


def text_file(path: Path, *, seed: int = 0, documents: int = 40) -> Path:
    generator = np.random.default_rng(seed)
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
    lines = []
    for index in range(documents):
        chosen = generator.choice(words, size=int(generator.integers(15, 40)))
        lines.append(json.dumps({"text": f"document {seed}-{index} " + " ".join(chosen)}))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def train_config(
    root: Path, *, split: int = 2, method: str = "bridge", backbone: str = "backbone", lora: int = 0, **data: Any
) -> TrainConfig:
    return TrainConfig(
        backbone=BackboneConfig(id=str(backbone_folder(root / backbone)), device="cpu"),
        data=DataConfig(
            **{"source": str(root / "text.jsonl"), "sequence_length": LENGTH, "validation_fraction": 0.4, **data}
        ),
        method=MethodConfig(
            name=method,
            split=split,
            denoiser=DenoiserConfig(width=32, depth=1, heads=2),
            lora=LoraConfig(rank=lora),
            objective=ObjectiveConfig(kl=0.1 if lora else 0.0),
        ),
        budget=BudgetConfig(tokens=4096),
    )


def make_run(
    root: Path, name: str = "run", *, steps: int = 40, config: TrainConfig | None = None, **options: Any
) -> Path:
    """Train a little and save a checkpoint as training does."""
    if not (root / "text.jsonl").exists():
        text_file(root / "text.jsonl")
    config = config or train_config(root, **options)
    backbone = load_backbone(config.backbone.id, device="cpu")
    data = TextDataModule(
        config.data,
        tokenizer=backbone.tokenizer,
        tokenizer_fingerprint=backbone.tokenizer_fingerprint,
        start_token_id=backbone.start_token_id,
        end_token_id=backbone.end_token_id,
    )
    torch.manual_seed(0)
    method = build_method(config.method, backbone)
    method.attach(backbone)
    batches = iter(data.train_dataloader())
    method.fit_normalisation(backbone, [next(batches) for _ in range(4)])
    optimiser = torch.optim.AdamW(method.parameters(), lr=3e-3)
    seen, spent = 0, Spent()
    for step in range(steps):
        batch = next(batches)
        out = method.loss(
            backbone, batch, seed=0, step=step, batch_index=torch.arange(len(batch)), global_batch=len(batch)
        )
        optimiser.zero_grad()
        out.total.backward()
        optimiser.step()
        seen += out.tokens
        spent.add_flops(out.flops)
    folder = root / name
    save_checkpoint(
        folder,
        tensors={"model": method.state_dict(), "ema": dict(method.named_parameters())},
        state={
            **spent.state(),
            "step": steps,
            "tokens": seen,
            "samples_seen": steps * config.data.batch_size,
            "seconds": 1.5,
            "peak_memory": 10**9,
            "budget": {"unique_tokens": min(seen, len(data.stream))},
        },
        config=dataclasses.asdict(config),
        manifest_extra={
            "backbone": dataclasses.asdict(backbone.reference),
            "split": config.method.split,
            "reads_from": config.method.split,
            "backbone_fingerprint": backbone.fingerprint(config.method.split),
            "tokenizer_fingerprint": backbone.tokenizer_fingerprint,
            "data_fingerprint": data.fingerprint(),
        },
    )
    return folder


COMPARABLE = Comparable(
    metric_version=METRIC_VERSION,
    score_type="teacher_forced",
    tokenizer_fingerprint="tok",
    backbone_fingerprint="bb",
    sequence_length=256,
    tokens=8192,
    data_fingerprint="data",
    budget=None,
    training=None,
)

TRAINING = TextTerms(data_fingerprint="text", sequence_length=256, seed=0, splice=0.0, splice_length=32)


def budget_terms(name: str, **changes: Any) -> BudgetTerms:
    """A budget of tokens alone."""
    given = {"name": name, "tokens": 30_000_000, "seconds": None, "flops": None, "hardware": None}
    return BudgetTerms(**{**given, **changes})


def sums(kl: float, *, error: float | None = None, documents: int = 24, seed: int = 0) -> dict[str, np.ndarray]:
    """Per-document sums with a given KL and state error, noisy over documents."""
    shared = np.random.default_rng(7)
    tokens = shared.integers(100, 500, documents).astype(float)
    own = np.random.default_rng(seed)
    noise = np.exp(0.2 * own.standard_normal(documents))
    table = {name: np.zeros(documents) for name in SUMS}
    table |= {"tokens": tokens, "bytes": 4 * tokens, "kl": kl * tokens * noise}
    table |= {"nll": 3.4 * tokens * np.exp(0.05 * shared.standard_normal(documents)) + 0.8 * table["kl"]}
    table |= {"agreement": tokens * np.exp(-kl), "margin": tokens * (1.5 - kl)}
    if error is not None:
        table |= {"state_tokens": tokens - 1, "sink_tokens": np.ones(documents), "state_variance": 50.0 * tokens}
        table |= {"state_squared_error": error * 50.0 * tokens * noise, "state_cosine": (tokens - 1) * (1 - error / 2)}
        table |= {"sink_energy": np.full(documents, 1e6), "sink_squared_error": np.full(documents, error)}
    return table


def text(perplexity: float, entropy: float) -> TextResult:
    return TextResult(
        samples=16, prompt_tokens=32, new_tokens=32, temperature=1.0, scorer="embedded", self_graded=True,
        scored_tokens=512, generative_nll=float(np.log(perplexity)), generative_perplexity=perplexity, entropy=entropy,
        entropy_pooled=entropy + 1.5, dist_1=0.4, dist_2=0.8, dist_3=0.9, dist_4=0.95, rep_2=0.1, rep_3=0.05,
        rep_4=0.02, degenerate_rate=0.0, tokens_per_second=120.0,
        texts=["The prompt goes here ||| and <b>this</b> is what it became."],
    )  # fmt: skip


def make_result(
    name: str,
    kl: dict[int, float],
    *,
    kind: str = "checkpoint",
    error: dict[int, float] | None = None,
    split: int | None = 3,
    texts: dict[int, TextResult] | None = None,
    seed: int = 0,
    parameters: int | None = None,
    budget: str | BudgetTerms | None = None,
    **comparable: Any,
) -> Result:
    """A valid result whose metrics follow from its per-document sums, as in a real one."""
    weights = document_weights(24, 300, 0)
    reference = sums(0.0)
    tables = {
        str(steps): sums(value, error=None if error is None else error[steps], seed=seed + steps)
        for steps, value in kl.items()
    }
    terms = budget_terms(budget) if isinstance(budget, str) else budget
    training = None if terms is None else TRAINING
    agreed = dataclasses.replace(COMPARABLE, **{"budget": terms, "training": training, **comparable})
    return Result(
        schema=SCHEMA,
        name=name,
        method="bridge" if kind == "checkpoint" else name.split("@")[0],
        kind=kind,
        split=split,
        regime="replace",
        metrics={steps: estimates(table, reference, weights, 0.95) for steps, table in tables.items()},
        per_document={steps: {key: value.tolist() for key, value in table.items()} for steps, table in tables.items()},
        documents=[f"d{index}" for index in range(24)],
        text={str(steps): value for steps, value in (texts or {}).items()},
        confidence=0.95,
        bootstrap=300,
        bootstrap_seed=0,
        reference="backbone",
        comparable=agreed,
        cost=Cost(
            trainable_parameters=parameters,
            frozen_parameters=107_000_000,
            diffused_tokens=30_000_000 if parameters else None,
            unique_tokens=5_000_000 if parameters else None,
            train_flops={"denoiser_forward": 1e15, "denoiser_backward": 2e15} if parameters else None,
            train_seconds=600.0 if parameters else None,
            train_peak_memory=10**9 if parameters else None,
            train_hardware="1 x NVIDIA H200" if parameters else None,
            tuning_trials=3 if parameters else None,
            nfe={str(steps): steps for steps in kl if steps},
            sampling_flops={str(steps): 1e8 * (1 + steps) for steps in kl},
            evaluation_seconds={},
        ),
        checkpoint=None,
        config={"tokens": 8192},
        config_hash="0123456789abcdef",
        train_config={"seed": 0} if kind == "checkpoint" else None,
        train_config_hash="fedcba9876543210" if kind == "checkpoint" else None,
        backbone={"id": "embedded", "revision": "0.1.2", "family": "llama", "dtype": "float32"},
        details={"notes": []},
        provenance={
            "commit": "0" * 40,
            "dirty": False,
            "versions": {"torch": "2.13.0"},
            "hardware": {"cpus": 2, "gpus": []},
            "command": "dihal evaluate --config demo.yaml",
            "time": "2026-01-01T00:00:00+00:00",
        },
        command="dihal evaluate --config demo.yaml",
    )


def demo_results() -> list[Result]:
    """A table as the demo makes it."""
    m = make_result
    return [
        m("backbone", {0: 0.0}, kind="bound", split=None, texts={0: text(41.0, 3.3)}),
        m("identity@3", {0: 0.0}, kind="bound", error={0: 0.0}),
        m("bridge-wide", {1: 0.031, 4: 0.036, 16: 0.044}, error={1: 0.033, 4: 0.035, 16: 0.05}, seed=1,
          parameters=80_000_000, budget="b1", texts={1: text(44.2, 3.3), 4: text(46.0, 3.25)}),
        m("bridge-narrow", {1: 0.033, 4: 0.039}, error={1: 0.034, 4: 0.037}, seed=2, parameters=20_000_000,
          budget="b1", texts={1: text(47.1, 3.28)}),
        m("bridge-split6", {1: 0.11, 4: 0.12}, error={1: 0.07, 4: 0.08}, split=6, seed=3, parameters=20_000_000,
          budget="b1"),
        m("embedding@3", {0: 4.2}, kind="control", error={0: 1.4}, seed=4),
        m("mean-state@3", {0: 5.1}, kind="control", error={0: 1.0}, seed=5),
        m("untrained@3", {1: 5.1}, kind="control", error={1: 1.0}, seed=5, parameters=80_000_000),
        m("unigram", {0: 3.6}, kind="control", split=None, seed=6, texts={0: text(2200.0, 3.4)}),
    ]  # fmt: skip
