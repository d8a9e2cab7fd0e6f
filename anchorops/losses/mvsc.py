"""MVSC, multi-group visual semantic centroids."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import check_count, check_flags, check_number, check_temperature
from .._moments import ClassMoments
from .._ops.centroid_info_nce import centroid_info_nce
from .._ops.split_groups import random_halves
from .base import (
    Classifier,
    Losses,
    Plan,
    Regularizer,
    Term,
    classification_loss,
    linear_weight,
)
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

    A batch without a valid pixel, or an empty one, gives L_cos, which needs no features.

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
        ignore_index, process_group, check_labels: as in `Regularizer`.

    State: `prototypes` (V), a parameter [G, K, D]. `terms`: fca, cos, visual, present (of K).
    """

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
        check_labels: bool = False,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, process_group, check_labels)
        self.groups = check_count("MVSC", "groups", groups)
        self.fca_weight = check_number("MVSC", "fca_weight", fca_weight)
        self.cos_weight = check_number("MVSC", "cos_weight", cos_weight)
        self.visual_weight = check_number("MVSC", "visual_weight", visual_weight)
        self.temperature = check_temperature("MVSC", temperature)
        check_flags("MVSC", enhance=enhance)
        self.enhance = enhance
        self.prototypes = nn.Parameter(torch.empty(self.groups, self.num_classes, self.dim))
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
            means = sums / counts.clamp(min=1)[..., None]  # r_kg, 0 where absent
            present = counts > 0
            prototypes = self.prototypes.to(torch.promote_types(weight.dtype, sums.dtype))
            visual = prototypes.transpose(0, 1)  # V', with a gradient of r (Eq. 4)
            if self.enhance:
                visual = visual + (means - means.detach())
            classified = classification_loss(visual, weight, bias, present=present, temperature=1.0)
            terms: dict[str, Term] = {
                "cos": (self.cos_weight, self._consistency(prototypes, seed)),
                "fca": (self.fca_weight, self._alignment(means, prototypes, present)),
                "visual": (self.visual_weight, classified),
            }
            return Losses(terms, {"present": present[:, 0]})  # group 0 has the first pixel

        return Plan(Request(groups=self.groups, seed=seed), losses)

    def _alignment(self, means: Tensor, prototypes: Tensor, present: Tensor) -> Tensor:
        """L_fca (Eq. 2) of the global centroids v'_k. Their sums, once normalised, are the same, if
        they are longer than eps."""
        total, temperature = prototypes.sum(0), self.temperature
        return centroid_info_nce(
            means, total, present=present, temperature=temperature, normalize=EPS
        )

    def _consistency(self, prototypes: Tensor, seed: Tensor) -> Tensor:
        """L_cos = mean 1 − cos(a_k, b_k) (Eq. 3). Sums have the cosines of means."""
        if self.groups == 1:
            return prototypes.new_zeros(())
        half = random_halves(self.groups, seed, prototypes)
        halves = torch.stack((half, 1 - half)).to(prototypes.dtype)
        sums = (halves @ prototypes.flatten(1)).view(2, self.num_classes, self.dim)
        # normalised, to the length √D: one operator, where F.normalize has four
        a, b = F.rms_norm(sums, (self.dim,), eps=EPS**2 / self.dim)
        return 1 - (a * b).mean()
