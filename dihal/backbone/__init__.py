"""Pretrained causal LMs: loading, splitting, capturing states.

The only package that reads attributes of a Hugging Face model; which attributes is data
(``layout.py``). ``import dihal.backbone`` does not import transformers; loading does.
"""

from dihal.backbone.load import backbone_from_config, load_backbone, random_backbone
from dihal.backbone.model import Backbone
from dihal.backbone.reference import BackboneReference

__all__ = ["Backbone", "BackboneReference", "backbone_from_config", "load_backbone", "random_backbone"]
