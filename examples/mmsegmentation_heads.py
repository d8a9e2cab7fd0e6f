"""mmsegmentation: decode and auxiliary heads whose losses read the low-resolution logits.

    python examples/mmsegmentation_heads.py

Compares the losses of two heads with those of mmsegmentation on random features. A configuration:

    custom_imports = dict(imports=["mmsegmentation_heads"])
    decode_head = dict(type="LowResolutionFCNHead", …, loss_decode=dict(type="AnchoropsLoss"))
    auxiliary_head = dict(type="LowResolutionFCNHead", …,
                          loss_decode=dict(type="AnchoropsLoss", loss_weight=0.4))
"""

from types import SimpleNamespace
from typing import Any

import torch
from mmseg.models.decode_heads import FCNHead  # pyright: ignore[reportMissingImports]
from mmseg.registry import MODELS  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

import anchorops as ao


@MODELS.register_module()
class AnchoropsLoss(nn.Module):
    """A loss of anchorops with the name and weight that mmsegmentation expects.

    Args:
        loss: "CrossEntropy", "BinaryCrossEntropy", "Dice" or "CrossEntropyDice".
        loss_weight, loss_name: as in mmsegmentation.
        weight: of the classes, a list (mmsegmentation: class_weight). The mean is then over the
            weights of the valid pixels.
        avg_non_ignore: False divides a cross-entropy by all pixels, which is the default of
            mmsegmentation's CrossEntropyLoss.
        ignore_index: as the head's.
        options: of the loss, for example ohem_threshold=0.7, ohem_min_kept=100000 (mmsegmentation:
            a sampler).
    """

    def __init__(
        self,
        loss: str = "CrossEntropy",
        loss_weight: float = 1.0,
        loss_name: str = "loss_ce",
        weight: list[float] | None = None,
        avg_non_ignore: bool = True,
        ignore_index: int = 255,
        **options: Any,
    ) -> None:
        super().__init__()
        hard = "ohem_threshold" in options or "ohem_min_kept" in options
        if not avg_non_ignore and (hard or loss not in ("CrossEntropy", "BinaryCrossEntropy")):
            text = 'expected True, or "CrossEntropy" or "BinaryCrossEntropy" without OHEM'
            raise ValueError(f"AnchoropsLoss: avg_non_ignore: {text}, got {loss!r}")
        if weight is not None:
            options["weight"] = torch.tensor(weight)
        self.loss = getattr(ao, loss)(ignore_index=ignore_index, **options)
        self.loss_weight, self.loss_name = loss_weight, loss_name
        self.avg_non_ignore = avg_non_ignore

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss_weight * self.loss(logits, labels)
        if not self.avg_non_ignore and getattr(self.loss, "weight", None) is None:
            loss = loss * (labels != self.loss.ignore_index).float().mean()
        return loss


class LowResolution:
    """Mixin of a decode or auxiliary head. Its losses are AnchoropsLoss, alone or in a list. Heads
    with a loss_by_feat of their own (point, encoding and two-branch heads) need their own mixin."""

    def loss_by_feat(self: Any, seg_logits: Tensor, batch_data_samples: list) -> dict[str, Any]:
        labels = self._stack_batch_gt(batch_data_samples).squeeze(1)
        several = isinstance(self.loss_decode, nn.ModuleList)
        losses: list[Any] = [*self.loss_decode] if several else [self.loss_decode]
        terms: dict[str, Any] = {}
        for loss in losses:
            self._check(loss)
            terms[loss.loss_name] = terms.get(loss.loss_name, 0) + loss(seg_logits, labels)
        binary = seg_logits.shape[1] == 1
        matrix = ao.pixel_confusion(
            seg_logits.detach(),
            labels,
            sigmoid=binary,
            ignore_index=self.ignore_index,
            align_corners=self.align_corners,
        )
        hits = matrix.diagonal(dim1=-2, dim2=-1).sum()
        return terms | {"acc_seg": 100 * hits / matrix.sum().clamp(min=1)}

    def _check(self: Any, loss: nn.Module) -> None:
        if not isinstance(loss, AnchoropsLoss) or self.sampler is not None:
            raise ValueError(f"{type(self).__name__}: expected AnchoropsLoss and no sampler")
        for name in ("align_corners", "ignore_index"):
            head_value, loss_value = getattr(self, name), getattr(loss.loss, name)
            if head_value != loss_value:
                text = f"loss_decode: expected {name}={head_value}, as the head, got {loss_value}"
                raise ValueError(f"{type(self).__name__}: {text}")


def low_resolution_head(head: type) -> type:
    """Registers LowResolution + the name of the head."""
    name = f"LowResolution{head.__name__}"
    return MODELS.register_module(name=name)(type(name, (LowResolution, head), {}))


low_resolution_head(FCNHead)  # and every other head that you use


def main() -> None:
    torch.manual_seed(0)
    classes, features = 7, [torch.randn(2, 16, 8, 8), torch.randn(2, 32, 4, 4)]
    labels = torch.randint(0, classes, (2, 1, 32, 32))
    labels[:, :, :5] = 255
    samples = [SimpleNamespace(gt_sem_seg=SimpleNamespace(data=x)) for x in labels]
    for role, index, weight in (("decode", 1, 1.0), ("auxiliary", 0, 0.4)):
        options = {"in_channels": features[index].shape[1], "channels": 16, "in_index": index}
        options |= {"num_classes": classes, "num_convs": 1, "concat_input": False}
        loss = {"loss_weight": weight, "avg_non_ignore": True}
        before = MODELS.build(
            {"type": "FCNHead", "loss_decode": {"type": "CrossEntropyLoss", **loss}, **options}
        )
        after = MODELS.build(
            {
                "type": "LowResolutionFCNHead",
                "loss_decode": {"type": "AnchoropsLoss", **loss},
                **options,
            }
        )
        after.load_state_dict(before.state_dict())
        for name, head in (("before", before), ("after", after)):
            losses = head.eval().loss(features, samples, train_cfg={})
            values = ", ".join(f"{key} {value.item():.5f}" for key, value in losses.items())
            print(f"{role} head, {name}: {values}")


if __name__ == "__main__":
    main()
