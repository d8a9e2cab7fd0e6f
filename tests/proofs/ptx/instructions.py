"""What each instruction is: a function, its arguments and results with their dtypes. A modifier
that is not taken here is refused, because it changes what the instruction means."""

import re
from collections.abc import Callable
from enum import IntEnum
from functools import partial
from typing import NamedTuple

import numpy as np

from . import arithmetic, matrices
from .text import Instruction, Literal, Nothing, Operand, Register, Symbol, Unsupported, bits_of

# Hints, of no meaning here; of `nc` it is not checked that nobody writes what it reads.
CACHE = re.compile(r"L[12]_\w+|ca|cg|cs|wb|wt|nc|lu|cv")
ORDER = ("relaxed", "weak", "acquire", "release", "acq_rel")


class Waits(IntEnum):
    """Which lanes run the instruction together: any, those of a warp, of a thread block."""

    NO, WARP, BLOCK = range(3)


class Operation(NamedTuple):
    """`function` takes arrays; or it is the name of a method of machine.Batch, which takes the
    lanes, the instruction's number and guard before them."""

    function: Callable[..., object] | str
    results: list[tuple[Operand, str]]
    arguments: list[tuple[Operand, str]]
    waits: Waits = Waits.NO


class _Modifiers:
    def __init__(self, instruction: Instruction):
        self.left = [m for m in instruction.modifiers if not CACHE.fullmatch(m)]

    def take(self, *names: str) -> str | None:
        """The one of these that is there."""
        found = next((name for name in names if name in self.left), None)
        if found is not None:
            self.left.remove(found)
        return found

    def must(self, *names: str) -> str:
        found = self.take(*names)
        if found is None:
            raise ValueError(f"none of {names}")
        return found


