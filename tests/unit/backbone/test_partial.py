"""A backbone loaded in part: what is read, what is held, what it computes, what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch

from dihal.backbone import load_backbone, random_backbone
from dihal.backbone.shapes import SHAPES, make_config
from dihal.backbone.skeleton import build_skeleton
from dihal.backbone.weights import lower_fingerprint
from dihal.errors import UsageError
from dihal.meter import stack_shape
from tests.kit import FAMILIES, tiny_config, tiny_model, tiny_tokenizer

IDS = torch.tensor([[0, 5, 9, 30, 41, 7], [0, 8, 3, 3, 22, 60]])
SPLIT = 2


def saved(folder: Path, family: str = "llama", *, shard: str = "20KB", **sizes: Any) -> Path:
    tiny_model(family, **sizes).save_pretrained(folder, max_shard_size=shard)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Counting:
    """Stands for safetensors.safe_open in the loader: which files were opened, which tensors read."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.read: list[str] = []

    def __call__(self, path: str, **options: Any) -> Any:
        self.opened.append(Path(path).name)
        archive, read = safetensors.safe_open(path, **options), self.read

        class Archive:
            def __enter__(self) -> Any:
                archive.__enter__()
                return self

            def __exit__(self, *rest: Any) -> None:
                archive.__exit__(*rest)

            def keys(self) -> list[str]:
                return list(archive.keys())

            def get_tensor(self, name: str) -> torch.Tensor:
                read.append(name)
                return archive.get_tensor(name)

        return Archive()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    wrapper = Counting()
    monkeypatch.setattr("dihal.backbone.partial.safe_open", wrapper)
    return wrapper


def test_nothing_above_the_split_is_read_or_held(tmp_path: Path, counting: Counting) -> None:
    folder = saved(tmp_path, num_blocks=6)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 6
    backbone = load_backbone(folder, device="cpu", blocks=SPLIT)
    read = set(counting.read)
    assert read
    assert all(".layers.0." in name or ".layers.1." in name or "embed_tokens" in name for name in read)
    assert len(counting.read) == len(read), "each once"
    assert set(counting.opened) < set(shards), "files of the upper blocks stay closed"
    held = {name for name, tensor in backbone.model.named_parameters() if not tensor.is_meta}
    assert held == read
    assert backbone.weight_bytes == sum(backbone.model.get_parameter(name).nbytes for name in read)
    assert backbone.weight_bytes < 0.5 * 4 * backbone.parameter_count()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_the_part_computes_what_the_whole_computes(family: str, tied: bool, tmp_path: Path) -> None:
    folder = saved(tmp_path, family, tied=tied)
    whole, part = load_backbone(folder, device="cpu"), load_backbone(folder, device="cpu", blocks=SPLIT)
    for split, state in whole.states(IDS, range(SPLIT + 1)).items():
        assert torch.equal(part.prefix(IDS, split), state), split
    assert part.num_blocks == whole.num_blocks
    assert part.reference == whole.reference
    assert part.parameter_count() == whole.parameter_count()
    assert stack_shape(part) == stack_shape(whole)
    assert lower_fingerprint(part, SPLIT) == lower_fingerprint(whole, SPLIT)
    assert lower_fingerprint(part, 1) != lower_fingerprint(part, SPLIT)


def test_a_checkpoint_of_the_decoder_alone(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.transformer.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    part = load_backbone(tmp_path, device="cpu", blocks=1)
    assert torch.equal(part.prefix(IDS, 1), load_backbone(model, device="cpu").prefix(IDS, 1))


def test_weights_in_the_stored_type_stay_mapped(tmp_path: Path) -> None:
    folder = saved(tmp_path, hidden_size=64, vocab=4096, shard="1GB")
    part = load_backbone(folder, device="cpu", blocks=1)
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("no /proc")
    address = part.input_embedding.weight.data_ptr()
    for line in mapped.read_text().splitlines():
        low, high = (int(x, 16) for x in line.split()[0].split("-"))
        if low <= address < high:
            assert "model.safetensors" in line
            return
    raise AssertionError("the embedding lies in no mapping")


def test_dtype_is_cast(tmp_path: Path) -> None:
    part = load_backbone(saved(tmp_path), device="cpu", dtype="bfloat16", blocks=1)
    assert part.dtype == torch.bfloat16
    assert part.prefix(IDS, 1).dtype == torch.bfloat16


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    part = load_backbone(saved(tmp_path), device="cpu", blocks=1)
    with pytest.raises(UsageError, match="only the embedding and the 1 lowest blocks"):
        part.prefix(IDS, 2)
    with pytest.raises(UsageError, match="the suffix and the head"):
        part.suffix(part.prefix(IDS, 1), 1)
    with pytest.raises(UsageError, match="the suffix and the head"):
        part.forward(IDS)
    with pytest.raises(UsageError, match="no fingerprint here"):
        part.fingerprint()
    with pytest.raises(UsageError, match="out of range"):
        load_backbone(tmp_path, device="cpu", blocks=9)
    with pytest.raises(UsageError, match="as a whole"):
        load_backbone(tiny_model(), device="cpu", blocks=1)


def test_a_missing_tensor_is_said(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = saved(tmp_path, shard="1GB")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match=r"holds no tensor 'model.layers.0.mlp.up_proj.weight'"):
        load_backbone(folder, device="cpu", blocks=1)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="no safetensors"):
        load_backbone(folder, device="cpu", blocks=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_random_backbones_run_and_repeat(family: str) -> None:
    first, again, other = (
        random_backbone(tiny_config(family), device="cpu", dtype="float32", seed=seed) for seed in (3, 3, 4)
    )
    logits = first.forward(IDS)
    assert logits.isfinite().all()
    assert torch.equal(again.forward(IDS), logits)
    assert not torch.equal(other.forward(IDS), logits)
    assert not any(tensor.is_meta for tensor in [*first.model.parameters(), *first.model.buffers()])
    reference = load_backbone(tiny_model(family), device="cpu")
    for name, buffer in reference.model.named_buffers():
        assert torch.equal(first.model.get_buffer(name), buffer), name


def test_random_part() -> None:
    part = random_backbone(tiny_config(), device="cpu", dtype="bfloat16", blocks=2)
    assert part.prefix(IDS, 2).isfinite().all()
    assert all(tensor.is_meta == (i >= 2) for i, block in enumerate(part.blocks) for tensor in block.parameters())


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_their_published_size(name: str) -> None:
    model, _ = build_skeleton(make_config(name)[0], "sdpa")
    billions = sum(p.numel() for p in model.parameters()) / 1e9
    assert billions == pytest.approx({"llama-3.1-8b": 8.03, "qwen3-8b": 8.19}[name], abs=0.01)
    with pytest.raises(UsageError, match=r"llama-3\.1-8b"):
        make_config("llama-3.1")
