"""Writes the tables of README.md and docs/ from committed rows.

    python bench/cost_tables.py

A table stands between `<!-- rows: NAME -->` and `<!-- end of rows -->`. A function that returns
text writes the whole table. One that returns a list checks a table whose words are written by hand:
its figures must stand in the page, in this order.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial

import record
from cases.listed import FORWARD, IMAGES, TRAINING, VOLUMES
from record import BASELINE, BOTH, OWN, ROOT, by_case, compared, gain, markdown_table

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MARKED = re.compile(r"(?P<mark><!-- rows: (?P<name>\w+) -->\n).*?(?=<!-- end of rows -->)", re.S)
OF_README = ("HRNet, Cityscapes", "SegFormer, ADE20K")  # cross-entropy on a GPU


def committed(name: str) -> dict:
    return record.load(ROOT / f"bench/results/{name}.json")


CPU = committed("amd-epyc-avx512-2-threads")  # of `make bench BENCH=bench/results`
HOST_TIME = committed("host-time")["host_time"]
GPU = committed("nvidia-h100-80gb-hbm3-132-multiprocessors")


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


def gains_of(run: dict, **fields: object) -> list[float]:
    """Of the cases with these fields: how many times as fast as the fastest alternative."""
    return [gain(case) for case in by_case(run["operators"]) if fields.items() <= case[0].items()]


def between(values: Iterable[float], digits: str = ".0f") -> str:
    lowest, *_, highest = sorted(values)
    return f"{lowest:{digits}} to {highest:,.0f}"


def step_of(network: str, run: dict) -> dict[str, dict]:
    """The rows of a training step by name."""
    steps = compared(run["training_steps"], "network").items()
    return next(rows for (name,), rows in steps if network in name)


# README


def gains() -> list[str]:
    """Typical and best cases of what the README promises. Ours is with late upsampling, if
    something could run later."""

    def step(network: str, run: dict) -> str:
        rows = step_of(network, run)
        ours, plain = rows.get(BOTH) or rows[OWN], rows[BASELINE]
        return f"{ours['ratio']['median']:.0%}, {ours['peak_bytes'] / plain['peak_bytes']:.0%}"

    def batches(network: str) -> str:
        counted = [row for row in committed("counted-memory")["rows"] if row["network"] == network]
        rows = compared(counted, "checkpointing")[(False,)]
        pair = rows[BASELINE], rows.get(BOTH) or rows[OWN]
        return f"{' → '.join(str(row['largest_batches']['24 GB']) for row in pair)}: {network}"

    fields = {"operation": "cross-entropy", "direction": TRAINING, "dtype": "bf16"}
    hrnet, segformer = (gains_of(GPU, **fields, shape=shape)[0] for shape in OF_README)
    fields = {"operation": "cross-entropy", "shape": IMAGES}
    (trained,) = gains_of(CPU, **fields, num_classes=19, labels="trained")
    (best,) = gains_of(CPU, **fields, num_classes=150, stride=8)
    return [
        *(f"{hrnet:.0f}×: 19 classes", f"{segformer:.0f}×: 150 classes"),
        *(f"{step('hrnet', GPU)}: HRNet", f"{step('segformer', GPU)}: SegFormer"),
        *(batches("SegFormer-B5"), batches("PSPNet-R101")),
        *(f"{trained:.0f}×: 19 classes, stride 4", f"{best:.0f}×: 150 classes, stride 8"),
        *(f"{step('hrnet', CPU)}: HRNet", f"{step('segformer', CPU)}: SegFormer"),
    ]


def uses() -> list[str]:
    """What the calls gain on a CPU."""

    def over(other: str, section: str, *case: str) -> str:
        cases = compared(CPU[section], *case).values()
        return between(rows[other]["seconds"] / rows["anchorops"]["seconds"] for rows in cases)

    segformer = step_of("segformer", CPU)
    volume = {"operation": "cross-entropy + Dice", "shape": VOLUMES, "dtype": "fp32"}
    return [
        *(f"{segformer[name]['ratio']['median']:.0%}" for name in (BOTH, OWN)),
        f"{gains_of(CPU, **volume)[0]:.0f}×",
        *(f"{over(way, 'export', 'volume', 'dtype')}×" for way in ("torch", "nnU-Net")),
        f"{over('torch, pycocotools', 'masks', 'masks', 'threads')}×",
        f"{between(gains_of(CPU, operation='matched masks: focal + Dice'))}×",
        f"{between(gains_of(CPU, operation='Lovász'))}×",
    ]


def speedups() -> str:
    """Of the pixel losses."""
    kinds = {"150 classes": 150, "19 classes": 19, "14 classes, volumes": 14, "2 classes": 2}
    kinds |= {"one sigmoid": 1, "20 sigmoids": 20}
    lines = []
    for name, num_classes in kinds.items():
        shape = VOLUMES if "volumes" in name else IMAGES
        fields = {"num_classes": num_classes, "shape": shape}
        loss = {"operation": "sigmoid: " * ("sigmoid" in name) + "cross-entropy", "dtype": "fp32"}
        cells = [name]
        for stride, labels in ((8, "coherent"), (4, "coherent"), (4, "trained"), (1, "coherent")):
            found = gains_of(CPU, **fields, **loss, stride=stride, labels=labels)
            cells += [f"{found[0]:.2g}" if found else ""]
        lines.append([*cells, between(gains_of(CPU, **fields, stride=4), ".2g")])
    header = ["times as fast", "output stride 8", "4", "4, trained network", "1"]
    return markdown_table([*header, "range of all losses, stride 4"], lines)


# Pages of docs/


def cases(run: dict) -> str:
    """The first case of each operation, those of the README, and those slower than the fastest
    other implementation: forward and backward, or forward if there is nothing else."""
    rows = [row for row in run["operators"] if row["shape"] not in (IMAGES, VOLUMES)]
    trained = {row["operation"] for row in rows if row["direction"] == TRAINING}
    usual = "bf16" if run["device_type"] == "cuda" else "fp32"
    lines, seen = [], set()
    for ours, other in map(record.ours_and_other, by_case(rows)):
        if ours is None or other is None:
            continue
        operation, direction, ratio = ours["operation"], ours["direction"], gain([ours, other])
        of_readme = operation == "cross-entropy" and ours["shape"] in OF_README
        shown = operation not in seen or ratio < 1 or of_readme
        if not shown or (direction != TRAINING and operation in trained):
            continue
        lowest, highest = other["q20"] / ours["q80"], other["q80"] / ours["q20"]
        digits = 1 if ratio >= 0.1 else 2
        name = operation if direction == TRAINING else f"{operation}, {direction}"
        cells = [name, sizes(ours, seen, usual), measured(ours)]
        cells += [f"{other['name']}: {measured(other)}"]
        lines.append([*cells, f"{ratio:.{digits}f} ({lowest:.{digits}f}–{highest:.{digits}f})"])
        seen.add(operation)
    header = ["operation", "sizes", "anchorops: ms, MiB", "fastest other: ms, MiB", "×"]
    return markdown_table(header, lines, words=(0, 1, 3))


def measured(row: dict) -> str:
    """Milliseconds and mebibytes."""
    memory = [] if row["extra_bytes"] is None else [record.number(row["extra_bytes"] / 2**20)]
    return "; ".join([record.number(row["median"] * 1e3), *memory])


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


def slower() -> list[str]:
    """Losses that take longer than the fastest alternative."""
    return [f"{x:.2f}" for shape in (VOLUMES, IMAGES) for x in gains_of(CPU, shape=shape) if x < 1]


def bandwidth() -> str:
    """Where the picture of the cost was measured, and how fast the features are read."""
    moments = {"operation": "class moments with anchors", "direction": FORWARD}
    row = next(row for row in CPU["operators"] if moments.items() <= row.items())
    return (
        f"{record.machine(CPU)}.\nThe forward pass of class moments reads the features at "
        f"{row['read_share']:.0%} of the bandwidth at which torch sums them, by turns."
    )


def pivot(rows: Iterable[dict], line: str, column: str, cell: str) -> str:
    """A line for each value of one field, a column for each of another. cell: of a row's fields."""
    lines: dict[object, dict[str, str]] = {}
    for row in rows:
        lines.setdefault(row[line], {})[row[column]] = cell.format(**row)
    columns = dict.fromkeys(name for cells in lines.values() for name in cells)
    table = [[name, *(cells.get(x, "") for x in columns)] for name, cells in lines.items()]
    return markdown_table([line, *columns], table)


