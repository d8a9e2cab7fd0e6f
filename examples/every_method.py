"""Every method on an unchanged segmentation-models-pytorch model, with one line each.

    python examples/every_method.py [--steps 10] [--out FOLDER]

Trains FPN on small scenes of coloured discs, on a CPU in about a minute. Prints the terms and
diagnostics of each method; with --out it writes figures of the last model.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor

import anchorops as ao
from anchorops.losses import Regularizer

K, D = 5, 128  # FPN's last classifier has 128 inputs

METHODS: dict[str, Callable[[], Regularizer]] = {
    **{name: partial(method, K, D) for name, method in ao.losses.METHODS.items()},
    "CR": lambda: ao.SAR(K, D, embed=False, anchors="simplex"),
    "CBP + OCCL": lambda: ao.Combined(ao.CBP(K, D), ao.OCCL(K, D)),
    "SAR + OCCL": lambda: ao.Combined(ao.SAR(K, D), ao.OCCL(K, D)),
}


def scenes(images: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Discs of K − 1 classes on background 0. The colour is the class; higher classes are rarer."""
    colours = torch.linspace(-1, 1, K)[:, None] * torch.tensor([1.0, -0.5, 0.25])
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = torch.zeros(images, size, size, dtype=torch.long)
    frequency = 1 / torch.arange(1, K)
    for image in labels:
        for kind in torch.multinomial(frequency, 6, replacement=True, generator=generator):
            x, y, radius = torch.randint(12, size, (3,), generator=generator).tolist()
            image[(rows - y) ** 2 + (columns - x) ** 2 < (radius / 4) ** 2] = int(kind) + 1
    noise = 0.2 * torch.randn(images, 3, size, size, generator=generator)
    return colours[labels].movedim(-1, 1) + noise, labels


def train(method: str, steps: int) -> torch.nn.Module:
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = smp.FPN("resnet18", encoder_weights=None, classes=K)
    regularizer = ao.attach(model, METHODS[method]())  # the only line that is added
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    print(f"\n{regularizer}")
    for step in range(steps):
        images, labels = scenes(4, 64, generator)
        ce = F.cross_entropy(model(images), labels)
        loss = ce + regularizer(labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, steps - 1):
            terms = ", ".join(
                f"{name} {float(value):.3f}" for name, value in regularizer.terms.items()
            )
            print(f"  step {step + 1:3d}: ce {ce.item():.3f}, {terms}")
    return model


def diagnose(model: torch.nn.Module, out: Path | None) -> None:
    geometry = ao.diagnostics.CentroidGeometry(K, D)
    seen: list[Tensor] = []
    classifier = model.get_submodule("segmentation_head.0")
    hook = classifier.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    images, labels = scenes(8, 64, torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.eval()(images)
    hook.remove()
    geometry.update(seen[0], labels)
    print("  " + ", ".join(f"{name} {float(v):.3f}" for name, v in geometry.compute().items()))
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        centroids = geometry.centroids()[0].float()
        ao.plots.cosine_map(classifier.get_parameter("weight")).savefig(
            out / "classifier.png", dpi=120
        )
        ao.plots.cosine_map(centroids, centered=True).savefig(out / "centroids.png", dpi=120)
        figure = ao.plots.features_with_anchors(seen[0], labels, centroids)
        figure.savefig(out / "features.png", dpi=120)
        picture = images[0] / 2.5 + 0.5
        figure = ao.plots.centroid_similarity(seen[0][0], centroids[1], picture.clamp(0, 1))
        figure.savefig(out / "similarity.png", dpi=120)
        print(f"  figures in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    for method in arguments.methods:
        model = train(method, arguments.steps)
        last = method == arguments.methods[-1]
        diagnose(model, arguments.out if last else None)


if __name__ == "__main__":
    main()
