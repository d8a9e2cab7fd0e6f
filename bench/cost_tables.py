"""Writes the tables of README.md and some pages of docs/ from committed rows.

    python bench/cost_tables.py

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`. A function that returns
text writes the whole table. One that returns a list checks a table whose words are written by hand:
its figures must stand in the page, in this order.
"""

import re
import sys
from collections.abc import Callable, Iterator

from cases import FORWARD, IMAGES, METHODS, TRAINING, VOLUMES
from record import (
    BASELINE,
    BOTH,
    OWN,
    ROOT,
    by_case,
    compared,
    gain,
    grouped,
    load,
    machine,
    markdown_table,
    number,
    ours_and_other,
    variant_of,
)

PAGES = [
    ROOT / page
    for page in (
        *("README.md", "docs/cost.md", "docs/evaluation.md"),
        *("docs/gpu.md", "docs/how-it-works.md", "docs/losses.md"),
    )
]
MARKED = re.compile(r"(?P<mark><!-- rows: (?P<name>\w+) -->\n).*?(?=<!-- end of rows -->)", re.S)
RESULTS = ROOT / "bench/results"
RUN = RESULTS / "amd-epyc-avx512-2-threads.json"  # of `make bench BENCH=bench/results`
GPU_RUN = RESULTS / "nvidia-h100-80gb-hbm3-132-multiprocessors.json"
COUNTED_MEMORY = RESULTS / "counted-memory.json"
COUNTED_ERRORS = RESULTS / "counted-errors.json"
COUNTED_LAUNCHES = RESULTS / "counted-launches.json"
COUNTED_PRECISION = RESULTS / "counted-precision.json"
HOST_TIME = RESULTS / "host-time.json"  # of bench/host_time.py
EXPONENTIALS = "exponentials"
OF_README = ("HRNet, Cityscapes", "SegFormer, ADE20K")  # cross-entropy on a GPU


def main() -> None:
    wrong = []
    for page in PAGES:
        text = page.read_text()
        page.write_text(with_tables(text))
        wrong += [f"{page.relative_to(ROOT)}: {figure}" for figure in missing_figures(text)]
    if wrong:
        sys.exit("\n".join(["not there, or not in their place:", *wrong]))


def with_tables(page: str) -> str:
    """The text of a page, with its tables made anew from the rows."""

    def made_anew(marked: re.Match[str]) -> str:
        table = TABLES[marked["name"]]()
        return f"{marked['mark']}\n{table}\n\n" if isinstance(table, str) else marked[0]

    return MARKED.sub(made_anew, page)


def missing_figures(page: str) -> Iterator[str]:
    """Figures of the rows that a table written by hand does not have, or not in this order."""
    for marked in MARKED.finditer(page):
        table, start = TABLES[marked["name"]](), 0
        for figure in table if isinstance(table, list) else []:
            whole = re.compile(rf"(?<![\d.,]){re.escape(figure)}(?![.,]?\d)")
            if found := whole.search(marked[0], start):
                start = found.end()
            else:
                yield f"table {marked['name']}: {figure}"


def cases_of(run: dict, **fields: object) -> list[list[dict]]:
    """The rows of cases with these fields, the fastest first."""
    return [case for case in by_case(run["operators"]) if fields.items() <= case[0].items()]


# README


def gains() -> list[str]:
    """Typical and best cases of what the README promises."""

    def step(network: str, run: dict) -> str:
        """With late upsampling, if something could run later."""
        rows = step_of(network, run)
        ours = rows.get(BOTH) or rows[OWN]
        memory = ours["peak_bytes"] / rows[BASELINE]["peak_bytes"]
        return f"{ours['ratio']['median']:.0%}, {memory:.0%}: {network}"

    fields = {"operation": "cross-entropy", "direction": TRAINING, "dtype": "bf16"}
    on_gpu = [cases_of(load(GPU_RUN), **fields, shape=shape)[0] for shape in OF_README]
    return [
        *(f"{gain(case):.0f}×: {case[0]['num_classes']} classes" for case in on_gpu),
        *(step(network, load(GPU_RUN)) for network in ("HRNet", "SegFormer")),
        *(largest_batches(network) for network in ("SegFormer-B5", "PSPNet-R101")),
        f"{gain_of('cross-entropy', 19, 4, labels='trained')}: 19 classes, stride 4",
        f"{gain_of('cross-entropy', 150, 8)}: 150 classes, stride 8",
        *(step(network, load(RUN)) for network in ("HRNet", "SegFormer")),
    ]


