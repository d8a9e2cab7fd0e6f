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

__all__ = [
    "CBP",
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
