"""Shape annotations are checked while the tests run; DIHAL_NO_JAXTYPING=1 turns that off."""

from __future__ import annotations

import gc
import os

import torch

if os.environ.get("DIHAL_NO_JAXTYPING") != "1":
    from tests.typecheck import install

    install("dihal")

torch.set_num_threads(int(os.environ.get("DIHAL_TEST_THREADS", "1")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_finish() -> None:
    """What was imported stays: to look through it takes half a second at every full collection, which tests ask for."""
    gc.collect()
    gc.freeze()
