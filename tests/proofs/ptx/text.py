"""The text of a PTX module as kernels: basic blocks of instructions, and where variables lie."""

import re
import struct
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "s16x2": 32, "u16x2": 32}
TYPE = re.compile(r"pred|bf16(x2)?|[usf]16x2|[usbf](8|16|32|64|128)")
VARIABLE = re.compile(
    r"\.(?P<space>shared|local|param)\s+(?:\.align\s+(?P<align>\d+)\s+)?\.(?P<type>\w+)\s+"
    r"(?:\.ptr[\w.\s]*?\s)?(?P<name>[\w$]+)(?:\[(?P<size>\d*)\])?$"
)
IGNORED = re.compile(r"\.(pragma|section|file|loc|branchtargets)\b")
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)(?:.*inlined_at\s+(\d+)\s+(\d+))?")
COMMA = re.compile(r",(?![^{\[(]*[}\])])")  # outside of brackets
STATEMENT = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
FLOAT = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}")
INTEGER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0|[1-9]\d*)U?")
DECIMAL = re.compile(r"-?\d+\.\d*")
END = ("bra", "ret", "exit")


class Unsupported(NotImplementedError):
    """PTX that the machine does not know."""


class Register(NamedTuple):
    name: str
    bits: int  # 1: a predicate


class Literal(NamedTuple):
    """An integer (bits is None), or the bits of a floating-point number."""

    value: int
    bits: int | None = None


class Symbol(NamedTuple):
    """A variable, a label or a special register."""

    name: str


class Address(NamedTuple):
    base: "Register | Symbol | Literal"
    offset: int


class Nothing(NamedTuple):
    """`_`: a result that nobody needs."""


Operand = Register | Literal | Symbol | Address | Nothing | tuple["Operand", ...]


class Instruction(NamedTuple):
    name: str
    modifiers: tuple[str, ...]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None  # runs where this predicate is true; false if `inverted`
    inverted: bool
    text: str
    line: int  # of the PTX
    source: str  # folder/file:line
    caller: str  # the line into which that one was inlined, or ""

    def refuse(self, reason: str) -> Unsupported:
        return Unsupported(f"the PTX machine does not know {reason} of `{self.text}`")


class Block(NamedTuple):
    """Instructions that run one after the other. Then lanes whose `condition` holds go to the block
    `target`, others to `following`; None: the thread ends."""

    instructions: list[Instruction]
    condition: Register | None
    inverted: bool
    target: int | None
    following: int | None


