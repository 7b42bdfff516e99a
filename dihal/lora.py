"""LoRA on the suffix blocks, through peft; off unless its scope is entered.

The adapters are injected into the backbone's own modules, which other readers (the teacher, the
backbone's row in a table) share. So they are switched off by default and act only inside
:meth:`Adapters.active`: a backbone stays the backbone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from dihal.config.method import LoraConfig
from dihal.errors import UsageError

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["Adapters"]


class Adapters:
    """Low-rank adapters on the linear layers of blocks ``split`` and above.

    Args:
        backbone: its modules are wrapped in place; its own weights stay frozen and unchanged.
        config: rank (> 0), scale, dropout, target layers.
        split: first adapted block.
        trainable: whether the adapters' weights require gradients.

    Raises:
        UsageError: rank 0, a backbone that has adapters already, or target names that no layer has.
    """

    def __init__(self, backbone: Backbone, config: LoraConfig, split: int, *, trainable: bool = True) -> None:
        import peft

        if config.rank <= 0:
            raise UsageError(f"method.lora.rank is {config.rank}; adapters need a rank of at least 1.")
        if any(isinstance(m, peft.tuners.lora.LoraLayer) for m in backbone.model.modules()):
            raise UsageError("this backbone has LoRA adapters already. Load it anew for another method.")
        available = list(backbone.lora_targets)
        targets = list(config.targets) or available
        unknown = sorted(set(targets) - set(available))
        if unknown:
            raise UsageError(
                f"method.lora.targets {unknown} are no layers of this suffix. Valid: {', '.join(available)}."
            )
        self._peft = peft.get_peft_model(
            backbone.model,
            peft.LoraConfig(
                r=config.rank,
                lora_alpha=config.alpha,
                lora_dropout=config.dropout,
                target_modules=targets,
                layers_to_transform=list(range(split, backbone.num_blocks)),
                layers_pattern=backbone.layers_pattern,
                task_type="CAUSAL_LM",
            ),
        )
        self._layers = [m for m in backbone.model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
        for parameter in backbone.model.parameters():
            parameter.requires_grad_(False)
        for parameter in self.parameters():
            parameter.requires_grad_(trainable)
            # bf16 adapters lose small updates: they are kept in fp32 like every trained weight.
            parameter.data = parameter.data.float()
        self._switch(False)

    def parameters(self) -> list[nn.Parameter]:
        """The adapters' weights, in a fixed order."""
        return [p for name, p in self._peft.named_parameters() if "lora_" in name]

    def _switch(self, on: bool, *, training: bool = False) -> None:
        # Not enable_adapter_layers(): that also toggles requires_grad, under a graph already built.
        for layer in self._layers:
            layer._disable_adapters = not on
            # The layers are the backbone's, which no train() or eval() of the method reaches.
            layer.lora_dropout.train(training)

    @contextlib.contextmanager
    def active(self, *, training: bool = False) -> Iterator[None]:
        """Scope in which the suffix reads through the adapters; ``training``: with their dropout."""
        self._switch(True, training=training)
        try:
            yield
        finally:
            self._switch(False)

    def save(self, folder: str | Path) -> None:
        """Write ``adapter_config.json`` and ``adapter_model.safetensors``, peft's own format."""
        self._peft.save_pretrained(str(folder), safe_serialization=True, save_embedding_layers=False)

    def load(self, folder: str | Path) -> None:
        """Read weights written by :meth:`save`.

        Raises:
            UsageError: the files are missing or do not fit.
        """
        from peft import set_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder) / "adapter_model.safetensors"
        try:
            weights = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UsageError(f"cannot read the adapters {str(path)!r}: {error}. Save the hybrid again.") from error
        outcome = set_peft_model_state_dict(self._peft, weights)
        if outcome.unexpected_keys or len(weights) != len(self.parameters()):
            raise UsageError(f"the adapters in {str(path)!r} do not fit this suffix. Use the hybrid's own backbone.")
