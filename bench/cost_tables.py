"""Writes the tables of README.md and some pages of docs/ from committed rows.

    python bench/cost_tables.py

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`.
"""

import json
import re
from pathlib import Path

import charts
import plot_counted_memory
import plot_operators
import plot_options
import plot_training_step
from charts import number
from markdown_table import markdown_table
from record import GRAPH, by_case, grouped

ROOT = Path(__file__).parents[1]
PAGES = (
    ROOT / "README.md",
    *(
        ROOT / "docs" / name
        for name in (
            *("cost.md", "evaluation.md", "gpu.md"),
            *("how-it-works.md", "losses.md"),
        )
    ),
)
RESULTS = ROOT / "bench/results"
MARKED = re.compile(r"(<!-- rows: (\w+) -->\n).*?(?=<!-- end of rows -->)", re.S)
RUN = RESULTS / "amd-epyc-avx512-2-threads.json"  # of `make bench BENCH=bench/results`
GPU_RUN = RESULTS / "nvidia-h100-80gb-hbm3-132-multiprocessors.json"
COUNTED_MEMORY = RESULTS / "counted-memory.json"
COUNTED_LOVASZ = RESULTS / "counted-lovasz.json"
COUNTED_TRAFFIC = RESULTS / "counted-traffic.json"
COUNTED_PRECISION = RESULTS / "counted-precision.json"
REQUESTS = ("loads", "stores", "atomics")  # of counted traffic
BOTH = "late upsampling, ours (both)"  # a row of a training step


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(page: str) -> str:
    """The text of a page, with its tables made anew from the rows."""
    return MARKED.sub(lambda marked: f"{marked[1]}\n{TABLES[marked[2]]()}\n\n", page)


def run() -> dict:
    return json.loads(RUN.read_text())


def gpu_run() -> dict:
    return json.loads(GPU_RUN.read_text())


def counted_memory() -> dict:
    return json.loads(COUNTED_MEMORY.read_text())


def bandwidth() -> str:
    """Where the picture of the cost was measured, and how fast the features are read."""
    forward, _ = plot_operators.headline_groups(run(), *plot_operators.HEADLINES[1][:2])
    share = next(row["read_share"] for row in forward if row["ours"])
    return (
        f"{charts.machine(run())}.\nThe forward pass of class moments reads the features at "
        f"{share:.0%} of the bandwidth at which torch sums them."
    )


def gain_of(option: str, num_classes: int, ratio: int, axes: int = 2) -> str:
    """How many times as fast as the fastest alternative."""
    what = {"option": option, "num_classes": num_classes, "ratio": ratio, "axes": axes}
    row = next(row for row in run()["options"] if what.items() <= row.items())
    return f"{plot_options.gain(row):.0f}×"


def gains() -> str:
    """The README's first table: a typical and the best case of what it promises."""
    network, best = step_with_both("hrnet"), step_with_both("segformer")
    losses = {
        rows[0]["shape"]: gain_of_case(rows)
        for rows in by_case(gpu_run()["operators"])
        if (rows[0]["operation"], rows[0]["direction"])
        == ("cross-entropy", plot_operators.TRAINING)
    }
    on_gpu = [step_with_both(name, gpu_run()) for name in ("hrnet", "segformer")]
    lines = [
        [
            "cross-entropy, forward and backward",
            f"{gain_of('cross-entropy, trained', 19, 4)} as fast: 19 classes, output stride 4, "
            "trained logits",
            f"{gain_of('cross-entropy', 150, 8)}: 150 classes, stride 8, random logits",
            "CPU",
        ],
        [
            "the same, bfloat16",
            f"{losses['HRNet, Cityscapes']}: 19 classes, stride 4, random logits",
            f"{losses['SegFormer, ADE20K']}: 150 classes, stride 4, random logits",
            "[H100](docs/gpu.md#how-fast)",
        ],
        [
            "a training step, with late upsampling",
            f"{network}: HRNet-W18-small, 19 classes",
            f"{best}: SegFormer-B0, 150 classes",
            "CPU",
        ],
        [
            "the same, autocast",
            f"{on_gpu[0]}: HRNet-W48, without it",
            f"{on_gpu[1]}: SegFormer-B5",
            "[H100](docs/gpu.md#how-fast)",
        ],
        [
            "largest batch in 24 GB, with late upsampling",
            f"{largest_batches('SegFormer-B5')}: SegFormer-B5",
            f"{largest_batches('PSPNet')}: PSPNet-R101, without it",
            "counted",
        ],
    ]
    return markdown_table(["", "typical", "best", "source"], lines, words=(0, 1, 2, 3))


