"""How many labels are neither a class nor ignored, on backends that leave this to PyTorch."""

import pytest
import torch

import anchorops as ao


@pytest.mark.parametrize(
    ("loss", "num_classes"), [(ao.CrossEntropy(), 3), (ao.BinaryCrossEntropy(), 2)], ids=str
)
def test_count(loss, num_classes):
    labels = torch.tensor([0, 1, num_classes, 254, 255, 1], dtype=torch.uint8).view(1, 2, 3)
    logits = torch.randn(1, num_classes, 1, 1, requires_grad=True)
    if loss.sigmoid:
        labels = labels[:, None].expand(-1, 2, -1, -1)
    loss(logits, labels).backward()
    assert loss.terms["labels_out_of_range"] == 2 * (1 + loss.sigmoid)
    assert loss.terms["labels_ignored"] == 1 + loss.sigmoid
