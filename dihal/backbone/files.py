"""Causal LMs from files: hub snapshots and local folders. Every failure is said in one sentence."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dihal.backbone.layout import find_layout
from dihal.errors import UsageError

__all__ = ["Loaded", "explained", "load_files", "load_tokenizer", "quiet", "require_complete"]


@dataclass(frozen=True)
class Loaded:
    """A model as it came, before it is frozen."""

    model: nn.Module
    tokenizer: Any | None
    id: str
    revision: str | None
    blocks: int | None = None
    """Blocks with weights, beside the embedding; None: the whole model."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No load reports and weight bars of the library: what matters in them is raised as an error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what the libraries raise for a bad source into one `UsageError`."""
    import pickle

    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise UsageError(
            f"the weights of {source!r} are damaged or incomplete ({error}). Download or copy them again."
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise UsageError(
                f"{source!r} needs Python code that comes with it, which is not run by default. "
                "Read that code, then load with trust_remote_code=True (backbone.trust_remote_code: true)."
            ) from error
        if not Path(source).exists() and isinstance(error, OSError):
            raise UsageError(
                f"cannot load {source!r}: no local folder or file of that name, and the Hugging Face hub did not "
                "provide it. Check the spelling and the revision, the network (or HF_HUB_OFFLINE) and, for gated models, "
                f"HF_TOKEN. Without a hub use the backbone 'embedded'. ({text[:300]})"
            ) from error
        raise UsageError(f"cannot load {source!r}: {text[:400]}") from error

    except Exception as error:
        # The tokenizers library raises bare exceptions for files that it cannot read.
        if type(error) is not Exception:
            raise
        raise UsageError(f"cannot load the tokenizer of {source!r}: {error}. Download or copy it again.") from error


def load_files(
    source: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tokenizer: Any | None,
) -> Loaded:
    """Load from ``"embedded"``, a ``.gguf`` file, a local folder or the hub; weights on the CPU."""
    options = {"dtype": dtype, "tokenizer": tokenizer}
    local = Path(source).expanduser()
    if revision is not None and source != "embedded" and local.exists():
        raise UsageError(f"{source!r} has no revisions; leave revision out (it is for hub ids).")
    if source == "embedded":
        from dihal.backbone.embedded import EMBEDDED_VERSION, embedded_folder

        # A reference names the version it was made with, and asks for just that one again.
        if revision not in (None, EMBEDDED_VERSION):
            raise UsageError(
                f"the embedded backbone is {EMBEDDED_VERSION!r}, not {revision!r}; leave revision out, or use the "
                "release of DiHAL that carries it."
            )
        folder = embedded_folder()
        loaded = _load_pretrained(str(folder), None, {}, trust_remote_code=False, **options)
        return Loaded(loaded.model, loaded.tokenizer, "embedded", EMBEDDED_VERSION)
    if source.endswith(".gguf"):
        if not local.is_file():
            raise UsageError(f"no GGUF file {source!r}. Check the path.")
        from dihal.backbone.gguf_file import load_gguf

        return load_gguf(local, source, **options)
    if local.is_dir():
        _check_folder(local, source)
        loaded = _load_pretrained(str(local), None, {}, trust_remote_code=trust_remote_code, **options)
        return Loaded(loaded.model, loaded.tokenizer, source, None)
    if local.is_file() or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(
            f"no model folder {source!r}. Give a folder with config.json, a .gguf file, or a hub id like 'org/name'."
        )
    revision_options = {} if revision is None else {"revision": revision}
    return _load_pretrained(source, revision, revision_options, trust_remote_code=trust_remote_code, **options)


def _check_folder(folder: Path, source: str) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(f"the folder {source!r} has no config.json: it is not a Hugging Face model. Check the path.")
    try:
        json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{str(config)!r} is not valid JSON ({error}). Copy the model again.") from error


def _load_pretrained(
    source: str,
    revision: str | None,
    options: dict[str, Any],
    *,
    dtype: torch.dtype,
    trust_remote_code: bool,
    tokenizer: Any | None,
) -> Loaded:
    from transformers import AutoConfig, AutoModelForCausalLM

    with quiet(), explained(source):
        # The family is known before gigabytes are read.
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, **options)
        find_layout(config)
        commit = getattr(config, "_commit_hash", None)
        if commit is not None:
            # A branch may move between two downloads.
            options = {**options, "revision": commit}
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    require_complete(source, report)
    if tokenizer is None:
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code, **options)
    return Loaded(model, tokenizer, source, commit or revision)


def require_complete(source: str, report: dict[str, Any]) -> None:
    """Refuse a load in which a tensor was missing or of another shape."""
    # The library fills what is missing with random numbers and goes on.
    missing = sorted(report.get("missing_keys") or ())
    mismatched = sorted(str(item[0]) for item in report.get("mismatched_keys") or ())
    if missing or mismatched:
        names = ", ".join((missing + mismatched)[:3])
        raise UsageError(
            f"the weights of {source!r} are incomplete: {len(missing)} tensors missing, {len(mismatched)} of another shape "
            f"({names}, ...). Download or copy them again."
        )


def load_tokenizer(source: str, **options: Any) -> Any | None:
    """The tokenizer that lies beside the model; None where there is none (asked for later, it is refused by name)."""
    from transformers import AutoTokenizer

    if os.path.isdir(source) and not any(
        os.path.exists(os.path.join(source, name))
        for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model")
    ):
        return None
    with quiet(), explained(source):
        return AutoTokenizer.from_pretrained(source, **options)