def uses() -> str:
    """The README's table of what to write, and what it gains."""
    exported, torch_exported = (gains_of_export(way) for way in ("nnU-Net", "torch"))
    steps = [share_of_time("segformer", name) for name in ("baseline, ours", BOTH)]
    lovasz = [plot_options.gain(row) for row in rows_of_lovasz()]
    lines = [
        [
            "logits and labels, in any framework",
            "`ao.pixel_cross_entropy(logits, labels)`, `ao.CrossEntropy`, `ao.Dice`, "
            "`ao.BinaryCrossEntropy`, …",
            "[below](#what-to-expect)",
        ],
        [
            "a model that upsamples its logits: torchvision, segmentation_models.pytorch, "
            "UperNet of Transformers",
            "`ao.low_resolution(model, images)`",
            "the same",
        ],
        [
            "a head that upsamples before a 1×1 convolution: SegFormer, HRNet, PSPNet, DPT",
            "`ao.late_upsampling(model, images)`",
            f"SegFormer-B0's step: {steps[0]:.0%} → {steps[1]:.0%} of the baseline's",
        ],
        [
            "MONAI, volumes",
            "`ao.CrossEntropyDice()`",
            f"{gain_of('cross-entropy + Dice', 14, 4, axes=3)} (torch's formulas, 14 classes)",
        ],
        [
            "labels of whole volumes; nnU-Net",
            "`ao.pixel_argmax(logits, size)`; [export and trainer]"
            "(docs/evaluation.md#labels-of-whole-volumes)",
            f"{torch_exported} as fast as torch, {exported} as nnU-Net",
        ],
        [
            "masks of instances: Ultralytics, SAM",
            "[`ao.mask_rle(logits, size)`](docs/evaluation.md#masks-of-instances)",
            gains_of_masks(),
        ],
        [
            "Lovász of a softmax",
            "`ao.Lovasz()`, without sorting, [rounded](docs/losses.md#without-sorting-aolovasz)",
            f"{min(lovasz):.0f} to {max(lovasz):.0f}×",
        ],
    ]
    return markdown_table(["you have", "line of code", "gain on a CPU"], lines, words=(0, 1, 2))


def gain_of_case(rows: list[dict]) -> str:
    """The time of the fastest alternative divided by that of ours."""
    ours = next(row for row in rows if row["ours"])
    other = next(row for row in rows if "anchorops" not in row["name"])
    return f"{other['median'] / ours['median']:.0f}×"


def step_with_both(network: str, of: dict | None = None) -> str:
    """With late upsampling, if something could run later."""
    rows = rows_of_step(network, of)
    ours = rows.get(BOTH) or rows["baseline, ours"]
    memory = ours["peak_bytes"] / rows["baseline, torch's cross-entropy"]["peak_bytes"]
    return f"time {ours['ratio']['median']:.0%}, memory {memory:.0%}"


def share_of_time(network: str, name: str) -> float:
    return rows_of_step(network)[name]["ratio"]["median"]


def steps_with_methods() -> str:
    """The README's sentence on the time that a method adds to a step."""
    added: dict[str, list[float]] = {}
    for network in ("hrnet", "segformer"):
        without = share_of_time(network, BOTH)
        for name in rows_of_step(network):
            if name.endswith(", both"):
                share = share_of_time(network, name) / without
                added.setdefault(name.removesuffix(", both"), []).append(share - 1)
    ceco = max(added.pop("CeCo"))
    most = max(map(max, added.values()))
    return f"A method adds at most {most:.0%} to a step (CeCo {ceco:.0%}) on a CPU."


def rows_of_step(network: str, of: dict | None = None) -> dict[str, dict]:
    rows = (of or run())["training_steps"]
    return {plot_training_step.label(row): row for row in rows if network in row["network"]}


