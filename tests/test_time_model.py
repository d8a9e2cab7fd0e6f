"""The time model of bench/, on hand-written machine code."""

import numpy as np
import pytest

label_maps = pytest.importorskip("label_maps")
model = pytest.importorskip("time_model")
paths = pytest.importorskip("paths")
backward_paths = pytest.importorskip("backward_paths")
shapes = pytest.importorskip("shapes")
sorted_paths = pytest.importorskip("sorted_paths")
random_paths = pytest.importorskip("random_paths")
sass = pytest.importorskip("sass")
line, path = sass.line, sass.path

LOOP = "".join(
    [
        line("MOV R1, RZ", 2),
        ".L_x_0:\n",
        line("LDS.128 R4, [R0]", 2, write=1),
        line("@!P1 BRA `(.L_x_2)", 5),
        line("FADD R4, R4, R8", 4, wait=0b10),
        line("STS [R0], R4", 1, read=0),
        ".L_x_2:\n",
        line("@!P0 BRA `(.L_x_0)", 5),
        line("EXIT", 5),
    ]
)


def test_decode():
    (x,) = path(line("@P2 LDG.E.EF.128 R4, desc[UR8][R2.64]", 3, write=5, read=0, wait=0b100010))
    assert (x.opcode, x.stall, x.write, x.read, x.wait) == ("LDG.E.EF.128", 3, 5, 0, (1, 5))
    assert (x.bytes, x.latency, x.pipe, x.busy) == (512, model.MEMORY, "lsu", 4)
    (x,) = path(line("DEPBAR.LE SB0, 0x1", 1))
    assert x.pending == 1
    (x,) = path(line("LDG.E.CONSTANT R4, desc[UR8][R2.64]", 1, write=0))
    assert (x.bytes, x.latency) == (0, model.L1)
    (slow,) = model.cached([x], model.L2, lines=32)
    assert (slow.latency, slow.busy) == (model.L2, 32)


def test_blocks():
    blocks = model.blocks_of(LOOP)
    assert [len(block.instructions) for block in blocks] == [1, 2, 2, 1, 1, 0]
    assert [block.next for block in blocks[:5]] == [[1], [2, 3], [3], [4, 1], []]
    assert blocks[1].count("LDS") == 1 and blocks[2].count("STS") == 1


def test_walks_by_what_blocks_hold():
    blocks = model.blocks_of(LOOP)
    read, store = (lambda b: b.count("LDS") > 0), (lambda b: b.count("STS") > 0)
    names = [
        [x.opcode for x in model.walk(blocks, *stops)]
        for stops in ([read, read], [read, store, read])
    ]
    assert names[0] == ["LDS.128", "BRA", "BRA"]
    assert names[1] == ["LDS.128", "BRA", "FADD", "STS", "BRA"]
    assert [x.opcode for x in model.walk(blocks, [0], read)] == ["MOV"]
    with pytest.raises(LookupError, match="no path"):
        model.walk(blocks, [4], read)


def test_one_warp_waits():
    chain = path(line("FADD R1, R1, R2", 4), line("FADD R1, R1, R2", 4), line("FADD R1, R1, R2", 4))
    assert model.simulate([chain]) == 12
    load = path(line("LDS R1, [R0]", 2, write=0), line("FADD R1, R1, R2", 4, wait=1))
    assert model.simulate([load]) == 29 + 4
    apart = path(line("LDS R1, [R0]", 2, write=0), line("FADD R3, R3, R2", 4))
    assert model.simulate([apart]) == 6


def test_warps_share_schedulers_and_pipes():
    adds = path(*[line("FADD R1, R1, R2", 4)] * 25)
    assert [model.simulate([adds] * warps) for warps in (1, 4, 16)] == pytest.approx(
        [100] * 3, abs=4
    )
    assert model.simulate([adds] * 32) == pytest.approx(200, abs=4)
    integers = path(*[line("LOP3.LUT R1, R1, R2, RZ", 1)] * 25)  # a pipe of half the rate
    assert model.simulate([integers]) == pytest.approx(50, abs=2)
    loads = path(*[line("LDS.128 R4, [R0]", 1, write=0)] * 25)  # 4 cycles, of all schedulers
    assert model.simulate([loads] * 4) == pytest.approx(400, abs=4)


def test_memory_is_a_queue_with_a_latency():
    load = path(line("LDG.E.EF.128 R4, [R2.64]", 1, write=0), line("FADD R4, R4, R4", 1, wait=1))
    once = 512 / model.BYTES_PER_CYCLE
    assert model.simulate([load]) == pytest.approx(model.MEMORY + once + 1)
    assert model.simulate([load * 10] * 40) == pytest.approx(400 * once, rel=0.1)
    stores = path(*[line("STG.E.EF.128 [R2.64], R4", 1)] * 100)
    assert model.simulate([stores]) == pytest.approx(100 * once)