def dtype_of(ty: str) -> str:
    """NumPy's name; bits and bfloat16 are unsigned."""
    if ty == "pred":
        return "?"
    kind = "u" if ty[0] == "b" or ty.endswith("x2") else ty[0]
    if bits_of(ty) > 64:
        raise ValueError(f"type {ty}")
    return {"s": "i"}.get(kind, kind) + str(bits_of(ty) // 8)


def bits_as(ty: str) -> str:
    """NumPy's name for what copies bits: a NaN stays what it is."""
    return dtype_of(ty).replace("i", "u").replace("f", "u")


def operation(i: Instruction) -> Operation:
    decode = _DECODE.get(i.name)
    if decode is None:
        raise i.refuse(f"the instruction {i.name}")
    modifiers = _Modifiers(i)
    try:
        result = decode(i, modifiers)
    except (KeyError, ValueError, IndexError) as error:
        raise i.refuse(f"this form ({error})") from error
    if modifiers.left:
        raise i.refuse(f"the modifier {modifiers.left[0]}")
    if i.guard is not None and result.waits:
        raise i.refuse("the predicate")
    return result


def _plain(i: Instruction, function: Callable[..., object], *dtypes: str) -> Operation:
    """One result, and arguments of these dtypes: all of the type of the instruction, if none is
    named."""
    to, *arguments = i.operands
    result, *rest = dtypes or [dtype_of(i.types[-1])] * len(i.operands)
    return Operation(function, [(to, result)], list(zip(arguments, rest, strict=True)))


def _integer(i: Instruction, function: Callable[..., object]) -> Operation:
    if i.types[-1][0] not in "su" or i.types[-1].endswith("x2"):
        raise ValueError(f"type {i.types[-1]}")
    return _plain(i, function)


def _float(i: Instruction, m: _Modifiers, function: Callable[..., object]) -> Operation:
    """With `.ftz`; `.rn` is what numbers are rounded by anyhow."""
    if i.types[-1] not in ("f32", "f64"):
        raise ValueError(f"type {i.types[-1]}")
    m.take("rn")
    if not m.take("ftz"):
        return _plain(i, function)

    def compute(*arguments):
        flushed = (arithmetic.without_subnormals(x) for x in arguments)
        return arithmetic.without_subnormals(function(*flushed))

    return _plain(i, compute)


def _sum(i: Instruction, m: _Modifiers) -> Operation:
    if i.types[-1] in ("s16x2", "u16x2"):
        return _plain(i, arithmetic.sums_of_halves)
    return _arithmetic(np.add)(i, m)


def _arithmetic(function: Callable[..., object]) -> Callable[..., Operation]:
    def decode(i: Instruction, m: _Modifiers) -> Operation:
        return _float(i, m, function) if i.types[-1][0] == "f" else _integer(i, function)

    return decode


def _approximate(function: Callable[..., object]) -> Callable[..., Operation]:
    """NumPy's function, which is more exact than that of a GPU."""

    def decode(i: Instruction, m: _Modifiers) -> Operation:
        m.take("approx", "full")
        return _float(i, m, function)

    return decode


def _bits(function: Callable[..., object]) -> Callable[..., Operation]:
    return lambda i, m: _plain(i, function)


def _multiply(i: Instruction, m: _Modifiers) -> Operation:
    """mul and mad: `+ z` if there is a third argument."""
    ty = i.types[-1]
    if ty[0] == "f":
        return _float(i, m, np.multiply if i.name == "mul" else arithmetic.fma)
    part, one = m.must("lo", "hi", "wide"), dtype_of(ty)
    if part == "hi" and bits_of(ty) > 32:
        raise ValueError(f"type {ty}")
    product = {"lo": np.multiply, "hi": arithmetic.high_product, "wide": arithmetic.wide_product}[
        part
    ]
    result = f"{one[0]}{2 * int(one[1])}" if part == "wide" else one
    dtypes = [result, one, one, result][: len(i.operands)]
    return _plain(i, product if i.name == "mul" else lambda x, y, z: product(x, y) + z, *dtypes)


def _divide(i: Instruction, m: _Modifiers) -> Operation:
    if i.types[-1][0] != "f":
        return _integer(i, arithmetic.quotient)
    return _approximate(np.divide)(i, m)


def _extreme(i: Instruction, m: _Modifiers) -> Operation:
    ty, is_min = i.types[-1], i.name == "min"
    if "f" in ty:
        keep_nan = m.take("NaN") is not None
        function = partial(arithmetic.extreme, is_min=is_min, keep_nan=keep_nan)
        if ty == "bf16":
            wide, narrow = arithmetic.from_bfloat16, arithmetic.to_bfloat16
            return _plain(i, lambda x, y: narrow(function(wide(x), wide(y))), "u2", "u2", "u2")
        if ty == "f16":
            return _plain(i, function, "f2", "f2", "f2")
        return _float(i, m, function)
    function = np.minimum if is_min else np.maximum
    if m.take("relu"):
        return _integer(i, lambda x, y: np.maximum(function(x, y), x.dtype.type(0)))
    return _integer(i, function)


def _shift(i: Instruction, m: _Modifiers) -> Operation:
    function = arithmetic.shift_left if i.name == "shl" else arithmetic.shift_right
    one = dtype_of(i.types[-1])
    return _plain(i, function, one, one, "u4")


def _bit_field(i: Instruction, m: _Modifiers) -> Operation:
    one = dtype_of(i.types[-1])
    return _plain(i, arithmetic.extracted_bits, one, one, "u4", "u4")


def _count(i: Instruction, m: _Modifiers) -> Operation:
    return _plain(i, np.bitwise_count, "u4", dtype_of(i.types[-1]).replace("i", "u"))


def _highest_bit(i: Instruction, m: _Modifiers) -> Operation:
    shift = m.take("shiftamt") is not None
    one = dtype_of(i.types[-1])
    if one[0] != "u":
        raise ValueError("a signed number")
    return _plain(i, partial(arithmetic.highest_bit, shift=shift), "u4", one)


def _select(i: Instruction, m: _Modifiers) -> Operation:
    one = bits_as(i.types[-1])
    return _plain(i, lambda x, y, p: np.where(p, x, y), one, one, one, "?")


def _move(i: Instruction, m: _Modifiers) -> Operation:
    to, source = i.operands
    bits = bits_of(i.types[-1])
    if type(to) is tuple:
        part = f"u{bits // 8 // len(to)}"
        step = bits // len(to)

        def unpacked(x):
            return [(x >> x.dtype.type(step * k)).astype(part) for k in range(len(to))]

        return Operation(unpacked, [(x, part) for x in to], [(source, f"u{bits // 8}")])
    if type(source) is tuple:
        part, whole, step = (
            f"u{bits // 8 // len(source)}",
            np.dtype(f"u{bits // 8}"),
            bits // len(source),
        )

        def joined(*parts):
            result = parts[0].astype(whole)
            for k, x in enumerate(parts[1:], 1):
                result = result | (x.astype(whole) << whole.type(step * k))
            return result

        return Operation(joined, [(to, whole.str[1:])], [(x, part) for x in source])
    one = bits_as(i.types[-1])
    return _plain(i, lambda x: x, one, one)


def _convert_address(i: Instruction, m: _Modifiers) -> Operation:
    """Generic addresses of global memory are its own."""
    m.must("to")
    m.must("global")
    return _plain(i, lambda x: x)


def _convert(i: Instruction, m: _Modifiers) -> Operation:
    to, source = i.types[-2:]
    mode = m.take("rzi", "rni", "rmi", "rpi")
    m.take("rn")
    if source == "f32" and to in ("f16", "bf16", "f16x2", "bf16x2"):
        narrow = arithmetic.to_float16 if to.startswith("f16") else arithmetic.to_bfloat16
        if to.endswith("x2"):
            return _plain(i, lambda x, y: arithmetic.packed(narrow(y), narrow(x)), "u4", "f4", "f4")
        return _plain(i, narrow, "u2", "f4")
    if source == "bf16" and to == "f32":
        return _plain(i, arithmetic.from_bfloat16, "f4", "u2")
    if "bf16" in (to, source):
        raise ValueError("types")
    result, one, flush = dtype_of(to), dtype_of(source), m.take("ftz")

    def compute(x):
        if flush and one == "f4":
            x = arithmetic.without_subnormals(x)
        if one[0] == "f" and result[0] != "f":
            return arithmetic.rounded_to_integer(x, mode or "rzi", result)
        if mode is not None:
            x = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}[mode](x)
        return x.astype(result)

    return _plain(i, compute, result, one)


