"""CBP, category-basis prototypes: a classifier that is fixed instead of learned
(doi 10.1016/j.patcog.2024.110431)."""

import warnings
from typing import NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from .._checks import FLOATING, check_choice, check_number, check_share, describe, fail
from .._moments import ClassMoments
from .._torch_state import has_values
from ..anchors import category_basis
from ..distributed import reduce_moments
from .base import Classifier, Losses, Plan, Regularizer, linear_weight
from .statistics import Request


class _Replaced(NamedTuple):
    """The state of a classifier before `install`: its parameters, the weight's values, and whether
    it was trained."""

    weight: nn.Parameter
    values: Tensor
    trained: bool
    bias: nn.Parameter | None


def _replaced_parameters(
    classifier: nn.Module, basis: Tensor
) -> tuple[nn.Parameter, nn.Parameter | None]:
    """The weight and the bias that `install` replaces. Raises ValueError if a write to the weight
    would be lost: if it is computed, quantised, sharded, or has no memory."""

    def refuse(expected: str, got: object) -> NoReturn:
        fail("CBP", "classifier", expected, got)

    parameters = classifier._parameters  # a bias that is None is there too
    for name in ("weight", "bias"):
        if name not in parameters:
            expected = (
                f"a {name} that is a parameter: first remove what computes it "
                "(torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, "
                "remove_spectral_norm, prune.remove)"
            )
            refuse(expected, type(classifier).__name__)
    weight = parameters.get("weight")
    if weight is None or weight.numel() != basis.numel():
        num_classes, dim = basis.shape
        expected = f"a linear layer or 1×1 convolution {dim} → {num_classes}"
        refuse(expected, describe(classifier))
    if hasattr(weight, "placements"):
        refuse("a weight that is not sharded: attach first", "a DTensor")
    if weight.dtype not in FLOATING:
        refuse("a weight that is not quantised", describe(weight))
    if weight.is_meta:
        refuse("a weight with memory: call to_empty() before attach", describe(weight))
    return weight, parameters.get("bias")


def _weight_of(classifier: nn.Module) -> Tensor:
    weight = classifier.weight
    if not isinstance(weight, Tensor):
        expected = "a weight that is not quantised: call detach() before quantisation"
        fail("CBP", "classifier", expected, describe(classifier))
    return weight


