"""Losses for semantic segmentation, as fused PyTorch operators."""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from . import anchors as anchors
from . import ops as ops
from ._attach import Attachment, attach
from ._backend import backends, exclude_from_auto, use_backend
from ._model_changes.late_upsampling import LateUpsampling, late_upsampling
from ._model_changes.low_resolution import LowResolution, low_resolution
from ._ops.class_moments import class_centroids, pixel_to_anchor_mse
from ._ops.confusion import confusion, pixel_confusion
from ._ops.mask_rle import MaskRLE, mask_rle
from ._ops.onnx_export import onnx_decompositions
from ._ops.pixel_argmax import pixel_argmax
from ._ops.pixel_kl_divergence import pixel_kl_divergence
from ._windows import gaussian_weights, window_argmax, window_origins, window_rows
from .losses import (
    CBP,
    MVSC,
    OCCL,
    SAR,
    BinaryCrossEntropy,
    CeCo,
    Combined,
    CrossEntropy,
    CrossEntropyDice,
    Dice,
    Lovasz,
    MaskLoss,
)
from .losses.pixel_binary_cross_entropy import pixel_binary_cross_entropy
from .losses.pixel_cross_entropy import pixel_cross_entropy

__all__ = [
    "CBP",
    "MVSC",
    "OCCL",
    "SAR",
    "Attachment",
    "BinaryCrossEntropy",
    "CeCo",
    "Combined",
    "CrossEntropy",
    "CrossEntropyDice",
    "Dice",
    "LateUpsampling",
    "Lovasz",
    "LowResolution",
    "MaskLoss",
    "MaskRLE",
    "attach",
    "backends",
    "class_centroids",
    "confusion",
    "exclude_from_auto",
    "gaussian_weights",
    "late_upsampling",
    "low_resolution",
    "mask_rle",
    "onnx_decompositions",
    "pixel_argmax",
    "pixel_binary_cross_entropy",
    "pixel_confusion",
    "pixel_cross_entropy",
    "pixel_kl_divergence",
    "pixel_to_anchor_mse",
    "use_backend",
    "window_argmax",
    "window_origins",
    "window_rows",
]

if importlib.util.find_spec("torchmetrics"):  # otherwise `from anchorops import *` would fail
    __all__ += ["MeanIoU"]

__version__ = "0.1.0"  # pyproject.toml reads it here

# Imported at first use: diagnostics and MeanIoU need torchmetrics, plots needs matplotlib.
_LAZY = ("diagnostics", "measure", "plots")
if TYPE_CHECKING:  # with __getattr__, a type checker would accept any name
    from . import diagnostics as diagnostics
    from . import measure as measure
    from . import plots as plots
    from ._mean_iou import MeanIoU as MeanIoU
else:

    def __getattr__(name: str) -> Any:
        if name in _LAZY:
            return importlib.import_module(f".{name}", __name__)
        if name == "MeanIoU":
            return importlib.import_module("._mean_iou", __name__).MeanIoU
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        return sorted({*globals(), *_LAZY, "MeanIoU"})
