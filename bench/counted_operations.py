"""Operations of a forward pass, without and with late_upsampling, counted by FlopCounterMode.

    python bench/counted_operations.py [--out bench/results/counted-operations.json]

A multiplication and an addition count as 2. FlopCounterMode counts convolutions and products of
matrices, not the upsampling. The tensors are fake: they have shapes but no values.
"""

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import segmentation_models_pytorch as smp
import torch
from record import save_counts
from segformer import segformer
from storages import make_fake
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import anchorops as ao
from anchorops.train.networks.models import build_model


class Network(NamedTuple):
    name: str
    library: str
    build: Callable[[], nn.Module]
    size: tuple[int, int]


def smp_network(architecture: str, encoder: str, **options: Any) -> Callable[[], nn.Module]:
    options |= {"encoder_weights": None, "classes": 150}
    return lambda: smp.create_model(architecture, encoder, **options)


NETWORKS = (
    Network("SegFormer-B0", "smp", smp_network("segformer", "mit_b0"), (512, 512)),
    Network("SegFormer-B2", "smp", smp_network("segformer", "mit_b2"), (512, 512)),
    Network("SegFormer-B0", "Transformers", lambda: segformer(0, 150), (512, 512)),
    Network("SegFormer-B2", "Transformers", lambda: segformer(2, 150), (512, 512)),
    Network("SegFormer-B5", "Transformers", lambda: segformer(5, 150), (512, 512)),
    Network(*("HRNet-W18-small", "timm", lambda: build_model("hrnet-w18-small", 19), (512, 1024))),
    Network("HRNet-W48", "timm", lambda: build_model("hrnet-w48", 19), (512, 1024)),
    Network("PSPNet-R101", "smp", smp_network("pspnet", "resnet101"), (512, 512)),
    Network(
        *("DPT-ViT-B", "smp"),
        smp_network("dpt", "tu-vit_base_patch16_224.augreg_in21k", dynamic_img_size=True),
        (512, 512),
    ),
)


def operations(model: nn.Module, size: tuple[int, int]) -> int:
    model = copy.deepcopy(model).to("meta")
    with FakeTensorMode(), FlopCounterMode(display=False) as counter, torch.no_grad():
        make_fake(model)
        model(torch.empty(1, 3, *size))
    return counter.get_total_flops()


def row_of(network: Network) -> dict[str, Any]:
    """Operations for one image in evaluation mode; late: None if there is nothing to move."""
    model = network.build().eval()  # on the CPU: what is moved depends on the device
    plain, late = operations(model, network.size), None
    try:
        moved = ao.late_upsampling(model, torch.zeros(1, 3, *network.size)).moved
        late = operations(model, network.size)
    except ValueError as error:
        moved = [str(error)]
    return {
        "network": network.name,
        "library": network.library,
        "size": f"{network.size[0]}×{network.size[1]}",
        "plain": plain,
        "late": late,
        "moved": moved,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the rows to this JSON file")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for network in NETWORKS:
        rows.append(row := row_of(network))
        late = "nothing to move" if row["late"] is None else f"{row['late'] / 1e9:.1f}"
        print(f"{network.name} of {network.library}: {row['plain'] / 1e9:.1f} → {late} GFLOP")
    if arguments.out:
        save_counts(arguments.out, rows)


if __name__ == "__main__":
    main()
