"""How far the gradient of `ao.Lovasz`, which rounds errors to bins, is from that of exact sorting.

    python bench/counted_precision.py [--out bench/results/counted-precision.json]

In float64, on a CPU; some seconds.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from record import parser_of_counts, save_counts
from torch import Tensor

import anchorops as ao
from anchorops.doctor.catalogue.formulas import sorted_loss

Function = Callable[..., Tensor]
CLASS_PIXELS, EXAMPLES, BINS = (1, 2, 7, 20, 50), 150, (1024, 8192)
NUM_CLASSES, PIXELS = 5, 4096


def gradient(loss: Function, logits: Tensor) -> Tensor:
    logits = logits.detach().requires_grad_()
    return torch.autograd.grad(loss(logits), logits)[0]


def of_last_class(logits: Tensor, is_class: Tensor) -> Tensor:
    return sorted_loss((is_class.to(logits) - logits.softmax(1)[:, -1]).abs(), is_class)


def rows() -> Iterator[dict[str, Any]]:
    """The relative error of the gradient of one class with few pixels, in float64. Trained: the
    logit of the pixel's class is larger by 6."""
    for bins, trained, pixels in product(BINS, (False, True), CLASS_PIXELS):
        loss, errors = ao.Lovasz(classes=[NUM_CLASSES - 1], bins=bins), []
        for seed in range(EXAMPLES):
            torch.manual_seed(seed)
            labels = torch.randint(NUM_CLASSES - 1, (PIXELS,))
            labels[:pixels] = NUM_CLASSES - 1
            logits = 2 * torch.randn(PIXELS, NUM_CLASSES, dtype=torch.float64)
            logits += 6 * trained * F.one_hot(labels, NUM_CLASSES)
            is_class = labels == NUM_CLASSES - 1
            exact = gradient(partial(of_last_class, is_class=is_class), logits)
            ours = gradient(partial(loss, labels=labels), logits)
            errors.append(float((ours - exact).norm() / exact.norm()))
        row = {"bins": bins, "trained": trained, "pixels": pixels, "worst": max(errors)}
        yield row | {"median": float(torch.tensor(errors).median())}


def main() -> None:
    args = parser_of_counts(__doc__, "counted-precision").parse_args()
    save_counts(args.out, list(rows()))


if __name__ == "__main__":
    main()
