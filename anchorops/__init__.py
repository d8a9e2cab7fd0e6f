"""Losses for semantic segmentation, as fused PyTorch operators."""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import _program as _program  # first: it hears signals while torch is imported
from ._attach import Attachment, attach
from ._backend import backends, use_backend
from ._low_resolution import LowResolution, low_resolution
from .anchors import category_basis, orthogonal_anchors, random_anchors, simplex_etf
from .losses import CBP, MVSC, OCCL, SAR, CeCo, Combined, CrossEntropy, CrossEntropyDice, Dice
from .ops.centroid_info_nce import centroid_info_nce
from .ops.class_moments import class_centroids, class_moments, pixel_to_anchor_mse
from .ops.confusion import confusion, pixel_confusion
from .ops.pixel_argmax import pixel_argmax
from .ops.pixel_cross_entropy import pixel_cross_entropy
from .ops.softmax_moments import softmax_moments
from .reference import ClassMoments, SoftmaxMoments

__all__ = [
    "CBP",
    "MVSC",
    "OCCL",
    "SAR",
    "Attachment",
    "CeCo",
    "ClassMoments",
    "Combined",
    "CrossEntropy",
    "CrossEntropyDice",
    "Dice",
    "LowResolution",
    "SoftmaxMoments",
    "attach",
    "backends",
    "category_basis",
    "centroid_info_nce",
    "class_centroids",
    "class_moments",
    "confusion",
    "low_resolution",
    "orthogonal_anchors",
    "pixel_argmax",
    "pixel_confusion",
    "pixel_cross_entropy",
    "pixel_to_anchor_mse",
    "random_anchors",
    "simplex_etf",
    "softmax_moments",
    "use_backend",
]

__version__ = "0.1.0"  # pyproject.toml reads it here

# diagnostics needs torchmetrics and plots needs matplotlib, so they are imported at first use.
if TYPE_CHECKING:  # with __getattr__, a type checker would accept any name
    from . import diagnostics as diagnostics
    from . import plots as plots
else:

    def __getattr__(name: str) -> ModuleType:
        if name in ("diagnostics", "plots"):
            return importlib.import_module(f".{name}", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
