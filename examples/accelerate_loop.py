"""Hugging Face Accelerate: accumulated gradients, the cross-entropy of low-resolution logits, OCCL.

    python examples/accelerate_loop.py [--steps 3] [--size 64]
    accelerate launch examples/accelerate_loop.py       # several GPUs, mixed precision

Trains FPN on random images and labels.
"""

import argparse

import segmentation_models_pytorch as smp
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, TensorDataset

import anchorops as ao

K = 7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    arguments = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    size = (arguments.size, arguments.size)
    images = torch.randn(4 * arguments.steps, 3, *size)
    data = TensorDataset(images, torch.randint(0, K, (len(images), *size)))
    model = smp.FPN("resnet18", encoder_weights=None, classes=K)

    low = ao.low_resolution(model, images[:2])  # the loss upsamples the logits, not the model
    occl = ao.attach(model, ao.OCCL(K, 128))  # 1. before the optimizer and `prepare`
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(data, batch_size=2))
    for images, labels in loader:
        with accelerator.accumulate(model):
            logits = model(images)
            ce = ao.pixel_cross_entropy(logits, labels, align_corners=low.align_corners)
            loss = ce + occl(labels)  # 2. add the method's loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            terms = {"ce": ce.detach(), **occl.terms}  # 3. log its weighted terms
            accelerator.print(", ".join(f"{name} {float(terms[name]):.3f}" for name in terms))


if __name__ == "__main__":
    main()
