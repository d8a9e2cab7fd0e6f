"""The PTX machine's own arithmetic, by kernels of a few lines, against the definitions of the PTX
manual: integers exactly, floats against float64. Needs neither Triton nor nvcc."""

import math

import numpy as np
import pytest
from ptx.text import Unsupported

from tests.helpers.ptx_kernels import launch


def compute(instruction: str, *arguments: np.ndarray, dtype: str) -> np.ndarray:
    """`instruction` with {to}, {0}, {1} … of one number for each of 32 lanes."""
    names = {"2": "h", "4": "r", "8": "d"}
    loads = ["mov.u64 %d2, %d0;"]
    registers = []
    data = np.stack([np.resize(x, 32).view(f"u{x.itemsize}").astype(np.uint64) for x in arguments])
    for k, x in enumerate(arguments):
        bits, name = 8 * x.itemsize, f"%{names[str(x.itemsize)]}{k + 4}"
        loads.append(f"mad.wide.u32 %d3, %r0, 8, %d2; ld.global.b{bits} {name}, [%d3+{256 * k}];")
        registers.append(name)
    size = np.dtype(dtype).itemsize
    to = f"%{names[str(size)]}8" if size != 4 else "%r20"
    body = "\n".join(loads) + "\n" + instruction.format(*registers, to=to)
    body += f"\nmad.wide.u32 %d3, %r0, {size}, %d1; st.global.b{8 * size} [%d3], {to};"
    return launch(body, data, np.zeros(32, dtype))


RANDOM = np.random.default_rng(0)


