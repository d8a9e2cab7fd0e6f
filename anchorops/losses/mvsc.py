"""MVSC, multi-group visual semantic centroids."""

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import check_count, check_flags, check_number, check_temperature
from ..ops.centroid_losses import centroid_losses
from ..ops.prototype_halves import prototype_halves
from ..ops.straight_through import straight_through
from ..ops.unit_rows import unit_views
from ..reference import ClassMoments
from .base import Classifier, Losses, Plan, Regularizer, linear_weight
from .occl import EPS
from .statistics import Request


class MVSC(Regularizer):
    """Aligns learnable centroids in G groups with means of random groups of each class's pixels.

    V_g [K, D]: learnable, v'_k = mean_g V_gk; r_kg: mean of the g-th random group of class k's
    pixels; a_k, b_k: means of V over a random half of the groups (⌊G/2⌋, drawn in every step) and
    over the other groups. Means are over the non-empty (k, g), the mean in L_cos over all classes.

        L_fca = mean_{k,g} −log [ e^{r_kg·v'_k/τ} / Σ_{j present} e^{r_kg·v'_j/τ} ]
        L_cos = mean_k 1 − cos(a_k, b_k)
        L_v   = mean_{k,g} CE(classifier(V'_kg), k),  V' = V + r − sg(r)
        L = fca_weight·L_fca + cos_weight·L_cos + visual_weight·L_v

    Its Eq. 2 is damaged in print; this is the InfoNCE that it describes, with r and v' normalised,
    which is ours. The text once says that L_cos reduces the similarity; formula and purpose say the
    contrary.

    V starts from Kaiming normal (unstated), with rows of length √2 in the mean square, whatever the
    length of the features. L_fca and L_cos are of cosines, which no length changes. L_v alone
    depends on it: with short rows it begins near log K, and their length is learned. A length taken
    from the first batch would make the initial weights depend on the data, and differ among ranks.

    Args:
        num_classes, dim: K and D.
        groups: G; with 1, L_cos is 0.
        fca_weight, cos_weight, visual_weight: λ_f, λ_c, λ_v.
        enhance: False for L_v = CE of V itself, without a gradient to the features.
        temperature: τ, a normal number of float32.
        seed: of the random splits, together with the step counter `step`, a buffer, as in `OCCL`.
        ignore_index, process_group: as in `Regularizer`.

    State: `prototypes` (V), a parameter [G, K, D]. `terms`: fca, cos, visual, present (of K).
    """

    settings = (
        "groups",
        "fca_weight",
        "cos_weight",
        "visual_weight",
        "enhance",
        "temperature",
        "seed",
    )
    uses_classifier = True

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        groups: int = 4,
        fca_weight: float = 0.1,
        cos_weight: float = 1.0,
        visual_weight: float = 0.05,
        enhance: bool = True,
        temperature: float = 0.07,
        seed: int = 0,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index=ignore_index, process_group=process_group)
        check_count("MVSC", "groups", groups)
        check_number("MVSC", "fca_weight", fca_weight)
        check_number("MVSC", "cos_weight", cos_weight)
        check_number("MVSC", "visual_weight", visual_weight)
        check_temperature("MVSC", temperature)
        check_flags("MVSC", enhance=enhance)
        self.groups, self.enhance, self.temperature = groups, enhance, temperature
        self.fca_weight, self.cos_weight = fca_weight, cos_weight
        self.visual_weight = visual_weight
        self.prototypes = nn.Parameter(torch.empty(groups, num_classes, dim))
        for group in self.prototypes.data:
            nn.init.kaiming_normal_(group)
        self._count_steps(seed)

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        weight, bias = linear_weight("MVSC", classifier, self.num_classes, self.dim)
        seed = self._next_seed()

        def losses(moments: ClassMoments | None) -> Losses:
            assert moments is not None
            shape = (self.num_classes, self.groups)
            counts = moments.counts.view(shape)
            sums = moments.sums.view(*shape, self.dim)
            prototypes = self.prototypes.to(torch.promote_types(weight.dtype, sums.dtype))
            queries, means, _, present = unit_views(
                sums, counts, eps=EPS, with_means=self.enhance, with_centroids=False
            )
            # a different seed from that of the pixels' split
            keys, distances, rows = prototype_halves(
                prototypes, seed, 1 << 31, eps=EPS, loss_weight=self.cos_weight / self.num_classes
            )
            losses = centroid_losses(
                queries,
                keys,
                weight,
                rows=straight_through(rows, means) if self.enhance else rows,
                bias=bias,
                added=distances if self.groups > 1 else None,
                present=present,
                temperature=self.temperature,
                class_temperature=1.0,
                contrast_weight=self.fca_weight,
                class_weight=self.visual_weight,
            )
            fca, visual, cos = losses.terms
            terms = {"fca": fca, "cos": cos, "visual": visual}
            return Losses(terms, {"present": losses.present}, losses.total)

        return Plan(Request(groups=self.groups, seed=seed), losses)