def _compare(i: Instruction, m: _Modifiers) -> Operation:
    """setp: p = a ? b."""
    ty, (to, x, y) = i.types[-1], i.operands
    if ty.endswith("x2"):
        raise ValueError(f"type {ty}")
    name = m.must(*arithmetic.COMPARE)
    compare = arithmetic.COMPARE[name]
    if ty == "bf16":
        one, wide = "u2", arithmetic.from_bfloat16
        return Operation(lambda a, b: compare(wide(a), wide(b)), [(to, "?")], [(x, one), (y, one)])
    one = dtype_of(ty)
    compare = np.not_equal if name == "ne" and ty[0] != "f" else compare
    return Operation(compare, [(to, "?")], [(x, one), (y, one)])


def _values(operand: Operand) -> tuple[Operand, ...]:
    return operand if type(operand) is tuple else (operand,)


def _space(m: _Modifiers, *spaces: str) -> str:
    return m.must(*spaces).removesuffix("_cta")


def _ordinary(m: _Modifiers) -> None:
    """Accesses that threads order by other means: how strong they are does not matter here."""
    if m.take(*ORDER, "volatile"):
        m.take("gpu", "cta", "sys")


def _load(i: Instruction, m: _Modifiers) -> Operation:
    space = _space(m, "global", "shared", "shared_cta", "param")
    _ordinary(m)
    m.take("v2", "v4", "v8")
    targets, one = _values(i.operands[0]), dtype_of(i.types[-1]).replace("f", "u")
    method = f"load_{space}:{one}:{len(targets)}"
    return Operation(method, [(x, one) for x in targets], [(i.operands[1], "address")])


def _store(i: Instruction, m: _Modifiers) -> Operation:
    space = _space(m, "global", "shared", "shared_cta")
    _ordinary(m)
    m.take("v2", "v4", "v8")
    values, one = _values(i.operands[1]), bits_as(i.types[-1])
    arguments = [(i.operands[0], "address"), *((x, one) for x in values)]
    return Operation(f"store_{space}:{one}:{len(values)}", [], arguments)


def _atomic(i: Instruction, m: _Modifiers) -> Operation:
    space = _space(m, "global", "shared", "shared_cta")
    m.take(*ORDER)
    scope = m.take("gpu", "sys", "cta") or "gpu"
    kind, one = m.must("add", "exch"), dtype_of(i.types[-1])
    to, address, value = i.operands
    arguments = [(address, "address"), (value, one)]
    return Operation(f"atomic:{space}:{kind}:{one}:{scope}", [(to, one)], arguments)


