"""Are the asynchronous matrix products of warp groups (wgmma) fenced and awaited? The machine
computes them at once. So this follows every path through a kernel's text, whatever its data.

Until wgmma.wait_group, a product writes the registers of its results, and reads those of A and the
shared memory of B. Before it, wgmma.fence must follow the last use of these registers, but for that
of a result by a product of the same shape. Stricter than PTX: until all products are done, there
may be no barrier, and no change of shared memory, wherever it is."""

from typing import NamedTuple

from .program import Live, Program, Step, registers_of
from .text import Literal, Register

NOT_COMMITTED = -1
Pending = dict[Register, int]  # with how many groups were committed after its product's
# A register that was used after the last fence -> the shape of the product whose result it is; ""
# after another use.
Used = dict[Register, str]
CHANGES_OF_SHARED_MEMORY = (
    "barrier",  # after it, other threads may store
    *("store_shared", "store_matrices", "atomic:shared", "copy"),
)


class State(NamedTuple):
    """At a place of the text, by any path to it. used: None if there was no fence."""

    results: Pending
    inputs: Pending
    used: Used | None

    def joined(self, other: "State") -> "State":
        used = None
        if self.used is not None and other.used is not None:
            x, y = self.used, other.used
            used = {r: shape if x.get(r, shape) == shape else "" for r, shape in (x | y).items()}
        return State(_least(self.results, other.results), _least(self.inputs, other.inputs), used)


def _least(x: Pending, y: Pending) -> Pending:
    return y | {register: min(age, y.get(register, age)) for register, age in x.items()}


def _older(pending: Pending) -> Pending:
    return {register: age + 1 for register, age in pending.items()}


def _left(pending: Pending, groups: int) -> Pending:
    """After all but the last so many groups are done."""
    return {register: age for register, age in pending.items() if age < groups}


def _is(step: Step, modifier: str) -> bool:
    return step.instruction.name == "wgmma" and modifier in step.instruction.modifiers


def _inputs(step: Step) -> Live:
    """Registers of A."""
    _, _, *operands = step.operation.arguments  # B's descriptor and a predicate
    return registers_of(x for x, _ in operands) - step.writes


def _shape(step: Step) -> str:
    return next(x for x in step.instruction.modifiers if x.startswith("m64"))


def _fault(step: Step, state: State) -> str | None:
    if _is(step, "mma_async"):
        reads, shapes = _inputs(step), dict.fromkeys(step.writes, _shape(step))
        if reads & state.results.keys():
            return "a result of wgmma that is not awaited"
        if step.writes & state.inputs.keys():
            return "a use of a register that wgmma reads"
        if state.used is None or any(
            state.used.get(x, shapes.get(x)) != shapes.get(x) for x in reads | step.writes
        ):
            return "wgmma of registers without a fence"
        return None
    touched = step.reads | step.writes
    if touched & state.results.keys():
        return "a result of wgmma that is not awaited"
    if touched & state.inputs.keys():
        return "a use of a register that wgmma reads"
    if state.results and step.is_method(*CHANGES_OF_SHARED_MEMORY):
        return "a change of shared memory that wgmma may read"
    return None


def _after(step: Step, state: State) -> State:
    results, inputs, used = state
    if _is(step, "mma_async"):
        new = dict.fromkeys(step.writes, NOT_COMMITTED)
        inputs = inputs | dict.fromkeys(_inputs(step), NOT_COMMITTED)
        shapes = dict.fromkeys(step.writes, _shape(step))
        return State(results | new, inputs, None if used is None else used | shapes)
    if _is(step, "commit_group"):
        return State(_older(results), _older(inputs), used)
    if _is(step, "wait_group"):
        (groups,) = step.instruction.operands
        assert isinstance(groups, Literal)
        return State(_left(results, groups.value), _left(inputs, groups.value), used)
    if _is(step, "fence"):
        return State(results, inputs, {})
    touched = dict.fromkeys(step.reads | step.writes, "")
    return State(results, inputs, None if used is None else used | touched)


def fault_of(program: Program) -> tuple[str, int] | None:
    """What is wrong, and the number of the instruction."""
    steps = [step for steps in program.steps for step in steps]
    products = [number for number, step in enumerate(steps) if _is(step, "mma_async")]
    if not products:
        return None
    before: dict[int, State] = {0: State({}, {}, None)}  # of a block
    waiting, blocks = [0], program.kernel.blocks
    while waiting:
        b = waiting.pop()
        state, first = before[b], sum(map(len, program.steps[:b]))
        for at, step in enumerate(program.steps[b], first):
            if (what := _fault(step, state)) is not None:
                return what, at
            state = _after(step, state)
        block = blocks[b]
        ends = block.following is None or (block.condition is not None and block.target is None)
        if state.results and ends:
            return "wgmma that nobody awaits", products[0]
        for after in program.successors(block):
            joined = state.joined(before[after]) if after in before else state
            if joined != before.get(after):
                before[after] = joined
                waiting.append(after)
    return None