def integers(dtype: str) -> np.ndarray:
    info = np.iinfo(dtype)
    edges = [info.min, info.min + 1, 0, 1, 2, 3, info.max - 1, info.max, 255, 256, info.max // 3]
    edges = [x for x in edges if info.min <= x <= info.max]
    some = RANDOM.integers(info.min, info.max, 32 - len(edges), dtype=dtype, endpoint=True)
    return RANDOM.permutation(np.concatenate([np.array(edges, dtype), some]))


def wrapped(x: int, bits: int, signed: bool) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if signed and x >> (bits - 1) else x


INTEGERS = {
    "add": lambda x, y, bits: x + y,
    "sub": lambda x, y, bits: x - y,
    "mul.lo": lambda x, y, bits: x * y,
    "mul.hi": lambda x, y, bits: x * y >> bits,
    "min": lambda x, y, bits: min(x, y),
    "max": lambda x, y, bits: max(x, y),
    "div": lambda x, y, bits: int(math.copysign(1, x) * math.copysign(1, y)) * (abs(x) // abs(y)),
    "rem": lambda x, y, bits: int(math.copysign(1, x)) * (abs(x) % abs(y)),
}


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32", "s64", "u64"])
@pytest.mark.parametrize("name", INTEGERS)
def test_integers(name: str, ty: str):
    bits, signed = int(ty[1:]), ty[0] == "s"
    if name == "mul.hi" and bits == 64:
        pytest.skip("no kernel has it")
    dtype = f"{'i' if signed else 'u'}{bits // 8}"
    x, y = integers(dtype), integers(dtype)
    if name in ("div", "rem"):
        y = np.where(y == 0, y.dtype.type(7), y)
    result = compute(f"{name}.{ty} {{to}}, {{0}}, {{1}};", x, y, dtype=dtype)
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    exact = [wrapped(INTEGERS[name](a, b, bits), bits, signed) for a, b in pairs]
    assert result.tolist() == exact


@pytest.mark.parametrize("ty", ["s16x2", "u16x2"])
def test_sums_of_halves(ty: str):
    x, y = integers("u4"), integers("u4")
    result = compute(f"add.{ty} {{to}}, {{0}}, {{1}};", x, y, dtype="u4")
    assert result.view("u2").tolist() == (x.view("u2") + y.view("u2")).tolist()


@pytest.mark.parametrize("ty", ["s16", "u16", "s32", "u32"])
def test_wide_products(ty: str):
    kind, size = ("i" if ty[0] == "s" else "u"), int(ty[1:]) // 8
    x, y, z = integers(f"{kind}{size}"), integers(f"{kind}{size}"), integers(f"{kind}{2 * size}")
    bits, signed = 16 * size, kind == "i"
    product = compute(f"mul.wide.{ty} {{to}}, {{0}}, {{1}};", x, y, dtype=f"{kind}{2 * size}")
    total = compute(
        f"mad.wide.{ty} {{to}}, {{0}}, {{1}}, {{2}};", x, y, z, dtype=f"{kind}{2 * size}"
    )
    numbers = list(zip(x.tolist(), y.tolist(), z.tolist(), strict=True))
    assert product.tolist() == [a * b for a, b, _ in numbers]
    assert total.tolist() == [wrapped(a * b + c, bits, signed) for a, b, c in numbers]


@pytest.mark.parametrize("ty", ["s16", "b16", "s32", "u32", "b32", "s64", "u64", "b64"])
def test_shifts(ty: str):
    bits, signed = int(ty[1:]), ty[0] == "s"
    x = integers(f"{'i' if signed else 'u'}{bits // 8}")
    by = np.resize(np.array([0, 1, 5, 31, 32, 63, 64, 200, 2**31], "u4"), 32)
    left = compute(f"shl.b{bits} {{to}}, {{0}}, {{1}};", x, by, dtype=x.dtype.str[1:])
    right = compute(f"shr.{ty} {{to}}, {{0}}, {{1}};", x, by, dtype=x.dtype.str[1:])
    pairs = list(zip(x.tolist(), by.tolist(), strict=True))
    assert left.tolist() == [wrapped(a << min(b, bits), bits, signed) for a, b in pairs]
    assert right.tolist() == [a >> min(b, bits) for a, b in pairs]


def test_bits():
    """Fields, counts, permutations and tables of bits."""
    x, y = integers("u4"), integers("u4")
    at, n = RANDOM.integers(0, 32, 32).astype("u4"), RANDOM.integers(0, 40, 32).astype("u4")
    a, b, p, k = (v.tolist() for v in (x, y, at, n))

    def field(value: int, position: int, length: int, signed: bool) -> int:
        top = min(position + length - 1, 31)
        sign = (value >> top & 1) if signed and length else 0
        read = [value >> (position + j) & 1 if position + j <= 31 else sign for j in range(32)]
        return sum((read[j] if j < length else sign) << j for j in range(32))

    for signed in (False, True):
        ty = "s32" if signed else "u32"
        result = compute(f"bfe.{ty} {{to}}, {{0}}, {{1}}, {{2}};", x, at, n, dtype="u4")
        assert result.tolist() == [field(v, i, j, signed) for v, i, j in zip(a, p, k, strict=True)]
    for name, exact in (
        ("popc.b32", lambda v: v.bit_count()),
        ("brev.b32", lambda v: int(f"{v:032b}"[::-1], 2)),
        ("bfind.u32", lambda v: v.bit_length() - 1 & 0xFFFFFFFF),
        ("bfind.shiftamt.u32", lambda v: 32 - v.bit_length() if v else 0xFFFFFFFF),
        ("not.b32", lambda v: ~v & 0xFFFFFFFF),
    ):
        assert compute(f"{name} {{to}}, {{0}};", x, dtype="u4").tolist() == [exact(v) for v in a], (
            name
        )
    selector = RANDOM.integers(0, 1 << 16, 32).astype("u4")
    result = compute("prmt.b32 {to}, {0}, {1}, {2};", x, y, selector, dtype="u4")
    for u, v, s, got in zip(a, b, selector.tolist(), result.tolist(), strict=True):
        octets = list((u | v << 32).to_bytes(8, "little"))
        chosen = [s >> 4 * j & 15 for j in range(4)]
        exact = [(255 * (octets[q & 7] >> 7)) if q & 8 else octets[q] for q in chosen]
        assert got == int.from_bytes(bytes(exact), "little")


SPECIAL = [0.0, -0.0, 1.0, -1.5, 2.5, 3.4e38, -3.4e38, 1e-40, -1e-40, np.inf, -np.inf, np.nan]


def floats(scale: float = 1.0) -> np.ndarray:
    some = scale * RANDOM.standard_normal(32 - len(SPECIAL))
    return RANDOM.permutation(np.concatenate([SPECIAL, some])).astype("f4")


def test_floats():
    x, y, z = floats(), floats(), floats()
    a, b, c = (v.astype("f8") for v in (x, y, z))
    with np.errstate(all="ignore"):
        exact = {
            "add.f32 {to}, {0}, {1};": a + b,
            "sub.rn.f32 {to}, {0}, {1};": a - b,
            "mul.f32 {to}, {0}, {1};": a * b,
            "fma.rn.f32 {to}, {0}, {1}, {2};": a * b + c,
            "div.rn.f32 {to}, {0}, {1};": a / b,
            "min.f32 {to}, {0}, {1};": np.fmin(a, b),
            "max.NaN.f32 {to}, {0}, {1};": np.maximum(a, b),
            "neg.f32 {to}, {0};": -a,
            "abs.f32 {to}, {0};": abs(a),
            "cvt.rni.f32.f32 {to}, {0};": np.rint(a),
        }
        exact = {text: values.astype("f4") for text, values in exact.items()}
    for text, values in exact.items():
        result = compute(text, x, y, z, dtype="f4")
        np.testing.assert_array_equal(result, values, err_msg=text)
    result = compute("ex2.approx.f32 {to}, {0};", abs(x), dtype="f4")
    with np.errstate(all="ignore"):
        np.testing.assert_allclose(result, np.exp2(abs(a)).astype("f4"), rtol=4e-7)
    small = np.array([1e-40, -1e-40, 2.0, -3.0], "f4")
    result = compute("mul.ftz.f32 {to}, {0}, {1};", small, np.ones(4, "f4"), dtype="f4")
    assert result[:4].tolist() == [0, 0, 2, -3] and np.signbit(result[:4]).tolist() == [0, 1, 0, 1]


def test_conversions():
    x = np.array([0.4, 0.5, 1.5, 2.5, -0.5, -1.5, -2.7, 3e9, -3e9, np.nan, np.inf, -np.inf], "f4")
    for mode, function in (
        ("rzi", np.trunc),
        ("rni", np.rint),
        ("rmi", np.floor),
        ("rpi", np.ceil),
    ):
        result = compute(f"cvt.{mode}.s32.f32 {{to}}, {{0}};", x, dtype="i4")[: len(x)]
        exact = np.clip(np.nan_to_num(function(x.astype("f8")), nan=0), -(2.0**31), 2.0**31 - 1)
        assert result.tolist() == exact.tolist()
    wide = compute("cvt.rzi.s64.f32 {to}, {0};", x, dtype="i8")[: len(x)]
    assert wide[7:].tolist() == [3_000_000_000, -3_000_000_000, -(2**63), 2**63 - 1, -(2**63)]
    nan = np.array([np.nan])
    assert compute("cvt.rzi.u32.f64 {to}, {0};", nan, dtype="u4")[0] == 1 << 31
    assert compute("cvt.rzi.u64.f32 {to}, {0};", nan.astype("f4"), dtype="u8")[0] == 1 << 63
    y = integers("i4")
    assert compute("cvt.s64.s32 {to}, {0};", y, dtype="i8").tolist() == y.tolist()
    assert compute("cvt.u64.u32 {to}, {0};", y, dtype="u8").tolist() == y.view("u4").tolist()
    assert compute("cvt.s32.s8 {to}, {0};", y, dtype="i4").tolist() == y.astype("i1").tolist()
    assert compute("cvt.rn.f32.s32 {to}, {0};", y, dtype="f4").tolist() == y.astype("f4").tolist()
    z = floats()
    bits = z.view("u4").astype("u8")
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("u2")
    result = compute("cvt.rn.bf16.f32 {to}, {0};", z, dtype="u2")
    assert np.where(np.isnan(z), 0x7FFF, rounded).tolist() == result.tolist()
    with np.errstate(over="ignore"):
        half = np.where(np.isnan(z), np.uint16(0x7FFF), z.astype("f2").view("u2"))
    assert compute("cvt.rn.f16.f32 {to}, {0};", z, dtype="u2").tolist() == half.tolist()
    pair = compute("cvt.rn.f16x2.f32 {to}, {0}, {1};", z, np.ones(32, "f4"), dtype="u4")
    assert pair.tolist() == (half.astype("u4") << 16 | 0x3C00).tolist()
    pair = compute("cvt.rn.bf16x2.f32 {to}, {0}, {1};", np.ones(32, "f4"), z, dtype="u4")
    assert pair.tolist() == (0x3F800000 | result.astype("u4")).tolist()
    pairs = integers("u4")
    swapped = compute("mov.b32 {{%h1, %h2}}, {0}; mov.b32 {to}, {{%h2, %h1}};", pairs, dtype="u4")
    assert swapped.tolist() == (pairs >> 16 | pairs << 16).tolist()


def test_zeros_and_bits_of_nan():
    """−0 is less than 0, a number goes before NaN; what only copies keeps the bits of NaN."""
    zero, negative = np.zeros(32, "f4"), -np.zeros(32, "f4")
    for x, y in ((zero, negative), (negative, zero)):
        assert np.signbit(compute("min.f32 {to}, {0}, {1};", x, y, dtype="f4")).all()
        assert not np.signbit(compute("max.NaN.f32 {to}, {0}, {1};", x, y, dtype="f4")).any()
    for ty, one, less, not_a_number in (
        ("bf16", 0x3F80, 0xBF80, 0x7FC0),
        ("f16", 0x3C00, 0xBC00, 0x7E00),
    ):
        ones = np.full(32, one, "u2")
        for name, bits, result in (
            ("max", less, one),
            ("min", less, less),
            ("max", not_a_number, one),
        ):
            text, other = f"{name}.{ty} {{to}}, {{0}}, {{1}};", np.full(32, bits, "u2")
            assert (compute(text, ones, other, dtype="u2") == result).all()
    nan = np.full(32, 0xFFC00001, "u4")
    text = "setp.eq.u32 %p1, %r0, %r0; selp.f32 {to}, {0}, {0}, %p1;"
    assert compute(text, nan, dtype="u4").tolist() == nan.tolist()
    body = "ld.global.f32 %f1, [%d0]; st.global.f32 [%d1], %f1;"
    assert launch(body, nan, np.zeros(1, "u4"))[0] == nan[0]


COMPARISONS = {
    "eq": lambda x, y: x == y,
    "ne": lambda x, y: x != y and x == x and y == y,
    "lt": lambda x, y: x < y,
    "ge": lambda x, y: x >= y,
    "neu": lambda x, y: x != y,
    "equ": lambda x, y: not (x < y or x > y),
    "ltu": lambda x, y: not x >= y,
    "leu": lambda x, y: not x > y,
    "gtu": lambda x, y: not x <= y,
    "geu": lambda x, y: not x < y,
    "num": lambda x, y: x == x and y == y,
    "nan": lambda x, y: x != x or y != y,
}


@pytest.mark.parametrize("ty", ["f32", "bf16"])
@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons(name: str, ty: str):
    x, y = (
        np.repeat(np.array([0.0, 1.0, np.nan, -np.inf], "f4"), 4),
        np.tile(np.array([0.0, 2.0, np.nan, 1.0], "f4"), 4),
    )
    text = f"setp.{name}.{ty} %p1, {{0}}, {{1}}; selp.b32 {{to}}, 1, 0, %p1;"
    stored = [n if ty == "f32" else (n.view("u4") >> 16).astype("u2") for n in (x, y)]
    result = compute(text, *stored, dtype="u4")[:16]
    pairs = zip(x.tolist(), y.tolist(), strict=True)
    assert result.tolist() == [COMPARISONS[name](a, b) for a, b in pairs]


def test_relu_of_integers():
    x = integers("i4")
    result = compute("min.relu.s32 {to}, {0}, 10;", x, dtype="i4")
    assert result.tolist() == [max(min(v, 10), 0) for v in x.tolist()]


def test_warps():
    x = integers("u4")
    lanes = np.arange(32)
    for mode, by, source in (
        ("bfly", 5, lanes ^ 5),
        ("up", 3, np.where(lanes >= 3, lanes - 3, lanes)),
        ("idx", 7, np.full(32, 7)),
    ):
        clamp = 0 if mode == "up" else 31
        result = compute(f"shfl.sync.{mode}.b32 {{to}}, {{0}}, {by}, {clamp}, -1;", x, dtype="u4")
        assert result.tolist() == x[source].tolist(), mode
    segments = compute("shfl.sync.idx.b32 {to}, {0}, 1, 0x181f, -1;", x, dtype="u4")  # of 8 lanes
    assert segments.tolist() == x[lanes // 8 * 8 + 1].tolist()
    y = x.view("i4")
    assert set(compute("redux.sync.min.s32 {to}, {0}, -1;", y, dtype="i4")) == {y.min()}
    assert set(compute("redux.sync.add.s32 {to}, {0}, -1;", y, dtype="i4")) == {y.sum(dtype="i4")}
    odd = "and.b32 %r30, {0}, 1; setp.eq.u32 %p1, %r30, 1; vote.sync.ballot.b32 {to}, %p1, -1;"
    assert set(compute(odd, x, dtype="u4").tolist()) == {
        sum(int(v & 1) << k for k, v in enumerate(x))
    }
    text = "setp.eq.u32 %p1, %r0, 5; vote.sync.any.pred %p2, %p1, -1; selp.b32 {to}, 1, 0, %p2;"
    assert (compute(text, x, dtype="u4") == 1).all()
    text = "elect.sync _|%p1, -1; selp.b32 {to}, 1, 0, %p1;"
    assert compute(text, x, dtype="u4").tolist() == [1, *[0] * 31]


def test_loops_and_divergence():
    """Each thread adds 1 as often as its number says."""
    body = """
    mov.u32 %r4, 0;
    $loop: setp.ge.u32 %p1, %r4, %r3; @%p1 bra $end; add.u32 %r4, %r4, 1; bra $loop;
    $end: mad.wide.u32 %d2, %r3, 4, %d1; st.global.b32 [%d2], %r4;
    """
    result = launch(body, np.zeros(1, "u4"), np.zeros(128, "u4"), blocks=2, threads=64)
    assert result.tolist() == list(range(128))


def test_atomics():
    body = """
    atom.global.gpu.relaxed.add.u32 %r4, [%d1], 1;
    mad.wide.u32 %d2, %r3, 4, %d1; st.global.b32 [%d2+4], %r4;
    """
    result = launch(body, np.zeros(1, "u4"), np.zeros(129, "u4"), blocks=2, threads=64)
    assert result[0] == 128 and sorted(result[1:].tolist()) == list(range(128))
    text = "setp.lt.u32 %p1, %r0, 9; @%p1 atom.global.exch.b32 %r4, [%d1], %r0;"
    assert launch(text, np.zeros(1, "u4"), np.zeros(1, "u4"))[0] == 8  # in the order of the lanes


def test_nan_is_one():
    x = np.array([0xFFC00001, 0x7F800001, 0x7F800000], "u4").view("f4")
    result = compute("add.f32 {to}, {0}, {1};", np.resize(x, 32), np.zeros(32, "f4"), dtype="f4")
    assert result[:3].view("u4").tolist() == [0x7FFFFFFF, 0x7FFFFFFF, 0x7F800000]


@pytest.mark.parametrize(
    "instruction",
    [
        "add.cc.s32 %r4, %r3, 1;",
        "cos.approx.f32 %f1, %f2;",
        "red.global.add.u32 [%d1], %r3;",
        "atom.global.max.u32 %r4, [%d1], %r3;",
        "cvt.sat.f32.f32 %f1, %f2;",
        "fma.rn.f16x2 %r4, %r5, %r6, %r7;",
        "min.xorsign.f32 %f1, %f2, %f3;",
        "tex.2d.v4.f32 {%f1, %f2, %f3, %f4}, [%d0, {%f1, %f2}];",
        "ld.global.unknown.b32 %r4, [%d0];",
        "mad.hi.cc.s32 %r4, %r3, 1, 2;",
        "cvt.rp.f32.s32 %f1, %r3;",
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, 7;",
        "bar.sync 0, 32;",
        "add.bf16x2 %r4, %r5, %r6;",
        "max.bf16x2 %r4, %r5, %r6;",
        "abs.bf16 %h1, %h2;",
        "add.sat.s16x2 %r4, %r5, %r6;",
        "max.s16x2 %r4, %r5, %r6;",
        "setp.eq.f16x2 %p1, %r4, %r5;",
        "cp.async.ca.shared.global [%r4], [%d0], 4, %p1;",
        "cp.async.ca.shared.global [%r4], [%d0], %r5;",
        "mov.b128 %d4, %d5;",
        "bra $nowhere;",
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1}, {%r1}, %d4, %p1, 1, 1, 0;",
        "setp.eq.u32 %p1, %r0, 3; @%p1 bra $end; bra $on; $end: ret; $on: "
        "shfl.sync.idx.b32 %r4, %r3, 0, 31, -1;",
    ],
)
def test_what_is_not_known_is_refused(instruction: str):
    with pytest.raises(Unsupported, match="the PTX machine does not know"):
        launch(instruction, np.zeros(1, "u4"), np.zeros(32, "u4"))