def _number(operand: Operand) -> int:
    if not isinstance(operand, Literal):
        raise ValueError("a number in a register")
    return operand.value


def _copy(i: Instruction, m: _Modifiers) -> Operation:
    m.must("async")
    if m.take("commit_group"):
        return Operation("commit_copies", [], [])
    if m.take("wait_all"):
        return Operation("await_copies:-1", [], [])
    if m.take("wait_group"):
        return Operation(f"await_copies:{_number(i.operands[0])}", [], [])
    m.must("shared", "shared_cta")
    m.must("global")
    to, source, size, *more = i.operands
    # an operand of 64 bits is a cache policy, one of 32 the number of bytes before zeros
    read = [x for x in more if not isinstance(x, Register) or x.bits != 64]
    if any(isinstance(x, Register) and x.bits == 1 for x in read):
        raise ValueError("a predicate")
    arguments = [(to, "address"), (source, "address"), (read[0] if read else size, "u4")]
    return Operation(f"copy:{_number(size)}", [], arguments)


def _policy(i: Instruction, m: _Modifiers) -> Operation:
    """A cache policy: a hint, without effect here."""
    m.must("fractional")
    return Operation(lambda x: x, [(i.operands[0], "u8")], [(Literal(0), "u8")])


def _of_warp(function: Callable[..., object]) -> Callable[..., object]:
    """The last argument is the mask of the lanes that take part: here all of a warp."""

    def compute(*arguments):
        if not (arguments[-1] == 0xFFFFFFFF).all():
            raise Unsupported("the PTX machine does not know exchanges in a part of a warp")
        return function(*arguments[:-1])

    return compute


def _barrier(i: Instruction, m: _Modifiers) -> Operation:
    if m.take("warp"):
        m.must("sync")
        if i.operands != (Literal(-1),):
            raise ValueError("a part of a warp")
        return Operation("warp_barrier", [], [], Waits.WARP)
    m.must("sync")
    m.take("aligned")
    m.take("cta")
    if len(i.operands) != 1 or not isinstance(i.operands[0], Literal):
        raise ValueError("a barrier for some threads")
    return Operation("barrier", [], [], Waits.BLOCK)


def _fence(i: Instruction, m: _Modifiers) -> Operation:
    m.must("proxy")
    m.must("async")
    m.take("shared_cta")
    return Operation("fence_async", [], [])


def _shuffle(i: Instruction, m: _Modifiers) -> Operation:
    m.must("sync")
    mode, (to, x, by, clamp, mask) = m.must("bfly", "idx", "up"), i.operands
    targets = _values(to)
    return Operation(
        _of_warp(partial(arithmetic.shuffled, mode=mode)),
        [(targets[0], "u4"), (targets[1] if len(targets) > 1 else Nothing(), "?")],
        [(x, "u4") for x in (x, by, clamp, mask)],
        Waits.WARP,
    )


def _warp(i: Instruction, function: Callable[..., object], result: str, argument: str) -> Operation:
    to, x, mask = i.operands
    arguments = [(x, argument), (mask, "u4")]
    return Operation(_of_warp(function), [(to, result)], arguments, Waits.WARP)


def _reduce(i: Instruction, m: _Modifiers) -> Operation:
    m.must("sync")
    kind, one = m.must("add", "min", "max", "or"), dtype_of(i.types[-1])
    return _warp(i, partial(arithmetic.reduced, kind=kind), one, one)


def _vote(i: Instruction, m: _Modifiers) -> Operation:
    m.must("sync")
    if m.must("ballot", "any") == "ballot":
        return _warp(i, arithmetic.ballot, "u4", "?")
    function = lambda p: np.repeat(p.reshape(-1, 32).any(1), 32)  # noqa: E731
    return _warp(i, function, "?", "?")


def _elect(i: Instruction, m: _Modifiers) -> Operation:
    """The first lane of a warp."""
    m.must("sync")
    to, mask = i.operands
    targets = _values(to)
    if len(targets) < 2 or not isinstance(targets[0], Nothing):
        raise ValueError("the number of a lane")
    first = _of_warp(lambda x: x == 0)
    lane = Symbol("%laneid")
    return Operation(first, [(targets[1], "?")], [(lane, "u4"), (mask, "u4")], Waits.WARP)


