"""The ways of operators on K rows through machine code written by hand, and the times of whole
steps that follow."""

import math

import pytest

model = pytest.importorskip("time_model")
paths = pytest.importorskip("row_paths")
metric_paths = pytest.importorskip("metric_paths")
step_times = pytest.importorskip("step_times")
cuda_report = pytest.importorskip("cuda_report")
sass = pytest.importorskip("sass")
line = sass.line

END = line("EXIT", 5)
LOAD, FLAG = line("LDG.E R4, [R2.64]", 1, write=0), line("LDG.E.U8 R4, [R2.64]", 1, write=0)
STORE, FMA = line("STG.E [R2.64], R4"), line("FFMA R1, R1, R2, R3", 1)


def loop(label: str, *lines: str) -> str:
    return "".join([f".L_x_{label}:\n", *lines, line(f"@P0 BRA `(.L_x_{label})", 5)])


def skipped(label: str, *lines: str) -> str:
    """A branch that jumps over the lines."""
    return "".join([line(f"@P1 BRA `(.L_x_{label})", 5), *lines, f".L_x_{label}:\n"])


def code(*lines: str):
    return paths.Code("".join(lines))


def count(path, opcode: str) -> int:
    return sum(x.opcode == opcode for x in path)


def test_lanes_load_eight_numbers_at_once():
    assert [paths.rounds(dim) for dim in (1, 256, 257, 720, 768)] == [1, 1, 2, 3, 3]


def test_a_row_of_logits_is_read_four_at_a_time():
    """150 classes: five numbers of a lane, in each of three loops."""
    loops = [loop(f"{i}0", LOAD) + loop(f"{i}1", LOAD * 4) for i in range(3)]
    path = paths.cross_entropy_path(code(line("MOV R1, RZ"), *loops, END), 150)
    assert count(path, "LDG.E") == 3 * 5


def test_the_average_is_stored_after_its_loads():
    stores = [skipped(f"{i}5", STORE * 2) for i in range(8)]
    body = code(
        line("MOV R1, RZ"),
        skipped("90", FLAG),
        loop("0", FLAG * 4),
        loop("1", FLAG),
        loop("2", LOAD * 8),
        loop("3", LOAD * 16, *stores),
        END,
    )
    path = paths.gated_average_path(body, classes=150, dim=720)
    assert [count(path, x) for x in ("LDG.E.U8", "LDG.E", "STG.E")] == [5, 24 * 3, 16 * 3]


@pytest.mark.parametrize("counts", [False, True])
def test_unit_rows(counts):
    """The code has the rows with counts first. Each row is added, then the sum is scaled."""

    def rows(label: str) -> str:
        loads = [skipped(f"{label}{i}1", LOAD * 2) for i in range(8)]
        stores = [skipped(f"{label}{i}2", FMA * 2, STORE) for i in range(8)]
        return "".join([*loads, *stores])

    of_count = line("LDG.E.64 R4, [R2.64]", 1, write=0)
    scaled = [skipped(f"9{i}", STORE * 2) for i in range(8)]
    body = code(
        line("MOV R1, RZ"),
        line("@P2 BRA `(.L_x_3)", 5),
        loop("1", of_count, skipped("40", ""), loop("2", rows("5"))),
        line("BRA `(.L_x_4)", 5),
        loop("3", rows("6")),
        ".L_x_4:\n",
        loop("7", LOAD * 8, *scaled),
        skipped("80", loop("8", of_count)),
        END,
    )
    path = paths.unit_rows_path(body, dim=768, groups=2, counts=counts)
    found = [count(path, x) for x in ("LDG.E", "FFMA", "STG.E", "LDG.E.64")]
    assert found == [2 * 48 + 24, 2 * 48, 2 * 24 + 48, 4 * counts]


