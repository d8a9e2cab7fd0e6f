"""The benchmarks: counted bytes, rows, plots."""

import importlib
import json
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, Mock

import cost_tables
import operator_times
import plot
import pytest
import run as bench
import torch
from cases import listed, networks, operations, shapes
from record import compared, head_of, load, save

import anchorops as ao
from anchorops.doctor import __main__ as doctor
from anchorops.doctor import benchmark as _doctor_benchmark
from anchorops.doctor import catalogue
from anchorops.doctor.catalogue import batches
from anchorops.measure import example_labels, measure, peak_extra_bytes, summary

ROOT = Path(__file__).parents[1]
CPU, TRAINING = torch.device("cpu"), "forward + backward"


def output_of(*words: object) -> str:
    """Of a program of bench/ that ends well."""
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-4000:]
    return ended.stdout


def test_counted_bytes():
    features = torch.empty(2, 3, 4, 5, dtype=torch.bfloat16)  # 240 bytes, 40 pixels
    moments_bytes = operations.moments_bytes
    keys, sums, sqdists, anchors = 160, 7 * 3 * 4, 7 * 4, 7 * 3 * 4
    assert moments_bytes(features, 7, "forward") == 240 + keys + sums
    assert moments_bytes(features, 7, "backward") == 240 + keys + sums
    both = {"sums": True, "sqdists": True}
    forward = moments_bytes(features, 7, "forward", **both)
    assert forward == 240 + keys + anchors + sums + sqdists
    backward = moments_bytes(features, 7, "backward", **both)
    assert backward == 2 * 240 + keys + anchors + sums + sqdists
    assert moments_bytes(features, 7, "forward + backward", **both) == forward + backward


@pytest.mark.parametrize("size", [(500,), (3, 200), (2, 60, 90)], ids=str)
def test_example_labels(size):
    random, coherent = (example_labels(size, 19, kind) for kind in ("random", "coherent"))
    assert random.shape == coherent.shape == size
    for labels in (random, coherent):
        assert labels.min() == -1 or labels.min() >= 0
        assert labels.max() < 19
    changes = [(labels.diff() != 0).float().mean() for labels in (random, coherent)]
    assert changes[0] > 0.8
    assert changes[1] < 2 / 37


def test_measure():
    features = torch.randn(2, 8, 32, 32)
    calls = []
    measured, times = measure(lambda: calls.append(features.sum()), 1000, CPU, seconds=0)
    assert len(calls) == len(times) == measured.rounds == 3
    assert min(times) <= measured.q20 <= measured.median <= measured.q80 <= max(times)
    assert measured.gbps == pytest.approx(1000 / measured.median / 1e9)
    assert measured.others is None  # too short to measure it
    assert len(measure(lambda: None, 1, CPU, seconds=0, rounds=1)[1]) == 2  # quantiles need two


def test_shares_of_bandwidths():
    """Medians over the rounds of 8 bytes, beside a copy and a sum of 2."""
    measured = summary([1.0, 2.0], 8, 2, [[1.0, 1.0], [2.0, 4.0]])
    assert (measured.copy_share, measured.read_share) == (1.5, 8)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until a test moves it."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("anchorops.measure.time.perf_counter", lambda: clock.now)
    return clock


def test_measure_outlasts_slow_first_calls(clock):
    durations = [0.25] * 4 + [0.0625] * 1000  # exact in binary

    def run() -> None:
        clock.now += durations.pop(0)

    measured, times = measure(run, 1, CPU, seconds=2)
    assert times == [0.25] * 4 + [0.0625] * 16
    assert measured.median == 0.0625


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_measure_sees_other_processes():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        stat = Path(f"/proc/{busy.pid}/stat")

        def used() -> float:
            user, system = stat.read_text().rpartition(")")[2].split()[11:13]
            return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")

        def run() -> None:  # however many processes share the cores, the busy one gets 0.2 s
            end = used() + 0.2
            while used() < end:
                time.sleep(0.01)

        try:
            measured, times = measure(run, 1, CPU, seconds=0)
        finally:
            busy.kill()
    assert (measured.others or 0) * sum(times) > 0.5  # of the 0.6 s in three rounds