def gain_of(operation: str, num_classes: int, stride: int, **fields: object) -> str:
    """How many times as fast as the fastest alternative, of the grid of options."""
    fields = {"shape": IMAGES, "dtype": "fp32", "labels": "coherent"} | fields
    fields |= {"operation": operation, "num_classes": num_classes, "stride": stride}
    return f"{gain(cases_of(load(RUN), **fields)[0]):.0f}×"


def step_of(network: str, run: dict) -> dict[str, dict]:
    """The rows of a training step by name."""
    steps = run["training_steps"]
    return {row["name"]: row for row in steps if network.lower() in row["network"].lower()}


def largest_batches(network: str) -> str:
    """With late upsampling, if something can be moved on a GPU."""
    rows = next(
        rows
        for (name, _, checkpointing), rows in counted_steps().items()
        if name == network and not checkpointing
    )
    after = rows.get(BOTH) or rows[OWN]
    sizes = (row["largest_batches"]["24 GB"] for row in (rows[BASELINE], after))
    return f"{' → '.join(map(str, sizes))}: {network}"


def counted_steps() -> dict[tuple, dict[str, dict]]:
    return compared(load(COUNTED_MEMORY)["rows"], "network", "sizes", "checkpointing")


def uses() -> list[str]:
    """What the calls gain on a CPU."""
    run = load(RUN)
    steps = [step_of("segformer", run)[name]["ratio"]["median"] for name in (BOTH, OWN)]
    exports = compared(run["export"], "volume", "dtype")
    lovasz, matched = (
        [gain(case) for case in cases_of(run, operation=name)]
        for name in ("Lovász", "matched masks: focal + Dice")
    )
    return [
        *(f"{step:.0%}" for step in steps),
        gain_of("cross-entropy + Dice", 14, 4, shape=VOLUMES),
        *(gains_over(way, exports) for way in ("torch", "nnU-Net")),
        gains_over("torch, pycocotools", compared(run["masks"], "masks", "threads")),
        f"{min(matched):.0f} to {max(matched):.0f}×",
        f"{min(lovasz):.0f} to {max(lovasz):.0f}×",
    ]


def gains_over(other: str, cases: dict[tuple, dict[str, dict]]) -> str:
    gains = [rows[other]["seconds"] / rows["anchorops"]["seconds"] for rows in cases.values()]
    return f"{min(gains):,.0f} to {max(gains):,.0f}×"


def speedups() -> str:
    """Of the pixel losses."""
    kinds = {
        "150 classes": (150, IMAGES, False),
        "19 classes": (19, IMAGES, False),
        "14 classes, volumes": (14, VOLUMES, False),
        "2 classes": (2, IMAGES, False),
        "one sigmoid": (1, IMAGES, True),
        "20 sigmoids": (20, IMAGES, True),
    }
    columns = [(8, "coherent"), (4, "coherent"), (4, "trained"), (1, "coherent")]
    lines = []
    for name, (num_classes, shape, sigmoid) in kinds.items():
        gains, every = {}, []
        for case in cases_of(load(RUN), num_classes=num_classes, shape=shape):
            row, prefix = case[0], "sigmoid: "
            if row["operation"].startswith(prefix) != sigmoid:
                continue
            if row["operation"].removeprefix(prefix) == "cross-entropy" and row["dtype"] == "fp32":
                gains[row["stride"], row["labels"]] = gain(case)
            if row["stride"] == 4:
                every.append(gain(case))
        cells = [f"{gains[column]:.2g}" if column in gains else "" for column in columns]
        lines.append([name, *cells, f"{min(every):.2g} to {max(every):.0f}"])
    header = ["times as fast", "output stride 8", "4", "4, trained network", "1"]
    return markdown_table([*header, "range of all losses, stride 4"], lines)


