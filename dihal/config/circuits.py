"""Options of `dihal circuits`: what is attributed, what is run, what is compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from dihal.config.parts import Device, Dtype

__all__ = [
    "AttributionConfig",
    "CircuitsCompareConfig",
    "CircuitsHybridConfig",
    "CircuitsPlotConfig",
    "CircuitsRunConfig",
    "CircuitsSelftestConfig",
    "LensConfig",
    "LoadConfig",
    "OverlapConfig",
    "RunningConfig",
    "TaskConfig",
    "VerdictConfig",
]


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Which prompts, and how many."""

    name: str = "ioi"
    """`ioi`, `greater_than`, `countdown`, `infill`, `induction`, or a .jsonl file of one's own pairs."""
    options: tuple[str, ...] = ()
    """Options of the task, `KEY=VALUE`, e.g. `corruption=third-name` (`dihal/circuits/tasks`)."""
    n: int = 500
    """Pairs by which edges are scored (discovery)."""
    test: int = 200
    """Pairs on which circuits are run; they share no combination of template and words with those above."""
    seed: int = 0
    """Seed of the pairs."""
    batch_size: int = 10
    """Prompts per forward pass (memory, not results)."""
    partners: tuple[str, ...] = ()
    """Models this one will be compared with (anything `model` takes): words must be one token in their tokenizers too. Name the same models in both runs."""
    solved: bool = False
    """Use only pairs that the model and all `partners` solve (answers above foils)."""
    pool: int = 4
    """With `solved`: pairs tried, in multiples of those wanted."""
    metric: Literal["logit_difference", "probability_difference"] = "logit_difference"
    """What a run is judged by."""
    reveal: Literal["left-to-right", "confidence"] = "left-to-right"
    """Masked diffusion models: order in which the answer's tokens are revealed along the trajectory."""
    reveal_steps: int = 4
    """Masked diffusion models: states of the trajectory that are looked at, evenly spaced."""


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a model is held."""

    revision: str | None = None
    """Hub revision (commit, tag or branch); only for hub ids."""
    dtype: Dtype = "float32"
    """Type of the weights; not of a saved hybrid, which has its own, and for a run at least as many bits as in training."""
    device: Device = "auto"
    """`auto` (CUDA if there is any, else CPU), `cpu`, `cuda`, `cuda:N`."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation of the blocks."""
    weights: Literal["ema", "raw"] = "ema"
    """Averaged or last weights of a training run."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off: such a model is refused."""


@dataclass(frozen=True, kw_only=True)
class AttributionConfig:
    """How edges are scored."""

    method: Literal["eap-ig", "eap", "clean-corrupted"] = "eap-ig"
    """EAP with integrated gradients, plain EAP (one gradient), or the mean of the gradients at the two ends."""
    steps: int = 5
    """Points of the path of EAP-IG (m)."""
    rule: Literal["midpoint", "left"] = "midpoint"
    """Where the points lie; `left` is that of the reference implementation."""
    path: Literal["inputs", "seam"] = "inputs"
    """What is interpolated: the token embeddings, or the state at the seam."""
    kv: Literal["grouped", "query"] = "grouped"
    """Readers of keys and values: one per key-value head, or per query head (published graphs)."""
    seam: int = 0
    """First block of the graph; what is below is one writer."""
    noise_seed: int = 0
    """First noise seed of a model that samples the state at its seam."""
    noise_seeds: int = 1
    """Noise seeds averaged, the same for the clean and the corrupted run of a pair."""
    parts: int = 16
    """Parts of the prompts (sample id modulo parts) whose scores are kept apart, for halves and intervals; even."""


@dataclass(frozen=True, kw_only=True)
class RunningConfig:
    """What is run to see what circuits do."""

    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    """Budgets of the faithfulness curves, as shares of all edges."""
    signed: bool = True
    """Also the curve of circuits ranked by signed value."""
    random: int = 3
    """Random circuits per budget whose mean gives a curve; 0: none."""
    baseline: bool = True
    """Also the curve of plain EAP (scored on the same prompts)."""
    ablation: Literal["corrupt", "mean", "zero"] = "corrupt"
    """What stands in for edges outside a circuit."""


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """Comparison of two score tables."""

    ks: tuple[int, ...] = (100, 300, 1_000, 3_000)
    """Numbers of edges at which circuits are compared."""
    fractions: tuple[float, ...] = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)
    """The same as shares of all edges."""
    k: int = 1_000
    """Number of edges that give the components."""
    components: tuple[int, ...] = (20, 50)
    """Numbers of components compared."""
    resamples: int = 100
    """Bootstrap resamples of the parts of the prompts."""
    null_resamples: int = 1_000
    """Draws of the layer-preserving null."""
    confidence: float = 0.95
    """Coverage of intervals, and the quantile of nulls."""
    seed: int = 0
    """Seed of resamples and nulls."""