def largest_batches(network: str) -> str:
    """With late upsampling, if something can be moved on a GPU."""
    settings = plot_counted_memory.settings(counted_memory())
    rows = next(
        rows
        for (name, _, precision, checkpointing), rows in settings.items()
        if network in name and precision == "bf16" and not checkpointing
    )
    ours = rows.get(plot_counted_memory.BOTH) or rows[plot_counted_memory.OWN]
    before, after = (
        row["largest_batches"]["24 GB"] for row in (rows[plot_counted_memory.BASELINE], ours)
    )
    return f"{before} → {after} images"


def gains_of_export(way: str) -> str:
    gains = [
        ways[way]["seconds"] / ways["anchorops"]["seconds"] for ways in rows_of_export().values()
    ]
    return f"{min(gains):.0f} to {max(gains):.0f}×"


def rows_of_export() -> dict[tuple, dict[str, dict]]:
    """By volume and dtype, then by way."""
    groups = grouped(run()["export"], "volume", "dtype").items()
    return {case: {row["way"]: row for row in rows} for case, rows in groups}


def gains_of_masks() -> str:
    """Over torch in chunks and pycocotools; nothing where the run has no such rows."""
    groups = grouped(run().get("masks", []), "masks", "threads").values()
    seconds = [{row["way"]: row["seconds"] for row in rows} for rows in groups]
    gains = [x["torch, pycocotools"] / x["anchorops"] for x in seconds]
    return f"{min(gains):,.0f} to {max(gains):,.0f}× (torch, pycocotools)" if gains else ""


def export() -> str:
    lines = [
        [
            *case,
            *(f"{row['seconds']:.2f} s, {row['memory'] / 1e6:,.0f} MB" for row in ways.values()),
        ]
        for case, ways in rows_of_export().items()
    ]
    (ways, *_) = rows_of_export().values()
    return markdown_table(["volume", "logits", *ways], lines, words=(0, 1))


def rows_of_lovasz() -> list[dict]:
    return [row for row in run()["options"] if row["option"].startswith("Lovász")]


def lovasz() -> str:
    def cell(row: dict, name: str) -> str:
        if name not in row["seconds"]:
            return ""
        seconds, gain = row["seconds"][name], row["seconds"][name] / row["seconds"]["ours"]
        return f"{number(seconds * 1e3)} ms" + (f" ({gain:.0f}×)" if name != "ours" else "")

    dice = {
        (row["num_classes"], row["ratio"]): row["seconds"]["ours"]
        for row in run()["options"]
        if row["option"] == "Dice"
    }
    lines = []
    for row in rows_of_lovasz():
        trained = ", trained logits" if "trained" in row["option"] else ""
        images = f"{row['batch']} image{'s' if row['batch'] > 1 else ''}"
        share = row["seconds"]["ours"] / dice[row["num_classes"], row["ratio"]]
        lines.append(
            [
                f"{row['num_classes']}, {images}{trained}",
                *(cell(row, name) for name in ("ours", "smp", "torch", "compiled")),
                f"{share:.1f}",
            ]
        )
    header = ["classes, images", "`ao.Lovasz`", "smp", "the authors' formula", "compiled"]
    return markdown_table([*header, "times our Dice"], lines)


def slower() -> str:
    """Losses that take longer than the fastest alternative."""
    lines = []
    for row in run()["options"]:
        if plot_options.gain(row) < 1:
            assert row["ratio"] == 1, f"docs/losses.md says otherwise of {row['test']}"
            what = "channel" if "sigmoid" in row["option"] else "class"
            plural = {"channel": "channels", "class": "classes"}[what]
            number_of = f"{row['num_classes']} {plural if row['num_classes'] > 1 else what}"
            lines.append([row["option"], number_of, f"{plot_options.gain(row):.2f}"])
    return markdown_table(["loss", "logits", "times as fast"], lines, words=(0, 1))


