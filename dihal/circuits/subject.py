"""The models of a comparison, opened by name: a causal LM, a hybrid, or a masked diffusion model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dihal.backbone import Backbone, backbone_from_config, load_backbone
from dihal.circuits.adapters import Adapter, open_model
from dihal.circuits.metrics import find_metric
from dihal.circuits.tasks import Task, View, build_task, reveal_orders
from dihal.circuits.tasks.selection import LogitsOf, jointly_solved
from dihal.circuits.types import PairBatch
from dihal.config.circuits import LoadConfig, TaskConfig
from dihal.errors import UsageError
from dihal.io import read_json

__all__ = ["Subject", "logits_of", "open_subject", "subject_of", "task_for", "task_options"]

_MASKED = "masked.json"


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An opened model."""

    adapter: Adapter
    tokenizer: Any
    kind: str
    """`causal`, `hybrid` or `masked`."""
    mask_id: int | None
    """Id of the mask token of a masked diffusion model."""
    about: dict[str, Any]
    """Where it came from and how it is held, for run.json."""
    model: Any
    """What the adapter was opened from."""

    def view(self, steps: int) -> View:
        """How it looks at a pair."""
        if self.kind != "masked":
            return View()
        return View(attention="full", mask_id=self.mask_id, shift=True, steps=steps)


def _is_hybrid(path: Path) -> bool:
    from dihal.hybrid import HybridConfig
    from dihal.restore import is_checkpoint

    if is_checkpoint(path):
        return True
    config = path / "config.json"
    return config.is_file() and read_json(config).get("model_type") == HybridConfig.model_type


def _backbone_of_run(path: Path, load: LoadConfig) -> Backbone | None:
    """The backbone of a training run in the type asked for; None for a saved hybrid, which says itself how it is held."""
    from dihal.checkpoint import load_checkpoint
    from dihal.restore import is_checkpoint

    if not is_checkpoint(path):
        return None
    config = load_checkpoint(path).config.backbone
    return backbone_from_config(replace(config, dtype=load.dtype, device=load.device, attention=load.attention))


def _is_masked_run(path: Path) -> bool:
    from dihal.checkpoint import load_checkpoint
    from dihal.restore import is_checkpoint

    return is_checkpoint(path) and load_checkpoint(path).config.method.regime == "mask"


def _open_masked_run(path: Path, load: LoadConfig) -> tuple[Backbone, int, dict[str, Any]]:
    """The converted model of a training run, its mask token's id, and the backbone it was made from."""
    from dihal.masked import to_causal_lm
    from dihal.restore import load_method

    method, origin = load_method(path, device="cpu", weights=load.weights)
    tokenizer = origin.tokenizer
    model = to_causal_lm(method, origin)
    return (
        load_backbone(model, dtype=load.dtype, device=load.device, attention=load.attention, tokenizer=tokenizer),
        int(method.mask_token_id),
        origin.reference.to_dict(),
    )


def open_subject(model: str, load: LoadConfig) -> Subject:
    """Open a model; what it is shows in its files.

    Raises:
        UsageError: nothing there, or a model whose circuits cannot be read.
    """
    path = Path(model)
    about: dict[str, Any] = {"model": model}
    if (path / _MASKED).is_file():
        from dihal.masked import load_masked

        method, backbone = load_masked(path, device=load.device, dtype=load.dtype, attention=load.attention)
        kind, mask_id, opened = "masked", int(method.mask_token_id), backbone
    elif path.is_dir() and _is_masked_run(path):
        opened, mask_id, origin = _open_masked_run(path, load)
        backbone, kind = opened, "masked"
        # The model in memory knows only where its first weights lay.
        about |= {"name": path.resolve().name, "backbone": origin}
    elif path.is_dir() and _is_hybrid(path):
        from dihal.hybrid import load_hybrid

        opened = load_hybrid(path, backbone=_backbone_of_run(path, load), device=load.device, weights=load.weights)
        backbone, kind, mask_id = opened.backbone, "hybrid", None
        about |= {"split": opened.split}
    else:
        opened = backbone = load_backbone(
            model,
            revision=load.revision,
            dtype=load.dtype,
            device=load.device,
            attention=load.attention,
            trust_remote_code=load.trust_remote_code,
        )
        kind, mask_id = "causal", None
    return subject_of(opened, backbone, kind=kind, mask_id=mask_id, about=about)