def test_measure_leaves_out_its_own_process(clock, monkeypatch):
    """Seconds of all cores, and of this process, which is a part of them."""
    system, process = 100.0, 10.0
    ticks = os.sysconf("SC_CLK_TCK")

    def run() -> None:
        nonlocal system, process
        clock.now, system, process = clock.now + 1, system + 1.75, process + 1.5

    stat = lambda path: f"cpu {system * ticks:.0f} 0 0 900 0 0 0 0 0 0\n"  # noqa: E731
    monkeypatch.setattr("anchorops.measure.Path.read_text", stat)
    monkeypatch.setattr("anchorops.measure.time.process_time", lambda: process)
    assert measure(run, 1, CPU, seconds=0)[0].others == 0.25


@pytest.mark.parametrize(("host", "reads"), [(0.0, 1), (3e-3, 1 + 3), (1.0, 1 + 10)])
def test_measure_on_cuda(monkeypatch, clock, host: float, reads: int):
    """The order of events, with a replacement for CUDA: read a clean buffer for twice as long as
    the host needs for a call, and at most 20 ms; start, call, end. On the GPU that is named."""
    order = []
    device = MagicMock()
    entered = device.return_value.__enter__
    event = Mock(**{"elapsed_time.return_value": 2.0})  # milliseconds

    def record() -> None:
        assert entered.called and device.call_args.args == (torch.device("cuda:1"),)
        order.append("event")

    event.record.side_effect = record
    clean = Mock()
    clean.sum.side_effect = lambda: order.append("read")  # a write would leave dirty lines
    zeros = Mock(return_value=clean)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    properties = SimpleNamespace(total_memory=141 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch, "zeros", zeros)

    def run() -> None:
        order.append("call")
        clock.now += host

    measured, times = measure(run, 10**6, torch.device("cuda:1"), seconds=0)
    assert times == [2e-3] * 3
    assert measured.gbps == pytest.approx(0.5)
    of_a_read = ["read", "event", "read", "event"]
    once = [*["read"] * reads, "event", "call", "event"]
    assert order == [*of_a_read * 3, "call", *once * 3]
    zeros.assert_called_once_with(2**28, dtype=torch.float32, device="cuda")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_extra_bytes():
    tensor = torch.ones(2**24)  # 64 MiB
    runs = [lambda: tensor.sum(), lambda: tensor + 1, lambda: (tensor + 1).sum()]
    for run in runs:
        run()  # the first call of an operator also loads its code
    nothing, output, temporary = (peak_extra_bytes(run, CPU) for run in runs)
    # the system may join pages to huge ones of 2 MiB meanwhile
    assert nothing == pytest.approx(0, abs=2**22)
    assert output == pytest.approx(0, abs=2**22)
    assert temporary == pytest.approx(2**26, rel=0.1)


