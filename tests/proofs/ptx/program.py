"""A kernel as Python functions, one for each basic block: an instruction becomes one call for all
lanes that run the block."""

from collections.abc import Callable, Iterable
from functools import cache, cached_property
from typing import Any

import numpy as np

from .instructions import Operation, Waits, operation
from .text import (
    Address,
    Block,
    Instruction,
    Kernel,
    Literal,
    Operand,
    Register,
    Symbol,
    Unsupported,
)

Live = set[Register]
NAMES = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")
DTYPES = {name: np.dtype(name) for name in NAMES}
NAN32 = np.uint32(0x7FFFFFFF).view(np.float32)


@cache
def holder(name: str, bits: int) -> Callable[..., Any]:
    """A function of a result of this dtype: as a register holds it, unsigned, extended by zeros or
    by the sign. All NaN of float32 are one, as on GPUs."""
    dtype = np.dtype(name)
    if bits == 1:
        return lambda x: x.astype(dtype, copy=False)
    register, wide = np.dtype(f"u{bits // 8}"), np.dtype(f"{dtype.kind}{bits // 8}")
    assert dtype.itemsize <= wide.itemsize

    def held(x):
        return x.astype(dtype, copy=False).astype(wide, copy=False).view(register)

    def held_float(x):
        x = x.astype(dtype, copy=False)
        if np.isnan(x @ x):  # a sum of squares is NaN only if one of them is
            x = np.where(np.isnan(x), NAN32, x)
        return held(x)

    return held_float if name == "f4" else held


def registers_of(operands: Iterable[Operand]) -> Live:
    found: Live = set()
    for x in operands:
        x = x.base if isinstance(x, Address) else x
        if isinstance(x, Register):
            found.add(x)
    return found


class Step:
    """An instruction of a block, and the registers that it reads and writes."""

    def __init__(self, instruction: Instruction):
        self.instruction = instruction
        self.operation: Operation = operation(instruction)
        self.writes = registers_of([x for x, _ in self.operation.results])
        self.reads = registers_of([x for x, _ in self.operation.arguments])
        if instruction.guard is not None:  # where it is false, results keep their values
            self.reads = self.reads | {instruction.guard} | self.writes

    def is_method(self, *beginnings: str) -> bool:
        """Whether its operation is a method of machine.Batch whose name begins so."""
        function = self.operation.function
        return isinstance(function, str) and function.startswith(beginnings)

    @property
    def bases(self) -> Live:
        """Registers of its address in memory."""
        return registers_of([x for x, dtype in self.operation.arguments[:1] if dtype == "address"])


