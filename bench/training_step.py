"""Time and memory of training steps with our losses and late_upsampling, compared with the plain
step with torch's; and time of inference.

    python bench/training_step.py [--network SegFormer-B0] [--section inference] [--rows ROWS.json]

A step is forward, backward and AdamW; on a GPU with bf16 autocast and channels last. The baseline
is the network with F.interpolate and F.cross_entropy; compiled is the network together with its
loss. Candidates take turns. Their time is that of a step, on a GPU also the sum of its kernels,
which the host does not decide. The ratio is the time divided by the median of the baseline.
--dry-run: small images, with torch.compile's backend "eager" for the loss alone.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from cases.networks import (
    IGNORE_INDEX,
    METHODS,
    ON_CPU,
    Candidate,
    Network,
    candidates,
    names_of,
    networks_on,
)
from record import head_of, parser_of, save, spread
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import anchorops as ao
from anchorops.measure import example_labels, in_turns, peak_extra_bytes

SECTIONS = ("training_steps", "inference")
ROUNDS, PROFILED = 10, 3  # of timing; steps
PLAIN, LATER, EXPORTED = "plain", "late", "late, exported"  # names of inference
Step = Callable[[], object]


def candidates_of(network: Network, late: bool, compiled: bool) -> list[Candidate]:
    """compiled: those that are, beside the baseline. On the CPU with methods, too."""
    on_cpu = network.name in [x.name for x in ON_CPU]
    if not compiled:
        return candidates(late, METHODS if on_cpu else ())
    baseline, *every = candidates(late)
    some = [] if on_cpu else [one for one in every if one.ours]
    return [baseline, *(one._replace(compiled=True) for one in (baseline, *some))]


def plan(device: str, section: str, compiled: bool = False) -> list[tuple[Network, list[str]]]:
    """The networks of a section, and the names of the rows that are known before late_upsampling
    was tried."""
    planned = []
    for network in networks_on(device, section, compiled):
        every = [x for x in candidates_of(network, False, compiled) if x.compiled == compiled]
        names = [PLAIN] if section == "inference" else [one.name for one in every]
        planned.append((network, names))
    return planned


class Bench(NamedTuple):
    """How a network is measured. dry: a dry run, in which torch.compile gets the loss alone.
    compiled: the candidates that are."""

    network: Network
    device: torch.device
    dry: bool
    compiled: bool

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.network.build().to(self.device)
        last = torch.channels_last if self.network.channels_last else torch.preserve_format
        return model.to(memory_format=last)  # pyright: ignore[reportCallIssue]

    def batch(self, size: int) -> tuple[Tensor, Tensor]:
        """Images and labels of coherent regions."""
        *rows, columns = self.network.size
        images = torch.randn(self.network.shape(size), device=self.device)
        if self.network.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        flat = (size, torch.Size(rows).numel(), columns)
        labels = example_labels(flat, self.network.num_classes, "coherent")
        labels = torch.where(labels < 0, IGNORE_INDEX, labels).view(size, *rows, columns)
        return images, labels.to(self.device)

    def autocast(self) -> torch.autocast:
        return torch.autocast("cuda", torch.bfloat16, enabled=self.device.type == "cuda")

    def step(self, candidate: Candidate, model: nn.Module) -> Callable[[Tensor, Tensor], None]:
        """One training step of a model in training mode."""
        network, ours = self.network, candidate.ours
        attached = None
        if candidate.method:
            attached = ao.attach(model, network.regularizer(candidate.method).to(self.device))
        loss_of_outputs = network.loss
        if candidate.compiled and self.dry:
            loss_of_outputs = torch.compile(network.loss, dynamic=False, backend="eager")

        def loss_of(images: Tensor, labels: Tensor) -> Tensor:
            return loss_of_outputs(network.outputs(model, images, low=ours), labels, ours)

        if candidate.compiled and not self.dry:
            loss_of = torch.compile(loss_of, dynamic=False)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-5)

        def step(images: Tensor, labels: Tensor) -> None:
            with self.autocast():
                loss = loss_of(images, labels)
                if attached is not None:
                    loss = loss + attached(labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    def prepared(self, candidate: Candidate) -> Callable[[Tensor, Tensor], None]:
        model = self.model().train()
        self.network.arrange(model, self.batch(2)[0], candidate)
        return self.step(candidate, model)

    def runs_later(self) -> bool:
        device = "cpu" if self.device.type == "cpu" else "meta"
        return self.network.runs_later(self.network.build().train().to(device))

    def measured(self, steps: dict[str, Step], rounds: int) -> Iterator[dict[str, Any]]:
        """Time and memory of calls that take turns. The first is the baseline."""
        peaks, kernels = [], []
        for step in steps.values():
            step()  # Adam's state exists then
            peaks.append(peak_of(step, self.device))
            kernels.append(seconds_of_kernels(step, self.device))
        times, others = in_turns([*steps.values()], self.device, seconds=0.0, rounds=rounds)
        spreads = [spread(seconds) for seconds in times]
        for name, seconds, peak, of_kernels in zip(steps, spreads, peaks, kernels, strict=True):
            yield {
                "network": str(self.network),
                "name": name,
                "seconds": seconds,
                "kernels": of_kernels,
                "rounds": len(times[0]),
                "ratio": {x: value / spreads[0]["median"] for x, value in seconds.items()},
                "peak_bytes": peak,
                "others": others,
            }

    def training_steps(self, rounds: int) -> Iterator[dict[str, Any]]:
        """On a GPU the peak of a step includes the parameters of its candidate alone."""
        images, labels = self.batch(self.network.batch)
        steps: dict[str, Step] = {}
        kept: dict[str, int] = {}
        every = candidates_of(self.network, self.runs_later(), self.compiled)
        for candidate in every:
            before = torch.cuda.memory_allocated()  # 0 without a GPU
            step = partial(self.prepared(candidate), images, labels)
            step()
            steps[candidate.name] = step
            kept[candidate.name] = torch.cuda.memory_allocated() - before
        for one, row in zip(every, self.measured(steps, rounds), strict=True):
            if row["peak_bytes"] is not None:
                row["peak_bytes"] -= sum(kept.values()) - kept[one.name]
            if one.compiled == self.compiled:
                methods = "+".join(names_of(one.method or "plain"))
                yield row | {"methods": methods, "late": one.late, "compiled": one.compiled}

    def inference(self, rounds: int) -> Iterator[dict[str, Any]]:
        """Forward passes in evaluation mode without gradients."""
        images, _ = self.batch(self.network.batch)
        model = self.model().eval()
        late = copy.deepcopy(model)
        networks: dict[str, Callable[..., Any]] = {PLAIN: model}
        if self.runs_later():
            ao.late_upsampling(late, images[:1])
            networks[LATER] = late
        if self.device.type == "cpu":
            networks[EXPORTED] = torch.export.export(late, (images,)).module()

        def run(network: Callable[..., Any]) -> None:
            with torch.no_grad(), self.autocast():
                network(images)

        steps: dict[str, Step] = {name: partial(run, one) for name, one in networks.items()}
        yield from self.measured(steps, rounds)


def peak_of(step: Step, device: torch.device) -> int | None:
    """On a GPU all memory of torch's tensors, on the CPU the additional memory of a step."""
    if device.type == "cpu":
        return peak_extra_bytes(step, device)
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def seconds_of_kernels(step: Step, device: torch.device) -> float | None:
    """The sum of the kernels of a step; None on the CPU."""
    if device.type == "cpu":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(PROFILED):
            step()
    total = sum(event.self_device_time_total for event in profiled.key_averages())
    return total / 1e6 / PROFILED


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--network", action="append", help="by name (default: all)")
    parser.add_argument("--section", choices=SECTIONS, default=SECTIONS[0])
    parser.add_argument("--networks-of", help="a type of device (default: that of --device)")
    parser.add_argument("--compiled", action="store_true", help="steps by torch.compile")
    arguments = parser.parse_args()
    device, dry = torch.device(arguments.device), arguments.dry_run
    of = arguments.networks_of or device.type
    for network, _ in plan(of, arguments.section, arguments.compiled):
        if arguments.network and network.name not in arguments.network:
            continue
        bench = Bench(network.tiny() if dry else network, device, dry, arguments.compiled)
        rows: list[dict[str, Any]] = []
        try:
            for row in getattr(bench, arguments.section)(1 if dry else ROUNDS):
                rows.append(row)
                print(line(row), flush=True)
        except ImportError as error:
            print(f"{network}: {error.name} is not installed", file=sys.stderr)
        if arguments.rows:
            save(arguments.rows, arguments.section, head_of(device), rows)


def line(row: dict[str, Any]) -> str:
    middle, share = row["seconds"]["median"], row["ratio"]["median"]
    return f"{row['network']}: {row['name']:<36}{1e3 * middle:9.1f} ms{share:7.0%}"


if __name__ == "__main__":
    main()