def test_copies_are_waited_for_in_groups():
    copy = [line("LDGSTS.E.BYPASS.128 [R7], [R4.64]"), line("LDGDEPBAR")]
    one, all_ = line("DEPBAR.LE SB0, 0x1"), line("DEPBAR.LE SB0, 0x0")
    once = 512 / model.BYTES_PER_CYCLE
    assert model.simulate([path(*copy, one)]) < model.MEMORY
    assert model.simulate([path(*copy, all_)]) == pytest.approx(model.MEMORY + once, abs=3)
    assert model.simulate([path(*copy, *copy, one)]) == pytest.approx(model.MEMORY + once, abs=3)
    assert model.simulate([path(*copy, *copy, all_)]) == pytest.approx(
        model.MEMORY + 2 * once, abs=3
    )


def test_warps_of_a_block_wait_at_barriers():
    add, barrier = line("FADD R1, R1, R2", 4), line("BAR.SYNC.DEFER_BLOCKING 0x0", 5)
    slow, fast = path(*[add] * 50, barrier, add), path(add, barrier, *[add] * 50)
    alone, together = (model.simulate([slow, fast], block) for block in (1, 2))
    assert alone == pytest.approx(240, abs=20) and together == pytest.approx(430, abs=20)
    apart = model.simulate([slow, slow, fast, fast], 2)  # two blocks
    assert apart == pytest.approx(alone, abs=30)


def test_steady_leaves_the_start_out():
    adds, load = path(line("FADD R1, R1, R2", 4)), path(line("LDC R1, c[0x0]", 15))
    assert model.steady(lambda warp, r: adds * (5 if r else 50), 3) == pytest.approx(20)
    assert model.steady(lambda warp, r: load if warp else adds, 2) == pytest.approx(15)


def test_label_maps():
    shape = 4, 128, 256, 19
    images, random = (label_maps.label_maps(kind, *shape) for kind in ("images", "random"))
    assert images.shape == random.shape == shape[:3]
    runs = [1 / (np.diff(maps, axis=-1) != 0).mean() for maps in (images, random)]
    assert 25 < runs[0] < 60 and runs[1] < 1.1
    assert all(len(np.unique(image)) > 5 for image in images)


def test_tiles_of_a_chunk():
    """For class_moments_kernel, which has 32 slots."""
    Pass, Uniform = label_maps.Pass, label_maps.Uniform
    keys = np.concatenate([np.full(64, -1), np.repeat([1, 2], 32), np.full(64, 2), np.arange(64)])
    many = (Pass(30, True, True, True), Pass(32, True, True))
    assert label_maps.tiles_of_chunk(keys, 64, False, True) == [
        (Pass(0),),
        (Pass(2),),
        (Pass(0),),
        many,
    ]
    assert label_maps.tiles_of_chunk(keys, 64, True, True) == [
        Uniform(True),
        (Pass(2),),
        Uniform(False),
        many,
    ]
    keys = np.repeat([1, 1, 1, 2, 2, 2, 1], 64)
    ends = [
        getattr(tile, "ends_run", None) for tile in label_maps.tiles_of_chunk(keys, 64, True, True)
    ]
    assert ends == [None, False, False, None, True, False, True]
    # keys 0, 2, …, 34, then two of them: of the lower half of the slots, of the upper, of both
    tiles = [
        np.arange(64) % 18 * 2,
        *(np.arange(64) % 2 * (b - a) + a for a, b in ((0, 4), (30, 34), (0, 34))),
    ]
    first, *rest = label_maps.tiles_of_chunk(np.concatenate(tiles), 64, True, True)
    assert first == (Pass(18, True, True),)
    assert rest == [(Pass(0, True, False),), (Pass(0, False, True),), (Pass(0, True, True),)]
    all_products = label_maps.tiles_of_chunk(np.concatenate(tiles), 64, True, False)
    assert all_products[1:] == [(Pass(0, True, True),)] * 3
    half = label_maps.tiles_of_chunk(np.arange(64) % 18, 64, True, True, 16)  # slots
    assert half == [(Pass(16, evicts=True), Pass(2))]


def test_bank_cycles():
    """Eight lanes read 16 bytes each in one cycle if their rows begin in different banks."""
    keys = np.arange(32)
    assert label_maps.bank_cycles(keys, 1, 5) == 4
    assert label_maps.bank_cycles(keys, 1, 2) == 8  # keys 0 and 4 have the same banks
    assert label_maps.bank_cycles(keys, 1, 8) == 32
    assert label_maps.bank_cycles(np.full(32, -1), 1, 8) == 4  # one row


