"""The command line: `dihal score | train | evaluate | leaderboard | generate`.

Each command is a configuration dataclass and a function of it; the same options exist from Python.
A :class:`~dihal.errors.UsageError` becomes one message on standard error and exit status 2; anything
else is a defect and keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dihal.config import EvalConfig, GenerateConfig, LeaderboardConfig, ScoreRunConfig, TrainConfig
from dihal.errors import UsageError, unknown_name

__all__ = ["COMMANDS", "main", "run_command"]


def _score(config: ScoreRunConfig) -> None:
    from rich.console import Console

    from dihal.backbone import backbone_from_config
    from dihal.data import read_documents, split_documents
    from dihal.geometry import score_layers
    from dihal.io import ensure_dir

    ensure_dir(config.out)
    train, _ = split_documents(read_documents(config.data), config.data)
    backbone = backbone_from_config(config.backbone)
    report = score_layers(backbone, [document.text for document in train], config.score, progress=True)
    folder = report.save(config.out)
    console = Console()
    console.print(report.table(console.width))
    console.print(
        f"split {report.selected_split} selected; wrote scores.json, .png and .svg to {folder}", highlight=False
    )


def _train(config: TrainConfig) -> None:
    from rich.console import Console

    from dihal.training.run import train

    folder = train(config)
    if not config.dry_run and _first_process():
        Console().print(f"wrote {folder}", highlight=False)


def _first_process() -> bool:
    return os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")) == "0"


def _evaluate(config: EvalConfig) -> None:
    from dihal.evaluation import evaluate

    if not _first_process():
        return  # evaluation is one process; under torchrun the others have nothing to do
    evaluate(config)
    if config.leaderboard:
        _show_leaderboard(LeaderboardConfig(results=(config.out,), out=config.out))


def _show_leaderboard(config: LeaderboardConfig) -> None:
    from rich.console import Console

    from dihal.evaluation.leaderboard import leaderboard

    console = Console()
    console.print(leaderboard(config, width=console.width))
    if config.out is not None:
        console.print(f"wrote leaderboard.html, .md, .csv, .png and .svg to {config.out}", highlight=False)


def _generate(config: GenerateConfig) -> None:
    import torch
    from rich.console import Console

    from dihal.backbone import backbone_from_config
    from dihal.hybrid import load_hybrid

    if not config.checkpoint or not config.prompt:
        raise UsageError("dihal generate needs --checkpoint FOLDER and --prompt TEXT.")
    backbone = None if config.backbone is None else backbone_from_config(config.backbone)
    hybrid = load_hybrid(config.checkpoint, backbone=backbone)
    backbone = hybrid.backbone
    ids = backbone.tokenizer(config.prompt, add_special_tokens=False).input_ids
    start = backbone.start_token_id
    ids = torch.tensor([([] if start is None else [start]) + ids], device=backbone.device)
    options: dict[str, Any] = {
        "max_new_tokens": config.new_tokens,
        "do_sample": config.temperature > 0,
        "attention_mask": torch.ones_like(ids),
        "pad_token_id": backbone.end_token_id,
    }
    if config.temperature > 0:
        options |= {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    console = Console(highlight=False)
    runs: list[tuple[str, Any, dict[str, Any]]] = [
        (f"hybrid, split {hybrid.split}", hybrid, {"steps": config.steps, "sampler_seed": config.seed})
    ]
    if config.compare:
        runs.append(("backbone", backbone.model, {}))
    for name, model, more in runs:
        torch.manual_seed(config.seed)
        out = model.generate(ids, **options, **{k: v for k, v in more.items() if v is not None})
        if config.compare:
            console.rule(name)
        console.print(backbone.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), markup=False)


@dataclass(frozen=True)
class Command:
    """A configuration and what is done with it."""

    config: type
    run: Callable[[Any], None]


COMMANDS: dict[str, Command] = {
    "score": Command(ScoreRunConfig, _score),
    "train": Command(TrainConfig, _train),
    "evaluate": Command(EvalConfig, _evaluate),
    "leaderboard": Command(LeaderboardConfig, _show_leaderboard),
    "generate": Command(GenerateConfig, _generate),
}
"""Command name -> configuration and function."""

_USAGE = """usage: dihal COMMAND [options]

Where should continuous diffusion enter a pretrained language model?

commands:
  score        score the hidden layers of a backbone by geometry
  train        train a diffusion bridge that replaces the lower blocks
  evaluate     measure checkpoints beside the rows that are always there
  leaderboard  rank result files that may be compared
  generate     continue a prompt with a trained hybrid

`dihal COMMAND --help` lists the options of a command with their defaults."""


def run_command(name: str, argv: Sequence[str]) -> int:
    """Run one command; return the exit status (0, or 2 for input that the user can fix)."""
    from dihal.config.cli import parse

    command = COMMANDS[name]
    try:
        command.run(parse(command.config, argv, prog=f"dihal {name}"))
    except UsageError as error:
        from rich.console import Console

        Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_escape(str(error))}")
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; what was complete is kept, the same command goes on where that is possible.", file=sys.stderr
        )
        return 130
    return 0


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script."""
    words = list(sys.argv[1:] if argv is None else argv)
    # No number below depends on them, and their notices would bury what does matter.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not words or words[0] in ("-h", "--help"):
        print(_USAGE)
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from dihal import __version__

        print(f"dihal {__version__}")
        sys.exit(0)
    if words[0] not in COMMANDS:
        print(f"error: {unknown_name('command', words[0], COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_command(words[0], words[1:]))
