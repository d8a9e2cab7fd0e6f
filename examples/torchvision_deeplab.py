"""torchvision's DeepLabV3 with its auxiliary head: cross-entropy without upsampled logits, and SAR.

    python examples/torchvision_deeplab.py [--steps 3] [--size 128]

Trains on random images and labels, to show what changes in a training script.
"""

import argparse

import torch
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large

import anchorops as ao

K = 21


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=128, help="height and width of the images")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = deeplabv3_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=K, aux_loss=True
    )
    images = torch.randn(2, 3, arguments.size, arguments.size)
    labels = torch.randint(0, K, (2, arguments.size, arguments.size))

    handle = ao.low_resolution(model, images)  # 1. removes the upsampling of both heads
    sar = ao.attach(model, ao.SAR(K, 256))
    print(handle)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for step in range(arguments.steps):
        heads = model.train()(images)
        ce = {name: ao.pixel_cross_entropy(logits, labels) for name, logits in heads.items()}  # 2.
        loss = ce["out"] + 0.5 * ce["aux"] + sar(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        size = tuple(heads["out"].shape[2:])
        print(f"step {step + 1}: ce {ce['out'].item():.3f} from logits of {size}")

    with torch.no_grad():
        logits = model.eval()(images)["out"]  # upsampled, as before
    print(f"in eval mode: {tuple(logits.shape)}")


if __name__ == "__main__":
    main()