def _matrix_product(i: Instruction, m: _Modifiers) -> Operation:
    m.must("sync")
    m.must("aligned")
    m.must("row")
    m.must("col")
    m.must("m16n8k16")
    (to, a, b, c), (result, dtype, other, added) = i.operands, i.types
    if dtype != other or (result, added) != ("f32", "f32") or dtype not in ("f16", "bf16"):
        raise ValueError("types")
    arguments = [(x, "u4") for part in (a, b) for x in _values(part)]
    arguments += [(x, "f4") for x in _values(c)]
    function = partial(matrices.product, dtype=dtype)
    return Operation(function, [(x, "f4") for x in _values(to)], arguments, Waits.WARP)


def _matrix_move(i: Instruction, m: _Modifiers) -> Operation:
    m.must("sync")
    m.must("aligned")
    m.must("m8n8")
    m.must("shared", "shared_cta")
    count, flip = int(m.must("x1", "x2", "x4")[1]), m.take("trans") is not None
    if i.name == "ldmatrix":
        results = [(x, "u4") for x in _values(i.operands[0])]
        return Operation(
            f"load_matrices:{count}:{flip}", results, [(i.operands[1], "address")], Waits.WARP
        )
    arguments = [(i.operands[0], "address"), *((x, "u4") for x in _values(i.operands[1]))]
    return Operation(f"store_matrices:{count}:{flip}", [], arguments, Waits.WARP)


def _wgmma(i: Instruction, m: _Modifiers) -> Operation:
    if m.take("mma_async") is None:
        m.must("fence", "commit_group", "wait_group")
        m.must("sync")
        m.must("aligned")
        return Operation("nothing", [], [], Waits.BLOCK)
    m.must("sync")
    m.must("aligned")
    shape = m.must(*(f"m64n{n}k16" for n in range(8, 257, 8)))
    n = int(shape[4:-3])
    result, dtype, other = i.types
    to, a, b, keep, *signs = i.operands
    literals = [x.value for x in signs if isinstance(x, Literal)]
    if result != "f32" or dtype != other or dtype not in ("f16", "bf16") or type(a) is not tuple:
        raise ValueError("operands")
    if literals[:2] != [1, 1] or len(literals) != 3:
        raise ValueError("signs")
    arguments = [(b, "u8"), (keep, "?"), *((x, "u4") for x in a), *((x, "f4") for x in _values(to))]
    method = f"wgmma:{dtype}:{n}:{literals[2]}"
    return Operation(method, [(x, "f4") for x in _values(to)], arguments, Waits.BLOCK)


_DECODE: dict[str, Callable[[Instruction, _Modifiers], Operation]] = {
    "mov": _move,
    "cvta": _convert_address,
    "cvt": _convert,
    "selp": _select,
    "setp": _compare,
    "add": _sum,
    "sub": _arithmetic(np.subtract),
    "mul": _multiply,
    "mad": _multiply,
    "fma": lambda i, m: _float(i, m, arithmetic.fma),
    "div": _divide,
    "rem": _bits(arithmetic.remainder),
    "neg": _arithmetic(np.negative),
    "abs": _arithmetic(np.abs),
    "min": _extreme,
    "max": _extreme,
    "and": _bits(np.bitwise_and),
    "or": _bits(np.bitwise_or),
    "xor": _bits(np.bitwise_xor),
    "not": _bits(np.invert),
    "shl": _shift,
    "shr": _shift,
    "bfe": _bit_field,
    "brev": _bits(arithmetic.reversed_bits),
    "bfind": _highest_bit,
    "popc": _count,
    "prmt": _bits(arithmetic.permuted_bytes),
    "sqrt": _approximate(np.sqrt),
    "ex2": _approximate(np.exp2),
    "ld": _load,
    "st": _store,
    "atom": _atomic,
    "cp": _copy,
    "createpolicy": _policy,
    "bar": _barrier,
    "fence": _fence,
    "shfl": _shuffle,
    "redux": _reduce,
    "vote": _vote,
    "elect": _elect,
    "mma": _matrix_product,
    "ldmatrix": _matrix_move,
    "stmatrix": _matrix_move,
    "wgmma": _wgmma,
}
