"""Segformer of segmentation_models_pytorch, as it is, and with its upsampling moved.

    python examples/smp_segformer.py [--steps 3] [--size 128]

Trains two copies of a model on random images and labels: one unchanged, with torch's cross-entropy;
the other with late_upsampling (the 1×1 convolution of the head runs before the upsampling of its
input), low_resolution (the logits are not upsampled) and anchorops's cross-entropy. Their losses
agree.
"""

import argparse
import copy

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F

import anchorops as ao

K = 19


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = smp.Segformer("mit_b0", encoder_weights=None, classes=K)
    plain = copy.deepcopy(model)
    images = torch.randn(2, 3, arguments.size, arguments.size)
    labels = torch.randint(0, K, (2, arguments.size, arguments.size))
    labels[:, :4] = 255  # ignored

    print(ao.late_upsampling(model, images))
    handle = ao.low_resolution(model, images)
    corners = handle.align_corners  # True for the heads of this library
    print(handle)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (plain, model)]
    for step in range(arguments.steps):
        torch.manual_seed(step)  # the same dropout for both
        before = F.cross_entropy(plain.train()(images), labels, ignore_index=255)
        torch.manual_seed(step)
        after = ao.pixel_cross_entropy(model.train()(images), labels, align_corners=corners)
        for loss, optimizer in zip((before, after), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"step {step + 1}: {before.item():.5f} before, {after.item():.5f} after")


if __name__ == "__main__":
    main()
