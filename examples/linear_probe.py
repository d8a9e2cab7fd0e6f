"""Linear probing: how well the features of a frozen backbone separate the classes of pixels.

    python examples/linear_probe.py                     # scenes of digits, random weights
    python examples/linear_probe.py --data FOLDER --classes 19 --pretrained --size 512 --views 8 \
        --backbone vit_small_patch16_dinov3 --steps 10000 --learning-rates 1e-4 3e-4 1e-3 3e-3

FOLDER has images/{train,val}/NAME.jpg and masks/{train,val}/NAME.png with the classes 0, 1, … and
255, which is ignored. The backbone is any of timm's that has `forward_intermediates`.

A head is a 1×1 convolution after batch norm, as in DINOv2 and DINOv3. Each learning rate has one,
and all are trained at once on the same features. The backbone sees `views` crops of each training
image, before the training; their features stay in a temporary file, as float16. (To flip features
would add nothing: the head sees single pixels.) The loss reads the labels of all pixels.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2

import anchorops as ao

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BATCH = 16
Heads = list[nn.Conv2d]
Item = tuple[Tensor, Tensor]  # an image uint8 (3, H, W), and its labels uint8 (H, W)


def scenes(count: int) -> list[Item]:
    """Noisy images of four digits, 128×128. The soft border of a stroke is ignored."""
    pixels, digits = (torch.from_numpy(x) for x in load_digits(n_class=5, return_X_y=True))
    chosen = torch.randint(len(digits), (count, 2, 2))
    strokes = pixels.view(-1, 8, 8)[chosen].transpose(2, 3).reshape(count, 16, 16) / 16
    strokes = torch.kron(strokes, torch.ones(1, 8, 8))
    labels = torch.kron(1 + digits[chosen], torch.ones(1, 64, 64)).where(strokes > 0.5, 0)
    labels[(strokes > 0.3) & (strokes <= 0.5)] = 255
    images = 200 * strokes[:, None] + 50 * torch.rand(count, 3, 128, 128)
    return list(zip(images.byte(), labels.byte(), strict=True))


class Folder:
    """The images and masks of a split."""

    def __init__(self, root: Path, split: str) -> None:
        self.images = sorted((root / "images" / split).iterdir())
        self.masks = [root / "masks" / split / f"{path.stem}.png" for path in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> Item:
        image = v2.functional.pil_to_tensor(Image.open(self.images[i]).convert("RGB"))
        return image, v2.functional.pil_to_tensor(Image.open(self.masks[i]))[0]


class Backbone:
    """Frozen features (B, D, h, w) of images uint8 (B, 3, H, W), H and W multiples of `stride`."""

    def __init__(self, name: str, level: int, pretrained: bool) -> None:
        try:
            model: Any = timm.create_model(name, pretrained=pretrained, dynamic_img_size=True)
        except TypeError:  # convolutional networks take images of any size
            model = timm.create_model(name, pretrained=pretrained)
        self.model, self.level = model.eval().requires_grad_(False).to(DEVICE), level
        self.normalize = v2.Normalize(model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
        self.stride = model.feature_info[-1]["reduction"]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        x, levels = self.normalize(images.to(DEVICE) / 255), [self.level]
        return self.model.forward_intermediates(x, levels, norm=True, intermediates_only=True)[0]


def views_of(items: list[Item] | Folder, backbone: Backbone, size: int, views: int) -> Item:
    """Features float16 (N, D, h, w), in a file, and labels uint8 (N, size, size) of crops."""
    crop = [v2.RandomResizedCrop(size, scale=(0.25, 1)), v2.RandomHorizontalFlip()]
    view = v2.Compose([*crop, v2.ColorJitter(0.3, 0.3, 0.3)])
    shape = backbone(torch.zeros(1, 3, size, size)).expand(len(items) * views, -1, -1, -1).shape
    with tempfile.NamedTemporaryFile() as file:  # the mapped file stays until the end
        features = torch.from_file(file.name, True, shape.numel(), dtype=torch.float16).view(shape)
    print(f"features {(*shape,)}: {features.nbytes / 1e6:.0f} MB in {tempfile.gettempdir()}")
    labels = torch.empty(len(features), size, size, dtype=torch.uint8)
    for i in range(len(features)):
        image, mask = items[i // views]
        image, labels[i] = view(tv_tensors.Image(image), tv_tensors.Mask(mask))
        features[i] = backbone(image[None])[0]
    return features, labels


def train(norm: nn.Module, heads: Heads, views: Item, rates: list[float], steps: int) -> None:
    groups = [{"params": x.parameters(), "lr": lr} for x, lr in zip(heads, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(views[0]), (BATCH,))
        features, labels = (x[chosen].to(DEVICE) for x in views)
        x = norm(features.float())
        losses = torch.stack([ao.pixel_cross_entropy(head(x), labels) for head in heads])
        optimizer.zero_grad()
        losses.sum().backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 4) == 0:
            print(f"step {step}: losses " + ", ".join(f"{x:.3f}" for x in losses.tolist()))
    print(f"{(time.perf_counter() - start) / steps:.3f} s for a step")


@torch.no_grad()
def evaluate(
    norm: nn.Module, heads: Heads, items: list[Item] | Folder, backbone: Backbone, size: int
) -> list[float]:
    """The mIoU of each head, of whole images at the size of their labels. size: as for crops."""
    metrics = [ao.MeanIoU(head.out_channels).to(DEVICE) for head in heads]
    for image, labels in items:
        scale = size / min(image.shape[1:]) / backbone.stride
        sides = [max(1, round(n * scale)) * backbone.stride for n in image.shape[1:]]
        x = norm.eval()(backbone(v2.functional.resize(image, sides)[None]))
        for metric, head in zip(metrics, heads, strict=True):
            metric.update(head(x), labels[None].to(DEVICE))
    return [metric.compute().item() for metric in metrics]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, metavar="FOLDER")
    parser.add_argument("--classes", type=int, default=6)
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--level", type=int, default=-1, help="of the backbone (default: the last)")
    parser.add_argument("--size", type=int, default=128, help="of crops; the short side of images")
    parser.add_argument("--views", type=int, default=4, help="crops of each training image")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-4, 1e-3, 1e-2])
    options = parser.parse_args()
    torch.manual_seed(0)
    training, validation, size = scenes(32), scenes(16), options.size
    if options.data:
        training, validation = (Folder(options.data, split) for split in ("train", "val"))
    backbone = Backbone(options.backbone, options.level, options.pretrained)
    views = views_of(training, backbone, size, options.views)
    dim, rates = views[0].shape[1], options.learning_rates
    norm = nn.BatchNorm2d(dim, affine=False).to(DEVICE)  # weights would add nothing but time
    heads = [nn.Conv2d(dim, options.classes, 1).to(DEVICE) for _ in rates]
    train(norm, heads, views, rates, options.steps)
    for rate, score in zip(rates, evaluate(norm, heads, validation, backbone, size), strict=True):
        print(f"learning rate {rate:g}: mIoU {100 * score:.1f} %")


if __name__ == "__main__":
    main()
