"""Neural-collapse and separability measures, as functions of vectors and as torchmetrics Metrics;
and the calibration error of predictions.

Sources: CBP (doi 10.1016/j.patcog.2024.110431, Eq. 8), CeCo (CVPR 2023, Figs. 2, 5, 6, Table 12).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._backend import GPU_MAX_CLASSES
from ._checks import (
    MAX_CLASSES,
    check_choice,
    check_count,
    check_features,
    check_flags,
    check_ignore_index,
    check_int,
    check_integers,
    check_labels,
    check_num_classes,
    check_pixels,
    describe,
    fail,
    missing_extra,
    rows_of_classes,
)
from ._ops.class_moments import class_moments
from ._ops.pixel_argmax import pixel_argmax

try:
    from torchmetrics import Metric
except ModuleNotFoundError as error:
    raise missing_extra("diagnostics", error) from error

MAX_BINS = GPU_MAX_CLASSES // 2 - 1  # the keys of hits and misses, of one bin more


def _of_classes(function: str, argument: str, values: Tensor) -> Tensor:
    """[K] in float64."""
    if not isinstance(values, Tensor) or values.dim() != 1 or values.is_complex():
        fail(function, argument, "a real tensor [K]", describe(values))
    return values.double()


def _centred_rows(function: str, vectors: Tensor, mean: Tensor | None) -> Tensor:
    rows = rows_of_classes(function, "vectors", vectors).double()
    if mean is None:
        return rows - rows.mean(0)
    real = isinstance(mean, Tensor) and not mean.is_complex()
    if not real or mean.shape != rows.shape[1:] or mean.device != rows.device:
        fail(function, "mean", f"a real tensor [{rows.shape[1]}] on {rows.device}", describe(mean))
    return rows - mean.double()


def _pairwise_cosines(rows: Tensor) -> Tensor:
    """cos of each pair i < j: [K(K−1)/2]."""
    unit = F.normalize(rows, dim=1)
    i, j = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return (unit @ unit.T)[i, j]


def class_separability(weight: Tensor) -> Tensor:
    """½ Σ_i Σ_{j≠i} cos(w_i, w_j) of a classifier's rows (CBP, Eq. 8): 0 where orthogonal."""
    return _pairwise_cosines(rows_of_classes("class_separability", "weight", weight).double()).sum()


