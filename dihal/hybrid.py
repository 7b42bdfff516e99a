"""The hybrid as a Hugging Face model: bridge + frozen suffix.

What is saved is the bridge and a *reference* to the backbone: id, revision, split, and a sha256 of
the weights the hybrid reads (embedding, blocks from the split on, final norm, head). The backbone is
attached after construction and refused if its weights are not the ones the bridge was trained with:
building it from its configuration inside ``__init__`` would come back silently random.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from dihal.backbone import load_backbone
from dihal.config.convert import from_dict
from dihal.config.method import MethodConfig
from dihal.controls import Identity
from dihal.errors import UsageError
from dihal.methods import Method, build_method, positions_of
from dihal.restore import is_checkpoint, load_method, require_backbone

if TYPE_CHECKING:
    from dihal.backbone import Backbone

__all__ = ["HybridCache", "HybridConfig", "HybridForCausalLM", "load_hybrid"]


class HybridConfig(PretrainedConfig):
    """Configuration of a hybrid.

    Args:
        method: the resolved :class:`~dihal.config.MethodConfig` as a dict; ``{"name": "identity", "split": l}``
            for the identity control.
        backbone: the :class:`~dihal.backbone.BackboneReference` as a dict.
        fingerprint: sha256 of the backbone's weights that the hybrid needs.
    """

    model_type = "dihal_hybrid"

    def __init__(
        self,
        method: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        fingerprint: str = "",
        **kwargs: Any,
    ) -> None:
        self.method = method or {}
        self.backbone = backbone or {}
        self.fingerprint = fingerprint
        self.hidden_size = self.backbone.get("hidden_size", 0)
        self.vocab_size = self.backbone.get("vocab_size", 0)
        self.num_hidden_layers = self.backbone.get("num_blocks", 0)
        super().__init__(**kwargs)


class HybridCache:
    """Keys and values of both halves: the bridge's, one set per function evaluation, and the suffix's."""

    is_compileable = False

    def __init__(self, bridge: Any, suffix: Any) -> None:
        self.bridge = bridge
        self.suffix = suffix

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions held."""
        return self.suffix.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select rows, as beam search does."""
        if self.bridge is not None:
            self.bridge.reorder(beam_idx)
        self.suffix.reorder(beam_idx)


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """Bridge + frozen suffix as a causal LM with ``generate()``.

    The logits at position i are those of the suffix reading the bridge's sample of h^l_{<=i}. The
    sampling noise at a position depends on (sampler seed, position) only, so that cached and uncached
    generation, and any batch a prompt is in, give the same result.
    """

    config_class = HybridConfig
    base_model_prefix = "bridge"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_flash_attn = False

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.bridge: nn.Module = _build(config)
        # Outside the module registry: the backbone is neither saved nor moved nor counted with the bridge.
        object.__setattr__(self, "_held", None)
        self.generation_config = GenerationConfig.from_model_config(config)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave weights alone: the bridge has initialised itself."""

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() must not make a cache of its own: see prepare_inputs_for_generation

    @classmethod
    def from_method(cls, method: Method | Identity, backbone: Backbone) -> HybridForCausalLM:
        """Make a hybrid of a trained method (or the identity control) and the backbone it was trained with."""
        described = (
            {"name": "identity", "split": method.split} if isinstance(method, Identity) else asdict(method.config)
        )
        config = HybridConfig(
            method=described,
            backbone=asdict(backbone.reference),
            fingerprint=backbone.fingerprint(method.split),
            bos_token_id=backbone.start_token_id,
            eos_token_id=backbone.end_token_id,
            pad_token_id=backbone.end_token_id,
        )
        model = cls(config)
        model.bridge = method
        model._hold(backbone)
        return model.eval()

    @property
    def backbone(self) -> Backbone:
        """The attached backbone.

        Raises:
            UsageError: none is attached.
        """
        held = self.__dict__.get("_held")
        if held is None:
            raise UsageError(
                "no backbone is attached. Load with dihal.load_hybrid(path), or call model.attach(backbone)."
            )
        return held

    @property
    def split(self) -> int:
        """Blocks replaced."""
        return int(self.config.method["split"])

    @property
    def device(self) -> torch.device:
        """Where the backbone is; the bridge follows it."""
        held = self.__dict__.get("_held")
        if held is not None:
            return held.device
        # The identity has no parameter to ask, only a buffer.
        return next(tensor.device for tensor in (*self.parameters(), *self.buffers()))

    @property
    def dtype(self) -> torch.dtype:
        """Type of the bridge's weights; the backbone has its own."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def _hold(self, backbone: Backbone) -> None:
        self.to(backbone.device)
        object.__setattr__(self, "_held", backbone)
        if isinstance(self.bridge, Method):
            self.bridge.attach(backbone, trainable=False)

    def attach(self, backbone: Backbone) -> HybridForCausalLM:
        """Attach the backbone after checking that it is the one the bridge was trained with.

        Raises:
            UsageError: another family, size, revision, or any weight that differs.
        """
        require_backbone("this hybrid", self.config.backbone, self.config.fingerprint, backbone, self.split)
        self._hold(backbone)
        return self

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json, the bridge's weights as safetensors, and LoRA adapters in peft's format under ``adapter/``."""
        # The adapters have files of their own: said twice, they would be unexpected tensors when loading.
        own = {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("bridge.lora.")}
        super().save_pretrained(str(save_directory), **{"state_dict": own, **kwargs})
        adapters = self.bridge.adapters if isinstance(self.bridge, Method) else None
        if adapters is not None:
            adapters.save(Path(save_directory) / "adapter")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, path: str | Path, *args: Any, backbone: Backbone | None = None, **kwargs: Any
    ) -> HybridForCausalLM:
        """Load a saved hybrid and attach its backbone.

        Args:
            path: folder written by :meth:`save_pretrained`, or a hub id.
            backbone: an already loaded backbone; default: loaded as the reference says.
            kwargs: ``device`` (default ``"auto"``) for the backbone; the rest goes to
                ``PreTrainedModel.from_pretrained``.

        Raises:
            UsageError: files missing or damaged, or a backbone that is not the one of the reference.
        """
        device = kwargs.pop("device", "auto")
        kwargs["dtype"] = torch.float32  # the bridge; the backbone has its own
        try:
            model = super().from_pretrained(str(path), *args, **kwargs)
        except UsageError:
            raise
        except Exception as error:
            # transformers and safetensors raise a dozen types here; the user's question is which file.
            raise UsageError(
                f"cannot load the hybrid {str(path)!r}: {error}. Save it again or check the path."
            ) from error
        if backbone is None:
            reference = model.config.backbone
            backbone = load_backbone(
                reference["id"], revision=reference["revision"], dtype=reference["dtype"], device=device
            )
        model.attach(backbone)
        adapters = model.bridge.adapters if isinstance(model.bridge, Method) else None
        if adapters is not None:
            adapters.load(Path(path) / "adapter")
        return model.eval()

    def new_cache(self) -> HybridCache:
        """An empty cache for both halves."""
        backbone = self.backbone
        return HybridCache(self.bridge.new_cache(backbone), backbone.new_cache(self.split, backbone.num_blocks))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        steps: int | None = None,
        sampler: str | None = None,
        sampler_seed: int | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the hybrid.

        Args:
            input_ids: (batch, time) new tokens.
            attention_mask: (batch, cached + time), 1 for real tokens.
            position_ids: (batch, time); default: counted from the mask.
            past_key_values: cache of earlier positions, extended in place.
            labels: (batch, time) token ids, -100 ignored; shifted inside; gives ``loss``.
            use_cache: return a cache (a new one if none is given).
            logits_to_keep: only the last positions' logits; 0: all.
            steps, sampler, sampler_seed: default: the method's own sampler.
        """
        backbone = self.backbone
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        mask = None if attention_mask is None else attention_mask.bool()
        if position_ids is None:
            cached = 0 if past_key_values is None else past_key_values.get_seq_length()
            batch, time = input_ids.shape
            whole = (
                torch.ones(batch, cached + time, dtype=torch.bool, device=input_ids.device) if mask is None else mask
            )
            position_ids = positions_of(whole)[:, -time:]
        if mask is not None and bool(mask.all()):
            mask = None
        keywords: dict[str, Any] = {"attention_mask": mask, "position_ids": position_ids}
        state = self.bridge.states(
            backbone,
            input_ids,
            steps=steps,
            sampler=sampler,
            seed=sampler_seed,
            cache=None if past_key_values is None else past_key_values.bridge,
            **keywords,
        )
        with self.bridge.reading():
            logits = backbone.suffix(
                state,
                self.split,
                cache=None if past_key_values is None else past_key_values.suffix,
                logits_to_keep=logits_to_keep,
                **keywords,
            )
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: HybridCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Inputs of one decoding step: with a cache, only the tokens it does not hold."""
        if use_cache and past_key_values is None:
            past_key_values = self.new_cache()
        cached = 0 if past_key_values is None else past_key_values.get_seq_length()
        inputs: dict[str, Any] = {
            "input_ids": input_ids[:, cached:],
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": 1,
        }
        for name in ("steps", "sampler", "sampler_seed"):
            if kwargs.get(name) is not None:
                inputs[name] = kwargs[name]
        return inputs

    def _reorder_cache(self, past_key_values: HybridCache, beam_idx: Tensor) -> HybridCache:
        past_key_values.reorder_cache(beam_idx)
        return past_key_values