class CBP(Regularizer):
    """Replaces the classifier's weight by `category_basis`, without a bias, and freezes it.

    `attach` does this, and `detach` restores the old weight and bias. Without `attach`, call
    `install(classifier)`. Do this before you load a checkpoint of a model with CBP, and after you
    load any other: a frozen classifier refuses rows that are no basis. The logits are still the
    product of features and weight. The loss is 0, except with "penalty". The classifier's weight
    must be a parameter that is not computed (parametrizations, pruning), shared with another
    module, quantised or sharded.

    Args:
        num_classes, dim: K and D ≥ K.
        length: T of the rows (ADE20K: FCN 2, ConvNeXt 2, Swin 1, SegFormer 1); None: as
            Gram-Schmidt leaves them ("orthogonalised only": Algorithm 1 without its line 12).
        init: [K, D] to orthogonalise instead of Kaiming normal (for example text embeddings).
        orthogonalize: False for "equalised only".
        update: from the paper's Table 4. "frozen": never changed. "gradient": learned from this
            start. "ema": moving average of the batch's class centroids; the lengths change too.
            "penalty": learned, with rows kept at `length`; the loss is `penalty_weight` times the
            mean squared cosine between rows (the text says: forced to 0). "ema" and "penalty"
            change the weight in place when the next training forward begins. Therefore they need
            `attach` (without it a call warns), and a backward pass after each forward, before the
            next one. With "frozen" and "ema" the weight is a buffer of the classifier, which FSDP
            does not shard, and for which torch.ao.quantization.prepare_qat raises TypeError: call
            it before `attach`. With "penalty" it must not be sharded: the first forward raises
            ValueError.
        momentum: for "ema", w ← momentum·w + (1 − momentum)·centroid on present classes (the paper
            names this average, without an equation).
        ignore_index, process_group, check_labels: as in `Regularizer`; without a
            process_group "ema" uses all ranks, because their classifiers must stay equal.

    State of "ema": `centroids` [K, D], a buffer with the centroids of the last batch. The next
    training forward moves the classifier's rows towards them. A row is zero if the class was
    absent, or if the classifier's row has already been moved. An average of models (AveragedModel,
    ModelEma) contains the mean of these centroids. If training continues from it, the rows first
    move by 1 − momentum to that mean, and the next batch replaces it.
    """

    replaces_classifier = True
    centroids: Tensor

    def __init__(
        self,
        num_classes: int,
        dim: int,
        *,
        length: float | None = 2.0,
        init: Tensor | None = None,
        orthogonalize: bool = True,
        update: str = "frozen",
        momentum: float = 0.999,
        penalty_weight: float = 0.01,
        ignore_index: int | None = None,
        process_group: ProcessGroup | str | None = None,
        check_labels: bool = False,
    ) -> None:
        super().__init__(num_classes, dim, ignore_index, process_group, check_labels)
        check_choice("CBP", "update", update, ("frozen", "gradient", "ema", "penalty"))
        if update == "penalty" and length is None:
            fail("CBP", "length", 'a number for update="penalty"', None)
        self.momentum = check_share("CBP", "momentum", momentum)
        self.penalty_weight = check_number("CBP", "penalty_weight", penalty_weight)
        if length is not None:
            length = check_number("CBP", "length", length, above=True)
        self.length, self.orthogonalize, self.update = length, orthogonalize, update
        self.uses_classifier, self.has_state = update == "penalty", update == "ema"
        num_classes, dim = self.num_classes, self.dim
        basis = category_basis(num_classes, dim, length, init=init, orthogonalize=orthogonalize)
        self._replaced: _Replaced | None = None
        # Whether something changes the classifier's rows, or a warning said that nothing does.
        self._moves_rows = False
        self.basis = basis  # the classifier has it as its state
        if update == "ema":
            dtype = torch.promote_types(basis.dtype, torch.float32)
            self.register_buffer("centroids", torch.zeros(num_classes, dim, dtype=dtype))

    @property
    def _as_buffer(self) -> bool:
        """No gradient reaches the weight, so it is a buffer: `model.requires_grad_()` does not thaw
        it, and wrappers, which shard parameters, leave it whole."""
        return self.update in ("frozen", "ema")

    @torch.no_grad()
    def install(self, classifier: nn.Module) -> None:
        """Set the classifier's weight and remove its bias."""
        if self._replaced is not None:
            fail("CBP", "classifier", "the first one: call uninstall() on it before", classifier)
        weight, bias = _replaced_parameters(classifier, self.basis)
        self._replaced = _Replaced(weight, weight.detach().clone(), weight.requires_grad, bias)
        self._moves_rows = self.update in ("frozen", "gradient")
        basis = self.basis.to(weight).view_as(weight)
        classifier.register_parameter("bias", None)
        if self._as_buffer:
            del classifier.weight
            classifier.register_buffer("weight", basis.clone())
        else:
            weight.copy_(basis)
            weight.requires_grad_(True)

    @torch.no_grad()
    def uninstall(self, classifier: nn.Module) -> None:
        """Restore the weight and bias that the classifier had before `install`. Called again, it
        does nothing."""
        replaced = self._replaced
        if replaced is None:
            return
        weight = _weight_of(classifier)
        if hasattr(weight, "placements"):
            expected = "a weight that is not sharded: call detach() on a model before fully_shard"
            fail("CBP", "classifier", expected, "a DTensor")
        self._moves_rows = False
        if self._as_buffer:
            del classifier.weight
            del classifier.bias  # the order of the parameters is that of an optimizer's state
            replaced.weight.data = replaced.values.to(weight)  # the model may have moved since
            classifier.register_parameter("weight", replaced.weight)
        else:
            weight.copy_(replaced.values)
            weight.requires_grad_(replaced.trained)
        if replaced.bias is not None:
            replaced.bias.data = replaced.bias.to(weight)
        classifier.register_parameter("bias", replaced.bias)
        self._replaced = None

    @torch.no_grad()
    def check_checkpoint(self, weight: Tensor) -> None:
        """Raises ValueError if the rows of a frozen classifier would be no basis: of several
        lengths, or not orthogonal. Then they come from a model without CBP."""
        comparable = weight.numel() == self.basis.numel() and has_values(weight)
        if self.update != "frozen" or not comparable:
            return
        rows = weight.flatten(1).double()
        unit, lengths = F.normalize(rows, dim=1), rows.norm(dim=1)
        cosines = (unit @ unit.T).fill_diagonal_(0)
        rounding = 2**-6  # of bfloat16, generously
        expected = "a checkpoint of a model with CBP (load others before attach)"
        if self.length is not None and lengths.max() > (1 + rounding) * lengths.min():
            got = f"rows of lengths {lengths.min():.3g} to {lengths.max():.3g}"
            fail("CBP", "state_dict", expected, got)
        if self.orthogonalize and cosines.abs().max() > rounding:
            got = f"rows with cosines of up to {cosines.abs().max():.3g}"
            fail("CBP", "state_dict", expected, got)

    @torch.no_grad()
    def before_classifier(self, classifier: nn.Module) -> None:
        self._moves_rows = True
        weight = _weight_of(classifier)
        if self.update == "penalty":
            assert self.length is not None
            if self._replaced is None or weight is not self._replaced.weight:
                expected = (
                    'the parameter that the classifier had at attach: for update="penalty" do not '
                    "shard it (use DDP), and do not replace it (load_state_dict with assign=False)"
                )
                fail("CBP", "classifier", expected, "another parameter")
            rows = F.normalize(weight.flatten(1), dim=1) * self.length
            weight.copy_(rows.view_as(weight))
        elif self.update == "ema":
            rows, present = weight.flatten(1), self.centroids.any(1, keepdim=True)
            centroids = torch.where(present, self.centroids.to(weight), rows)
            rows.lerp_(centroids, 1 - self.momentum)
            self.centroids.zero_()

    def plan(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Plan:
        if self.training and not (self._moves_rows or torch.compiler.is_compiling()):
            self._moves_rows = True
            warnings.warn(
                f'CBP: update="{self.update}" changes no classifier here, because it was not '
                "attached: call anchorops.attach(model, method), and its result with the labels "
                "after each forward of the model"
                + " (or install(classifier) once)"
                * (self.update in ("frozen", "gradient")),
                stacklevel=2,
            )
        if self.update == "ema":
            return Plan(Request(), self._remember)
        if self.update == "penalty":
            weight, _ = linear_weight("CBP", classifier, self.num_classes, self.dim)
            rows = F.normalize(weight, dim=1)
            cosines = (rows @ rows.T).fill_diagonal_(0)
            pairs = max(self.num_classes * (self.num_classes - 1), 1)
            penalty = cosines.square().sum() / pairs
            return Plan(None, lambda _: Losses({"penalty": (self.penalty_weight, penalty)}, {}))
        return Plan(None, lambda _: Losses({}, {}))

    def reduce(self, moments: ClassMoments, request: Request) -> ClassMoments:
        return reduce_moments(moments, self.process_group or "world")

    @torch.no_grad()
    def _remember(self, moments: ClassMoments | None) -> Losses:
        assert moments is not None
        if self.training:
            # not out=self.centroids: a compiler would leave out what changed them before, which is
            # check_first_pass
            self.centroids.copy_(moments.sums / moments.counts.clamp(min=1)[:, None])
        return Losses({}, {})
