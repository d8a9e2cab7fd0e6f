"""The methods: each a module whose loss is arithmetic on class statistics."""

from .base import Regularizer
from .sar import SAR

__all__ = ["SAR", "Regularizer"]
