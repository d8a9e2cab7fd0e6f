"""Each loss as `attach` calls it, forward and backward to features, classifier and parameters.

They are compared with the same losses on class statistics computed by hand, so the figures differ
only by the statistics. Bytes are those of the method's pass over the features.
"""

import copy
from contextlib import nullcontext

import alternatives
import torch
from cases import OCRNET, SEGFORMER, Case, Inputs, backends, grid
from torch import Tensor, nn

import anchorops as ao
from anchorops.measure import moments_bytes

TRAINING = "forward + backward"
METHODS = {
    "SAR": lambda k, d: ao.SAR(k, d, ignore_index=-1),
    "OCCL": lambda k, d: ao.OCCL(k, d, ignore_index=-1),
    "CBP, moving average": lambda k, d: ao.CBP(k, d, update="ema", ignore_index=-1),
    "CeCo": lambda k, d: ao.CeCo(k, d, resolution="feature", dropout=0, ignore_index=-1),
    "CeCo at label size": lambda k, d: ao.CeCo(k, d, dropout=0, ignore_index=-1),
    "MVSC": lambda k, d: ao.MVSC(k, d, ignore_index=-1),
    "SAR + OCCL": lambda k, d: ao.Combined(
        ao.SAR(k, d, ignore_index=-1), ao.OCCL(k, d, ignore_index=-1)
    ),
}
METHODS_WITH_ANCHORS = ("SAR", "SAR + OCCL")
OWN_PASS = ("CeCo", "CeCo at label size")  # they do not use class_statistics
ALTERNATIVES = ("index_add", "one_hot bmm")


def names(case: Case, device: torch.device) -> list[str]:
    own_pass = case.operation in OWN_PASS
    ours = [name for name, kind in backends(device).items() if not (own_pass and kind == "cuda")]
    return [*ours, *(() if own_pass else ALTERNATIVES)]


@grid(
    [Case(method, TRAINING, OCRNET) for method in METHODS],
    [
        Case(method, TRAINING, shape, dtype)
        for shape in (OCRNET, SEGFORMER)
        for dtype in ("bf16", "fp32")
        for method in METHODS
    ],
    names,
)
def test_loss(bench, case: Case, name: str):
    shape = case.shape.on(bench.device, bench.tiny)
    num_classes, dim = min(shape.num_classes, shape.size[1]), shape.size[1]  # CBP and ETF: K ≤ D
    shape = shape._replace(num_classes=num_classes)
    inputs = Inputs(shape, case.dtype, case.labels, bench.device)
    features = inputs.features.requires_grad_()
    torch.manual_seed(0)
    module = METHODS[case.operation](num_classes, dim).to(bench.device)
    classifier = nn.Conv2d(dim, num_classes, 1).to(bench.device)
    if case.operation in METHODS_WITH_ANCHORS:
        open_gate(module if isinstance(module, ao.SAR) else module.methods[0], classifier)
    parameters = [*classifier.parameters(), *module.parameters()]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]

    def step(module: nn.Module, parameters: list[Tensor]) -> list[Tensor]:
        """Gradients of features and parameters; for CBP, which has none, the centroids."""
        loss = module(features, inputs.labels, classifier)
        if isinstance(module, ao.CBP):
            return [module.centroids]
        gradients = torch.autograd.grad(loss, [features, *parameters], allow_unused=True)
        return [gradient for gradient in gradients if gradient is not None]

    with ao.use_backend("reference"):
        expected = step(copy.deepcopy(module), [])
    alternative = alternatives.FORMULAS.get(name)
    with (
        bench.backend(name),
        alternatives.statistics_by(alternative) if alternative else nullcontext(),
    ):
        bench.check(step(copy.deepcopy(module), []), expected, case.dtype)
        counted = moments_bytes(
            features,
            num_classes,
            "forward" if case.operation.startswith("CBP") else TRAINING,
            sums=case.operation != "SAR",
            sqdists=case.operation in METHODS_WITH_ANCHORS,
        )
        bench.record(
            lambda: step(module, parameters), case._replace(shape=shape), name, counted, features
        )


@torch.no_grad()
def open_gate(sar: ao.SAR, classifier: nn.Conv2d) -> None:
    """SAR pulls pixels only if the classifier recognises all anchors: set the weights for this."""
    weight = 20 * torch.linalg.pinv(sar.embedding(sar.anchors)).T
    classifier.weight.copy_(weight[..., None, None])
    if classifier.bias is not None:
        classifier.bias.zero_()
