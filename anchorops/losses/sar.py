"""SAR, semantic anchor regularization (arXiv 2312.11872), and its ablation CR."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import (
    check_choice,
    check_flags,
    check_int,
    check_number,
    check_share,
    check_strided,
    describe,
    fail,
)
from .._moments import ClassMoments
from .._ops.centroid_info_nce import centroid_info_nce
from .._shared.sums import fixed_order_sum
from ..anchors import orthogonal_anchors, random_anchors, simplex_etf
from .base import Classifier, Losses, Plan, Regularizer, Term, linear_weight
from .statistics import Request

_ANCHORS = {
    "normal": random_anchors,
    "orthogonal": orthogonal_anchors,
    "simplex": simplex_etf,
}


def _embedding(dim: int, layers: int) -> nn.Sequential:
    """Linear → BN → ReLU, `layers` times, on the K anchors as a batch. The third one is the
    release's 1×1 convolution, which on K×D is a linear layer without bias, and starts as
    mmcv's ConvModule does: Kaiming normal, fan-out. The others start as nn.Linear does."""
    modules: list[nn.Module] = []
    for layer in range(layers):
        linear = nn.Linear(dim, dim, bias=layer < 2)
        if layer == 2:
            nn.init.kaiming_normal_(linear.weight, mode="fan_out", nonlinearity="relu")
        modules += [linear, nn.BatchNorm1d(dim), nn.ReLU()]
    return nn.Sequential(*modules)


def _loss_of(probability: float) -> float:
    return -math.log(probability) if probability > 0 else math.inf


