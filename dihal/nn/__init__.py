"""The denoiser network. Knows neither transformers nor Lightning."""

from __future__ import annotations

from dihal.nn.cache import DenoiserCache, StaticDenoiserCache, StaticPlace
from dihal.nn.count import count_parameters, flops_per_token, parameter_groups
from dihal.nn.transformer import DenoiserTransformer, check_denoiser

__all__ = [
    "DenoiserCache",
    "DenoiserTransformer",
    "StaticDenoiserCache",
    "StaticPlace",
    "check_denoiser",
    "count_parameters",
    "flops_per_token",
    "parameter_groups",
]