def subject_of(
    model: Any,
    backbone: Any,
    *,
    kind: str = "causal",
    mask_id: int | None = None,
    about: dict[str, Any] | None = None,
) -> Subject:
    """A subject of something that is open already."""
    adapter = open_model(model)
    about = {"name": adapter.name, "backbone": backbone.reference.to_dict(), **(about or {})}
    adapter.name = about["name"]
    return Subject(
        adapter=adapter,
        tokenizer=backbone.tokenizer,
        kind=kind,
        mask_id=mask_id,
        model=model,
        about={
            **about,
            "kind": kind,
            "backbone_fingerprint": backbone.fingerprint(),
            "tokenizer_fingerprint": backbone.tokenizer_fingerprint,
            **({"bridge_fingerprint": _digest(model.bridge)} if kind == "hybrid" else {}),
            "dtype": str(adapter.dtype).removeprefix("torch."),
            "device": str(adapter.device),
            "attention": backbone.attention,
        },
    )


def _digest(module: torch.nn.Module) -> str:
    """Digest of all weights."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def logits_of(subject: Subject, noise_seed: int = 0) -> LogitsOf:
    """Logits of clean prompts at their targets, on the CPU."""
    adapter = subject.adapter

    @torch.no_grad()
    def logits(batch: PairBatch) -> torch.Tensor:
        here = batch.to(adapter.device)
        with adapter.session():
            keys = {"sample_ids": here.ids, "noise_seed": noise_seed}
            state = adapter.states(here.clean, adapter.seam, attention=here.attention, **keys)
            found = adapter.logits(state, adapter.seam, here.positions, attention=here.attention)
        return found.float().cpu()

    return logits


def task_options(options: tuple[str, ...]) -> dict[str, Any]:
    """`KEY=VALUE` words as keyword arguments; whole numbers become numbers.

    Raises:
        UsageError: a word without `=`.
    """
    found: dict[str, Any] = {}
    for word in options:
        name, equals, value = word.partition("=")
        if not equals:
            raise UsageError(f"task options are KEY=VALUE, got {word!r}.")
        found[name.strip()] = int(value) if value.strip().lstrip("-").isdigit() else value.strip()
    return found


def task_for(subject: Subject, config: TaskConfig, load: LoadConfig) -> Task:
    """The task as a model sees it: words checked in the partners' tokenizers too, selected and ordered as asked.

    Raises:
        UsageError: options that do not fit, or pairs that too few models solve.
    """
    find_metric(config.metric)
    if config.n < 2 or config.test < 1 or config.batch_size < 1 or config.pool < 1:
        raise UsageError("task.n must be at least 2, task.test, task.batch_size and task.pool at least 1.")
    partners = [open_subject(name, load) for name in config.partners]
    everyone = [subject, *partners]
    task = build_task(
        config.name,
        [one.tokenizer for one in everyone],
        view=subject.view(config.reveal_steps),
        batch_size=config.batch_size,
        **task_options(config.options),
    )
    if config.solved:
        tasks = [task.for_model(i, one.view(config.reveal_steps)) for i, one in enumerate(everyone)]
        wanted = {"discovery": config.n, "test": config.test}
        pool = config.pool * max(wanted.values())
        task = jointly_solved(tasks, [logits_of(one) for one in everyone], wanted, pool=pool, seed=config.seed)[0]
    if config.reveal == "confidence" and subject.kind == "masked":
        orders = {}
        for split, n in (("discovery", config.n), ("test", config.test)):
            orders |= reveal_orders(task, logits_of(subject), n, seed=config.seed, split=split)
        task = task.revealing(orders)
    return task
