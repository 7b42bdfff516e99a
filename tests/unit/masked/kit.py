"""Tiny masked diffusion LMs."""

from __future__ import annotations

import dataclasses

import torch

from dihal.backbone import Backbone
from dihal.config import MaskedConfig, MethodConfig, TimeConfig
from dihal.masked import MaskedLM
from dihal.methods import build_method
from tests.kit import tiny_backbone

VOCAB = 97


def config(**changes) -> MethodConfig:
    base = MethodConfig(name="masked", regime="mask", space="tokens", split=0, time=TimeConfig(terminal_fraction=0.0))
    return dataclasses.replace(base, **changes)


def converted(family: str = "llama", *, given: MethodConfig | None = None, **sizes) -> tuple[Backbone, MaskedLM]:
    backbone = tiny_backbone(family, **{"num_blocks": 2, "vocab": VOCAB, **sizes})
    method = build_method(config() if given is None else given, backbone)
    assert isinstance(method, MaskedLM)
    method.attach(backbone)
    return backbone, method


def with_token(token: str | None, **rest) -> MethodConfig:
    return config(masked=MaskedConfig(mask_token=token, **rest))


def all_known_but(time: int, *masked: int) -> torch.Tensor:
    known = torch.ones(1, time, dtype=torch.bool)
    known[:, list(masked)] = False
    return known
