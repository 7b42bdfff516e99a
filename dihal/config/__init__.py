"""Every default of DiHAL lives in one dataclass field here; YAML files are deltas.

The dataclasses are frozen and keyword-only, so that a resolved configuration can be hashed, stored
beside a result and compared. ``dihal.config.cli`` turns command lines and YAML into them.
"""

from dihal.config.circuits import (
    CircuitsCompareConfig,
    CircuitsHybridConfig,
    CircuitsPlotConfig,
    CircuitsRunConfig,
    CircuitsSelftestConfig,
)
from dihal.config.evaluation import EvalConfig, GenerateConfig, LeaderboardConfig
from dihal.config.frontier import FrontierConfig
from dihal.config.masked import BoundConfig, MaskedConfig
from dihal.config.method import (
    DenoiserConfig,
    LoraConfig,
    MethodConfig,
    ObjectiveConfig,
    ProcessConfig,
    SamplerConfig,
    TimeConfig,
)
from dihal.config.parts import BackboneConfig, BudgetConfig, DataConfig
from dihal.config.score import ScoreConfig, ScoreRunConfig
from dihal.config.spaces import EmbeddingConfig, KnownConfig, LatentConfig, SimplexConfig, WritingConfig
from dihal.config.sweep import PredictorConfig, SweepConfig, TextTruthConfig
from dihal.config.training import LogConfig, OptimConfig, TrainConfig, TrainerConfig

__all__ = [
    "BackboneConfig",
    "BoundConfig",
    "BudgetConfig",
    "CircuitsCompareConfig",
    "CircuitsHybridConfig",
    "CircuitsPlotConfig",
    "CircuitsRunConfig",
    "CircuitsSelftestConfig",
    "DataConfig",
    "DenoiserConfig",
    "EmbeddingConfig",
    "EvalConfig",
    "FrontierConfig",
    "GenerateConfig",
    "KnownConfig",
    "LatentConfig",
    "LeaderboardConfig",
    "LogConfig",
    "LoraConfig",
    "MaskedConfig",
    "MethodConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PredictorConfig",
    "ProcessConfig",
    "SamplerConfig",
    "ScoreConfig",
    "ScoreRunConfig",
    "SimplexConfig",
    "SweepConfig",
    "TextTruthConfig",
    "TimeConfig",
    "TrainConfig",
    "TrainerConfig",
    "WritingConfig",
]