def steps_with_methods() -> str:
    """The time that a method adds to a step."""
    added: dict[str, list[float]] = {}
    for network in ("hrnet", "segformer"):
        rows = step_of(network, load(RUN))
        for name, row in rows.items():
            if name.endswith(", both"):
                share = row["ratio"]["median"] / rows[BOTH]["ratio"]["median"]
                added.setdefault(name.removesuffix(", both"), []).append(share - 1)
    ceco = max(added.pop("CeCo"))
    most = max(map(max, added.values()))
    return f"On a CPU a method adds at most {most:.0%} to the time of a step (CeCo {ceco:.0%})."


# Times


def bandwidth() -> str:
    """Where the picture of the cost was measured, and how fast the features are read."""
    run = load(RUN)
    fields = {"operation": "class moments with anchors", "direction": FORWARD, "labels": "coherent"}
    ours, _ = ours_and_other(cases_of(run, **fields)[0])
    assert ours
    return (
        f"{machine(run)}.\nThe forward pass of class moments reads the features at "
        f"{ours['read_share']:.0%} of the bandwidth at which torch sums them, by turns."
    )


def cases(run: dict, methods: bool = True) -> str:
    """The first case of each operation, those of the README, and those slower than the fastest
    other implementation: forward and backward, or forward if there is nothing else. Where the rate
    of exponentials was measured, also what share of the nearer roof ours reaches."""
    fields = ("operation", "shape", "sizes", "dtype", "labels")
    rows = [row for row in run["operators"] if row["shape"] not in (IMAGES, VOLUMES)]
    rows = [row for row in rows if methods or row["operation"] not in METHODS]
    trained = {tuple(row[x] for x in fields) for row in rows if row["direction"] == TRAINING}
    lines, roofs = [], {row["name"]: row["per_second"] for row in run.get("roofs", [])}
    seen: set[str] = set()
    for group in by_case(rows):
        ours, other = ours_and_other(group)
        if ours is None or other is None:
            continue
        training, operation = ours["direction"] == TRAINING, ours["operation"]
        if not training and tuple(ours[x] for x in fields) in trained:
            continue
        ratio = other["median"] / ours["median"]
        of_readme = operation == "cross-entropy" and ours["shape"] in OF_README
        if operation in seen and ratio >= 1 and not of_readme:
            continue
        seen.add(operation)
        lowest, highest = other["q20"] / ours["q80"], other["q80"] / ours["q20"]
        digits = 1 if ratio >= 0.1 else 2
        lines.append(
            [
                operation + ("" if training else f", {ours['direction']}"),
                sizes(ours, seen, "bf16" if run["device_type"] == "cuda" else "fp32"),
                measured(ours),
                f"{other['name']}: {measured(other)}",
                f"{ratio:.{digits}f} ({lowest:.{digits}f}–{highest:.{digits}f})",
                *([share_of_roof(ours, roofs)] if EXPONENTIALS in roofs else []),
            ]
        )
    header = ["operation", "sizes", "anchorops: ms, MiB", "fastest other: ms, MiB", "×"]
    header += ["share of the nearer roof"] * (EXPONENTIALS in roofs)
    return markdown_table(header, lines, words=(0, 1, 3))


def share_of_roof(row: dict, roofs: dict[str, float]) -> str:
    """Counted bytes at the rate of a copy, or counted exponentials at their rate: which takes
    longer, and what share of the time."""
    seconds = {
        "bytes": row["bytes"] / roofs["copy"],
        EXPONENTIALS: (row.get(EXPONENTIALS) or 0) / roofs[EXPONENTIALS],
    }
    nearer = max(seconds, key=seconds.__getitem__)
    return f"{seconds[nearer] / row['median']:.0%} ({nearer})"


def measured(row: dict) -> str:
    """Milliseconds and mebibytes."""
    memory = [] if row["extra_bytes"] is None else [number(row["extra_bytes"] / 2**20)]
    return "; ".join([number(row["median"] * 1e3), *memory])


def sizes(row: dict, seen: set[str], usual: str) -> str:
    """Name and sizes of a shape, and only the name once the sizes have been printed; dtype and
    labels unless they are the usual dtype and coherent."""
    named = row["shape"] != "centroids"
    text = f"{row['shape']}: {row['sizes']}" if named else row["sizes"]
    if text in seen:
        text = row["shape"]
    seen.add(text)
    dtype = f", {row['dtype']}" if row["dtype"] != usual else ""
    return text + dtype + (", random labels" if named and row["labels"] == "random" else "")