def speedups() -> str:
    """The README's table of the pixel losses."""
    kinds = {
        "150 classes": (150, 2, False),
        "19 classes": (19, 2, False),
        "14 classes, volumes": (14, 3, False),
        "2 classes": (2, 2, False),
        "one sigmoid": (1, 2, True),
        "20 sigmoids": (20, 2, True),
    }
    lines = []
    for name, (num_classes, axes, sigmoid) in kinds.items():
        rows = [
            row
            for row in run()["options"]
            if (row["num_classes"], row["axes"]) == (num_classes, axes)
            and ("sigmoid" in row["option"]) == sigmoid
        ]
        cells = [name]
        for ratio in (8, 4, 1):
            gains = [
                plot_options.gain(x)
                for x in rows
                if x["ratio"] == ratio and x["option"].endswith("cross-entropy")
            ]
            cells.append(f"{gains[0]:.2g}" if gains else "")
        trained = [plot_options.gain(x) for x in rows if x["option"] == "cross-entropy, trained"]
        cells.insert(3, f"{trained[0]:.2g}" if trained else "")
        every = [plot_options.gain(row) for row in rows if row["ratio"] == 4]
        lines.append([*cells, f"{min(every):.2g} to {max(every):.0f}"])
    header = [
        *("times as fast", "output stride 8", "4", "4, trained network", "1"),
        "all losses, stride 4",
    ]
    return markdown_table(header, lines)


def measured(row: dict) -> str:
    """Milliseconds and mebibytes."""
    memory = [] if row["extra_bytes"] is None else [number(row["extra_bytes"] / 2**20)]
    return "; ".join([number(row["median"] * 1e3), *memory])


def sizes(row: dict, seen: set[str]) -> str:
    """Name and sizes of a shape, and only the name once the sizes have been printed; dtype and
    labels unless they are float32 and coherent."""
    named = row["shape"] != "centroids"
    text = f"{row['shape']}: {row['sizes']}" if named else row["sizes"]
    if text in seen:
        text = row["shape"]
    seen.add(text)
    dtype = f", {row['dtype']}" if row["dtype"] != "fp32" else ""
    return text + dtype + (", random labels" if named and row["labels"] == "random" else "")


def cases(of: dict) -> str:
    """The first case of each operation, and those less than twice as fast as the fastest other
    implementation: forward and backward, or forward if there is nothing else."""
    groups = plot_operators.quick_cases(of)
    fields = ("operation", "shape", "sizes", "dtype", "labels")
    trained = {
        tuple(rows[0][field] for field in fields)
        for rows in groups
        if rows[0]["direction"] == plot_operators.TRAINING
    }
    lines = []
    seen: set[str] = set()
    operations: set[str] = set()
    for rows in groups:
        ours = next((row for row in rows if row["ours"] and not row["name"].endswith(GRAPH)), None)
        other = next((row for row in rows if not row["name"].startswith("anchorops")), None)
        if ours is None or other is None:
            continue
        training = ours["direction"] == plot_operators.TRAINING
        if not training and tuple(ours[field] for field in fields) in trained:
            continue
        ratio = other["median"] / ours["median"]
        if ours["operation"] in operations and ratio >= 2:
            continue
        operations.add(ours["operation"])
        name = other["name"].replace(", kept pages", "\\*")
        lowest, highest = other["q20"] / ours["q80"], other["q80"] / ours["q20"]
        digits = 1 if ratio >= 0.1 else 2
        lines.append(
            [
                ours["operation"] + ("" if training else f", {ours['direction']}"),
                sizes(ours, seen),
                measured(ours),
                f"{name}: {measured(other)}",
                f"{ratio:.{digits}f} ({lowest:.{digits}f}–{highest:.{digits}f})",
            ]
        )
    header = ["operation", "sizes", "anchorops: ms, MiB", "fastest other: ms, MiB", "×"]
    return markdown_table(header, lines, words=(0, 1, 3))


def steps_on_a_gpu() -> str:
    """Without the methods."""
    of = gpu_run()
    plain = [row for row in of["training_steps"] if row["methods"] == "plain"]
    return plot_training_step.table({**of, "training_steps": plain})