def of_networks(run: dict, section: str = "training_steps", methods: bool = True) -> str:
    """Time and memory of every candidate, as shares of the first: the ratio of the medians, and of
    the quartiles to the first's median."""
    rows = []
    for row in run[section]:
        if "absent" not in row and (methods or row["methods"] == "plain"):
            first = next(x for x in run[section] if x["network"] == row["network"])
            median, q1, q3 = (100 * row["ratio"][x] for x in ("median", "q1", "q3"))
            text = f"{1e3 * row['seconds']['median']:,.0f} ms ({median:.0f}%; {q1:.0f}–{q3:.0f})"
            if row.get("kernels"):
                text += f", kernels {1e3 * row['kernels']:,.0f} ms"
            if peak := row["peak_bytes"]:
                text += f", {peak / 2**20:,.0f} MiB ({peak / first['peak_bytes']:.0%})"
            rows.append({"candidate": row["name"], "network": row["network"], "text": text})
    return pivot(rows, "candidate", "network", "{text}")


def beside(section: str, case: str, seconds: str, **fields: object) -> str:
    """Time and memory of the implementations, of rows with these fields. case: the first column."""
    rows = [row for row in CPU[section] if fields.items() <= row.items()]
    rows = [row | {"MB": row["memory"] / 1e6, "ms": 1e3 * row["seconds"]} for row in rows]
    return pivot(rows, case, "name", seconds + ", {MB:,.0f} MB")