def test_forward_plan():
    """The same arithmetic as in class_moments_plan.cuh: chunks that occupy a GPU once, or twice
    where partials are small. Of unaligned planes, each block has every eighth channel."""
    assert paths.forward_plan(shapes.HRNET, 2, 1) == (23, 68, 4096, 1)
    assert paths.forward_plan(shapes.HRNET, 4, 1) == (23, 204, 8192, 1)
    odd = shapes.UNALIGNED["HRNet, 129×129"]
    assert paths.forward_plan(odd, 2, 1) == (24, 66, 16 * 261, 8)
    assert paths.forward_plan(shapes.HRNET._replace(classes=1025), 2, 3) is None


def test_random_plan():
    """The same arithmetic as in class_moments_plan.cuh: one block for each multiprocessor."""
    assert random_paths.random_plan(shapes.SEGFORMER, 2) == (6, 22, 16)
    assert random_paths.random_plan(shapes.SEGFORMER, 4) == (6, 22, 32)
    small = shapes.SEGFORMER._replace(batch=1, height=64, width=64)
    assert random_paths.random_plan(small, 2) == (6, 1, 6)
    used = [
        random_paths.is_used(*case)
        for case in [
            (32, 1, 2, 6),
            (33, 1, 2, 6),
            (192, 1, 2, 7),
            (193, 1, 2, 7),
            (150, 2, 2, 1),
            (19, 1, 4, 1),
            (19, 1, 4, 3),
            (11, 1, 4, 3),
            (12, 1, 2, 7),
            (11, 1, 2, 7),
        ]
    ]
    assert used == [False, True, True, False, False, False, True, False, True, False]


def test_groups_of_sorted_pixels():
    """Other keys than that of the pixel before; a chunk begins with its own key."""
    keys = np.repeat([-1, 4, 5, 6], [40, 56, 2, 30])
    assert sorted_paths.groups_of(keys, 64, 64) == [[0, 1], [0, 2]]
    assert sorted_paths.groups_of(keys, 128, 128) == [[0, 1, 0, 2]]
    assert sorted_paths.groups_of(np.repeat([0, 1], 64), 64, 64) == [[0, 0], [0, 0]]


def test_lines_of_loads():
    raster, scattered = np.arange(1024), np.arange(1024).reshape(8, 128).T.flatten()
    assert label_maps.lines_of_loads(raster, 4) == 1
    assert label_maps.lines_of_loads(scattered, 4) == 8


def test_the_path_of_sorted_pixels():
    """A tile of two groups: one key, then three keys."""

    def branch(condition: str, label: str) -> str:
        return line(f"{condition}BRA `(.L_x_{label})", 5)

    added = [line("LDS.U16 R4, [R0]", 1)] * 32  # a group of pixels
    sass = [
        *[".L_x_0:\n", *[line("LDGSTS.E.BYPASS.128 [R7], [R4.64]")] * 8, branch("@P1 ", "5")],
        *[".L_x_5:\n", line("DEPBAR.LE SB0, 0x1"), branch("@P0 ", "1"), line("FLO.U32 R4, R4")],
        *[".L_x_1:\n", branch("@P1 ", "3"), *added, branch("", "9")],
        *[".L_x_3:\n", branch("@P1 ", "4"), *added, line("STG.E [R2], R4"), branch("", "9")],
        *[".L_x_4:\n", *added],
        *[".L_x_2:\n", line("SHFL.IDX R4, R4"), branch("@P0 ", "2")],
        *[".L_x_9:\n", branch("@P2 ", "1"), branch("@P3 ", "0"), line("EXIT", 5)],
    ]
    code = sorted_paths.Sorted(model.blocks_of("".join(sass)), rows=True)
    one, three = ([x.opcode for x in code.tile(groups, 2)] for groups in ([0, 0], [0, 2]))
    assert [one.count(x) for x in ("LDGSTS.E.BYPASS.128", "FLO.U32", "LDS.U16")] == [8, 0, 64]
    assert [three.count(x) for x in ("FLO.U32", "LDS.U16", "SHFL.IDX")] == [1, 64, 1]


def test_the_launches_of_a_sort():
    shape = shapes.SEGFORMER
    sums, both = (sorted_paths.other_seconds(shape, x, 256, 24) for x in (1, 3))
    assert 11 * model.LAUNCH < sums < 20 * model.LAUNCH
    assert both - sums == pytest.approx(2 * model.LAUNCH, rel=0.3)


def test_backward_plan():
    """The same arithmetic as in class_moments_backward.cu."""
    assert backward_paths.slices_of(shapes.SEGFORMER, 2, 3) == (22 * 22, 6, 9, 19, 6)
    odd = backward_paths.slices_of(shapes.UNALIGNED["HRNet, 129×129"], 2, 1)
    assert (odd.rounds, odd.steps, odd.row_vectors) == (4, 6, 7)
