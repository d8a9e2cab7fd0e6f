"""Several methods on one model, from one pass over its features."""

import torch
from torch import Tensor, nn

from .._checks import describe, fail
from .base import Classifier, Losses, Regularizer
from .statistics import class_statistics


class Combined(Regularizer):
    """The sum of several regularisers. If possible, one pass computes all their class moments.

    Methods on the same features share a pass, if at most one of them has anchors: SAR + OCCL read
    the features once, and their gradients are written once. CeCo has its own features. The values
    equal those of the separate methods if these have counted the same steps: in a shared pass, the
    random splits are those of the first method that needs one.

    The keys of `terms` begin with the method, for example "sar.p2a".

    Raises ValueError if the methods differ in num_classes, dim, ignore_index or seed.
    """

    def __init__(self, *regularizers: Regularizer) -> None:
        for regularizer in regularizers:
            if not isinstance(regularizer, Regularizer) or isinstance(regularizer, Combined):
                fail("Combined", "regularizers", "single methods", describe(regularizer))
        if not regularizers:
            fail("Combined", "regularizers", "at least one", "none")
        first = regularizers[0]
        super().__init__(
            first.num_classes,
            first.dim,
            ignore_index=first.ignore_index,
            check_labels=any(regularizer.check_labels for regularizer in regularizers),
        )
        for name in ("num_classes", "dim", "ignore_index", "seed"):
            values = {getattr(r, name) for r in regularizers if hasattr(r, name)}
            if len(values) > 1:
                fail("Combined", "regularizers", f"one {name}", sorted(values))
        if sum(regularizer.replaces_classifier for regularizer in regularizers) > 1:
            fail(
                "Combined", "regularizers", "at most one CBP: it replaces the classifier", "several"
            )
        self.methods = nn.ModuleList(regularizers)
        self.replaces_classifier = any(r.replaces_classifier for r in regularizers)
        self.uses_classifier = any(r.uses_classifier for r in regularizers)
        self.has_state = any(r.has_state for r in regularizers)
        names = [type(r).__name__.lower() for r in regularizers]
        self._names = [
            f"{name}{names[:i].count(name) + 1}" if names.count(name) > 1 else name
            for i, name in enumerate(names)
        ]

    def _losses(self, features: Tensor, labels: Tensor, classifier: Classifier | None) -> Losses:
        methods: list[Regularizer] = list(self.methods)  # type: ignore[arg-type]
        plans = [method.plan(features, labels, classifier) for method in methods]
        requests = [plan.request for plan in plans if plan.request is not None]
        moments = iter(
            class_statistics(features, labels, self.num_classes, requests, self.ignore_index)
        )
        combined = Losses({}, {})
        for name, method, (request, losses) in zip(self._names, methods, plans, strict=True):
            method_losses = losses(
                None if request is None else method.reduce(next(moments), request)
            )
            combined.terms.update({f"{name}.{key}": x for key, x in method_losses.terms.items()})
            combined.logs.update({f"{name}.{key}": x for key, x in method_losses.logs.items()})
        return combined

    def install(self, classifier: nn.Module) -> None:
        for method in self.methods:
            method.install(classifier)  # type: ignore[operator]

    def uninstall(self, classifier: nn.Module) -> None:
        for method in reversed(self.methods):
            method.uninstall(classifier)  # type: ignore[operator]

    def check_checkpoint(self, weight: Tensor) -> None:
        for method in self.methods:
            method.check_checkpoint(weight)  # type: ignore[operator]

    @torch.no_grad()
    def before_classifier(self, classifier: nn.Module) -> None:
        for method in self.methods:
            method.before_classifier(classifier)  # type: ignore[operator]

    def extra_repr(self) -> str:
        return ""