def training_steps(run: dict, methods: bool = True) -> str:
    """Time and memory of every candidate, as shares of the first: the ratio of the medians, and of
    the quartiles to the first's median."""
    rows = [row for row in run["training_steps"] if "absent" not in row]
    rows = [row for row in rows if methods or row["methods"] == "plain"]
    header, networks = ["a training step"], compared(rows, "network")
    for (network,) in networks:
        header += [f"{network}: time", "memory"]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        cells = [name]
        for candidates in networks.values():
            if name not in candidates:  # nothing could run later
                cells += ["", ""]
                continue
            row, ratio = candidates[name], candidates[name]["ratio"]
            between = f"{100 * ratio['q1']:.0f}–{100 * ratio['q3']:.0f}"
            kernels = f", kernels {1e3 * row['kernels']:,.0f} ms" if row.get("kernels") else ""
            cells.append(f"{milliseconds(row)} ({ratio['median']:.0%}; {between}){kernels}")
            peak, plain = row["peak_bytes"], candidates[BASELINE]["peak_bytes"]
            cells.append(f"{peak / 2**20:,.0f} MiB ({peak / plain:.0%})" if peak else "")
        lines.append(cells)
    return markdown_table(header, lines)


def batches(run: dict) -> str:
    """The largest batches that fit into 24 GB, measured."""
    lines = []
    for (network,), rows in compared(run["batches"], "network").items():
        images = [
            str(rows[x].get("images", "")) if x in rows else "" for x in (BASELINE, OWN, BOTH)
        ]
        lines.append([network, *images])
    return markdown_table(["images in 24 GB", "torch's cross-entropy", "ours", "both"], lines)


def milliseconds(row: dict) -> str:
    return f"{1e3 * row['seconds']['median']:,.0f} ms"


def inference(run: dict) -> str:
    """Time of a forward pass without gradients, and its share with late upsampling."""
    names, texts = {"late": "with late upsampling", "late, exported": "exported"}, []
    for (network,), rows in compared(run["inference"], "network").items():
        shares = [
            f"{text} {rows[name]['ratio']['median']:.0%}"
            for name, text in names.items()
            if name in rows
        ]
        texts.append(", ".join([f"{network}: {milliseconds(rows['plain'])}", *shares]))
    return "; ".join(texts) + "."


def beside(section: str, case: str, seconds: Callable[[float], str], **fields: object) -> str:
    """Time and memory of the implementations, of rows with these fields. case: the first column."""
    cases = compared([row for row in load(RUN)[section] if fields.items() <= row.items()], case)
    lines = [
        [name, *(f"{seconds(x['seconds'])}, {x['memory'] / 1e6:,.0f} MB" for x in rows.values())]
        for (name,), rows in cases.items()
    ]
    return markdown_table([case, *next(iter(cases.values()))], lines)


def slower() -> str:
    """Losses that take longer than the fastest alternative."""
    texts = []
    for case in (case for shape in (VOLUMES, IMAGES) for case in cases_of(load(RUN), shape=shape)):
        if gain(case) < 1:
            row = case[0]
            assert row["stride"] == 1, f"docs/losses.md says otherwise of {row['case']}"
            singular, plural = (
                ("channel", "channels") if "sigmoid" in row["operation"] else ("class", "classes")
            )
            number = row["num_classes"]
            logits = f"{number} {plural if number > 1 else singular}"
            texts.append(f"{variant_of(row)} of {logits} ({gain(case):.2f})")
    return ", ".join(texts) + "."


# Counts


