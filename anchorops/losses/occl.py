"""OCCL, online centroid contrastive loss (doi 10.1016/j.patcog.2024.110431)."""

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .._checks import check_choice, check_flags, check_number, check_temperature, fail
from .._moments import ClassMoments
from .._ops.centroid_info_nce import centroid_info_nce
from .._ops.split_groups import random_halves
from ..distributed import reduce_moments
from .base import Classifier, Losses, Plan, Regularizer, Term, linear_weight
from .statistics import Request

EPS = 1e-6  # of normalisation: it keeps the gradient of a centroid at zero below 1/EPS


class OCCL(Regularizer):
    """InfoNCE between the centroids of two random views of each class, and the classifier's rows.

    v_k1, v_k2: means of two random halves of class k's pixels; s_k = (v_k1 + v_k2)/2; P: classes in
    both views; w_k: the classifier's rows.

        L_v^x = mean_{i∈P} −log [ e_i / (e_i + Σ_{j∈P, j≠i} e^{v_ix·sg(s_j)/τ}) ]
        L_c^x = mean_{i∈P} −log [ e^{v_ix·w_i/τ} / Σ_{j=1..K} e^{v_ix·w_j/τ} ]
        L = ½ [ centroid_weight·(L_v^1 + L_v^2) + category_weight·(L_c^1 + L_c^2) ]

    As printed, Eqs. 4-6 have no −log, and their negatives repel a class from its own centroid. The
    text says InfoNCE, which is implemented here. Our additions: the mean over P, and v, s, w are
    normalised, because τ = 0.07 saturates on raw features.

    Args:
        num_classes, dim: K and D.
        centroid_weight, category_weight: λ and φ (ADE20K: FCN .4/.1, ConvNeXt 1/.2, Swin 1/.2,
            SegFormer 1/.1; COCO-Stuff: φ .3 except for SegFormer).
        temperature: τ, a normal number of float32.
        normalize: False for the inner products as printed in the paper.
        reduction: "mean" over P, or "sum" as printed in the paper.
        split: what is split at random: each class's "pixels", or the batch's "images" (at least 2),
            which is closer to the objects of the text.
        seed: of the random splits, together with the step counter `step`, a buffer. It is int64
            also in an average of models, where it only determines the next splits.
        ignore_index, process_group, check_labels: as in `Regularizer`.

    A trainable classifier receives the gradient of L_c. `terms`: centroid, category, present (|P|).
    """

    uses_classifier = True

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        centroid_weight: float = 1.0,
        category_weight: float = 0.3,
        temperature: float = 0.07,
        normalize: bool = True,
        reduction: str = "mean",
        split: str = "pixels",
        seed: int = 0,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
        check_labels: bool = False,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, process_group, check_labels)
        check_choice("OCCL", "reduction", reduction, ("mean", "sum"))
        check_choice("OCCL", "split", split, ("pixels", "images"))
        self.centroid_weight = check_number("OCCL", "centroid_weight", centroid_weight)
        self.category_weight = check_number("OCCL", "category_weight", category_weight)
        self.temperature = check_temperature("OCCL", temperature)
        check_flags("OCCL", normalize=normalize)
        self.normalize, self.reduction, self.split = normalize, reduction, split
        self._count_steps(seed)

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        weight, _ = linear_weight("OCCL", classifier, self.num_classes, self.dim)
        if self.split == "images" and (features.dim() == 2 or features.shape[0] < 2):
            expected = 'a batch of at least 2 images for split="images"'
            fail("OCCL", "features", expected, f"shape {tuple(features.shape)}")
        seed = self._next_seed()

        def losses(moments: ClassMoments | None) -> Losses:
            assert moments is not None
            counts, sums, _ = moments
            if self.split == "images":
                counts, sums, _ = reduce_moments(_halves(counts, sums, seed), self.process_group)
            return self._contrast(counts, sums, weight)

        if self.split == "images":
            return Plan(Request(per_image=True), losses)
        return Plan(Request(groups=2, seed=seed), losses)

    def _contrast(self, counts: Tensor, sums: Tensor, weight: Tensor) -> Losses:
        """counts [K, 2], sums [K, 2, D], weight [K, D]."""
        views = sums / counts.clamp(min=1)[..., None]  # v_kx (Eq. 3)
        centroids = views.detach().mean(1)  # sg(s_k)
        in_both = counts.all(1)  # P
        options: dict[str, Any] = {
            "present": in_both[:, None].expand(-1, 2),
            "temperature": self.temperature,
            "reduction": self.reduction,
            "normalize": EPS if self.normalize else None,
        }
        # Eqs. 4 and 5, the mean over P and over both views x; or their sums
        centroid = centroid_info_nce(views, centroids, positives=views.flip(1), **options)
        all_classes = torch.ones_like(in_both)
        category = centroid_info_nce(views, weight, present_keys=all_classes, **options)
        # Eq. 6: the mean over both views is ½(L^1 + L^2), the sum is L^1 + L^2
        half = 0.5 if self.reduction == "sum" else 1.0
        terms: dict[str, Term] = {
            "centroid": (half * self.centroid_weight, centroid),
            "category": (half * self.category_weight, category),
        }
        return Losses(terms, {"present": in_both})


def _halves(counts: Tensor, sums: Tensor, seed: Tensor) -> ClassMoments:
    """[B, K], [B, K, D] → [K, 2], [K, 2, D]: two random halves of the images, equal size (±1)."""
    half = random_halves(len(counts), seed, sums)[:, None]
    parts = [half == x for x in range(2)]
    return ClassMoments(
        torch.stack([torch.where(part, counts, 0).sum(0) for part in parts], 1),
        torch.stack([torch.where(part[..., None], sums, 0).sum(0) for part in parts], 1),
        None,
    )
