"""The ways of softmax moments through machine code written by hand."""

import pytest

model = pytest.importorskip("time_model")
paths = pytest.importorskip("softmax_paths")
sass = pytest.importorskip("sass")
line, path = sass.line, sass.path

FMA = line("FFMA R1, R1, R2, R3", 4)
END = line("EXIT", 5)


def opcodes(way) -> list[str]:
    return [x.opcode for x in way]


def loop(label: str, *lines: str) -> str:
    return "".join([f".L_x_{label}:\n", *lines, line(f"@P0 BRA `(.L_x_{label})", 5)])


def test_a_kernel_takes_its_waves():
    adds = path(*[FMA] * 100)
    whole = paths.Kernel(adds, 4, 2 * model.MULTIPROCESSORS, 1)
    assert paths.seconds(whole) == pytest.approx(800 / model.CLOCK + model.LAUNCH, rel=0.02)
    part = whole._replace(blocks=2 * model.MULTIPROCESSORS + 1)
    assert paths.seconds(part) == pytest.approx(1200 / model.CLOCK + model.LAUNCH, rel=0.02)
    bound = whole._replace(bytes=model.COPY_BANDWIDTH)
    assert paths.seconds(bound) == pytest.approx(1 + model.LAUNCH)


def test_blocks_begin_one_after_the_other():
    """Two blocks of which each waits for half of its time hide the other's waiting."""
    load = line("LDG.E.U16 R4, [R2.64]", 1, write=0)
    half = [load, line("FADD R4, R4, R4", 1, wait=1), *[FMA] * 175]
    one = paths.waiting(path(*half * 8))
    alone, both = paths.wave(one, 1, 1), paths.wave(one, 4, 2)
    assert alone == pytest.approx(8 * (model.MEMORY + 700), rel=0.01)
    assert both < 1.1 * alone and paths.wave(one, 4, 0) == 0


def test_loads_wait_for_where_they_come_from():
    loads = path(line("LDG.E.U16 R4, [R2.64]", 1, write=0), line("LDG.E R5, [R2.64]", 1, write=1))
    logit, other = paths.waiting(loads, lines=4)
    assert (logit.latency, logit.busy) == (model.MEMORY, 1)
    assert (other.latency, other.busy) == (model.L2, 4)


def test_triton_programs():
    """Forward: the loop over classes, not that over maxima, then the labels of the tile."""
    exponentials = [line("MUFU.EX2 R1, R1", 1)] * 5
    load, add = line("LDG.E.U16 R4, [R2.64]", 1, write=0), line("REDUX.SUM UR4, R4", 2)
    forward = line("MOV R1, RZ") + loop("0", load, *exponentials, FMA)
    forward += loop("1", load, add) + END
    found = opcodes(paths.forward_program(forward, num_classes=3, labels=2))
    assert [found.count(x) for x in ("MOV", "FFMA", "REDUX.SUM", "EXIT")] == [1, 3, 2, 0]
    backward = line("MOV R1, RZ") + loop("0", load, *exponentials, line("STG.E.U16 [R2.64], R4"))
    found = opcodes(paths.backward_program(backward + END, num_classes=7))
    assert [found.count(x) for x in ("MOV", "STG.E.U16")] == [1, 7]


def staging(classes: int) -> list[str]:
    """Of float16 first, which is converted by HADD2; then of bfloat16."""
    loads = [line("LDG.E.U16 R4, [R2.64]", 1, write=0)] * (3 * classes // 8)
    stores = [line("STS [R0], R4")] * (classes // 8)
    skip = line("@P1 BRA `(.L_x_9)", 5)
    rows = [*loads, skip, *stores, skip, *stores, skip, *stores, ".L_x_9:\n"]
    half = loop("1", *rows[: len(loads)], line("HADD2.F32 R4, R4, R4"), *rows[len(loads) : -1])
    edge = [line("LDG.E.U16 R4, [R2.64]", 1, write=0), line("STS [R0], R4")]
    return [
        line("@P4 BRA `(.L_x_2)", 5),
        half,
        loop("2", *rows),
        line("@P2 BRA `(.L_x_4)", 5),
        *edge,
        ".L_x_4:\n",
    ]


def test_losses_go_through_all_classes_and_labels():
    unrolled = [line("LDS R4, [R0]", 1, write=0)] * 8 + [line("MUFU.EX2 R1, R1", 1)] * 8
    labels = [line("LDG.E.64 R4, [R2.64]", 1, write=0)] * 16
    logits = [line("LDG.E.U16 R4, [R2.64]", 1, write=0)] * 4 + [line("@P1 BRA `(.L_x_8)", 5)]
    sums = [".L_x_8:\n", *[line("SHFL.BFLY R4, R4", 1)] * 10, line("REDUX.MIN UR4, R4", 1)]
    warps = [line("LDS R4, [R0]", 1, write=0)] * 8 + [line("@P1 BRA `(.L_x_{0})", 5), ".L_x_{0}:\n"]
    partial = [line("STG.E [R2.64], R4"), line("@P1 BRA `(.L_x_{1})", 5), ".L_x_{1}:\n"]
    parts = [x.format(a, b) for a, b in ((20, 21), (22, 23)) for x in (*warps, *partial)]
    again = line("@P3 BRA `(.L_x_3)", 5)
    sass = "".join([line("MOV R1, RZ"), ".L_x_3:\n", *staging(32), line("BAR.SYNC"),
                    loop("5", *unrolled), again, *labels, line("@P1 BRA `(.L_x_6)", 5), ".L_x_6:\n",
                    *[line("STG.E [R2.64], R4")] * 16, line("@P1 BRA `(.L_x_9)", 5), ".L_x_9:\n",
                    line("REDUX.MIN UR4, R4", 1), line("@P1 BRA `(.L_x_7)", 5),
                    loop("7", *logits, *sums), *parts, END])  # fmt: skip
    found = opcodes(paths.losses_path(paths.Code(sass), num_classes=70, labels=2))
    # 32 + 32 + 6 classes, two in each round of the loop
    assert found.count("MUFU.EX2") == 8 * 35 and found.count("BAR.SYNC") == 3
    assert found.count("LDG.E.U16") == 3 * (3 * 12 + 1) + 2 * 4 and found.count("HADD2.F32") == 0
    assert found.count("LDG.E.64") == 16 and found.count("STG.E") == 16 + 2
    assert found.count("SHFL.BFLY") == 2 * 10


def test_labels_of_a_tile():
    shape = paths.SHAPES["B8 K19 128×256 → 512×1024"]
    small, large = paths.labels_of_tile(shape, 4, 128), paths.labels_of_tile(shape, 64, 512)
    assert 1 <= small < large < 19