def counted_memory() -> str:
    """For each network and checkpointing: memory in GB and the largest batches. "→":
    baseline, with our cross-entropy, and with late upsampling too. What a method adds to the last
    of these."""
    lines, added = [], {}
    seen = ""
    for (network, size, checkpointing), rows in counted_steps().items():
        name = f"{network}, {size}"
        shown = [rows[x] for x in (BASELINE, OWN, BOTH) if x in rows]
        batches = (str(row["largest_batches"]["24 GB"]) for row in shown)
        most = max(row["peak_bytes"] for row in rows.values() if row["method"])
        added[network] = max(most - shown[-1]["peak_bytes"], added.get(network, 0))
        lines.append(
            [
                "checkpointing" if checkpointing and name == seen else name,
                " → ".join(f"{row['peak_bytes'] / 1e9:.1f}" for row in shown),
                " → ".join(batches),
            ]
        )
        seen = name
    header = ["network", "bf16 autocast, GB", "images in 24 GB"]
    network = max(added, key=added.__getitem__)
    largest = added.pop(network) / 1e9
    others = max(added.values()) / 1e9
    return (
        f"{markdown_table(header, lines)}\n\nSAR, OCCL, CeCo or MVSC add at most {largest:.1f} GB "
        f"to the last figure of the {network}, {others:.1f} GB to that of another network."
    )


def coco_steps() -> str:
    rows = load(RUN)["coco_steps"]
    steps = ", ".join(f"{row['step']} {row['seconds']:.1f} s" for row in rows)
    return f"{rows[0]['images']:,} images: {steps}."


def host_time() -> str:
    """Times of each call by each backend, also as multiples of torch's formula."""
    lines = []
    for (name,), rows in grouped(load(HOST_TIME)["host_time"], "name").items():
        times = (f"{row['us']:.0f} ({row['ratio']:.1f})" for row in rows)
        lines.append([name, *times, rows[0]["operators"]])
    return markdown_table(["call", "CPU", "Triton", "operators"], lines)


def launches() -> str:
    """Of a whole step, of which ours, and how many there were at an earlier commit."""
    rows = load(COUNTED_LAUNCHES)["rows"]
    lines = [(row["name"], row["launches"], row["ours"], row["earlier"]) for row in rows]
    return markdown_table(["a step", "launches", "of them ours", "before"], lines)


def errors() -> str:
    """Of Triton's operators that round, the largest errors as parts of the error budget."""
    rows = [row for row in load(COUNTED_ERRORS)["rows"] if row["error"]]
    shares = sorted(row["share"] for row in rows)
    return (
        f"Triton's largest errors there are {shares[0]:.0%} to {shares[-1]:.0%} of the\n[error "
        f"budget](how-it-works.md#what-every-backend-guarantees) for {len(rows)} operators; others "
        "are equal."
    )


def lovasz_precision() -> str:
    def percent(share: float) -> str:
        return f"{share:.2%}" if share < 0.001 else f"{share:.1%}"

    lines = []
    for (pixels,), group in grouped(load(COUNTED_PRECISION)["rows"], "pixels").items():
        group.sort(key=lambda row: row["trained"])
        cells = [f"{percent(row['median'])} ({percent(row['worst'])})" for row in group]
        lines.append([pixels, *cells])
    kinds = [
        f"{kind}, {bins} bins" for kind in ("random", "trained") for bins in ("1,024", "8,192")
    ]
    return markdown_table(["pixels of the class", *kinds], lines, words=())


OF_A_MACHINE = {
    "operators": cases,
    "training_steps": training_steps,
    "batches": batches,
    "inference": inference,
}
TABLES: dict[str, Callable[[], str | list[str]]] = {
    "gains": gains,
    "uses": uses,
    "slower": slower,
    "steps_with_methods": steps_with_methods,
    "speedups": speedups,
    "bandwidth": bandwidth,
    "cases": lambda: cases(load(RUN), methods=False),
    "cases_on_a_gpu": lambda: cases(load(GPU_RUN), methods=False),
    "training_steps": lambda: training_steps(load(RUN), methods=False),
    "steps_on_a_gpu": lambda: training_steps(load(GPU_RUN), methods=False),
    "inference": lambda: inference(load(RUN)),
    "masks_in_frameworks": lambda: beside(
        "masks_in_frameworks", "case", lambda seconds: f"{1e3 * seconds:,.0f} ms"
    ),
    "coco_steps": coco_steps,
    "host_time": host_time,
    "export": lambda: beside("export", "volume", "{:.2f} s".format, dtype="float16"),
    "counted_memory": counted_memory,
    "errors": errors,
    "launches": launches,
    "lovasz_precision": lovasz_precision,
}


if __name__ == "__main__":
    main()