@pytest.mark.slow
def test_dry_run(tmp_path):
    """All lines of the day with a GPU, on the CPU; then the tables and the pictures of its rows."""
    output_of("bench/run.py", "--device", "cuda", "--dry-run", "--out", tmp_path)
    run = {"training_steps": []}
    for path in tmp_path.glob("*.json"):
        written = load(path)
        run["training_steps"] += written.pop("training_steps", [])
        run |= written
    assert not [row for section in bench.CASES for row in run.get(section, []) if "absent" in row]
    rows = run["operators"]
    assert {row["operation"] for row in rows} == operations.OPERATIONS.keys()
    assert {row["dtype"] for row in rows} == shapes.DTYPES.keys()
    names = {row["name"] for row in rows}
    assert {"torch, upsampled in bf16", "compiled torch", "compiled MONAI", "smp"} < names
    assert {"compiled index_add", "compiled scatter_add", "compiled one_hot bmm"} < names
    for row in rows:
        assert row["minimum"] <= row["q20"] <= row["median"] <= row["q80"]
        assert row["bytes"] > 0 and row["copy_share"] > 0
    assert len({row["network"] for row in run["training_steps"]}) == 5
    assert "torch.compile" in cost_tables.OF_A_MACHINE["training_steps"](run)
    assert cost_tables.cases(run).startswith("| operation |")
    plot.draw(tmp_path / "operators.json")
    assert (tmp_path / "operators.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_dry_run_of_training_steps_on_a_cpu(tmp_path):
    """The networks of `make bench`, which have the methods too."""
    path = tmp_path / "rows.json"
    output_of("bench/training_step.py", "--device", "cpu", "--dry-run", "--rows", path)
    rows = load(path)["training_steps"]
    methods = {row["name"].partition(",")[0] for row in rows}
    assert len({row["network"] for row in rows if row["late"]}) == 2  # as on a CPU
    assert methods.issuperset(networks.METHODS)


def test_plan_of_a_day():
    """The check first, then what users call most; each row is known before, and written once."""
    plan = bench.Plan(Path("rows.json"), "cuda").of_gpu()
    assert [item.section for item in plan[:2]] == ["verify", "operators"]
    assert "SegFormer" in plan[1].name and sum(item.limit for item in plan[:8]) < 60 * 15
    rows = [(item.section, *row.items()) for item in plan for row in item.rows]
    assert len(rows) == len({*rows}) > 500
    assert len({item.name for item in plan}) == len(plan)
    networks = {row["network"] for item in plan for row in item.rows if "network" in row}
    assert len(networks) == 5


def test_state_of_an_item(tmp_path, monkeypatch):
    """Rows of another commit are measured after those that are missing; what does not end well has
    rows that say why."""
    path, head = tmp_path / "rows.json", {"device": "a CPU", "torch": "2"}
    rows = [{"network": "a", "compiled": False, "name": name} for name in ("plain", "ours")]
    compiled = {"network": "a", "compiled": True, "name": "plain", "commit": "0"}
    item = bench.Item("a", "training_steps", ["false"], 60.0, rows)
    assert bench.state(item, load(path), "1") == bench.MISSING
    monkeypatch.setattr("record.commit", lambda: "1")
    save(path, "training_steps", head, [compiled, rows[0] | {"others": 0.3}])
    assert bench.state(item, load(path), "1") == bench.MISSING
    monkeypatch.setattr(bench, "head_of", lambda device: head)
    monkeypatch.setattr(bench, "commit", lambda: "1")
    assert bench.measure_missing([item], path, CPU, None) == ["a: exit 1"]
    other, first, second = load(path)["training_steps"]
    assert other == compiled
    assert first == rows[0] | {"others": 0.3, "commit": "1"}
    assert second == rows[1] | {"absent": "exit 1", "commit": "1"}
    assert bench.state(item, load(path), "1") == bench.DONE
    assert bench.state(item, load(path), "2") == bench.OLD
    assert bench.take_out_disturbed(path) == ["a, False, plain: disturbed"]
    assert load(path)["training_steps"] == [other, second]


def test_a_backend_that_is_not_there_is_not_missing_again(tmp_path, monkeypatch):
    path, head = tmp_path / "rows.json", {"device": "a GPU", "torch": "2"}
    monkeypatch.setattr(bench, "head_of", lambda device: head)
    row = {"case": "a", "name": "anchorops (cuda)"}
    item = bench.Item("a", "operators", ["true"], 60.0, [row])
    assert bench.measure_missing([item], path, CPU, None) == []
    assert load(path)["operators"][0]["absent"] == "cannot be measured here"
    assert bench.measure_missing([item._replace(command=["false"])], path, CPU, None) == []


def test_an_item_has_a_limit():
    slow = [sys.executable, "-c", "import time; time.sleep(60)"]
    assert bench.measure(slow, 0.2, threads=1) == "over the limit of 0 s"


@pytest.mark.parametrize("name", sorted(p.name for p in (ROOT / "bench/results").glob("*.json")))
def test_committed_rows(name):
    run = load(ROOT / "bench/results" / name)
    assert (run.get("device") or "counted" in name) and run["torch"]
    for section in (section for section in bench.CASES if section in run):
        assert all(row["commit"] for row in run[section])
    for row in run.get("operators", []):
        assert row["minimum"] <= row["median"] and row["rounds"] > 0


def test_committed_rows_are_those_of_the_cases():
    """A case has the name that its rows have, so that it is not measured as if it were missing."""
    for run, device in ((cost_tables.CPU, "cpu"), (cost_tables.GPU, "cuda")):
        known = {str(case) for case in listed.cases_on(device)}
        rows = {row["case"] for row in run["operators"]}
        assert rows <= known
    assert known - rows  # of the GPU


def test_figures_in_a_table_of_words(monkeypatch):
    """Each stands there as a whole, and in its place; the words are free."""
    monkeypatch.setitem(cost_tables.TABLES, "uses", lambda: ["5", "7%"])
    right = "<!-- rows: uses -->\n\n| 15 and 5 | 7% faster |\n\n<!-- end of rows -->"
    assert cost_tables.with_tables(right) == right
    for table, missing in (
        (right, []),
        (right.replace(" 5 ", " 15 "), ["5"]),
        (right.replace(" 5 ", " 5.5 "), ["5"]),
        (right.replace("7%", "8%"), ["7%"]),
    ):
        found = [f"table uses: {figure}" for figure in missing]
        assert list(cost_tables.missing_figures(table)) == found


def test_rows_of_another_machine_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("record.commit", lambda: "abc")
    path, head = tmp_path / "x/rows.json", {"device": "a CPU", "torch": "2"}
    rows = [{"case": name, "name": "ours"} for name in ("a", "b")]
    save(path, "operators", head, rows)
    save(path, "operators", head, [rows[0] | {"median": 1}])
    kept = [rows[1] | {"commit": "abc"}, rows[0] | {"median": 1, "commit": "abc"}]
    assert load(path) == head | {"operators": kept}
    with pytest.raises(ValueError, match="has rows of device a CPU, and this run is of a GPU"):
        save(path, "operators", head | {"device": "a GPU"}, [])
    assert load(path) == head | {"operators": kept}


def test_disturbed_machine_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(bench.OtherProcesses, "cores", lambda self: 1.5)
    monkeypatch.setattr(bench, "WATCH", 0)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of this process
    monkeypatch.setattr(sys, "argv", ["run.py", "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"other processes keep 1\.5 cores busy"):
        bench.main()


def test_wrong_results_are_not_timed(monkeypatch):
    """Those of ours and of torch's formulas. A library that is not there has a row that says so."""
    case = listed.Case("cross-entropy", listed.SEGFORMER, dtype="fp32")
    case = case._replace(shape=case.shape.on(CPU, tiny=True))
    timer = operator_times.Timer(case, CPU, True)
    ours = operator_times.Implementation("anchorops (reference)", ao.CrossEntropy(), "reference")
    absent = operations.smp("DiceLoss")._replace(package="no_such_package")
    library = operator_times.Implementation("smp", absent)
    first, second = timer.rows([ours, library])
    assert first["error"] < 1e-3
    assert second["absent"] == "ModuleNotFoundError: No module named 'no_such_package'"
    wrong = ours._replace(formula=ao.CrossEntropy(label_smoothing=0.5))
    with pytest.raises(
        operator_times.WrongResults, match=r"anchorops \(reference\): error 0\.[45]"
    ):
        timer.rows([wrong])


def test_a_process_of_its_own():
    """In which a case is measured on the CPU."""
    case = listed.OF_USERS[0]
    assert operator_times.in_own_process(os.getpid) != os.getpid()
    assert operator_times.in_own_process(str, case) == str(case)


def test_doctor_benchmark(capsys, monkeypatch):
    small = partial(_doctor_benchmark.benchmark, size=1 / 32, seconds=0)
    monkeypatch.setattr(doctor, "benchmark", small)
    fused = ao.backends()["cpu"] is None
    assert doctor.main(["--benchmark"]) == (0 if fused else 1)
    table = capsys.readouterr().out
    for case in catalogue.cases("bench"):
        call, _, kind = str(case).rpartition(", ")
        backend = "cpu" if fused and "cpu" in case.entry.backends else "reference"
        row = rf"^{backend} +{re.escape(call)} +{kind}(?: +[\d.?]+){{8}}"
        assert len(re.findall(row, table, re.M)) == 1, str(case)
    assert "WRONG" not in table
    monkeypatch.setattr(_doctor_benchmark, "_error", lambda ours, exact: 1.0)
    assert doctor.main(["--benchmark"]) == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.slow
def test_cases_by_pytest_benchmark():
    """Tiny, each call once."""
    options = ["-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    passed = re.search(r"(\d+) passed", output_of("-m", "pytest", *options, "bench"))
    cases = {(x.operation, x.shape) for x in listed.OF_USERS if not x.only}
    assert passed and int(passed[1]) >= 2 * len(cases)  # ours, and torch's formula


SHARP = [case for case in catalogue.cases("bench") if str(case).endswith(", sharp")]


@pytest.mark.parametrize("case", SHARP, ids=str)
def test_sharp_logits(case: catalogue.Case):
    """Most labels are those of the logits, and sharp neighbours at a border differ by over 18."""
    make, inputs = case.sample.make, case.sample.inputs()
    assert isinstance(make, batches.Logits)
    logits, labels = inputs["logits"], inputs["labels"]
    labels = labels[:, 0] if logits.shape[1] == 1 else labels
    assert labels.shape == (1, *(make.ratio * n for n in make.size[1:]))
    nearest = labels[(slice(None), *[slice(None, None, make.ratio)] * (labels.dim() - 1))]
    predicted = logits[:, 0] > 0 if logits.shape[1] == 1 else logits.argmax(1)
    assert 0.8 < (predicted == nearest).float().mean() < 1
    border = nearest[..., 1:] != nearest[..., :-1]
    steps = logits.diff(dim=-1).abs().amax(1)
    assert border.any() and steps[border].min() > 18 and steps[~border].max() < 4
    flat = make._replace(sharp=False)(1, torch.Generator().manual_seed(0))["logits"]
    assert flat.std().item() == pytest.approx(1, abs=0.05)


@pytest.mark.slow
def test_rows_of_export(tmp_path):
    """Rows of small volumes stand in one file with the other sections of the run."""
    out = tmp_path / "rows.json"
    save(out, "operators", head_of(CPU), [])
    output_of("bench/export.py", "--dry-run", "--rows", out)
    run = json.loads(out.read_text())
    assert run["operators"] == []
    ways = [row["name"] for row in run["export"] if row["dtype"] == "float16"]
    assert ways[:3] == ["anchorops", "torch", "SciPy"]
    assert all(row["differ"] < 1e-2 for row in run["export"])


@pytest.mark.slow
def test_rows_of_windows(tmp_path):
    out = tmp_path / "rows.json"
    output_of("bench/windows.py", "--dry-run", "--rows", out)
    for case in compared(json.loads(out.read_text())["windows"], "windows").values():
        assert [*case] == ["anchorops", "the formula", "MONAI"]
        assert not any(row["differ"] for row in case.values())


@pytest.mark.parametrize(
    "section", ["masks", pytest.param("masks_in_frameworks", marks=pytest.mark.slow)]
)
def test_rows_of_masks(section, monkeypatch):
    """Rows of small masks are right, and the tables can name the gain."""
    masks = importlib.import_module("masks")
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # of this process
    with torch.no_grad():
        rows = list(getattr(masks, section)(CPU, tiny=True))
    assert not any(row.get("differ") for row in rows)
    ways = compared(rows, *bench.CASES[section]).values()
    other = masks.BY_TORCH if section == "masks" else masks.THEIRS
    assert all(found.keys() == {masks.OURS, other} for found in ways)


def test_trained_logits():
    """Few errors, and neighbours of different classes differ by much."""
    labels = example_labels((2, 64, 64), 19, "coherent").clamp(min=0)
    logits = shapes.trained_logits(labels, 19, 4)
    assert logits.shape == (2, 19, 16, 16)
    assert (logits.argmax(1) == labels[:, ::4, ::4]).float().mean() > 0.6
    assert logits.diff(dim=-1).abs().amax() > 10


def test_counted_precision(monkeypatch):
    precision = importlib.import_module("counted_precision")
    monkeypatch.setattr(precision, "EXAMPLES", 1)
    assert max(row["worst"] for row in precision.rows()) < 1


def test_counted_launches(tmp_path: Path):
    """In a process of its own, which registers Triton's kernels for tensors of the CPU."""
    pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")
    path = tmp_path / "launches.json"
    output_of("bench/counted_launches.py", "--steps", "centroid InfoNCE", "--out", path)
    (row,) = load(path)["rows"]
    # two launches forward, one backward, the temperature, and the gradient's seed
    assert row["launches"] == 5 and row["ours"] == 3 and row["operators"] == {"fill_": 2}
