"""Fused class-representation losses for semantic segmentation."""

from ._backend import backends, use_backend
from .anchors import category_basis, orthogonal_anchors, random_anchors, simplex_etf
from .attach import attach
from .losses import SAR
from .ops.centroid_info_nce import centroid_info_nce
from .ops.class_moments import class_centroids, class_moments, pixel_to_anchor_mse
from .reference import ClassMoments

__all__ = [
    "SAR",
    "ClassMoments",
    "attach",
    "backends",
    "category_basis",
    "centroid_info_nce",
    "class_centroids",
    "class_moments",
    "orthogonal_anchors",
    "pixel_to_anchor_mse",
    "random_anchors",
    "simplex_etf",
    "use_backend",
]