def counted_memory() -> str:
    """For each network and checkpointing: memory in GB and the largest batches. "→":
    baseline, with our cross-entropy, and with late upsampling too. What a method adds to the last
    of these."""
    lines, added = [], {}
    counted = compared(committed("counted-memory")["rows"], "network", "sizes", "checkpointing")
    for (network, size, checkpointing), rows in counted.items():
        shown = [rows[x] for x in (BASELINE, OWN, BOTH) if x in rows]
        most = max(row["peak_bytes"] for row in rows.values() if row["method"])
        added[network] = max(most - shown[-1]["peak_bytes"], added.get(network, 0))
        name = "checkpointing" if checkpointing else f"{network}, {size}"
        peaks = (f"{row['peak_bytes'] / 1e9:.1f}" for row in shown)
        batches = (str(row["largest_batches"]["24 GB"]) for row in shown)
        lines.append([name, " → ".join(peaks), " → ".join(batches)])
    *_, (second, _), (first, network) = sorted((size / 1e9, name) for name, size in added.items())
    table = markdown_table(["network", "bf16 autocast, GB", "images in 24 GB"], lines)
    return (
        f"{table}\n\nSAR, OCCL, CeCo or MVSC add at most {first:.1f} GB to the last figure of the "
        f"{network}, {second:.1f} GB to that of another network."
    )


def launches() -> str:
    """Of a whole step, of which ours, and how many there were at an earlier commit."""
    rows = committed("counted-launches")["rows"]
    cells = [[row[x] for x in ("name", "launches", "ours", "earlier")] for row in rows]
    return markdown_table(["a step", "launches", "of them ours", "before"], cells)


def lovasz_precision() -> str:
    rows = []
    for row in committed("counted-precision")["rows"]:
        kind = f"{'trained' if row['trained'] else 'random'}, {row['bins']:,} bins"
        rows.append(row | {"kind": kind, "pixels of the class": row["pixels"]})
    return pivot(rows, "pixels of the class", "kind", "{median:.2%} ({worst:.1%})")


OF_A_MACHINE = {
    "operators": cases,
    "training_steps": of_networks,
    "inference": partial(of_networks, section="inference"),
}
TABLES: dict[str, Callable[[], str | list[str]]] = {
    **{table.__name__: table for table in (gains, uses, speedups, slower, bandwidth)},
    **{table.__name__: table for table in (counted_memory, launches, lovasz_precision)},
    "cases": partial(cases, CPU),
    "cases_on_a_gpu": partial(cases, GPU),
    "training_steps": partial(of_networks, CPU),
    "steps_on_a_gpu": partial(of_networks, GPU, methods=False),
    "inference": partial(of_networks, CPU, "inference"),
    "host_time": partial(pivot, HOST_TIME, "name", "backend", "{us:.0f} ({ratio:.1f})"),
    "masks_in_frameworks": partial(beside, "masks_in_frameworks", "case", "{ms:,.0f} ms"),
    "export": partial(beside, "export", "volume", "{seconds:.2f} s", dtype="float16"),
}


if __name__ == "__main__":
    main()
