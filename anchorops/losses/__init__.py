"""Losses: pixel losses from softmax moments, and the published methods from class moments."""

from .base import Regularizer as Regularizer
from .binary_cross_entropy import BinaryCrossEntropy as BinaryCrossEntropy
from .cbp import CBP as CBP
from .ceco import CeCo as CeCo
from .combined import Combined as Combined
from .cross_entropy import CrossEntropy as CrossEntropy
from .dice import CrossEntropyDice as CrossEntropyDice
from .dice import Dice as Dice
from .lovasz import Lovasz as Lovasz
from .mask import MaskLoss as MaskLoss
from .mvsc import MVSC as MVSC
from .occl import OCCL as OCCL
from .pixel import MomentsLoss as MomentsLoss
from .pixel import PixelLoss as PixelLoss
from .sar import SAR as SAR

# What lists of methods follow from: the training program, bench/, examples/ and tests/.
METHODS: dict[str, type[Regularizer]] = {
    method.__name__: method for method in (SAR, CBP, OCCL, CeCo, MVSC)
}
