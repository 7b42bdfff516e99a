"""The command line: `dihal score | train | evaluate | leaderboard | generate | sweep | frontier | circuits`.

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

from dihal.config import (
    CircuitsCompareConfig,
    CircuitsHybridConfig,
    CircuitsPlotConfig,
    CircuitsRunConfig,
    CircuitsSelftestConfig,
    EvalConfig,
    FrontierConfig,
    GenerateConfig,
    LeaderboardConfig,
    ScoreRunConfig,
    SweepConfig,
    TrainConfig,
)
from dihal.errors import UsageError, unknown_name

__all__ = ["COMMANDS", "main", "run_command"]


def _score(config: ScoreRunConfig) -> None:
    from rich.console import Console

    from dihal.geometry.command import run_score

    done = run_score(config)
    if done is None:
        return  # another process than the first
    report, folder = done
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
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK")  # torchrun, srun, Lightning
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def _evaluate(config: EvalConfig) -> None:
    from dihal.evaluation import evaluate

    if not _first_process() and "RANK" not in os.environ:
        return  # not started by torchrun: the processes cannot share the work
    evaluate(config)
    if config.leaderboard and _first_process():
        _show_leaderboard(LeaderboardConfig(results=(config.out,), out=config.out))


def _show_leaderboard(config: LeaderboardConfig) -> None:
    from rich.console import Console

    from dihal.evaluation.leaderboard import leaderboard

    console = Console()
    console.print(leaderboard(config, width=console.width))
    if config.out is not None:
        console.print(f"wrote leaderboard.html, .md, .csv, .png and .svg to {config.out}", highlight=False)


def _sweep(config: SweepConfig) -> None:
    from dihal.sweep import sweep

    if not _first_process():
        return  # one process
    sweep(config)


def _frontier(config: FrontierConfig) -> None:
    from rich.console import Console

    from dihal.evaluation.frontier import frontier

    if not _first_process():
        return
    table = frontier(config)
    console = Console()
    console.print(table)
    console.print(f"wrote the rows, tables, figure and page to {config.out}", highlight=False)


def _generate(config: GenerateConfig) -> None:
    import torch
    from rich.console import Console

    from dihal.backbone import backbone_from_config
    from dihal.hybrid import load_hybrid
    from dihal.masked import MaskedLM
    from dihal.restore import is_checkpoint, load_method
    from dihal.writer import Writer

    writers = (Writer, MaskedLM)
    if not config.checkpoint or not config.prompt:
        raise UsageError("dihal generate needs --checkpoint FOLDER and --prompt TEXT.")
    backbone = None if config.backbone is None else backbone_from_config(config.backbone)
    source: Any = None
    if is_checkpoint(config.checkpoint):
        source, backbone = load_method(config.checkpoint, backbone=backbone)
    if not isinstance(source, writers):
        source = load_hybrid(config.checkpoint, backbone=backbone)
        backbone = source.backbone
    assert backbone is not None
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

    def with_method() -> Any:
        if isinstance(source, writers):
            return _written(source, backbone, ids, config)
        more = {"steps": config.steps, "sampler_seed": config.seed}
        return source.generate(ids, **options, **{k: v for k, v in more.items() if v is not None})

    console = Console(highlight=False)
    kind = (
        f"{source.config.space}, split {source.split}"
        if isinstance(source, writers)
        else f"hybrid, split {source.split}"
    )
    runs: list[tuple[str, Callable[[], Any]]] = [(kind, with_method)]
    if config.compare:
        runs.append(("backbone", lambda: backbone.model.generate(ids, **options)))
    for name, run in runs:
        torch.manual_seed(config.seed)
        out = run()
        if config.compare:
            console.rule(name)
        console.print(backbone.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True), markup=False)


def _written(writer: Any, backbone: Any, ids: Any, config: GenerateConfig) -> Any:
    """The prompt and what a method of the regime `generate` or `mask` writes after it, up to its end."""
    import dataclasses

    import torch

    writing = dataclasses.replace(writer.config.writing, seed=config.seed, temperature=config.temperature)
    if config.steps is not None:
        writing = dataclasses.replace(writing, steps=config.steps)
    room = torch.zeros(1, config.new_tokens, dtype=ids.dtype, device=ids.device)
    known = torch.cat([torch.ones_like(ids), room], dim=1).bool()
    text = writer.write(
        backbone,
        torch.cat([ids, room], dim=1),
        known,
        writing=writing,
        end=backbone.end_token_id is not None,
        compare=False,
    )
    return text.tokens[:, : int(text.lengths[0])]


def _circuits_run(config: CircuitsRunConfig) -> None:
    from dihal.circuits.run import run

    run(config)


def _circuits_compare(config: CircuitsCompareConfig) -> None:
    from dihal.circuits.contrast import compare

    compare(config)


def _circuits_hybrid(config: CircuitsHybridConfig) -> None:
    from dihal.circuits.contrast import hybrid

    hybrid(config)


def _circuits_plot(config: CircuitsPlotConfig) -> None:
    from dihal.circuits.commands import plot

    plot(config)


def _circuits_selftest(config: CircuitsSelftestConfig) -> None:
    from dihal.circuits.commands import selftest

    if not selftest():
        raise UsageError("a claim of the self-test does not hold on this machine: do not trust its circuits.")


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
    "sweep": Command(SweepConfig, _sweep),
    "frontier": Command(FrontierConfig, _frontier),
    "circuits run": Command(CircuitsRunConfig, _circuits_run),
    "circuits compare": Command(CircuitsCompareConfig, _circuits_compare),
    "circuits hybrid": Command(CircuitsHybridConfig, _circuits_hybrid),
    "circuits plot": Command(CircuitsPlotConfig, _circuits_plot),
    "circuits selftest": Command(CircuitsSelftestConfig, _circuits_selftest),
}
"""Command name (one word, or a group and a word) -> configuration and function."""

_USAGE = """usage: dihal COMMAND [options]

Where should continuous diffusion enter a pretrained language model?

commands:
  score        score the hidden layers of a backbone by geometry
  train        train a diffusion bridge that replaces the lower blocks
  evaluate     measure checkpoints beside the rows that are always there
  leaderboard  rank result files that may be compared
  generate     continue a prompt with a trained hybrid
  sweep        train at every split and compare what predicts the outcome
  frontier     likelihood of written text against its entropy
  circuits     which edges solve a task, and whether two models use the same:
               circuits run | compare | hybrid | plot | selftest

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
        return getattr(error, "exit_status", 2)
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
    grouped = " ".join(words[:2])
    if grouped in COMMANDS:
        sys.exit(run_command(grouped, words[2:]))
    if words[0] not in COMMANDS:
        asked = grouped if any(name.startswith(f"{words[0]} ") for name in COMMANDS) else words[0]
        print(f"error: {unknown_name('command', asked, COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    sys.exit(run_command(words[0], words[1:]))
