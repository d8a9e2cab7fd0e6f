"""The ways of the operators of keys and centroids through machine code written by hand."""

import pytest

model = pytest.importorskip("time_model")
paths = pytest.importorskip("small_paths")
sass = pytest.importorskip("sass")
line = sass.line

END = line("EXIT", 5)
MASK = line("LDG.E.U8 R4, [R2.64]", 1, write=0)


def loop(label: str, *lines: str) -> str:
    return "".join([f".L_x_{label}:\n", *lines, line(f"@P0 BRA `(.L_x_{label})", 5)])


def skipped(label: str, *lines: str) -> str:
    """A branch that jumps over the lines."""
    return "".join([line(f"@P1 BRA `(.L_x_{label})", 5), *lines, f".L_x_{label}:\n"])


def code(*lines: str):
    return paths.Code("".join(lines))


SORT = skipped("5", loop("4", line("LDS R4, [R2]")), line("STS [R2], R4") * 2)


def count(path, opcode: str) -> int:
    return sum(x.opcode == opcode for x in path)


def resident(threads: int, shared: int) -> int:
    return 2


def test_a_kernel_that_waits_starts_early():
    add, wait, permit = line("FADD R1, R1, R2", 4), line("ACQBULK"), line("PREEXIT")
    library = {
        "first": (permit + add + END, resident),
        "second": (wait + add + END, resident),
        "third": (wait + add + END, resident),
    }
    launches = paths.Launches(library)
    for name in library:
        launches.add(name, sass.path(add), 1)
    first, second, third = (time for _, time in launches.times)
    assert first == pytest.approx(third)  # the second kernel does not permit it
    assert first - second == pytest.approx(model.LAUNCH - model.EARLY_LAUNCH)


def test_keys_of_resized_labels():
    scale, load = line("I2F R1, R1", 2), line("LDG.E.64 R4, [R2.64]", 1, write=0)
    pixel = [skipped(f"{i}1", scale, skipped(f"{i}0", scale), load) for i in range(3)]
    last = skipped("9", scale, scale, load)
    bins = [skipped(f"{i}5", line("ATOMS.POPC.INC.32 RZ, [R1]")) for i in range(4)]
    store = line("STG.E [R2.64], R4")
    path = paths.resized_keys_path(code(line("MOV R1, RZ"), *pixel, last, store * 4, *bins, END))
    found = [count(path, x) for x in ("I2F", "LDG.E.64", "STG.E", "ATOMS.POPC.INC.32")]
    assert found == [8, 4, 4, 4]


def test_a_bucket_is_read_once():
    next_of = loop("0", line("LDG.E R4, [R2.64]", 1, write=0))
    totals = loop("1", *[line("LDG.E R4, [R2.64]", 1, write=0)] * 4)
    held = [line("LDG.E R4, [R2.64]", 1, write=0)] * 8
    written = [skipped(f"{i}2", line("STG.E [R2.64], R4")) for i in range(3)]
    last = skipped("7", line("STG.E [R2.64], R4"), END)
    path = paths.rank_path(
        code(line("MOV R1, RZ"), next_of, totals, skipped("6", *held), *written, last, END), 4
    )
    assert count(path, "LDG.E") == 4 + 4 + 8 and count(path, "STG.E") == 4
    assert paths.largest_bucket() == 4


def test_a_step_of_a_product_loads_and_converts_its_operands():
    """Four requests, of which the second half is skipped if elements have two bytes; and four
    conversions, each after the zeros of absent rows."""
    wide = line("LDG.E.128 R4, [R2.64]", 1, write=0)
    requests = [skipped(f"{i}3", wide, skipped(f"{i}4", wide)) for i in range(4)]
    half, joined = line("HADD2.F32 R1, -RZ, R2.H0_H0", 1), line("SEL R1, R1, RZ, P3", 1)
    converted = [skipped(f"{i}6", skipped(f"{i}7", half), joined) for i in range(4)]
    multiply = line("HMMA.16816.F32.BF16 R1, R2, R3, R1", 1)
    body = code(
        line("MOV R1, RZ"),
        loop("0", *requests, *converted, multiply * 48),
        skipped("9", joined),
        END,
    )
    path = paths.Products(body, 48, groups=2).path(3)
    found = [count(path, x) for x in ("LDG.E.128", "HADD2.F32", "SEL", "HMMA.16816.F32.BF16")]
    assert found == [8 * 3, 0, 4 * 3, 48 * 3]


def test_terms_are_divided_among_warps():
    assert paths.steps_of_warps(342, 8) == [3, 3, 3, 3, 3, 3, 2, 2]
    assert paths.steps_of_warps(171, 4) == [3, 3, 3, 2] * 2


def test_masks_are_cached_after_the_first_step():
    mask, other = sass.path(MASK), sass.path(line("LDG.E R4, [R2.64]", 1, write=0))
    latencies = [x.latency for x in paths.from_caches(mask + other + mask + other)]
    assert latencies == [model.L2, model.L2, model.L1, model.L2]


def test_keys_of_a_tile():
    keys = [paths.keys_of_tile(shape) for shape in (paths.HRNET, paths.SEGFORMER)]
    assert 1 < keys[0] <= keys[1] < 6


def test_upsampled_sums_of_a_tile():
    """Forward: features, a row of labels for each of a pixel's four threads in turn, weights of the
    four added, the keys sorted, keys; and the same again for the next tile."""
    feature, label = line("LDG.E.EF.128 R4, [R2.64]", 1, write=0), line("LDG.E.U8 R4, [R2.64]")
    rows = loop("1", label * 8)
    added = loop("2", line("LDS R4, [R2]") * 4, line("STS [R2], R4"))
    keys = loop("3", line("LDS.128 R4, [R2]") * 2, line("FFMA R1, R1, R2, R3", 1) * 32)
    tile = loop("0", feature * 4, line("@P1 BRA `(.L_x_1)", 5), rows, added, SORT, keys)
    path = paths.upsampled_path(code(line("MOV R1, RZ"), tile, END), tiles=3, keys=5)
    opcodes = ("LDG.E.EF.128", "LDG.E.U8", "STS", "FFMA")
    each = [4, 8 * 2 * paths.RATIO // 4, 4, 32 * 5]  # STS: two of five slots at most, and the sort
    assert [count(path, x) for x in opcodes] == [3 * n for n in each]


def test_gradient_of_upsampled_sums():
    """The weights are computed once for all channels, which two passes write."""
    feature, label = line("LDG.E.EF.128 R4, [R2.64]", 1, write=0), line("LDG.E.U8 R4, [R2.64]")
    weights = skipped(
        "7",
        loop("1", label * 8),
        loop("2", line("LDS R4, [R2]") * 2, line("STS [R2], R4")),
        SORT,
    )
    keys = loop("3", line("LDS.128 R4, [R2]") * 2, line("FFMA R1, R1, R2, R3", 1) * 32)
    store = line("STG.E.EF.128 [R2.64], R4")
    part = loop("0", feature * 4, weights, keys, *[skipped(f"{i}8", store) for i in range(4)])
    path = paths.upsampled_backward_path(code(line("MOV R1, RZ"), part, END), keys=3)
    opcodes = ("LDG.E.EF.128", "LDG.E.U8", "STS", "FFMA", "STG.E.EF.128")
    assert [count(path, x) for x in opcodes] == [8, 8 * 2 * paths.RATIO // 2, 4, 2 * 32 * 3, 8]