def test_prototypes_are_added_group_by_group():
    mark = line("STS.U8 [R1], R4")
    body = code(
        line("MOV R1, RZ"),
        loop("0", mark, skipped("1", "")),
        loop("2", line("IMAD R1, R1, R2, R3", 2)),
        mark,
        line("@P1 BRA `(.L_x_4)", 5),
        ".L_x_4:\n",
        loop("3", loop("5", LOAD * 8, line("LDS.U8 R4, [R1]")), FMA * 32, STORE * 8),
        loop("6", LOAD * 8, STORE * 8),
        loop("7", loop("8", LOAD * 8, STORE * 8)),
        END,
    )
    path = paths.prototype_halves_path(body, dim=512, groups=4)
    found = [count(path, x) for x in ("LDG.E", "FFMA", "STG.E")]
    assert found == [8 * 2 * (4 + 1 + 4), 64, 8 * 2 * (1 + 1 + 4)]


def test_confusion_reads_sixteen_pixels():
    wide = line("LDG.E.64 R4, [R2.64]", 1, write=0)
    row = loop("6", line("IADD3 R1, R1, R1, R1", 2))  # a pixel may be in the next row

    def rounds(mark: str, label: str) -> str:
        return loop(mark, *[skipped(f"{mark}{i}", row) + label + wide for i in range(4)])

    sums = loop("9", line("SHFL.BFLY R4, R4", 2) * 5)
    ends = line("SHFL.UP R4, R4", 2)
    narrow = skipped("7", rounds("4", LOAD))
    body = code(line("MOV R1, RZ"), narrow, rounds("8", wide), ends, skipped("5", ""), sums, END)
    path = metric_paths.confusion_path(body)
    found = [count(path, x) for x in ("LDG.E", "IADD3", "LDG.E.64", "SHFL.BFLY")]
    assert found == [0, 0, 32, 5 * metric_paths.HEADS]


def test_kernels_without_a_path_are_noticed():
    kernel = cuda_report.Kernel("sm_90", "next_seed_kernel", 32, 0, 0, [], END)
    names = ["next_seed_kernel", "new_kernel<float>", "new_kernel<int>", "join_chunks_kernel"]
    library = cuda_report.Library([kernel._replace(name=name) for name in names])
    assert len(library["next_seed_kernel"]) == 2
    assert library.faults() == ["new_kernel: no path predicts its time"]
    library.used |= {"new_kernel", "join_chunks_kernel"}
    assert library.faults() == ["join_chunks_kernel: in WITHOUT_PATH, but it has a path"]


def test_exceptions_are_kernels():
    """Each name in WITHOUT_PATH is that of a kernel in the sources."""
    sources = cuda_report.LIBRARY.parents[1] / "csrc" / "cuda"
    text = "".join(file.read_text() for file in sources.iterdir())
    assert all(f" {name}(" in text for name in cuda_report.WITHOUT_PATH)


def test_arguments_of_a_step():
    """Each call of a method has a prediction: of ATen's operators, one launch."""
    shares = dict.fromkeys(
        [
            ("class_moments_kernel<BFloat16, 1, false, false>", "HRNet, 2 groups, images"),
            (
                "class_moments_backward_planes_kernel<BFloat16, true, false, true>",
                "HRNet, 2 groups, images",
            ),
        ],
        0.9,
    )
    step = step_times.Step({}, shares, "HRNet")
    once = 2 * step.shape.pixels * step.shape.dim / model.COPY_BANDWIDTH / 0.9
    calls = step_times.launches.count(step_times.launches.METHODS["OCCL"], step.shape, "cuda").calls
    moments = [step.times(*call) for call in calls if call[0].startswith("class_moments")]
    (((_, forward),), ((_, backward),)) = moments
    assert math.isclose(forward, once + model.LAUNCH) and math.isclose(backward, once)
    given = [step_times.arguments(*call) for call in calls if call[0].startswith("unit_rows")]
    views, rows = {"groups": 2, "counts": True}, {"groups": 1, "counts": False}
    assert given[:2] == [views | {"centroids": True}, rows | {"centroids": False}]
    assert given[2:] == [rows | {"means": False}, views | {"means": False}]
    assert step.times("aten.add", ()) == [("aten.add", model.LAUNCH)]
