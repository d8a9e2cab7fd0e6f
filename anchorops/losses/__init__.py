"""Losses: pixel losses from softmax moments, and the published methods from class moments."""

from .base import Regularizer
from .binary_cross_entropy import BinaryCrossEntropy
from .cbp import CBP
from .ceco import CeCo
from .combined import Combined
from .cross_entropy import CrossEntropy
from .dice import CrossEntropyDice, Dice
from .lovasz import Lovasz
from .mask import MaskLoss
from .mvsc import MVSC
from .occl import OCCL
from .pixel import MomentsLoss, PixelLoss
from .sar import SAR

# What lists of methods follow from: the training program, bench/, examples/ and tests/.
METHODS: dict[str, type[Regularizer]] = {
    method.__name__: method for method in (SAR, CBP, OCCL, CeCo, MVSC)
}

__all__ = [
    "CBP",
    "METHODS",
    "MVSC",
    "OCCL",
    "SAR",
    "BinaryCrossEntropy",
    "CeCo",
    "Combined",
    "CrossEntropy",
    "CrossEntropyDice",
    "Dice",
    "Lovasz",
    "MaskLoss",
    "MomentsLoss",
    "PixelLoss",
    "Regularizer",
]