@dataclass(frozen=True, kw_only=True)
class VerdictConfig:
    """Thresholds of the verdict (`dihal/circuits/verdict.py` states the rule)."""

    fraction: float = 0.05
    """Budget of the circuits that are run, as a share of all edges."""
    accuracy: float = 0.6
    """Least accuracy of a model that counts as solving the task; chance is one half."""
    gap: float = 0.5
    """Least gap between clean and corrupted metric, as a share of the reference's."""
    faithful: float = 0.5
    """Least faithfulness of a model's own circuit."""
    overlap_share: float = 0.5
    """Without a matched null: overlap fails below this share of its split-half ceiling."""
    transfer_share: float = 0.8
    """Without a matched null: transfer fails below this share of the model's own faithfulness."""
    depth: float = 2.0
    """A depth profile has shifted if it moved by more than this many times the distance between halves of one model."""
    depth_layers: float = 0.5
    """... and by more than this many layers."""


@dataclass(frozen=True, kw_only=True)
class LensConfig:
    """Logit lens and neurons."""

    prompts: int = 32
    """Test pairs that are looked at; 0: no lens and no neurons."""
    components: int = 20
    """Components (largest s(v)) whose output is projected to the vocabulary."""
    layers: tuple[int, ...] = ()
    """Blocks whose MLP neurons are attributed; empty: all."""


@dataclass(frozen=True, kw_only=True)
class CircuitsRunConfig:
    """`dihal circuits run`: score the edges of one model on one task and run its circuits."""

    model: str = "embedded"
    """A causal LM (`embedded`, a hub id, a folder, a .gguf file), a hybrid (run, checkpoint or saved folder of a bridge), or a masked diffusion model (its run, or a folder of `save_masked`)."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """How it is held."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The prompts."""
    attribution: AttributionConfig = field(default_factory=AttributionConfig)
    """The scores."""
    running: RunningConfig = field(default_factory=RunningConfig)
    """The curves."""
    lens: LensConfig = field(default_factory=LensConfig)
    """Logit lens and neurons."""
    bootstrap: int = 1_000
    """Prompt resamples behind the intervals of faithfulness."""
    save_every: int = 5
    """Batches after which partial sums are saved; a stopped run goes on from there, bit for bit."""
    progress: bool = True
    """Progress bar."""
    out: str = "runs/circuits"
    """Folder for run.json, scores.npz, figures and the page."""


@dataclass(frozen=True, kw_only=True)
class CircuitsCompareConfig:
    """`dihal circuits compare`: two runs of one task, the first being the reference."""

    runs: tuple[str, ...] = ()
    """The folders of two runs."""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    """Overlaps, nulls, profiles."""
    transfer: bool = True
    """Load both models and run their circuits in each other; without it there is no verdict."""
    ablations: int = 10
    """Components ablated, beside random, middle and late ones; 0: none."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    """Thresholds."""
    prompts: int | None = None
    """Test pairs on which circuits are run; None: those of the runs."""
    bootstrap: int = 1_000
    """Prompt resamples behind the intervals of faithfulness."""
    progress: bool = True
    """Progress bar."""
    out: str = "runs/circuits-compare"
    """Folder for compare.json, figures and the page."""


@dataclass(frozen=True, kw_only=True)
class CircuitsHybridConfig:
    """`dihal circuits hybrid`: backbone against trained bridge, beside the noise-matched null."""

    checkpoint: str = ""
    """Run, checkpoint or saved folder of a bridge (regime `replace`)."""
    load: LoadConfig = field(default_factory=LoadConfig)
    """How it is held; the backbone as the bridge was trained with it."""
    task: TaskConfig = field(default_factory=TaskConfig)
    """The prompts."""
    attribution: AttributionConfig = field(default_factory=lambda: AttributionConfig(path="seam", noise_seeds=4))
    """The scores; the seam is the bridge's split."""
    running: RunningConfig = field(default_factory=RunningConfig)
    """The curves."""
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    """Overlaps, nulls, profiles."""
    verdict: VerdictConfig = field(default_factory=VerdictConfig)
    """Thresholds."""
    null: Literal["independent", "shared"] = "independent"
    """Noise of the null in the clean and the corrupted run of a pair: drawn for each, or the same."""
    ablations: int = 10
    """Components ablated, beside random, middle and late ones; 0: none."""
    lens: LensConfig = field(default_factory=LensConfig)
    """Logit lens and neurons."""
    bootstrap: int = 1_000
    """Prompt resamples behind the intervals of faithfulness."""
    save_every: int = 5
    """Batches after which partial sums are saved."""
    progress: bool = True
    """Progress bar."""
    out: str = "runs/circuits-hybrid"
    """Folder for the three runs (`backbone`, `hybrid`, `null`) and the comparison."""


@dataclass(frozen=True, kw_only=True)
class CircuitsPlotConfig:
    """`dihal circuits plot`: draw figures and page again from the files of a run or a comparison."""

    folder: str = ""
    """Folder of a run or a comparison."""
    edges: int = 40
    """Edges of the drawn circuit, at most 50."""


@dataclass(frozen=True, kw_only=True)
class CircuitsSelftestConfig:
    """`dihal circuits selftest`: hold the package against models whose circuits are known, in seconds. It has no options."""
