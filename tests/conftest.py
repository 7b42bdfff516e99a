"""Shape annotations are checked while the tests run; DIHAL_NO_JAXTYPING=1 turns that off."""

from __future__ import annotations

import os

import torch

if os.environ.get("DIHAL_NO_JAXTYPING") != "1":
    from jaxtyping import install_import_hook

    install_import_hook("dihal", "beartype.beartype")

torch.set_num_threads(int(os.environ.get("DIHAL_TEST_THREADS", "1")))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
