"""CeCo, center collapse (CVPR 2023)."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import check_choice, describe, fail
from ..anchors import simplex_etf
from ..distributed import all_reduce, reduce_moments
from ..ops.unit_rows import unit_rows
from ..ops.upsampled_sums import upsampled_sums
from ..reference import ClassMoments
from .base import Classifier, Losses, Plan, Regularizer
from .recomputation import recomputing, statistics_kept
from .statistics import Request


class CeCo(Regularizer):
    """Class centers of projected features, classified by a fixed simplex.

    g = BN(reduction(features)), upsampled to the labels; z_k = mean of g over class k;
    ẑ_k = normalize(ReLU(projection z_k)), with dropout; W: the simplex ETF (supplement, Eq. 11);
    π: the share of the training images that contain each class.

        L = loss_weight · mean_{k present} −log softmax_k( scale·⟨ẑ_k, W⟩ + log(π + 1e−12) )

    Args:
        num_classes, dim: K and D.
        loss_weight: λ: 0.8 (Swin-T), 0.2 (Swin-B).
        reduced_dim, center_dim: channels of g and of ẑ; center_dim ≥ K − 1.
        scale: of the cosines.
        prior: π [K], any positive scale; uniform if None. `diagnostics.LabelImbalance` computes it.
        resolution: "label" as in the released code (upsampled, but this tensor is not stored), or
            "feature": the labels are resized to the features by nearest-neighbour interpolation.
        per_image: centers of each image instead of the batch.
        freeze_projection: True as in the released code; False trains it.
        dropout: probability, for ẑ.
        ignore_index, process_group: as in `Regularizer`; with a group, the statistics of BN are
            global, and two ranks equal one process if dropout = 0.

    The model's own classifier is not used. `terms`: center, present (number of centers).
    """

    settings = (
        "loss_weight",
        "reduced_dim",
        "center_dim",
        "scale",
        "resolution",
        "per_image",
        "freeze_projection",
        "dropout",
    )
    has_state = True
    prior: Tensor
    etf: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        loss_weight: float = 0.8,
        reduced_dim: int = 128,
        center_dim: int = 512,
        scale: float = 5.0,
        prior: Tensor | None = None,
        resolution: str = "label",
        per_image: bool = False,
        freeze_projection: bool = True,
        dropout: float = 0.1,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index=ignore_index, process_group=process_group)
        check_choice("CeCo", "resolution", resolution, ("label", "feature"))
        if not 0 <= dropout < 1:
            fail("CeCo", "dropout", "a number in [0, 1)", dropout)
        if prior is None:
            prior = torch.ones(num_classes)
        elif not isinstance(prior, Tensor) or prior.shape != (num_classes,):
            fail("CeCo", "prior", f"a tensor [{num_classes}]", describe(prior))
        elif not (prior >= 0).all() or not prior.any():
            fail("CeCo", "prior", "no negative share, and one above 0", prior.tolist())
        self.loss_weight, self.scale, self.dropout = loss_weight, scale, dropout
        self.reduced_dim, self.center_dim = reduced_dim, center_dim
        self.resolution, self.per_image = resolution, per_image
        self.freeze_projection = freeze_projection
        self.reduction = nn.Conv2d(dim, reduced_dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced_dim)
        self.projection = nn.Linear(reduced_dim, center_dim)
        self.projection.requires_grad_(not freeze_projection)
        self.register_buffer("prior", (prior / prior.sum()).to(torch.get_default_dtype()))
        self.register_buffer("etf", simplex_etf(num_classes, center_dim))

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        if self.per_image and features.dim() == 2:
            expected = "images (B, D, ...) for per_image; pad point clouds with ignored labels"
            fail("CeCo", "features", expected, f"points {tuple(features.shape)}")
        if 0 in features.shape[2:]:  # torch's convolution would say that its kernel is too large
            shape = tuple(features.shape)
            fail("CeCo", "features", "at least one pixel per image", f"shape {shape}")
        reduced = self._reduce_channels(features)
        if features.dim() == 4 and self.resolution == "label":
            return Plan(None, lambda _: self._losses_of_centers(self._splat(reduced, labels)))

        def losses(moments: ClassMoments | None) -> Losses:
            assert moments is not None
            return self._losses_of_centers(moments)

        return Plan(Request(per_image=self.per_image, features=reduced), losses)

    def _reduce_channels(self, features: Tensor) -> Tensor:
        """g, in the features' shape and layout, float32 (float64 for float64 features)."""
        maps = features[(..., *[None] * (4 - features.dim()))]
        weight = self.reduction.weight.to(features.dtype)
        if torch.compiler.is_compiling() and self.training:
            torch.ops.anchorops.first_pass(self.norm.running_mean, "CeCo")
        with statistics_kept(self.norm) if recomputing() else nullcontext():
            reduced = self._normalise(F.conv2d(maps, weight))
        reduced = reduced.to(torch.promote_types(features.dtype, torch.float32))
        return reduced[(..., *[0] * (4 - features.dim()))]

    def _normalise(self, x: Tensor) -> Tensor:
        """Batch norm of (B, C, H, W), over all ranks if there is a group."""
        norm = self.norm
        if self.process_group is None or not self.training:
            return norm(x.to(norm.weight.dtype))
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        axes, shape = (0, 2, 3), (1, -1, 1, 1)
        here = x.new_full((1,), x.numel() // x.shape[1])
        total = all_reduce(torch.cat([x.sum(axes), here]), self.process_group)
        size, mean = total[-1], total[:-1] / total[-1]
        centered = x - mean.view(shape)
        variance = all_reduce(centered.square().sum(axes), self.process_group) / size
        with torch.no_grad():
            momentum = norm.momentum
            assert momentum is not None and norm.running_mean is not None
            assert norm.running_var is not None
            unbiased = variance * size / (size - 1)
            norm.running_mean.lerp_(mean.to(norm.running_mean), momentum)
            norm.running_var.lerp_(unbiased.to(norm.running_var), momentum)
            if norm.num_batches_tracked is not None:  # None in a recomputation
                norm.num_batches_tracked.add_(1)
        scale = norm.weight * (variance + norm.eps).rsqrt()
        return centered * scale.view(shape) + norm.bias.view(shape)

    def _splat(self, reduced: Tensor, labels: Tensor) -> ClassMoments:
        counts, sums, _ = moments = upsampled_sums(
            reduced, labels, self.num_classes, ignore_index=self.ignore_index
        )
        if self.per_image:
            return moments
        return reduce_moments(ClassMoments(counts.sum(0), sums.sum(0), None), self.process_group)

    def _losses_of_centers(self, moments: ClassMoments) -> Losses:
        """counts [K] or [B, K], sums [K, C] or [B, K, C]."""
        counts, sums, _ = moments
        present = counts > 0
        centers = sums / counts.clamp(min=1)[..., None]
        weight, bias, etf, prior = (
            x.to(centers.dtype)
            for x in (self.projection.weight, self.projection.bias, self.etf, self.prior)
        )
        hidden = unit_rows(F.linear(centers, weight, bias).relu(), eps=1e-12)
        hidden = F.dropout(hidden, self.dropout, self.training)
        logits = self.scale * F.linear(hidden, etf) + (prior + 1e-12).log()
        own = logits.log_softmax(-1).diagonal(dim1=-2, dim2=-1)
        total, number = -torch.where(present, own, 0).sum(), present.sum()
        if self.per_image:  # every rank has its own images
            total, number = (all_reduce(x, self.process_group) for x in (total, number))
        loss = self.loss_weight * total / number.clamp(min=1)
        return Losses({"center": loss}, {"present": number})