class Space:
    """Variables one after the other: name -> first byte."""

    def __init__(self) -> None:
        self.offsets: dict[str, int] = {}
        self.sizes: dict[str, int] = {}
        self.end = 0

    def place(self, match: re.Match[str]) -> None:
        item = bits_of(match["type"]) // 8
        size = item * int(match["size"] or (0 if match["size"] == "" else 1))
        align = int(match["align"] or item)
        begin = -(-self.end // align) * align
        self.offsets[match["name"]], self.sizes[match["name"]] = begin, size
        self.end = begin + size


class Kernel(NamedTuple):
    name: str
    blocks: list[Block]
    params: Space
    shared: Space
    local: Space

    def offset(self, symbol: Symbol) -> int:
        for space in (self.params, self.shared, self.local):
            if symbol.name in space.offsets:
                return space.offsets[symbol.name]
        raise Unsupported(f"{self.name}: the PTX machine does not know the symbol {symbol.name}")


def bits_of(dtype: str) -> int:
    return BITS.get(dtype) or int(dtype.lstrip("usbf"))


def _split(text: str) -> list[str]:
    return [part.strip() for part in COMMA.split(text) if part.strip()]


class _Reader:
    """Reads the instructions of a kernel's body."""

    def __init__(self, kernel: Kernel, files: dict[str, str]):
        self.kernel, self.files = kernel, files
        self.source = self.caller = ""
        self.scopes: list[dict[str, Register]] = [{}]
        self.registers = 0
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}

    def declare(self, dtype: str, names: str) -> None:
        for name in _split(names):
            many = re.fullmatch(r"(.*)<(\d+)>", name)
            for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                self.scopes[-1][one] = Register(f"r{self.registers}", bits_of(dtype))
                self.registers += 1

    def named(self, name: str) -> Register | Symbol:
        found = (scope[name] for scope in reversed(self.scopes) if name in scope)
        return next(found, Symbol(name))

    def register(self, name: str) -> Register:
        register = self.named(name)
        if not isinstance(register, Register):
            raise Unsupported(f"{self.kernel.name}: the PTX machine does not know {name}")
        return register

    def operand(self, text: str) -> Operand:
        if text == "_":
            return Nothing()
        if text[0] == "{":
            return tuple(self.operand(part) for part in _split(text[1:-1]))
        if text[0] == "[":
            base, _, offset = text[1:-1].partition("+")
            inner = self.operand(base.strip())
            if not isinstance(inner, Register | Symbol | Literal):
                raise Unsupported(f"the PTX machine does not know the address `{text}`")
            return Address(inner, int(offset or "0", 0))
        if "|" in text:
            return tuple(self.operand(part.strip()) for part in text.split("|"))
        if text[0] == "%":
            return self.named(text)
        if FLOAT.fullmatch(text):
            return Literal(int(text[2:], 16), 4 * len(text[2:]))
        if INTEGER.fullmatch(text):
            return Literal(int(text.rstrip("U"), 0))
        if DECIMAL.fullmatch(text):
            return Literal(int.from_bytes(struct.pack("<f", float(text)), "little"), 32)
        return self.named(text)

    def statement(self, text: str, line: int) -> None:
        if declared := re.match(r"\.reg\s+\.(\w+)\s+(.*)", text, re.S):
            self.declare(declared[1], declared[2])
            return
        if (variable := VARIABLE.match(text)) and variable["space"] != "param":
            space = self.kernel.shared if variable["space"] == "shared" else self.kernel.local
            space.place(variable)
            return
        match = STATEMENT.match(text)
        if match is None:
            raise Unsupported(f"the PTX machine does not know `{text}`")
        inverted, guard, name, operands = match.groups()
        head, *parts = name.replace("::", "_").split(".")
        self.instructions.append(
            Instruction(
                head,
                tuple(part for part in parts if not TYPE.fullmatch(part)),
                tuple(part for part in parts if TYPE.fullmatch(part)),
                tuple(self.operand(part) for part in _split(operands)),
                self.register(guard) if guard else None,
                bool(inverted),
                text,
                line,
                self.source,
                self.caller,
            )
        )

    def read(self, text: str, line: int) -> None:
        pending = ""
        for line, raw in enumerate(text.split("\n"), line):  # noqa: B020
            rest = raw.partition("//")[0].strip()
            if loc := LOCATION.match(rest):
                file, number, caller, line_of_caller = loc.groups()
                self.source = f"{self.files[file]}:{number}"
                self.caller = f"{self.files[caller]}:{line_of_caller}" if caller else ""
                if caller and self.files[file].endswith(".hpp"):  # a function of CUDA's headers
                    self.source = self.caller
            while rest and not IGNORED.match(rest):
                if not pending and (label := re.match(r"([\w$]+):", rest)):
                    self.labels[label[1]] = len(self.instructions)
                    rest = rest[label.end() :].strip()
                elif not pending and rest[0] in "{}":
                    if rest[0] == "}" and len(self.scopes) == 1:
                        return
                    self.scopes.append({}) if rest[0] == "{" else self.scopes.pop()
                    rest = rest[1:].strip()
                else:
                    head, semicolon, rest = rest.partition(";")
                    pending, rest = f"{pending} {head}".strip(), rest.strip()
                    if semicolon:
                        self.statement(pending, line)
                        pending = ""

    def blocks(self) -> Iterator[Block]:
        """Basic blocks. A barrier is one of its own, so that warps can run in any order between
        two of them."""
        code = self.instructions
        barriers = {i for i, one in enumerate(code) if one.name in ("bar", "barrier")}
        begins = {0, *barriers, *(i + 1 for i in barriers)}
        begins |= {i + 1 for i, one in enumerate(code) if one.name in END}
        begins |= {self.target(one) for one in code if one.name == "bra"}
        starts = sorted(i for i in begins if i < len(code))
        number: dict[int, int | None] = {start: i for i, start in enumerate(starts)}
        number[len(code)] = None
        for start, end in zip(starts, [*starts[1:], len(code)], strict=True):
            last, following = code[end - 1], number[end]
            if last.name not in END:
                yield Block(code[start:end], None, False, None, following)
                continue
            target = number[self.target(last)] if last.name == "bra" else None
            if last.guard is None:
                following = target
            yield Block(code[start : end - 1], last.guard, last.inverted, target, following)

    def target(self, branch: Instruction) -> int:
        label = branch.operands[0]
        if not isinstance(label, Symbol) or label.name not in self.labels:
            raise branch.refuse("the target")
        return self.labels[label.name]


def kernels(text: str, only: str | None = None) -> Iterator[Kernel]:
    """The kernels of a module, or the one of that name."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.S)
    named = re.findall(r'^\s*\.file\s+(\d+)\s+"([^"]+)"', text, re.M)
    files = {number: "/".join(path.split("/")[-2:]) for number, path in named}
    for entry in re.finditer(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{]*\{", text):
        if only not in (None, entry[1]):
            continue
        kernel = Kernel(entry[1], [], Space(), Space(), Space())
        for param in _split(re.sub(r"//.*", "", entry[2])):
            match = VARIABLE.match(re.sub(r"\s+", " ", param))
            if match is None:
                raise Unsupported(f"{kernel.name}: the PTX machine does not know `{param}`")
            kernel.params.place(match)
        outside = re.sub(r"//.*", "", text[: entry.start()])
        declared = re.findall(r"\.shared[^;{}]*(?=;)", outside)
        variables = [m for m in map(VARIABLE.match, declared) if m]
        reader = _Reader(kernel, files)
        for variable in variables:
            if variable["size"] != "":
                kernel.shared.place(variable)
        reader.read(text[entry.end() :], text.count("\n", 0, entry.end()) + 1)
        for variable in variables:
            if variable["size"] == "":  # of dynamic size: after all others
                kernel.shared.place(variable)
        kernel.blocks.extend(reader.blocks())
        yield kernel
