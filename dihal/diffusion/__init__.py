"""Diffusion mathematics: schedules, process, times, guidance, samplers. Knows no network, backbone or trainer."""

from __future__ import annotations

from dihal.diffusion.gaussian import GaussianData
from dihal.diffusion.guidance import evaluations_per_estimate, guided
from dihal.diffusion.learned import LearnedGumbel, Warp
from dihal.diffusion.process import PARAMETRISATIONS, Process, build_process, expand_time
from dihal.diffusion.samplers import SAMPLERS, Denoise, Noise, level_grid, nfe, sample, time_grid
from dihal.diffusion.schedule import SCHEDULES, Cosine, Linear, LogLinear, Schedule, Tan, build_schedule
from dihal.diffusion.timesteps import sample_times

__all__ = [
    "PARAMETRISATIONS",
    "SAMPLERS",
    "SCHEDULES",
    "Cosine",
    "Denoise",
    "GaussianData",
    "LearnedGumbel",
    "Linear",
    "LogLinear",
    "Noise",
    "Process",
    "Schedule",
    "Tan",
    "Warp",
    "build_process",
    "build_schedule",
    "evaluations_per_estimate",
    "expand_time",
    "guided",
    "level_grid",
    "nfe",
    "sample",
    "sample_times",
    "time_grid",
]
