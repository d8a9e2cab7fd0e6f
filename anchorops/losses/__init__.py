"""The methods: each a module whose loss is arithmetic on class statistics."""

from .base import Regularizer
from .cbp import CBP
from .ceco import CeCo
from .combined import Combined
from .mvsc import MVSC
from .occl import OCCL
from .sar import SAR

__all__ = ["CBP", "MVSC", "OCCL", "SAR", "CeCo", "Combined", "Regularizer"]
