"""How many labels differ if sliding windows are stitched at low resolution, not at full.

    python bench/counted_windows.py [--out bench/results/counted-windows.json]

MONAI's sliding_window_inference stitches the logits of a network of output stride 4: as they are,
then upsampled by pixel_argmax, or each window upsampled before. The logits are smooth noise of 16
pixels, those of SegFormer-B0 with random weights, or those of SegFormer-B0 after some steps of
training on handwritten digits, 4 × 6 scenes in an image. Counts are almost independent of the
machine; some minutes.
"""

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from monai.inferers.utils import sliding_window_inference
from record import save_counts
from torch import Tensor, nn

import anchorops as ao
from anchorops.train import IGNORED
from anchorops.train.data.digits import DigitScenes

NUM_CLASSES, IMAGES, ROWS, COLUMNS, SIDE = 11, 4, 4, 6, 64  # of the scenes in an image
WINDOW, STEPS, BATCH = 128, 300, 4
OVERLAPS = {64: 1 / 2, 96: 1 / 4, 85: 1 / 3}  # by the stride of the windows


def scenes(split: str, count: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Images float32 (count, 3, H, W) and labels int64 (count, H, W) of rows × columns scenes."""
    data = DigitScenes(split, count * rows * columns, (SIDE, SIDE), seed=0)
    pairs = [data[i] for i in range(len(data))]
    images, labels = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    tiles = torch.cat([images / 255 - 0.5, labels[:, None]], 1)
    tiles = tiles.view(count, rows, columns, 4, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
    tiles = tiles.reshape(count, 4, rows * SIDE, columns * SIDE)
    return tiles[:, :3], tiles[:, 3].long()


def network() -> nn.Module:
    torch.manual_seed(0)
    return smp.Segformer("mit_b0", encoder_weights=None, classes=NUM_CLASSES, upsampling=1)


def train(model: nn.Module, align_corners: bool) -> None:
    images, labels = scenes("train", 64, 2, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    options = {"ignore_index": IGNORED, "align_corners": align_corners}
    for _ in range(STEPS):
        batch = torch.randint(len(images), (BATCH,))
        loss = ao.pixel_cross_entropy(model(images[batch]), labels[batch], **options)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def smooth_noise() -> Tensor:
    noise = torch.randn(IMAGES, NUM_CLASSES, ROWS * SIDE // 16, COLUMNS * SIDE // 16)
    return F.interpolate(noise, scale_factor=16, mode="bicubic")


def stitched(
    model: nn.Module, images: Tensor, align_corners: bool, **options: Any
) -> tuple[Tensor, Tensor]:
    """The labels of logits that were stitched at full and at low resolution."""

    def upsampled(window: Tensor) -> Tensor:
        size = window.shape[2:]
        return F.interpolate(model(window), size, mode="bilinear", align_corners=align_corners)

    window = (WINDOW, WINDOW)
    full = sliding_window_inference(images, window, BATCH, upsampled, **options)
    low = sliding_window_inference(images, window, BATCH, model, **options)
    assert isinstance(full, Tensor) and isinstance(low, Tensor)
    size = (images.shape[2], images.shape[3])
    return full.argmax(1), ao.pixel_argmax(low, size, align_corners=align_corners)


def rows_of(align_corners: bool) -> Iterator[dict[str, Any]]:
    images, truth = scenes("val", IMAGES, ROWS, COLUMNS)
    random, trained = network().eval(), network()
    train(trained, align_corners)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "smooth": (nn.AvgPool2d(4), smooth_noise()),
        "random weights": (random, images),
        "trained": (trained.eval(), images),
    }
    for stride, mode, name in product(OVERLAPS, ("constant", "gaussian"), cases):
        model, inputs = cases[name]
        options = {"overlap": OVERLAPS[stride], "mode": mode}
        with torch.no_grad():
            full, low = stitched(model, inputs, align_corners, **options)
        row = {"align_corners": align_corners, "stride": stride, "weights": mode, "logits": name}
        row |= {"labels": full.numel(), "differ": int((full != low).sum())}
        if name == "trained":
            row["valid"] = int((truth != IGNORED).sum())
            row["right_full"] = int((full == truth).sum())
            row["right_low"] = int((low == truth).sum())
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for align_corners in (False, True):
        for row in rows_of(align_corners):
            rows.append(row)
            print(row, flush=True)
    if arguments.out:
        save_counts(arguments.out, rows)


if __name__ == "__main__":
    main()