def _build(config: HybridConfig) -> nn.Module:
    if not config.method:
        raise UsageError("this configuration describes no method: it was not written by DiHAL, or is damaged.")
    if config.method.get("name") == "identity":
        return Identity(int(config.method["split"]))
    return build_method(from_dict(MethodConfig, config.method), int(config.hidden_size))


AutoConfig.register(HybridConfig.model_type, HybridConfig)
AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)


def load_hybrid(
    path: str | Path,
    *,
    backbone: Backbone | None = None,
    device: str = "auto",
    weights: str = "ema",
) -> HybridForCausalLM:
    """Load a hybrid: a folder saved by ``save_pretrained``, a training run, or one of its checkpoints.

    Args:
        path: the folder.
        backbone: an already loaded backbone; default: loaded as the reference says.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``; used when the backbone is loaded here.
        weights: of a training run: averaged (``ema``) or last (``raw``) weights.

    Raises:
        UsageError: nothing there, damaged files, or a backbone that is not the one trained with.
    """
    if is_checkpoint(path):
        method, found = load_method(path, backbone=backbone, device=device, weights=weights)
        if not isinstance(method, Method):
            raise UsageError(
                f"{str(path)!r} is of the regime {method.config.regime!r}: it is no causal LM. "
                "Write with dihal.restore.load_method(path)[0].write(...)."
            )
        return HybridForCausalLM.from_method(method, found)
    if not (Path(path) / "config.json").is_file():
        raise UsageError(
            f"{str(path)!r} holds neither a saved hybrid (config.json) nor a training run (latest). Check the path."
        )
    return HybridForCausalLM.from_pretrained(path, backbone=backbone, device=device)
