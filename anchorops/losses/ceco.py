"""CeCo, center collapse (CVPR 2023)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import (
    check_choice,
    check_count,
    check_flags,
    check_number,
    check_share,
    check_strided,
    describe,
    fail,
)
from .._moments import ClassMoments
from .._ops.upsampled_sums import upsampled_sums
from .._torch_state import has_values
from ..anchors import simplex_etf
from ..distributed import all_reduce, reduce_moments
from .base import Classifier, Losses, Plan, Regularizer, classification_loss
from .batch_norm import batch_norm


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
        resolution: "label" as in the released code (upsampled with align_corners=True, but this
            tensor is not stored), or "feature": the labels are resized to the features by
            nearest-neighbour interpolation.
        per_image: centers of each image instead of the batch.
        freeze_projection: True as in the released code; False trains it.
        dropout: probability, for ẑ, below 1.
        ignore_index, process_group, check_labels: as in `Regularizer`; with a group, the
            statistics of BN are global, and two ranks equal one process if dropout = 0.

    The model's own classifier is not used. `terms`: center, present (number of centers).
    """

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
        check_labels: bool = False,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, process_group, check_labels)
        check_choice("CeCo", "resolution", resolution, ("label", "feature"))
        num_classes, dim = self.num_classes, self.dim
        self.loss_weight = check_number("CeCo", "loss_weight", loss_weight)
        self.scale = check_number("CeCo", "scale", scale, above=True)
        self.dropout = check_share("CeCo", "dropout", dropout, below_one=True)
        check_flags("CeCo", per_image=per_image, freeze_projection=freeze_projection)
        self.reduced_dim = reduced_dim = check_count("CeCo", "reduced_dim", reduced_dim)
        self.center_dim = center_dim = check_count("CeCo", "center_dim", center_dim)
        if center_dim < num_classes - 1:
            expected = f"at least num_classes - 1 = {num_classes - 1}, the rank of a simplex"
            fail("CeCo", "center_dim", expected, center_dim)
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        check_strided("CeCo", "prior", prior)
        if prior is None:
            prior = torch.ones(num_classes, dtype=dtype)
        elif not isinstance(prior, Tensor) or prior.shape != (num_classes,):
            fail("CeCo", "prior", f"a tensor [{num_classes}]", describe(prior))
        elif has_values(prior) and not (((prior >= 0) & prior.isfinite()).all() and prior.any()):
            fail("CeCo", "prior", "finite shares of at least 0, and one above 0", prior.tolist())
        self.resolution, self.per_image = resolution, per_image
        self.freeze_projection = freeze_projection
        self.reduction = nn.Conv2d(dim, reduced_dim, 1, bias=False)
        self.norm = nn.BatchNorm2d(reduced_dim)
        self.projection = nn.Linear(reduced_dim, center_dim)
        self.projection.requires_grad_(not freeze_projection)
        # in float32 at least, because shares may be small and their sum large
        prior = prior.to(torch.promote_types(prior.dtype, dtype))
        self.register_buffer("prior", (prior / prior.sum()).to(dtype))
        self.register_buffer("etf", simplex_etf(num_classes, center_dim))

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        if self.per_image and features.dim() == 2:
            expected = "images (B, D, ...) for per_image; pad point clouds with ignored labels"
            fail("CeCo", "features", expected, f"points {tuple(features.shape)}")
        if 0 in features.shape[2:]:
            shape = tuple(features.shape)
            fail("CeCo", "features", "at least one pixel per image", f"shape {shape}")
        return Plan(None, lambda _: self._losses_of_centers(*self._centers(features, labels)))

    def _centers(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Counts [K] and centers z_k [K, C]; of each image [B, K] and [B, K, C] for per_image.

        z_k is the batch norm of the mean over class k: neither g nor its gradient is stored.
        """
        upsample = features.dim() == 4 and self.resolution == "label"
        reduced = self._reduce_channels(features)
        if features.dim() < 4:
            labels = labels[None, None] if features.dim() == 2 else labels[:, None]
        counts, sums, mean, variance = upsampled_sums(
            reduced,
            labels,
            self.num_classes,
            per_image=self.per_image,
            upsample=upsample,
            ignore_index=self.ignore_index,
        )
        if not self.per_image:
            counts, sums, _ = reduce_moments(ClassMoments(counts, sums, None), self.process_group)
        pixels = reduced.numel() // reduced.shape[1]
        norm = batch_norm("CeCo", self.norm, mean, variance, pixels, self.process_group)
        return counts, norm.of(sums / counts.clamp(min=1)[..., None])

    def _reduce_channels(self, features: Tensor) -> Tensor:
        """reduction(features), (B, C, H, W) in the features' dtype and layout; points are a row.

        These are matrix products, because convolutions copy the features to other layouts.
        """
        weight = self.reduction.weight.flatten(1).to(features.dtype)
        if features.dim() == 2:
            return F.linear(features, weight).T[None, :, None]
        if features.stride(1) == 1:
            reduced = F.linear(features.movedim(1, -1), weight).movedim(-1, 1)
        else:
            reduced = torch.bmm(weight.expand(features.shape[0], -1, -1), features.flatten(2))
            reduced = reduced.unflatten(2, features.shape[2:])
        return reduced if features.dim() == 4 else reduced[:, :, None]

    def _losses_of_centers(self, counts: Tensor, centers: Tensor) -> Losses:
        weight, bias, etf, prior = (
            x.to(centers.dtype)
            for x in (self.projection.weight, self.projection.bias, self.etf, self.prior)
        )
        hidden, size = F.linear(centers, weight, bias).relu(), self.center_dim
        # normalised, to the length √C: one operator, where F.normalize has four
        hidden = F.rms_norm(hidden, (size,), eps=1e-24 / size)
        hidden = F.dropout(hidden, self.dropout, self.training)  # √C·ẑ_k
        present = counts > 0
        loss = classification_loss(
            hidden.transpose(0, -2),
            etf,
            (prior + 1e-12).log(),
            present=present.transpose(0, -1),
            temperature=math.sqrt(size) / self.scale,
            reduction="sum" if self.per_image else "mean",
        )
        if self.per_image:  # every rank has its own images
            loss, present = (all_reduce(x, self.process_group) for x in (loss, present.sum()))
            loss = loss / present.clamp(min=1)
        return Losses({"center": (self.loss_weight, loss)}, {"present": present})
