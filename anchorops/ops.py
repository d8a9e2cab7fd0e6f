"""The operators and statistics from which the losses are computed, for authors of losses."""

from ._moments import ClassMoments, SoftmaxMoments
from ._ops.centroid_info_nce import centroid_info_nce
from ._ops.class_moments import class_moments
from ._ops.softmax_moments import softmax_moments

__all__ = [
    "ClassMoments",
    "SoftmaxMoments",
    "centroid_info_nce",
    "class_moments",
    "softmax_moments",
]