def equiangularity(vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Standard deviation over pairs of cos(c_k − m, c_k' − m); 0 where all angles are equal.

    vectors: classifier rows or centroids, [K, D]; mean: m [D], by default the vectors' own mean.
    """
    return _pairwise_cosines(_centred_rows("equiangularity", vectors, mean)).std(correction=0)


def maximal_angle(vectors: Tensor, mean: Tensor | None = None) -> Tensor:
    """Mean over pairs of |cos(c_k − m, c_k' − m) + 1/(K−1)|: 0 for a simplex (largest angles), NaN
    of one vector.

    Arguments as `equiangularity`.
    """
    rows = _centred_rows("maximal_angle", vectors, mean)
    cosines = _pairwise_cosines(rows)
    return (cosines + 1 / max(len(rows) - 1, 1)).abs().mean()  # NaN of one vector


def imbalance_factor(counts: Tensor) -> Tensor:
    """n_max / n_min over the classes that occur (CeCo: PIF of pixels, CIF of centers)."""
    counts = _of_classes("imbalance_factor", "counts", counts)
    present = counts[counts > 0]
    return present.max() / present.min() if len(present) else present.new_tensor(torch.nan)


def _centred(values: Tensor) -> Tensor:
    """Minus the mean; 0 where all are equal, of which the mean may differ by its rounding."""
    mean = values.mean()
    centred = values - mean
    return torch.where((centred.abs() <= 1e-14 * mean.abs()).all(), 0, centred)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two tensors [K]; NaN where either is constant."""
    x, y = _of_classes("pearson", "x", x), _of_classes("pearson", "y", y)
    if len(x) != len(y):
        fail("pearson", "y", f"a tensor [{len(x)}], as x", describe(y))
    x, y = _centred(x), _centred(y)
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def norm_correlation(weight: Tensor, counts: Tensor) -> Tensor:
    """Pearson's correlation of ‖w_k‖ and the classes' pixel counts ("prior ambiguity" in CBP); NaN
    where all ‖w_k‖ are equal, up to the rounding of float32."""
    norms = rows_of_classes("norm_correlation", "weight", weight).double().norm(dim=1)
    counts = _of_classes("norm_correlation", "counts", counts)
    if len(counts) != len(norms):
        fail("norm_correlation", "counts", f"a tensor [{len(norms)}], as weight", describe(counts))
    mean = norms.mean()
    norms = torch.where(((norms - mean).abs() <= 1e-6 * mean).all(), mean, norms)
    return pearson(norms, counts)


def gradient_ratio(features: Tensor, loss: Tensor, other: Tensor) -> Tensor:
    """‖∂loss/∂features‖ / ‖∂other/∂features‖, Euclidean norms: compares the gradient of a method
    on the features with that of the cross-entropy. A detached scalar, float32 or float64.

        features = sar.features  # sar = anchorops.attach(…); None after sar(labels)
        extra = sar(labels)
        ratio = gradient_ratio(features, extra, cross_entropy)  # before the backward pass

    It runs a backward pass from each loss to the features, and changes neither graphs nor `.grad`.
    With float16 features, multiply the losses by the scaler's factor, or gradients underflow.

    Args:
        features: any shape, usually not a leaf; the losses are computed from them.
        loss: a scalar; the ratio is 0 if it does not depend on the features (CBP).
        other: a scalar that depends on them.

    Raises ValueError if `features` need no gradient, or if `other` does not depend on them. Inside
    a compiled graph there is no gradient at the features, so use a model that is not compiled.
    """
    if not isinstance(features, Tensor) or not features.requires_grad:
        fail("gradient_ratio", "features", "a tensor that requires a gradient", describe(features))
    dtype = torch.promote_types(features.dtype, torch.float32)
    norms = []
    for name, scalar in (("loss", loss), ("other", other)):
        if not isinstance(scalar, Tensor) or scalar.numel() != 1:
            fail("gradient_ratio", name, "a scalar tensor", describe(scalar))
        gradient = None
        if scalar.requires_grad:
            (gradient,) = torch.autograd.grad(
                scalar, features, retain_graph=True, allow_unused=True
            )
        if gradient is None:
            if name == "other":
                expected = "a loss that depends on the features (not through a compiled model)"
                fail("gradient_ratio", "other", expected, "one that does not")
            gradient = torch.zeros_like(features)
        norms.append(torch.linalg.vector_norm(gradient, dtype=dtype))
    return norms[0] / norms[1]


class CentroidGeometry(Metric):
    """Measures how closely the features have collapsed to well-separated class centroids.

    update(features, labels) has the arguments of `class_moments`. compute() returns a dict of
    float64 scalars:

        equiangularity   standard deviation over pairs of cos(ĉ_k, ĉ_k'), ĉ: centroid minus mean
        maximal_angle    mean over pairs of |cos(ĉ_k, ĉ_k') + 1/(K−1)|
        compactness      Σ ‖f − c‖² / Σ n
        min_distance, mean_distance    over pairs of centroids

    over the classes that occurred. With fewer than two of them, all but compactness are NaN.

    Args:
        num_classes, dim: K and D.
        mean: which mean is subtracted from the centroids: that of the "classes" (their centroids)
            or of the "pixels".
        anchors: [K, D], zero by default. Σ‖f−c‖² is computed as Σ‖f−a‖² − n‖c−a‖²; this is more
            exact if the anchors are closer to the centroids.
        ignore_index: as in `class_moments`.
    """

    plot = Metric._plot
    counts: Tensor
    sums: Tensor
    sqdists: Tensor
    anchors: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        mean: str = "classes",
        anchors: Tensor | None = None,
        ignore_index: int | None = None,
        **metric_arguments: Any,
    ) -> None:
        super().__init__(**metric_arguments)
        num_classes = check_num_classes("CentroidGeometry", num_classes)
        dim = check_count("CentroidGeometry", "dim", dim)
        check_choice("CentroidGeometry", "mean", mean, ("classes", "pixels"))
        self.num_classes, self.mean = num_classes, mean
        self.ignore_index = check_ignore_index("CentroidGeometry", ignore_index, num_classes)
        zeros = torch.zeros(num_classes, dim, dtype=torch.float32)
        if anchors is not None:
            floating = isinstance(anchors, Tensor) and anchors.is_floating_point()
            if not floating or anchors.shape != zeros.shape:
                expected = f"a floating tensor [{num_classes}, {dim}], as num_classes and dim"
                fail("CentroidGeometry", "anchors", expected, describe(anchors))
        self.register_buffer("anchors", zeros if anchors is None else anchors.detach().clone())
        self.add_state("counts", torch.zeros(num_classes, dtype=torch.int64), "sum")
        self.add_state("sums", zeros.double(), "sum")
        self.add_state("sqdists", torch.zeros(num_classes, dtype=torch.float64), "sum")
        arguments = F.pad(self.anchors.double().flatten(), (0, 1), value=self.ignore_index)
        self.add_state("arguments", arguments, "max")  # see MeanIoU

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor) -> None:
        """Add the statistics of a batch; shapes and dtypes as in `class_moments`."""
        check_features("CentroidGeometry", features)
        if features.shape[1] != self.anchors.shape[1]:
            expected = f"{self.anchors.shape[1]} channels, as dim"
            fail("CentroidGeometry", "features", expected, describe(features))
        check_labels("CentroidGeometry", labels, features)
        counts, sums, sqdists = class_moments(
            features,
            labels,
            self.num_classes,
            anchors=self.anchors,
            ignore_index=self.ignore_index,
        )
        assert sqdists is not None
        # new tensors, because a state may be one of inference mode; model.to(dtype) converts them
        self.counts = self.counts + counts
        self.sums = self.sums.double() + sums
        self.sqdists = self.sqdists.double() + sqdists

    def centroids(self) -> tuple[Tensor, Tensor]:
        """The values of this rank so far: centroids [K, D], float64, zero if absent; counts [K]."""
        return self.sums / self.counts.clamp(min=1)[:, None], self.counts.clone()

    def compute(self) -> dict[str, Tensor]:
        """The five measures by name, float64 scalars."""
        present = self.counts > 0
        counts = self.counts[present]
        centroids = self.sums[present] / counts[:, None]
        shift = centroids - self.anchors[present]
        within = (self.sqdists[present] - counts * shift.square().sum(1)).clamp(min=0)
        mean = None if self.mean == "classes" else self.sums.sum(0) / self.counts.sum()
        if len(counts) < 2:  # there is no pair
            centroids = centroids.new_full((2, centroids.shape[1]), torch.nan)
        distances = F.pdist(centroids)
        return {
            "equiangularity": equiangularity(centroids, mean),
            "maximal_angle": maximal_angle(centroids, mean),
            "compactness": within.sum() / counts.sum(),
            "min_distance": distances.min(),
            "mean_distance": distances.mean(),
        }


class LabelImbalance(Metric):
    """Class imbalance of labels (CeCo): update(labels), any integer dtype, (B, …).

    compute() returns pixel_imbalance (PIF) and center_imbalance (CIF, from the number of images
    that contain each class). The counts are `pixels` and `images`, int64 [K]. `prior()` is CeCo's
    π.
    """

    plot = Metric._plot
    pixels: Tensor
    images: Tensor

    def __init__(
        self, num_classes: int, *, ignore_index: int | None = None, **metric_arguments: Any
    ) -> None:
        super().__init__(**metric_arguments)
        self.num_classes = num_classes = check_num_classes("LabelImbalance", num_classes)
        self.ignore_index = check_ignore_index("LabelImbalance", ignore_index, num_classes)
        for name in ("pixels", "images"):
            self.add_state(name, torch.zeros(num_classes, dtype=torch.int64), "sum")
        self.add_state("arguments", torch.tensor(self.ignore_index), "max")  # see MeanIoU

    @torch.no_grad()
    def update(self, labels: Tensor) -> None:
        """Count the pixels and images of each class in labels, integer (B, …). Raises ValueError
        for others."""
        if not isinstance(labels, Tensor) or labels.dim() < 2:
            fail("LabelImbalance", "labels", "a tensor (B, …)", describe(labels))
        check_integers("LabelImbalance", "labels", labels)
        labels = labels.long().flatten(1)
        valid = (labels >= 0) & (labels < self.num_classes) & (labels != self.ignore_index)
        keys = torch.where(valid, labels, self.num_classes)
        counts = keys.new_zeros(len(labels), self.num_classes + 1)
        counts.scatter_add_(1, keys, torch.ones_like(keys))
        self.pixels = self.pixels + counts[:, :-1].sum(0)
        self.images = self.images + (counts[:, :-1] > 0).sum(0)

    def prior(self) -> Tensor:
        """Share of the images that contain each class, normalised to sum 1: float32 [K]."""
        return self.images.float() / self.images.sum().float()

    def compute(self) -> dict[str, Tensor]:
        """pixel_imbalance and center_imbalance, float64 scalars; NaN if no class occurred."""
        return {
            "pixel_imbalance": imbalance_factor(self.pixels),
            "center_imbalance": imbalance_factor(self.images),
        }


class CalibrationError(Metric):
    """How far the confidence of the predictions is from their accuracy, over all pixels that
    `update` received.

        gap_b = |hits_b − confidence_sums_b| / counts_b,   share_b = counts_b / Σ_i counts_i
        l1 = Σ_b share_b·gap_b (ECE),   l2 = √(Σ_b share_b·gap_b²),   max = max_b gap_b

    over the bins b of the confidence, the largest probability of a pixel: [b / n_bins, (b + 1) /
    n_bins) and, as in torchmetrics, a last bin of those that are 1. A hit is a right prediction.

    It equals torchmetrics' CalibrationError(task="multiclass") of upsampled logits, with sigmoid
    task="binary", except for pixels whose confidence is within rounding of an edge of two bins, and
    for bins of more than 2²⁴ pixels, where its float32 sums stop. It is NaN if no pixel is valid,
    or if the confidence of a valid one is NaN. `update` reads low-resolution logits; neither the
    upsampled ones nor the confidences of pixels are kept.

    Args:
        num_classes: K, 2 to 65,536; with sigmoid C, at least 1.
        sigmoid: each pixel of each channel is a prediction of its own, all in the same bins. The
            confidence is the probability of 1, and a hit is a label 1, as in
            BinaryCalibrationError.
        n_bins: number of bins, 1 to 8,191, of equal width.
        norm: "l1", "l2" or "max".
        ignore_index: the label to ignore, 255 by default; with K > 255 it must be given. Pixels
            whose label is no class are ignored too.
        align_corners: of the upsampling, as in F.interpolate.
        check_labels: as in `confusion`; a sigmoid has two classes, 0 and 1.
        metric_arguments: of torchmetrics.Metric, for example sync_on_compute.

    The state is `counts` and `hits`, int64, and `confidence_sums`, float64, all [n_bins + 1], which
    `plots.reliability` draws. `compute` adds the states of all ranks. Sources: Guo et al., arXiv
    1706.04599 (l1, max); Kumar et al., arXiv 1909.10155 (l2).
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    plot_lower_bound, plot_upper_bound = 0.0, 1.0
    plot = Metric._plot
    counts: Tensor
    hits: Tensor
    confidence_sums: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        sigmoid: bool = False,
        n_bins: int = 15,
        norm: str = "l1",
        ignore_index: int | None = None,
        align_corners: bool = False,
        check_labels: bool = False,
        **metric_arguments: Any,
    ) -> None:
        super().__init__(**metric_arguments)
        function = "CalibrationError"
        flags = {"align_corners": align_corners, "check_labels": check_labels}
        check_flags(function, sigmoid=sigmoid, **flags)
        least = 1 if sigmoid else 2
        expected = f"an int from {least} to {MAX_CLASSES}"
        if not sigmoid:
            expected += " (one sigmoid: CalibrationError(1, sigmoid=True))"
        num_classes = check_int(function, "num_classes", num_classes, expected, least, MAX_CLASSES)
        self.n_bins = check_int(
            function, "n_bins", n_bins, f"an int from 1 to {MAX_BINS}", 1, MAX_BINS
        )
        check_choice(function, "norm", norm, ("l1", "l2", "max"))
        self.num_classes, self.sigmoid, self.norm = num_classes, sigmoid, norm
        self.align_corners, self.check_labels = align_corners, check_labels
        classes = 2 if sigmoid else num_classes
        self.ignore_index = check_ignore_index(function, ignore_index, classes)
        dtypes = {"counts": torch.int64, "hits": torch.int64, "confidence_sums": torch.float64}
        for name, dtype in dtypes.items():
            self.add_state(name, torch.zeros(self.n_bins + 1, dtype=dtype), "sum")
        arguments = torch.tensor([self.ignore_index, align_corners, check_labels])
        self.add_state("arguments", arguments, "max")  # see MeanIoU

    @torch.no_grad()
    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add the pixels of a batch to the bins.

        Args:
            logits: (B, K, h, w) or (B, K, d, h, w), floating; with sigmoid of C channels.
            labels: integer, (B, H, W) or (B, D, H, W) of any size, also with a channel, (B, 1, …).
                With sigmoid 0 and 1, (B, C, …); if C = 1 also (B, H, W) or (B, D, H, W).

        Raises:
            ValueError: wrong shape, dtype, device or label.
        """
        function, sigmoid = "CalibrationError", self.sigmoid
        labels, _ = check_pixels(
            function,
            logits,
            labels,
            self.ignore_index,
            self.check_labels,
            sigmoid=sigmoid,
            points=False,
        )
        if logits.shape[1] != self.num_classes:
            expected = f"{self.num_classes} channels in dimension 1, as num_classes"
            fail(function, "logits", expected, describe(logits))
        predictions, confidences = pixel_argmax(
            logits,
            labels.shape[2 - logits.dim() :],
            align_corners=self.align_corners,
            confidence=True,
            dtype=torch.int32,
            sigmoid=sigmoid,
        )
        labels = labels.long()  # torch has no comparisons for uint16 to uint64
        classes = 2 if sigmoid else self.num_classes
        valid = (labels >= 0) & (labels < classes) & (labels != self.ignore_index)
        if sigmoid:
            confidences = torch.where(predictions == 1, confidences, 1 - confidences)
        hits = labels == (1 if sigmoid else predictions)
        confidences = confidences.float().clamp(0, 1)  # rounding may leave [0, 1]
        edges = torch.linspace(0, 1, self.n_bins + 1, dtype=torch.float32, device=logits.device)
        bins = torch.bucketize(confidences, edges, right=True, out_int32=True) - 1
        keys = torch.where(valid, 2 * bins + hits, -1)  # of misses and hits
        values = confidences.flatten(1)[:, None], keys.flatten(1)
        counts, sums, _ = class_moments(*values, 2 * len(edges), ignore_index=-1)
        counts, sums = counts.view(-1, 2), sums.double().view(-1, 2)
        # new tensors, because a state may be one of inference mode; model.to(dtype) converts them
        self.counts = self.counts + counts.sum(1)
        self.hits = self.hits + counts[:, 1]
        self.confidence_sums = self.confidence_sums.double() + sums.sum(1)

    def compute(self) -> Tensor:
        """The calibration error by the norm, a float64 scalar; NaN if no pixel was valid."""
        counts = self.counts.double()
        gaps = (self.hits - self.confidence_sums).abs() / counts.clamp(min=1)
        shares = counts / counts.sum()
        if self.norm == "l1":
            return (shares * gaps).sum()
        if self.norm == "l2":
            return (shares * gaps.square()).sum().sqrt()
        return torch.where(counts.any(), gaps.max(), torch.nan)
