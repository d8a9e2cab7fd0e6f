"""Lightning: a module with the cross-entropy of low-resolution logits, SAR and mIoU.

    python examples/lightning_module.py [--steps 3] [--size 64]

Trains a timm backbone with a head of segmentation_models_pytorch on random images and labels.
"""

import argparse

import lightning
import segmentation_models_pytorch as smp
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import anchorops as ao

K = 7


class Segmenter(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = smp.FPN("tu-resnet18", encoder_weights=None, classes=K)
        # the losses and the metric upsample the logits, not the model
        self.low = ao.low_resolution(self.model, torch.randn(2, 3, 64, 64), always=True)
        # 1. here, not in `setup` or `fit`: the optimizer and DDP must see SAR's parameters
        self.sar = ao.attach(self.model, ao.SAR(K, 128))
        self.miou = ao.MeanIoU(K, align_corners=self.low.align_corners)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return ao.pixel_cross_entropy(logits, labels, align_corners=self.low.align_corners)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        ce = self.cross_entropy(self.model(images), labels)
        loss = ce + self.sar(labels)  # 2. add the method's loss
        self.log_dict({"ce": ce, **self.sar.terms}, prog_bar=True)  # 3. log its weighted terms
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        logits = self.model(images)
        self.miou.update(logits, labels)
        self.log("validation ce", self.cross_entropy(logits, labels))
        self.log("validation mIoU", self.miou)  # computed at the end, over all batches and ranks

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--size", type=int, default=64, help="height and width of the images")
    arguments = parser.parse_args()
    lightning.seed_everything(0)
    size = (arguments.size, arguments.size)
    images = torch.randn(2 * arguments.steps, 3, *size)
    data = TensorDataset(images, torch.randint(0, K, (len(images), *size)))
    batches = DataLoader(data, batch_size=2)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",  # "auto" would use a GPU
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Segmenter(), batches, batches)
    print(", ".join(f"{name} {value:.3f}" for name, value in trainer.callback_metrics.items()))


if __name__ == "__main__":
    main()
