"""A stand-in for mmsegmentation: the parts of it that examples/mmsegmentation_heads.py uses.

Written after mmsegmentation 1.2.2: mmseg/registry, decode_head.py (loss_by_feat, _stack_batch_gt)
and fcn_head.py in mmseg/models/decode_heads, cross_entropy_loss.py and accuracy.py in
mmseg/models/losses.
"""

import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Registry:
    def __init__(self) -> None:
        self.classes: dict[str, type] = {}

    def register_module(self, name: str | None = None) -> Callable[[type], type]:
        def register(kind: type) -> type:
            key = kind.__name__ if name is None else name
            if key in self.classes:
                raise KeyError(f"{key} is already registered")
            self.classes[key] = kind
            return kind

        return register

    def build(self, config: dict[str, Any]) -> Any:
        options = dict(config)
        return self.classes[options.pop("type")](**options)


class CrossEntropyLoss(nn.Module):
    """The mean over all pixels, or over those that are not ignored, or over the class weights."""

    def __init__(
        self,
        use_sigmoid: bool = False,
        class_weight: Sequence[float] | Tensor | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_ce",
        avg_non_ignore: bool = False,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        self.use_sigmoid = use_sigmoid
        self.class_weight = class_weight
        self.loss_weight = loss_weight
        self.loss_name = loss_name
        self.avg_non_ignore = avg_non_ignore
        self.reduction = reduction

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int = 255) -> Tensor:
        valid = labels != ignore_index
        weight = None
        if self.class_weight is not None:
            weight = torch.as_tensor(self.class_weight).to(logits)
        if self.use_sigmoid:
            target = labels.clamp(max=1)
            if logits.shape[1] > 1:
                valid = valid[:, None].expand(logits.shape)
                target = torch.stack([labels == k for k in range(logits.shape[1])], 1)
            target = target.to(logits)
            losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none") * valid
        else:
            losses = F.cross_entropy(
                logits, labels, weight, ignore_index=ignore_index, reduction="none"
            )
        total = self.loss_weight * losses.sum()
        if self.reduction == "sum":
            return total
        if weight is not None:
            factor = weight[labels].sum()  # fails for a label that is ignored, as there
        else:
            factor = valid.sum() if self.avg_non_ignore else valid.numel()
        return total / (factor + torch.finfo(torch.float32).eps)


def build_head(registry: Registry) -> type:
    class FCNHead(nn.Module):
        """Here a 1×1 convolution; what mmsegmentation has before it does not matter to losses."""

        def __init__(
            self,
            in_channels: int,
            channels: int,
            *,
            num_classes: int,
            out_channels: int | None = None,
            in_index: int = -1,
            num_convs: int = 2,
            concat_input: bool = True,
            loss_decode: Any = None,
            ignore_index: int = 255,
            align_corners: bool = False,
        ) -> None:
            super().__init__()
            self.in_index, self.sampler = in_index, None
            self.ignore_index, self.align_corners = ignore_index, align_corners
            if isinstance(loss_decode, list):
                self.loss_decode = nn.ModuleList(registry.build(x) for x in loss_decode)
            else:
                self.loss_decode = registry.build(loss_decode)
            self.conv_seg = nn.Conv2d(in_channels, out_channels or num_classes, 1)

        def forward(self, inputs: list[Tensor]) -> Tensor:
            return self.conv_seg(inputs[self.in_index])

        def loss(self, inputs: list[Tensor], batch_data_samples: list, train_cfg: dict) -> dict:
            return self.loss_by_feat(self.forward(inputs), batch_data_samples)

        def _stack_batch_gt(self, batch_data_samples: list) -> Tensor:
            return torch.stack([sample.gt_sem_seg.data for sample in batch_data_samples])

        def loss_by_feat(self, seg_logits: Tensor, batch_data_samples: list) -> dict:
            labels = self._stack_batch_gt(batch_data_samples)
            logits = F.interpolate(
                seg_logits, labels.shape[2:], mode="bilinear", align_corners=self.align_corners
            )
            labels = labels.squeeze(1)
            several = isinstance(self.loss_decode, nn.ModuleList)
            losses: list[Any] = [*self.loss_decode] if several else [self.loss_decode]
            loss_terms: dict[str, Any] = {}
            for loss in losses:
                value = loss(logits, labels, ignore_index=self.ignore_index)
                loss_terms[loss.loss_name] = loss_terms.get(loss.loss_name, 0) + value
            hits = (logits.argmax(1) == labels)[labels != self.ignore_index]
            return loss_terms | {"acc_seg": 100 * hits.float().mean()}

    return FCNHead


def install(patch: pytest.MonkeyPatch) -> Registry:
    """Modules of the names that mmsegmentation has, until `patch` is undone."""
    registry = Registry()
    registry.register_module()(CrossEntropyLoss)
    heads = registry.register_module()(build_head(registry))
    contents = {
        "mmseg": {},
        "mmseg.models": {},
        "mmseg.models.decode_heads": {"FCNHead": heads},
        "mmseg.registry": {"MODELS": registry},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        vars(module).update(values)
        patch.setitem(sys.modules, name, module)
    return registry
