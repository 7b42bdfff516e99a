"""On a CUDA device: `python -m pytest tests/gpu -m gpu`. Nothing here runs without one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dihal.backbone import Backbone, load_backbone
from dihal.checkpoint import load_checkpoint
from dihal.config import DenoiserConfig, MethodConfig, ObjectiveConfig
from dihal.config.spaces import LatentConfig, WritingConfig
from dihal.evaluation.result import read_result
from dihal.hybrid import load_hybrid
from dihal.methods import Method, build_method
from dihal.training.logs import read_records
from dihal.writing.bound import nll_bound
from dihal.writing.static import room_of
from tests.integration.conftest import BATCH, STEP, Dihal
from tests.kit import tiny_model
from tests.unit.test_methods import make_batch

# cuBLAS reads it when the first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ON_GPU = ("--trainer.accelerator", "gpu", "--backbone.device", "auto", "--trainer.precision", "bf16-mixed")
DTYPES = ["float32", "bfloat16"]


@pytest.fixture
def _deterministic() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("_deterministic")
def test_resume_is_bit_identical(dtype: str, dihal: Dihal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = (*ON_GPU, "--backbone.dtype", dtype, "--method.split", 2, "--method.denoiser.dropout", 0.1)
    assert dihal("train", *words, "--out", tmp_path / "whole") == 0
    loss = Method.loss

    def interrupted(self: Method, *args: object, step: int, **rest: object) -> object:
        if step == 2 and self.training:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, *args, step=step, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Method, "loss", interrupted)
        with pytest.raises(SystemExit) as stopped:
            dihal("train", *words, "--out", tmp_path / "cut")
    assert stopped.value.code == 143
    assert load_checkpoint(tmp_path / "cut").state["step"] == 3
    torch.manual_seed(99)
    assert dihal("train", *words, "--out", tmp_path / "cut", "--resume") == 0
    whole, cut = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "cut")
    assert whole.state["samples_seen"] == cut.state["samples_seen"] == 6 * BATCH
    for name in whole.names:
        left, right = whole.tensors(name), cut.tensors(name)
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_train_evaluate_generate(dtype: str, dihal: Dihal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "bridge"
    words = (*ON_GPU, "--backbone.dtype", dtype, "--method.split", 2, "--budget.tokens", 60 * STEP)
    assert dihal("train", *words, "--out", run) == 0
    losses = [record["loss"] for record in read_records(run / "metrics.jsonl") if record["kind"] == "train"]
    assert sum(losses[-5:]) < sum(losses[:5])
    checkpoint = load_checkpoint(run)
    assert checkpoint.config.trainer.precision == "bf16-mixed"
    assert all(t.dtype == torch.float32 for t in checkpoint.tensors("ema").values())

    words = (
        "--checkpoints",
        run,
        "--samples",
        2,
        "--prompt_tokens",
        6,
        "--new_tokens",
        6,
        "--out",
        tmp_path / "results",
    )
    assert dihal("evaluate", *words) == 0
    found = {path.stem: read_result(path) for path in (tmp_path / "results").glob("*.json")}
    assert found["identity@2"].metrics["0"]["kl"].value == 0
    assert found["identity@2"].metrics["0"]["agreement"].value == 1
    trained, untrained = found["bridge"].metrics["1"]["kl"].value, found["untrained@2"].metrics["1"]["kl"].value
    assert trained is not None
    assert untrained is not None
    assert 0 < trained < untrained

    capsys.readouterr()
    words = ("--checkpoint", run, "--prompt", "the state", "--new_tokens", 6, "--compare")
    assert dihal("generate", *words) == 0
    first = capsys.readouterr().out
    assert "hybrid, split 2" in first
    assert dihal("generate", *words) == 0
    assert capsys.readouterr().out == first


def test_cpu_and_gpu_agree(dihal: Dihal, tmp_path: Path) -> None:
    """The same checkpoint, the same noise (counters, not generators): the same logits up to the order of sums."""
    assert dihal("train", "--method.split", 2, "--out", tmp_path / "run") == 0
    ids = torch.tensor([[0, 5, 9, 30, 41]])
    with torch.no_grad():
        expected = load_hybrid(tmp_path / "run", device="cpu")(ids).logits
        found = load_hybrid(tmp_path / "run", device="cuda")(ids.cuda()).logits
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


def test_a_step_while_compiled(dihal: Dihal, tmp_path: Path) -> None:
    words = (*ON_GPU, "--method.split", 2, "--trainer.compile", "--out", tmp_path / "run")
    if os.environ.get("DIHAL_NO_JAXTYPING") != "1":
        pytest.skip("run-time shape checks break graphs: set DIHAL_NO_JAXTYPING=1")
    assert dihal("train", *words) == 0
    assert load_checkpoint(tmp_path / "run").state["step"] == 6


def test_a_device_that_is_not_there(dihal: Dihal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = torch.cuda.device_count()
    assert dihal("train", *ON_GPU, "--method.split", 2, "--trainer.devices", count + 1, "--out", tmp_path / "run") == 2
    assert f"this machine has {count} GPUs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def moved_writer(config: MethodConfig, backbone: Backbone) -> Any:
    """A writer that has moved from where it starts, so that what it writes depends on all it reads."""
    writer = build_method(config, backbone).to("cuda").eval()
    with torch.no_grad():
        for parameter in writer.denoiser.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    writer.fit_normalisation(backbone, [make_batch(3, 40).to("cuda")])
    return writer


WAYS = {
    "whole": {},
    "blocks": {"block": 8},
    "projected": {"block": 8, "readout": "fused", "project": 0.5},
    "drawn": {"block": 8, "readout": "suffix", "project": 1.0, "temperature": 1.0, "sampler": "ancestral"},
    "guided": {"block": 8, "guidance": 1.5},
    "committed": {"block": 8, "commit": "confidence", "sampler": "heun"},
    "bf16": {"block": 8, "readout": "fused", "precision": "bfloat16"},
}


@pytest.mark.parametrize("way", sorted(WAYS))
@pytest.mark.parametrize("space", ["hidden", "embedding", "simplex"])
@pytest.mark.filterwarnings("error:this cannot be a CUDA graph")
def test_writing_by_graphs_writes_the_same(space: str, way: str) -> None:
    """Captured blocks are those that run op by op: the same tokens, and they are captured, not run."""
    backbone = load_backbone(tiny_model(), device="cuda")
    config = MethodConfig(
        regime="generate", space=space, split=0 if space == "embedding" else 2,
        denoiser=DenoiserConfig(width=32, depth=2, heads=4, mask="mixed", norm="rms", self_conditioning=0.5),
        objective=ObjectiveConfig(state=float(space == "hidden"), own=1.0, own_time="uniform", condition_dropout=0.1),
    )  # fmt: skip
    writer = moved_writer(config, backbone)
    known = (torch.arange(40, device="cuda") < 8).expand(3, -1)
    # Three texts: run, captured where the first had only one of a kind, replayed.
    found: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for static, texts in found.items():
        writing = WritingConfig(steps=6, static=static, **WAYS[way])  # type: ignore[arg-type]
        for number in range(3):
            ids, samples = make_batch(3, 40, seed=number).to("cuda").input_ids, 10 * number + torch.arange(3)
            made = writer.write(backbone, ids, known, writing=writing, sample_ids=samples, end=False)
            texts.append(made.tokens)
    room = room_of(writer)
    assert room is not None
    assert room.graphs is not None
    assert not room.graphs.failed
    kinds = {key[0] for key in room.graphs.captured}  # type: ignore[index]
    assert {"extend"} | ({"suffix"} if space == "simplex" else {"block"}) <= kinds
    # Other kernels sum in another order; in bf16 more tokens are a tie.
    plain, graphs = torch.stack(found[False]), torch.stack(found[True])
    assert (plain == graphs).float().mean() > (0.8 if way == "bf16" else 0.98)


@pytest.mark.parametrize("space", ["hidden", "latent", "embedding"])
def test_the_likelihood_bound_is_that_of_a_cpu(space: str) -> None:
    """Same noise, same levels: only the order of sums differs; the denoiser in bf16 stays near."""
    backbone = load_backbone(tiny_model(), device="cuda")
    config = MethodConfig(
        regime="generate", space=space, split=0 if space == "embedding" else 2,
        denoiser=DenoiserConfig(width=32, depth=2, heads=4, mask="mixed", norm="rms", self_conditioning=0.5),
        objective=ObjectiveConfig(state=float(space != "embedding"), own=1.0, own_time="uniform", read=0.2),
        latent=LatentConfig(dim=16, hidden=32),
    )  # fmt: skip
    writer = moved_writer(config, backbone)
    ids, known = make_batch(3, 24).input_ids, (torch.arange(24) < 8).expand(3, -1)
    how = {"cuts": 5, "seed": 1, "sample_ids": torch.arange(3)}
    found = nll_bound(writer, backbone, ids, known, **how)
    low = nll_bound(writer, backbone, ids, known, precision="bfloat16", **how)
    plain = nll_bound(writer.cpu(), load_backbone(tiny_model(), device="cpu"), ids, known, **how)
    for name in plain.reading:
        torch.testing.assert_close(found.total(name).cpu(), plain.total(name), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(low.total(name).cpu(), plain.total(name), rtol=0.1, atol=1.0)


@pytest.mark.parametrize("way", ["projected", "guided", "bf16"])
@pytest.mark.filterwarnings("error:this cannot be a CUDA graph")
def test_writing_by_graphs_of_compiled_blocks_writes_the_same(way: str) -> None:
    """Compiled and captured: nothing falls back, and the texts are those that run op by op."""
    if os.environ.get("DIHAL_NO_JAXTYPING") != "1":
        pytest.skip("run-time shape checks break graphs: set DIHAL_NO_JAXTYPING=1")
    torch._dynamo.reset()
    backbone = load_backbone(tiny_model(num_blocks=12), device="cuda")  # more blocks than torch's limit of variants
    config = MethodConfig(
        regime="generate", split=2,
        denoiser=DenoiserConfig(width=64, depth=2, heads=2, mask="mixed", norm="rms", self_conditioning=0.5),
        objective=ObjectiveConfig(state=1.0, own=1.0, own_time="uniform", condition_dropout=0.1),
    )  # fmt: skip
    writer = moved_writer(config, backbone)
    # Blocks of 8, and a last one of 4.
    known = (torch.arange(40, device="cuda") < 12).expand(3, -1)
    found = []
    for options in ({}, {"static": True, "compile": True}):
        writing = WritingConfig(steps=6, **options, **WAYS[way])  # type: ignore[arg-type]
        for number in range(3):
            ids, samples = make_batch(3, 40, seed=number).to("cuda").input_ids, 10 * number + torch.arange(3)
            found.append(writer.write(backbone, ids, known, writing=writing, sample_ids=samples, end=False).tokens)
    room = room_of(writer)
    assert room is not None
    assert room.compiles
    assert room.graphs is not None
    assert not room.graphs.failed
    # The prompt and a block taken in; whole blocks and the last one.
    assert len(room.graphs) == 4
    plain, graphs = torch.stack(found[:3]), torch.stack(found[3:])
    assert (plain == graphs).float().mean() > (0.8 if way == "bf16" else 0.98)