class SAR(Regularizer):
    """Pulls every pixel to the semantic anchor of its class, which is learned without the features.

    Fixed random anchors A pass through an embedding h and the model's own classifier. h learns from
    the cross-entropy of the anchors that are not recognised yet (L_aux). When the anchors are
    recognised, their moving average Â attracts the features:
    L_p2a = Σ ‖f_p − Â_{y_p}‖² / (D·N_valid) (its Eq. 4).

        L = aux_weight·L_aux + loss_weight·L_p2a                          (its Eq. 9, without L_ce)

    A batch without a valid pixel, or an empty one, gives L_aux, which needs no features.

    Args:
        num_classes, dim: K ≥ 2 and D.
        loss_weight: λ2 of L_p2a (0.05 for DeepLabV3).
        aux_weight: λ1 of L_aux.
        momentum: α of Â ← αÂ + (1−α)h(A) (0.999: its section 4.1); with 0 there is no average.
        tau: L_aux includes only the anchors with p_k ≤ τ (its Eq. 6, Table 18).
        delta: an anchor is recognised if it is classified as its class with p_k > δ (its
            Table 19).
        gate: "all" (as in the released code): the average is started and updated, and L_p2a is not
            0, only in steps in which every anchor is recognised. "per_class": as in the text, each
            class separately.
        anchors: "normal", "orthogonal", "simplex" (ND, OM, MES of its Table 7), or a tensor [K, D].
        embed: False for CR: L_p2a to the fixed A, no embedding, no classifier.
        layers: of the embedding: 3 for segmentation, 2 for classification (its appendix A).
        reweight: w_k = log p_k / Σ_S log p_j (its Eq. 7); False for the unweighted mean over S.
        detach_weights: stop the gradient through w; the released code does not.
        ignore_index, process_group, check_labels: as in `Regularizer`; with a group L_p2a is that
            of all ranks.

    State: `anchors` (A) and `semantic_anchors` (Â) are buffers. If the average of a class has not
    started, its row is zero (so it starts again after an h(A) of zeros); an average of models
    (AveragedModel, ModelEma) then includes these zeros. Keep the module in float32, because updates
    of size (1−α) are lost in bfloat16. `terms`: aux, p2a, gate (the share of open gates: 0 or 1 for
    "all") and unsure (|S|).
    """

    anchors: Tensor
    semantic_anchors: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        loss_weight: float = 0.1,
        aux_weight: float = 1.0,
        momentum: float = 0.999,
        tau: float = 0.9,
        delta: float = 0.8,
        gate: str = "all",
        anchors: str | Tensor = "normal",
        embed: bool = True,
        layers: int = 3,
        reweight: bool = True,
        detach_weights: bool = False,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
        check_labels: bool = False,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, process_group, check_labels)
        check_choice("SAR", "gate", gate, ("all", "per_class"))
        num_classes, dim = self.num_classes, self.dim
        self.layers = check_int("SAR", "layers", layers, "2 or 3", 2, 3)
        self.loss_weight = check_number("SAR", "loss_weight", loss_weight)
        self.aux_weight = check_number("SAR", "aux_weight", aux_weight)
        self.momentum = check_share("SAR", "momentum", momentum)
        self.tau, self.delta = check_share("SAR", "tau", tau), check_share("SAR", "delta", delta)
        check_flags("SAR", embed=embed, reweight=reweight, detach_weights=detach_weights)
        if embed and num_classes < 2:
            fail("SAR", "num_classes", "at least 2, for batch statistics over anchors", num_classes)
        check_strided("SAR", "anchors", anchors)
        self.anchor_kind = "given"
        if isinstance(anchors, str):
            check_choice("SAR", "anchors", anchors, tuple(_ANCHORS))
            self.anchor_kind = anchors
            anchors = _ANCHORS[anchors](num_classes, dim)
        elif not isinstance(anchors, Tensor) or anchors.shape != (num_classes, dim):
            fail("SAR", "anchors", f"a name or a tensor [{num_classes}, {dim}]", describe(anchors))
        elif not anchors.is_floating_point():
            fail("SAR", "anchors", "a floating dtype", anchors.dtype)
        self.gate, self.embed = gate, embed
        self.reweight, self.detach_weights = reweight, detach_weights
        self.uses_classifier = self.has_state = embed
        self.register_buffer("anchors", anchors.detach().clone())
        if embed:
            self.embedding = _embedding(dim, self.layers)
            # in float32 at least, because updates of size (1−α) would be lost
            dtype = torch.promote_types(self.anchors.dtype, torch.float32)
            self.register_buffer("semantic_anchors", torch.zeros_like(self.anchors, dtype=dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, anchor_kind={self.anchor_kind!r}"

    @property
    def started(self) -> Tensor:
        """The classes whose average has started: bool [K]."""
        return self.semantic_anchors.any(1)

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        if not self.embed:
            return self._plan(self.anchors, None, {}, {})
        weight, bias = linear_weight("SAR", classifier, self.num_classes, self.dim)
        dtype = next(self.embedding.parameters()).dtype
        embedded = self.embedding(self.anchors.to(dtype))  # h(A)
        rows = embedded.to(weight.dtype)
        # −log p_k of the anchor of class k
        ce = centroid_info_nce(rows, weight, bias=bias, temperature=1.0, reduction="none")
        unsure = ce >= _loss_of(self.tau)
        aux = self.aux_weight, self._auxiliary_loss(ce, unsure)
        recognised = ce < _loss_of(self.delta)
        if self.delta < 0.5:  # a larger p_k is the largest
            classes = torch.arange(self.num_classes, device=ce.device)
            recognised &= F.linear(rows, weight, bias).argmax(1) == classes
        gate = share = recognised.all()
        if self.gate == "per_class":
            gate, share = recognised, recognised.mean(dtype=ce.dtype)
        average = self._average(embedded.detach(), gate)
        return self._plan(average, gate, {"aux": aux}, {"gate": share, "unsure": unsure})

    def _auxiliary_loss(self, ce: Tensor, unsure: Tensor) -> Tensor:
        """L_aux = Σ w_k·ce_k (Eq. 5), w_k = ce_k / Σ ce_j (Eq. 7). Eq. 6 replaces p_k > τ by 1,
        whose logarithm is 0: the sums are over the unsure anchors."""
        ce = torch.where(unsure, ce, 0)
        if not self.reweight:
            return ce.sum() / unsure.sum().clamp(min=1)
        weights = ce.detach() if self.detach_weights else ce
        return (weights * ce).sum() / (weights.sum() + 1e-9)  # as the release

    @torch.no_grad()
    def _average(self, embedded: Tensor, gate: Tensor) -> Tensor:
        """Â ← αÂ + (1−α)h(A) (Eq. 8) where the gate is open; the first time Â ← h(A). The result,
        which holds where it is open, is in new memory, because the backward pass needs it after
        later updates."""
        kept = self.semantic_anchors
        embedded = embedded.to(kept.dtype)
        average = torch.lerp(embedded, kept, self.momentum)
        average = torch.where(self.started[:, None], average, embedded)
        if self.training:
            torch.where(gate.unsqueeze(-1), average, kept, out=kept)
        return average

    def _plan(
        self,
        anchors: Tensor,
        gate: Tensor | None,
        terms: dict[str, Term],
        logs: dict[str, Tensor],
    ) -> Plan:
        def losses(moments: ClassMoments | None) -> Losses:
            """L_p2a = Σ ‖f_p − Â_{y_p}‖² / (D·N) (Eq. 4), over the pixels of classes with an open
            gate; the sum of the terms is L (Eq. 9)."""
            assert moments is not None and moments.sqdists is not None
            counts, sqdists = moments.counts, moments.sqdists
            if gate is not None:
                sqdists = torch.where(gate, sqdists, 0)
                if self.gate == "per_class":  # of all, a closed one makes the sum 0
                    counts = torch.where(gate, counts, 0)
            mean = fixed_order_sum(sqdists) / counts.sum().clamp(min=1)
            return Losses(terms | {"p2a": (self.loss_weight / self.dim, mean)}, logs)

        return Plan(Request(anchors=anchors, with_sums=False), losses)
