"""Point clouds: features (N, D) of all points of a batch, with MVSC.

    python examples/point_cloud.py [--steps 100]

Scenes with a ground, a wall, a pole and a ball have different numbers of points. They are
concatenated in one tensor, as in libraries for sparse convolutions. The network processes each
point independently; replace it by your own.
"""

import argparse

import torch
from torch import Tensor, nn

import anchorops as ao

NAMES = ("ground", "wall", "pole", "ball")
K, D = len(NAMES), 64


def scene(ground: int) -> tuple[Tensor, Tensor]:
    """Noisy points (n, 3) and labels (n,). Each class has half as many points as the one before."""
    counts = [ground // 2**k for k in range(K)]
    u, v, w = (torch.rand(sum(counts)).split(counts) for _ in range(3))
    surface = torch.stack([4 * u[0] - 2, 4 * v[0] - 2, torch.zeros_like(u[0])], 1)
    wall = torch.stack([4 * u[1] - 2, torch.full_like(u[1], 2), 2 * v[1]], 1)
    angle = 2 * torch.pi * u[2]
    pole = torch.stack([1 + 0.1 * angle.cos(), 1 + 0.1 * angle.sin(), 2 * v[2]], 1)
    direction = nn.functional.normalize(torch.stack([u[3], v[3], w[3]], 1) - 0.5, dim=1)
    ball = torch.tensor([-1.0, -1.0, 0.5]) + 0.5 * direction
    points = torch.cat([surface, wall, pole, ball])
    labels = torch.arange(K).repeat_interleave(torch.tensor(counts))
    return points + 0.03 * torch.randn_like(points), labels


def batch() -> tuple[Tensor, Tensor]:
    scenes = [scene(ground) for ground in (512, 1024)]
    points, labels = (torch.cat(tensors) for tensors in zip(*scenes, strict=True))
    return points, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    hidden = [nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, D), nn.ReLU()]
    model = nn.Sequential(*hidden, nn.Linear(D, K))
    mvsc = ao.attach(model, ao.MVSC(K, D))  # 1. before the optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(arguments.steps):
        points, labels = batch()  # (N, 3), (N,); 255 is ignored
        ce = ao.pixel_cross_entropy(model(points), labels)  # 2. works for points too
        loss = ce + mvsc(labels)  # 3. add the method's loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in (0, arguments.steps - 1):
            parts = {"ce": ce.detach(), **mvsc.terms}
            text = ", ".join(f"{name} {float(value):.3f}" for name, value in parts.items())
            print(f"step {step + 1}: {text}")

    points, labels = batch()
    with torch.no_grad():
        predicted = model.eval()(points).argmax(1)
    matrix = ao.confusion(predicted, labels, K)  # (K, K): truth × prediction
    recall = matrix.diagonal() / matrix.sum(1).clamp(min=1)  # 0, not NaN, without points
    shares = zip(NAMES, recall.tolist(), strict=True)
    print("recall: " + ", ".join(f"{name} {share:.3f}" for name, share in shares))


if __name__ == "__main__":
    main()
