"""Whole passes of Triton's class moments, from machine code written by hand."""

import pytest

model = pytest.importorskip("time_model")
paths = pytest.importorskip("triton_paths")
shapes = pytest.importorskip("shapes")
sass = pytest.importorskip("sass")
line = sass.line

SHAPE = shapes.Shape(2, 128, 64, 128, 40)
LOAD = line("LDG.E.EF.128 R4, desc[UR8][R2.64]", 1, write=0)


def loop(*lines: str) -> str:
    again = line("@P0 BRA `(.L_x_0)", 5)
    return "".join([".L_x_0:\n", LOAD, line("BRA `(.L_x_1)"), ".L_x_1:\n", *lines, again])


def test_tiles_by_their_keys():
    ones, several = paths.tiles_of(SHAPE, "images")
    assert ones + sum(several.values()) == SHAPE.pixels // 128 and ones > 0 and set(several) == {1}
    # 128 pixels drawn from 40 classes have 33 to 40 of them
    assert paths.tiles_of(SHAPE, "random") == (0, {3: SHAPE.pixels // 128})


def test_more_keys_need_more_products():
    added = [line("FADD R4, R4, R4", 15)] * 20
    product = [line("HMMA.16816.F32.BF16 R4, R4, R8, R4"), *added, line("@P1 BRA `(.L_x_1)", 5)]
    programs = {
        "_one_key_kernel": paths.Program(loop(line("FADD R4, R4, R4", 4, wait=1)), 4, 4),
        "_several_keys_kernel": paths.Program(loop(*product), 4, 1),
    }
    images, random = (
        paths.forward_seconds(programs, SHAPE, kind, 2, True, sqdists=False)
        for kind in ("images", "random")
    )
    products = SHAPE.pixels // 128 * 2 / model.MULTIPROCESSORS * 300 / model.CLOCK  # three in turn
    assert random > products and random - images > products / 2
    with_anchors = paths.forward_seconds(programs, SHAPE, "images", 2, True, sqdists=True)
    assert with_anchors - images >= model.LAUNCH


def test_backward_tiles_take_their_branch():
    store = [line("STG.E.128 [R2.64], R4")] * 3 + [line("@P0 EXIT")]
    last = [line("STG.E.128 [R2.64], R4"), line("EXIT")]
    branch = line("@P1 BRA `(.L_x_5)", 5)
    gathers = [line("FADD R4, R4, R4", 15)] * 1000
    code = "".join([branch, *store, *last, ".L_x_5:\n", *gathers, *store, *last])
    program = paths.Program(code, 1, 1)
    images, random = (
        paths.backward_seconds(program, SHAPE, kind, 2, True) for kind in ("images", "random")
    )
    tiles = SHAPE.pixels // 128 * 2
    assert random - model.LAUNCH > tiles / model.MULTIPROCESSORS * 15_000 / model.CLOCK > images / 2
    assert images < random
