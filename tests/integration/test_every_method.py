"""Every method through its life: fit, stop, resume, sample, evaluate. What is registered and not here is an error."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dihal.checkpoint import load_checkpoint
from dihal.config import EvalConfig
from dihal.config.frontier import FrontierConfig
from dihal.errors import UsageError
from dihal.evaluation.frontier.report import report
from dihal.evaluation.frontier.result import FrontierRow, read_row, write_row
from dihal.evaluation.frontier.run import measure_frontier
from dihal.evaluation.masked import main as masked_bound
from dihal.evaluation.result import read_result
from dihal.evaluation.run import evaluate
from dihal.hybrid import load_hybrid
from dihal.io import read_json
from dihal.masked import MaskedLM, load_masked, save_masked
from dihal.masked.attention import full
from dihal.methods import METHODS, AnyMethod, Method
from dihal.restore import load_method
from dihal.spaces.build import SPACES
from dihal.writer import Writer
from tests.integration.conftest import BATCH, Dihal

STEPS = 6
"""Optimiser steps of a whole run (the budget in train.yaml)."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Options beside those of train.yaml."""

    name: str
    words: str
    regime: str = "replace"
    split: int = 2


def replace(name: str, words: str, **rest: int) -> Case:
    return Case(name=f"replace, {name}", words=words, **rest)


def generate(space: str, recovery: str, words: str = "", *, split: int = 2) -> Case:
    """A space with its own head alone, or trained through the frozen stack as well."""
    weights = {"own": "own 1.0 --method.objective.kl 0", "stack": "own 0.5 --method.objective.kl 1.0"}[recovery]
    shared = (
        f"--method.regime generate --method.space {space} --method.denoiser.mask mixed "
        f"--method.denoiser.self_conditioning 0.5 --method.objective.own_time uniform --method.objective.{weights}"
    )
    return Case(
        name=f"generate, {space}, {recovery} {words}", words=f"{shared} {words}", regime="generate", split=split
    )


def masked(name: str, words: str = "") -> Case:
    # train.yaml has options of the other regimes: back to their defaults.
    usual = "--method.denoiser.width 384 --method.denoiser.depth 6 --method.denoiser.heads 6 --method.objective.kl 0"
    shared = (
        "--method.name masked --method.regime mask --method.space tokens --method.time.terminal_fraction 0 "
        f"--method.masked.anneal 0.5 --method.masked.conditional 0.5 {usual}"
    )
    return Case(name=f"mask, {name}", words=f"{shared} {words}", regime="mask", split=0)


LATENT = "--method.latent.dim 8 --method.latent.hidden 32 --method.process.schedule tan"
CASES = [
    *(replace(name, f"--method.name {name}") for name in METHODS if name != "masked"),
    replace("split 0", "", split=0),
    replace("adapters", "--method.lora.rank 2 --method.lora.dropout 0.1"),
    replace("v, self-conditioning", "--method.process.parametrisation v --method.denoiser.self_conditioning 0.5"),
    replace(
        "flow, dropped conditions",
        "--method.process.schedule linear --method.process.parametrisation flow "
        "--method.objective.condition_dropout 0.2 --method.denoiser.dropout 0.1",
    ),
    # Every space with either recovery; splits and schedules with one each.
    *(
        generate(space, recovery, words, split=split)
        for space, recovery, words, split in (
            ("hidden", "own", "", 2),
            ("hidden", "stack", "", 0),
            ("embedding", "own", "--method.process.schedule gumbel", 0),
            ("embedding", "own", "--method.process.warp true --method.embedding.dim 8", 0),
            ("embedding", "stack", "--method.process.warp true --method.embedding.dim 8", 0),
            ("latent", "own", LATENT, 2),
            ("latent", "stack", LATENT, 2),
            ("simplex", "own", "", 0),
            ("simplex", "stack", "", 2),
        )
    ),
    generate("hidden", "stack", "--method.lora.rank 2 --method.objective.condition_dropout 0.2"),
    masked("weights"),
    masked("weights, a token of the vocabulary", "--method.masked.mask_token <unk> --method.masked.weight uniform"),
    masked("adapters", "--method.lora.rank 2 --method.lora.dropout 0.1"),
]