def counted_lovasz() -> str:
    """A sentence for two of the networks."""
    rows = json.loads(COUNTED_LOVASZ.read_text())["rows"]
    texts = []
    for (network,), pair in grouped(rows, "network").items():
        if network.startswith(("SegFormer", "HRNet")):
            memory = " → ".join(f"{row['peak_bytes'] / 1e9:.1f}" for row in pair)
            images = " → ".join(str(row["largest_batches"]["24 GB"]) for row in pair)
            texts.append(f"{network} {memory} GB, images in 24 GB {images}")
    return "; ".join(texts) + "."


def rows_of_precision(section: str) -> list[dict]:
    rows = json.loads(COUNTED_PRECISION.read_text())["rows"]
    return [row for row in rows if row["section"] == section]


def precision() -> str:
    """How many results have larger errors; the worst, divided by torch's."""
    rows = rows_of_precision("losses")
    (results,) = {row["results"] for row in rows}
    lines = []
    for (loss,), group in grouped(rows, "loss").items():
        counts = [str(row["larger"]) for row in group]
        worst = [f" ({row['worst']:.1f})" * (row["larger"] > 0) for row in group]
        lines.append([loss, *map("".join, zip(counts, worst, strict=True))])
    scales = dict.fromkeys(f"{row['scale']:,.0f}" for row in rows)
    return markdown_table([f"of {results} (worst, divided by torch's)", *scales], lines)


def lovasz_precision() -> str:
    def percent(share: float) -> str:
        return f"{share:.2%}" if share < 0.001 else f"{share:.1%}"

    lines = []
    for (pixels,), group in grouped(rows_of_precision("lovasz"), "pixels").items():
        group.sort(key=lambda row: row["trained"])
        cells = [f"{percent(row['median'])} ({percent(row['worst'])})" for row in group]
        lines.append([str(pixels), *cells])
    kinds = [
        f"{kind}, {bins} bins" for kind in ("random", "trained") for bins in ("1,024", "8,192")
    ]
    return markdown_table(["pixels of the class", *kinds], lines, words=())


def counted_traffic() -> str:
    """Without the kernels that ask for little."""
    rows = json.loads(COUNTED_TRAFFIC.read_text())["rows"]
    asked = [sum(row[what]["sectors"] for what in REQUESTS if what in row) for row in rows]
    return traffic_table([row for row, size in zip(rows, asked, strict=True) if size >= 200_000])


def traffic_table(rows: list[dict]) -> str:
    """KB of each kernel: of its operands; of the different sectors that it moves; of the sectors of
    all requests, and which part of them the lanes asked for. Equal rows of a kernel stand once."""

    def kilobytes(size: int) -> str:
        return f"{size / 1000:,.0f}"

    def requests(row: dict, what: str) -> str:
        if what not in row:
            return ""
        asked, sectors = row[what]["asked"], row[what]["sectors"]
        return f"{kilobytes(sectors)} ({asked / sectors:.2f})"

    lines, before, seen = [], "", []
    for row in rows:
        cells = [f"`{row['kernel']}`", kilobytes(row["operands"]), kilobytes(row["moved"])]
        cells += [requests(row, what) for what in REQUESTS]
        if cells in seen:
            continue
        seen.append(cells)
        case = row["case"] if row["backend"] == "triton" else f"CUDA: {row['case']}"
        lines.append([case if case != before else "", *cells])
        before = case
    header = ["operation", "kernel", "operands, KB", "moved, KB", *REQUESTS]
    return markdown_table(header, lines, words=(0, 1))


TABLES = {
    "gains": gains,
    "uses": uses,
    "slower": slower,
    "steps_with_methods": steps_with_methods,
    "speedups": speedups,
    "bandwidth": bandwidth,
    "cases": lambda: cases(run()),
    "cases_on_a_gpu": lambda: cases(gpu_run()),
    "training_steps": lambda: plot_training_step.table(run()),
    "steps_on_a_gpu": steps_on_a_gpu,
    "inference": lambda: plot_training_step.inference(run()),
    "export": export,
    "lovasz": lovasz,
    "counted_memory": lambda: plot_counted_memory.table(counted_memory()),
    "counted_lovasz": counted_lovasz,
    "precision": precision,
    "lovasz_precision": lovasz_precision,
    "counted_traffic": counted_traffic,
}


if __name__ == "__main__":
    main()
