"""Several processes with DDP, or with --fsdp FSDP2: a training loop with SAR.

    torchrun --nproc-per-node 2 examples/ddp_and_fsdp.py [--fsdp] [--steps 3]

Trains a small network on random images and labels, on the CPU if there is no GPU. Its logits have a
quarter of the labels' height and width.
"""

import argparse
import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import anchorops as ao

K, D = 7, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fsdp", action="store_true", help="shard the parameters")
    parser.add_argument("--steps", type=int, default=3)
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # FSDP does not copy rank 0's parameters: all ranks must draw the same
    model = nn.Sequential(nn.Conv2d(3, D, 7, 4, padding=3), nn.ReLU(), nn.Conv2d(D, K, 1))

    # 1. attach before wrapping the model; create the optimizer after it. process_group: use the
    # statistics of all ranks
    sar = ao.attach(model, ao.SAR(K, D, gate="per_class", process_group="world"))
    model.to(device)
    if arguments.fsdp:
        parallel = model
        fully_shard(model)
    else:
        parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), lr=1e-3)
    torch.manual_seed(1 + dist.get_rank())  # different images
    for step in range(arguments.steps):
        images = torch.randn(2, 3, 32, 32, device=device)
        labels = torch.randint(0, K, (2, 32, 32), device=device)
        ce = ao.pixel_cross_entropy(parallel(images), labels)  # of logits 8×8
        loss = ce + sar(labels)  # 2. add the method's loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        terms = {"ce": ce.detach(), **sar.terms}  # 3. log its weighted terms
        if dist.get_rank() == 0:
            text = ", ".join(f"{name} {float(value):.3f}" for name, value in terms.items())
            print(f"{type(parallel).__name__}, step {step + 1}: {text}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