def test_everything_registered_has_a_case() -> None:
    words = [case.words.split() for case in CASES]
    assert set(METHODS) <= {word for line in words for word in line}
    spaces = {line[line.index("--method.space") + 1] for line in words if "--method.space" in line}
    assert spaces - {"tokens"} == set(SPACES) == {"hidden", "embedding", "latent", "simplex"}
    assert {case.regime for case in CASES} == {"replace", "generate", "mask"}
    assert len({case.name + str(case.split) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} @{case.split}")
def test_fit_stop_resume_sample_evaluate(
    case: Case, dihal: Dihal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fitted_and_resumed(case, dihal, tmp_path, monkeypatch)
    if case.regime == "replace":
        sampled_by_the_hybrid(run, tmp_path)
        evaluated_beside_every_control(run, case, tmp_path)
    elif case.regime == "mask":
        written_in_every_order(run)
        saved_as_a_plain_model(run, tmp_path)
        bounded_beside_the_backbone(run, tmp_path)
        evaluated_on_the_frontier(run, tmp_path, ORDERS)
        refused_where_a_causal_model_is_needed(run, tmp_path, "mask")
    else:
        written_by_every_readout(run)
        evaluated_on_the_frontier(run, tmp_path)
        refused_where_a_causal_model_is_needed(run, tmp_path)


# -- fit and resume --------------------------------------------------------------------------------------------------


def fitted_and_resumed(case: Case, dihal: Dihal, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Train in one go and with a stop in between; the weights must be the same, bit for bit."""
    words = [*case.words.split(), "--method.split", case.split, "--trainer.save_every", 2]
    assert dihal("train", *words, "--out", folder / "whole") == 0

    kind = {"replace": Method, "generate": Writer, "mask": MaskedLM}[case.regime]
    loss = kind.loss

    def interrupted(self: AnyMethod, *args: object, step: int, **rest: object) -> object:
        if step == 2 and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, step=step, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(kind, "loss", interrupted)
        with pytest.raises(SystemExit) as stopped:
            dihal("train", *words, "--out", folder / "cut")
    assert stopped.value.code == 143
    assert load_checkpoint(folder / "cut").state["step"] == 3
    torch.manual_seed(99)  # whatever a new process draws
    assert dihal("train", *words, "--out", folder / "cut", "--resume") == 0
    whole, cut = load_checkpoint(folder / "whole"), load_checkpoint(folder / "cut")
    assert whole.state["samples_seen"] == cut.state["samples_seen"] == STEPS * BATCH
    assert whole.names == cut.names
    for name in whole.names:
        left, right = whole.tensors(name), cut.tensors(name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == [], name
        assert all(bool(torch.isfinite(tensor).all()) for tensor in left.values() if tensor.is_floating_point()), name
    return folder / "cut"


# -- replace ---------------------------------------------------------------------------------------------------------


def sampled_by_the_hybrid(run: Path, folder: Path) -> None:
    trained = load_hybrid(run)
    ids = torch.tensor([[0, 5, 9, 30, 41]])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    sampled = trained.generate(ids, **options)
    trained.save_pretrained(folder / "hybrid")
    stored = load_file(folder / "hybrid" / "model.safetensors")
    assert not [name for name in stored if "lora" in name], "adapters are stored once, in peft's format"
    loaded = load_hybrid(folder / "hybrid")
    assert torch.equal(loaded(ids).logits, trained(ids).logits)
    assert torch.equal(loaded.generate(ids, **options), sampled)


def evaluated_beside_every_control(run: Path, case: Case, folder: Path) -> None:
    files = evaluate(
        EvalConfig(
            checkpoints=(str(run),), tokens=400, batch_size=4, steps=(1, 2), samples=2, prompt_tokens=6, new_tokens=4,
            bootstrap=20, out=str(folder / "results"),
        )
    )  # fmt: skip
    found = {result.name: result for result in map(read_result, files)}
    of_split = ("identity", "embedding", "mean-state", "untrained", "oracle", "shuffled", "random-suffix")
    assert set(found) == {
        "backbone", "real-text", "unigram", "bigram", "trigram", "cut", *(f"{name}@{case.split}" for name in of_split)
    }  # fmt: skip
    assert set(EvalConfig.controls) <= {name.split("@")[0] for name in found}, "every control has a row"
    numbers: dict[str, dict[str, float]] = {}
    for name, result in found.items():
        for steps, metrics in result.metrics.items():
            values = {key: metric.value for key, metric in metrics.items() if metric.value is not None}
            assert all(map(math.isfinite, values.values())), name
            if name != "real-text":
                assert {"kl", "nll", "agreement"} <= values.keys(), name
                assert values["kl"] >= 0, name
            numbers[f"{name}/{steps}"] = values
        writes = name in ("backbone", "real-text", "unigram", "bigram", "trigram", "cut")
        assert set(result.text) == (set(result.metrics) if writes else set()), name
        assert all(math.isfinite(text.generative_nll) for text in result.text.values()), name
    at = f"@{case.split}/"
    assert numbers["backbone/0"]["kl"] == numbers[f"identity{at}0"]["kl"] == 0
    assert numbers[f"identity{at}0"]["state_error"] == numbers[f"random-suffix{at}0"]["state_error"] == 0
    assert numbers[f"random-suffix{at}0"]["kl"] > 0
    assert numbers["cut/1"]["kl"] > 0
    error = numbers["cut/1"]["state_error"]
    assert numbers[f"oracle{at}1"]["state_error"] == pytest.approx(error, rel=0.01)
    assert numbers[f"shuffled{at}1"]["state_error"] != pytest.approx(error, rel=0.01)
    if case.split == 0:
        assert numbers[f"embedding{at}0"]["kl"] == 0, "below block 0 there is nothing to leave out"


# -- generate --------------------------------------------------------------------------------------------------------

READOUTS = {
    "own": "readout=own",
    "suffix": "readout=suffix",
    "fused": "readout=fused",
    "projected": "readout=fused project=1.0 temperature_start=0.5",
}


def written_by_every_readout(run: Path) -> None:
    writer, backbone = load_method(run)
    assert isinstance(writer, Writer)
    ids = torch.tensor([[0, 5, 9, 30, 41, 7, 7, 7, 7, 7], [0, 44, 8, 12, 6, 9, 9, 9, 9, 9]])
    known = torch.arange(10).expand(2, 10) < torch.tensor([[5], [4]])
    keys = torch.arange(2)
    options = dataclasses.replace(writer.config.writing, steps=3)
    for readout in ("own", "suffix", "fused"):
        writing = dataclasses.replace(options, readout=readout, temperature=1.0)
        written = writer.write(backbone, ids, known, writing=writing, sample_ids=keys)
        assert torch.equal(written.tokens[known], ids[known]), readout
        assert written.nfe == writer.evaluations(writing) == 3
        assert written.tokens.min() >= 0
        assert written.tokens.max() < backbone.vocab_size
        again = writer.write(backbone, ids, known, writing=writing, sample_ids=keys)
        assert torch.equal(written.tokens, again.tokens), readout
        # What stands in the gap is not looked at.
        other = torch.where(known, ids, 3)
        assert torch.equal(
            writer.write(backbone, other, known, writing=writing, sample_ids=keys).tokens, written.tokens
        )
        assert written.agreement is not None
        assert bool(((written.agreement >= 0) & (written.agreement <= 1)).all())
    filled = writer.write(backbone, ids, known, given=torch.arange(10).expand(2, 10) >= 8, writing=options)
    assert torch.equal(filled.tokens[:, 8:], ids[:, 8:]), "the text after the gap stays"


def evaluated_on_the_frontier(run: Path, folder: Path, ways: dict[str, str] = READOUTS) -> None:
    config = FrontierConfig(
        checkpoints=(str(run),), samples=3, prompt_tokens=6, new_tokens=8, temperatures=(1.0,), steps=(2,),
        variants=tuple(f"{label}: {options}" for label, options in ways.items()), ngrams=(1, 3), mauve=False,
        self_bleu_samples=2, frechet_channels=2, batch_size=3, bootstrap=20, bound_cuts=4, out=str(folder / "frontier"),
    )  # fmt: skip
    files = measure_frontier(config)
    rows = [read_row(path) for path in files]
    trained = [row for row in rows if row.kind == "checkpoint"]
    bounded(config, files, trained)
    assert len(trained) == len(ways)
    assert len(rows) == len(ways) + 4, "backbone, real text and two n-gram samplers"
    for row in rows:
        for point in row.points:
            for name, estimate in point.metrics.items():
                assert estimate.value is None or math.isfinite(estimate.value), (row.name, name)
    for row in trained:
        (point,) = row.points
        assert point.nfe == (2 * 8 // row.writing["block"] if "block" in row.writing else 2)
        assert point.flops_per_token is not None
        assert point.flops_per_token > 0


def bounded(config: FrontierConfig, files: list[Path], trained: list[FrontierRow]) -> None:
    """The likelihood bound is of real text, so the same however a row writes; a file without one gets it."""
    found = [row.details.get("bound") for row in trained]
    if trained[0].space == "simplex" or trained[0].regime == "mask":
        assert found == [None] * len(trained), "no state, or none that is a vector"
        return
    assert 0 < found[0]["value"] < 100
    assert all(bound == found[0] for bound in found)
    report(files, config.out)
    table = (Path(config.out) / "frontier.md").read_text()
    assert table.count(f"| {found[0]['value']:.2f} [") >= len(trained)
    path, *others = [path for path in files if read_row(path).kind == "checkpoint"]
    lost = read_row(path)
    write_row(path, dataclasses.replace(lost, details={}))
    measure_frontier(config)
    again = read_row(path)
    assert again.details["bound"] == found[0]
    assert again.points == lost.points
    # Where other rows of the checkpoint have it, measured alike, it is theirs.
    for other in others:
        row = read_row(other)
        write_row(other, dataclasses.replace(row, details={**row.details, "bound": {**found[0], "seen": True}}))
    for cuts, seen in ((4, True), (5, False)):
        write_row(path, dataclasses.replace(lost, details={}))
        measure_frontier(dataclasses.replace(config, bound_cuts=cuts))
        bound = read_row(path).details["bound"]
        assert (bound["cuts"], "seen" in bound) == (cuts, seen and bool(others))


def refused_where_a_causal_model_is_needed(run: Path, folder: Path, regime: str = "generate") -> None:
    """Teacher forcing and token-by-token generation say what to use in their place."""
    with pytest.raises(UsageError, match="dihal frontier"):
        evaluate(EvalConfig(checkpoints=(str(run),), tokens=200, samples=0, out=str(folder / "refused")))
    assert not (folder / "refused").exists()
    with pytest.raises(UsageError, match=f"regime '{regime}'"):
        load_hybrid(run)


# -- mask ------------------------------------------------------------------------------------------------------------

ORDERS = {"confidence": "order=confidence", "entropy": "order=entropy top_p=0.9", "blocks": "order=random block=4"}


def written_in_every_order(run: Path) -> None:
    method, backbone = load_method(run)
    assert isinstance(method, MaskedLM)
    ids = torch.tensor([[0, 5, 9, 30, 41, 7, 7, 7, 7, 7], [0, 44, 8, 12, 6, 9, 9, 9, 9, 9]])
    known = torch.arange(10).expand(2, 10) < torch.tensor([[5], [4]])
    for order in ("confidence", "entropy", "random"):
        writing = dataclasses.replace(method.config.writing, steps=3, order=order, temperature=1.0)
        written = method.write(backbone, ids, known, writing=writing, sample_ids=torch.arange(2))
        assert torch.equal(written.tokens[known], ids[known])
        assert written.nfe == 3
        assert 0 <= written.tokens.min() <= written.tokens.max() < backbone.vocab_size
        assert method.mask_token_id not in written.tokens[~known].tolist()


def saved_as_a_plain_model(run: Path, folder: Path) -> None:
    method, backbone = load_method(run)
    save_masked(method, backbone, folder / "plain", weights="ema")
    loaded, converted = load_masked(folder / "plain", device="cpu")
    ids = torch.tensor([[0, 5, method.mask_token_id, 30, 41]])
    visible = full(torch.ones_like(ids, dtype=torch.bool))
    left = method.head(backbone, method.features(backbone, ids, visible))
    right = loaded.head(converted, loaded.features(converted, ids, visible))
    assert torch.allclose(left, right[..., : left.shape[-1]], atol=1e-5)


def bounded_beside_the_backbone(run: Path, folder: Path) -> None:
    target = folder / "bound.json"
    options = ["--tokens", "300", "--draws", "2", "--bootstrap", "20", "--out", str(target)]
    assert masked_bound(["--checkpoint", str(run), *options]) == 0
    result = read_json(target)
    for name in ("bound", "backbone_nll", "bound_minus_backbone"):
        value = result[name]
        assert value["low"] <= value["value"] <= value["high"]
    assert result["bound_minus_backbone"]["value"] == pytest.approx(
        result["bound"]["value"] - result["backbone_nll"]["value"]
    )
    assert result["monte_carlo_error"] > 0
    assert masked_bound(["--checkpoint", str(run / "nosuch"), *options]) == 2
