"""Are the asynchronous matrix products of warp groups (wgmma) fenced and awaited? The machine
computes them at once. So this follows every path through a kernel's text, whatever its data.

Until wgmma.wait_group, a product writes the registers of its results, and reads those of A and the
shared memory of B. Before it, wgmma.fence must follow the last other use of these registers."""

from typing import NamedTuple

from .program import Live, Program, Step, registers_of
from .text import Literal, Register

NOT_COMMITTED = -1
Pending = dict[Register, int]  # with how many groups were committed after its product's
CHANGES_OF_SHARED_MEMORY = (
    "barrier",  # after it, other threads may store
    *("store_shared", "store_matrices", "atomic:shared", "copy"),
)


class State(NamedTuple):
    """At a place of the text, by any path to it. used: registers that other instructions used after
    the last fence; None if there was no fence."""

    results: Pending
    inputs: Pending
    used: Live | None

    def joined(self, other: "State") -> "State":
        used = None
        if self.used is not None and other.used is not None:
            used = self.used | other.used
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


def _matrices(step: Step) -> Live:
    """Registers of A and of the result."""
    _, _, *operands = step.operation.arguments  # without B's descriptor and a predicate
    return registers_of(x for x, _ in operands)


def _fault(step: Step, state: State) -> str | None:
    if _is(step, "mma_async"):
        if state.used is None or state.used & _matrices(step):
            return "wgmma of registers without a fence"
    elif (step.reads | step.writes) & state.results.keys():
        return "a result of wgmma that is not awaited"
    elif step.writes & state.inputs.keys():
        return "a change of a register that wgmma reads"
    elif state.results and step.is_method(*CHANGES_OF_SHARED_MEMORY):
        return "a change of shared memory that wgmma may read"
    return None


def _after(step: Step, state: State) -> State:
    results, inputs, used = state
    if _is(step, "mma_async"):
        a = _matrices(step) - step.writes
        new = dict.fromkeys(step.writes, NOT_COMMITTED)
        return State(results | new, inputs | dict.fromkeys(a, NOT_COMMITTED), used)
    if _is(step, "commit_group"):
        return State(_older(results), _older(inputs), used)
    if _is(step, "wait_group"):
        (groups,) = step.instruction.operands
        assert isinstance(groups, Literal)
        return State(_left(results, groups.value), _left(inputs, groups.value), used)
    if _is(step, "fence"):
        return State(results, inputs, set())
    return State(results, inputs, None if used is None else used | step.reads | step.writes)


def fault_of(program: Program) -> tuple[str, int] | None:
    """What is wrong, and the number of the instruction."""
    if not any(step.is_method("wgmma") for steps in program.steps for step in steps):
        return None
    before: dict[int, State] = {0: State({}, {}, None)}  # of a block
    waiting, blocks = [0], program.kernel.blocks
    while waiting:
        b = waiting.pop()
        state, at = before[b], sum(map(len, program.steps[:b])) - 1
        for step in program.steps[b]:
            at += 1
            if (what := _fault(step, state)) is not None:
                return what, at
            state = _after(step, state)
        block = blocks[b]
        ends = block.following is None or (block.condition is not None and block.target is None)
        if state.results and ends:
            return "wgmma that nobody awaits", at
        for after in program.successors(block):
            joined = state.joined(before[after]) if after in before else state
            if joined != before.get(after):
                before[after] = joined
                waiting.append(after)
    return None