class Program:
    """`blocks[i](batch, registers, lanes, everyone)` runs a block and returns for each lane whether
    it goes to the block's target; None if there is no condition."""

    def __init__(self, kernel: Kernel):
        self.kernel = kernel
        self.steps = [[Step(i) for i in block.instructions] for block in kernel.blocks]
        self.instructions = [i for block in kernel.blocks for i in block.instructions]
        self.waits = [
            max((s.operation.waits for s in steps), default=Waits.NO) for steps in self.steps
        ]
        self.hits = [0] * len(kernel.blocks)  # how often each block ran
        self._live()
        kept = sorted(set().union(*self.live_in, *self.live_out))
        self.slots = {register: slot for slot, register in enumerate(kept)}
        self.constants: dict[str, Any] = {"np": np, **DTYPES}
        number, lines = 0, []
        for b, steps in enumerate(self.steps):
            lines += self._block(b, number)
            number += len(steps)
        exec(compile("\n".join(lines), f"<{kernel.name}>", "exec"), self.constants)
        self.blocks: list[Callable[..., Any]] = [
            self.constants[f"block{b}"] for b in range(len(kernel.blocks))
        ]

    @cached_property
    def grain(self) -> int:
        """Bytes of the smallest access of shared memory."""
        sizes = [4]
        for step in (step for steps in self.steps for step in steps):
            if step.is_method("load_shared", "store_shared"):
                sizes.append(np.dtype(str(step.operation.function).split(":")[1]).itemsize)
            elif step.is_method("wgmma"):
                sizes.append(2)
        return min(sizes)

    @staticmethod
    def successors(block: Block) -> list[int]:
        ways = [block.following, block.target] if block.condition else [block.following]
        return [way for way in ways if way is not None]

    def _live(self) -> None:
        """Registers whose values are needed before and after each block."""
        blocks = self.kernel.blocks
        reads: list[Live] = []
        writes: list[Live] = []
        for block, steps in zip(blocks, self.steps, strict=True):
            read: Live = set()
            written: Live = set()
            for step in steps:
                read |= step.reads - written
                written |= step.writes
            if block.condition is not None and block.condition not in written:
                read.add(block.condition)
            reads.append(read)
            writes.append(written)
        self.live_in = [set(read) for read in reads]
        self.live_out: list[Live] = [set() for _ in blocks]
        changed = True
        while changed:
            changed = False
            for b in reversed(range(len(blocks))):
                after = set().union(*(self.live_in[s] for s in self.successors(blocks[b])))
                before = reads[b] | (after - writes[b])
                if (before, after) != (self.live_in[b], self.live_out[b]):
                    self.live_in[b], self.live_out[b], changed = before, after, True

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _holder(self, dtype: str, bits: int) -> str:
        name = f"held_{dtype.replace('?', 'p')}_{bits}"
        self.constants[name] = holder(dtype, bits)
        return name

    def _value(self, x: Operand, dtype: str) -> str:
        """An expression: of an array with one number for each lane, or a constant (with `c`)."""
        if dtype == "address":
            assert isinstance(x, Address)
            if isinstance(x.base, Register):
                if x.base.bits == 32:  # the sum has 32 bits, too
                    return f"({x.base.name} + np.uint32({x.offset % 2**32})).astype(i8)"
                base = f"{x.base.name}.view(i8)"
                return f"({base} + {x.offset})" if x.offset else base
            base = x.base.value if isinstance(x.base, Literal) else self.kernel.offset(x.base)
            return self._constant(np.int64(base + x.offset))
        if isinstance(x, Register):
            if dtype == "?":
                return x.name
            size = 8 * np.dtype(dtype).itemsize
            if size > x.bits:
                raise Unsupported(f"{self.kernel.name}: {size} bits of a register of {x.bits}")
            text = x.name if size == x.bits else f"{x.name}.astype(u{size // 8})"
            return text if dtype[0] == "u" else f"{text}.view({dtype})"
        if isinstance(x, Symbol) and x.name.startswith("%"):
            return f"batch.special({x.name!r}, lanes).astype({dtype})"
        if isinstance(x, Symbol):
            return self._constant(np.dtype(dtype).type(self.kernel.offset(x)))
        assert isinstance(x, Literal)
        if dtype == "?":
            return self._constant(np.bool_(x.value != 0))
        bits = 8 * np.dtype(dtype).itemsize
        if x.bits not in (None, bits):
            raise Unsupported(f"{self.kernel.name}: a number of {x.bits} bits as {dtype}")
        pattern = np.array(x.value & ((1 << bits) - 1), f"u{bits // 8}")
        return self._constant(pattern.view(dtype)[()])

    def _call(self, step: Step, number: int, guard: str) -> str:
        function, _, arguments, waits = step.operation
        texts = [self._value(x, dtype) for x, dtype in arguments]
        constant = [text in self.constants for text in texts]
        if waits or isinstance(function, str):
            spread = constant
        else:  # one array is enough
            spread = [all(constant) and k == 0 for k in range(len(texts))]
        texts = [f"np.full(n, {t})" if s else t for t, s in zip(texts, spread, strict=True)]
        if not isinstance(function, str):
            return f"{self._constant(function)}({', '.join(texts)})"
        method, *static = function.split(":")
        static = [x if x.lstrip("-").isdigit() else repr(x) for x in static]
        return f"batch.{method}({', '.join(['lanes', str(number), guard, *static, *texts])})"

    def _block(self, b: int, number: int) -> list[str]:
        block, steps, live_out = self.kernel.blocks[b], self.steps[b], self.live_out[b]
        mentioned = set().union(*(s.reads | s.writes for s in steps))
        if block.condition is not None:
            mentioned.add(block.condition)
        lines = [f"def block{b}(batch, registers, lanes, everyone):", " n = len(lanes)"]
        for r in sorted(self.live_in[b] & mentioned):
            slot = f"registers[{self.slots[r]}]"
            lines.append(f" {r.name} = {slot} if everyone else {slot}[lanes]")
        last = {r: k for k, step in enumerate(steps) for r in step.reads | step.writes}
        dead: list[list[str]] = [[] for _ in steps]
        for r, k in last.items():
            if r not in live_out and r != block.condition:
                dead[k].append(r.name)
        for k, step in enumerate(steps):
            guard, i = "None", step.instruction
            if i.guard is not None:
                guard = f"~{i.guard.name}" if i.inverted else i.guard.name
            results = step.operation.results
            call = self._call(step, number + k, guard)
            values = [call]
            if len(results) != 1 or not isinstance(results[0][0], Register):
                lines.append(f" t = {call}")
                values = [f"t[{j}]" for j in range(len(results))]
            for value, (to, dtype) in zip(values, results, strict=True):
                if not isinstance(to, Register):
                    continue
                new = f"{self._holder(dtype, to.bits)}({value})"
                if i.guard is not None:
                    new = f"np.where({guard}, {new}, {to.name})"
                lines.append(f" {to.name} = {new}")
            if dead[k]:
                lines.append(f" del {', '.join(dead[k])}")
        written = set().union(*(s.writes for s in steps))
        for r in sorted(written & live_out):
            lines.append(f" batch.keep({self.slots[r]}, lanes, everyone, {r.name})")
        if block.condition is not None:
            lines.append(f" return {'~' if block.inverted else ''}{block.condition.name}")
        return lines
