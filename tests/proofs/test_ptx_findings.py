"""What the PTX machine finds and counts, by kernels of a few lines with a fault. Needs neither
Triton nor nvcc."""

import ast
import struct
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ptx import cuda_launches, report
from ptx.machine import Finding, Launch, Traffic, run
from ptx.memory import CANARY, Region
from ptx.program import Program
from ptx.text import kernels

from tests.helpers.ptx_kernels import COMMIT_AND_WAIT, FENCE, KERNEL, launch, wgmma

# Lane i stores to shared memory, and reads what the next thread of its block stored.
ROTATE = """
shl.b32 %r4, %r0, 2;
mov.u32 %r5, memory;
add.u32 %r5, %r5, %r4;
st.shared.b32 [%r5], %r3;
{barrier}
add.u32 %r6, %r0, 1;
rem.u32 %r6, %r6, %r2;
shl.b32 %r6, %r6, 2;
mov.u32 %r7, memory;
add.u32 %r7, %r7, %r6;
ld.shared.b32 %r8, [%r7];
mad.wide.u32 %d2, %r3, 4, %d1;
st.global.b32 [%d2], %r8;
"""


def rotate(barrier: str, threads: int = 64, **options) -> np.ndarray:
    size = 2 * threads
    return launch(
        ROTATE.format(barrier=barrier),
        np.zeros(1, "u4"),
        np.zeros(size, "u4"),
        blocks=2,
        threads=threads,
        shared=4 * threads,
        **options,
    )


def test_addresses_in_shared_memory_have_32_bits():
    """So has the sum of a register and an offset: compilers subtract before they add."""
    body = """
shl.b32 %r4, %r0, 2;
add.u32 %r5, %r4, -128;
st.shared.b32 [%r5+128], %r0;
ld.shared.b32 %r6, [%r5+128];
mad.wide.u32 %d2, %r3, 4, %d1;
st.global.b32 [%d2], %r6;
"""
    result = launch(body, np.zeros(1, "u4"), np.zeros(32, "u4"), shared=128)
    assert result.tolist() == list(range(32))


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_barriers_order_accesses(seed: int | None):
    exact = np.roll(np.arange(128).reshape(2, 64), -1, 1).reshape(-1)
    assert rotate("bar.sync 0;", seed=seed).tolist() == exact.tolist()
    exact = np.roll(np.arange(64).reshape(2, 32), -1, 1).reshape(-1)
    assert rotate("bar.warp.sync -1;", 32, seed=seed).tolist() == exact.tolist()


ADDRESS = "mad.wide.u32 %d2, %r3, 4, %d1; mad.wide.u32 %d3, %r3, 4, %d0;"
COPY = """
mov.u32 %r5, memory; shl.b32 %r4, %r0, 4; add.u32 %r5, %r5, %r4;
mad.wide.u32 %d3, %r0, 16, %d0;
cp.async.cg.shared.global [%r5], [%d3], 16;
cp.async.commit_group;
{wait}
ld.shared.b32 %r6, [%r5];
mad.wide.u32 %d2, %r3, 4, %d1; st.global.b32 [%d2], %r6;
"""


def product(results: range, a: range, n: int = 16) -> str:
    """Of these registers, with the B of `wgmma`."""
    to, of = (", ".join(f"%r{i}" for i in registers) for registers in (results, a))
    shape = f"m64n{n}k16.f32.f16.f16"
    return f"wgmma.mma_async.sync.aligned.{shape} {{{to}}}, {{{of}}}, %d5, %p1, 1, 1, 0;"


ZEROS = "".join(f"mov.b32 %r{i}, 0;" for i in range(30, 38))
PRODUCT_FENCE = "wgmma.fence.sync.aligned;"
FOUND = {
    "no barrier": (
        ROTATE.format(barrier=""),
        r"a race \(shared memory\)|unwritten memory \(shared",
    ),
    "a barrier of a warp": (ROTATE.format(barrier="bar.warp.sync -1;"), r"a race|unwritten memory"),
    "unwritten shared memory": (
        "mov.u32 %r5, memory; ld.shared.b32 %r6, [%r5];",
        r"unwritten memory \(shared memory\)",
    ),
    "after the last": (
        ADDRESS + "st.global.b32 [%d2+4], %r3;",
        r"out of bounds \(global memory\) at tested source.py:7 .*, block \(1, 0, 0\), thread 127",
    ),
    "before the first": (
        ADDRESS + "ld.global.b32 %r4, [%d3+-4];",
        r"out of bounds \(global memory\)",
    ),
    "shared memory that was not requested": (
        "mov.u32 %r5, memory; st.shared.b32 [%r5+2048], %r3;",
        r"out of bounds \(shared memory\)",
    ),
    "misaligned": (
        ADDRESS + "ld.global.v2.b32 {%r4, %r5}, [%d3];",
        "a misaligned access.*thread 1",
    ),
    "blocks race": (
        "mad.wide.u32 %d2, %r0, 4, %d1; st.global.b32 [%d2], %r3;",
        r"a race \(global memory\).*block \(0, 0, 0\), thread 0",
    ),
    "blocks race with reads": (
        "mad.wide.u32 %d2, %r0, 4, %d1; ld.global.b32 %r5, [%d2]; setp.eq.u32 %p1, %r1, 1;"
        "@%p1 st.global.b32 [%d2], %r3;",
        r"a race \(global memory\)",
    ),
    "unequal copies": (
        "setp.lt.u32 %p1, %r3, 32; @%p1 st.global.b32 [%d1], %r0;",
        "unequal copies",
    ),
    "a barrier for some": (
        "setp.lt.u32 %p1, %r0, 32; @%p1 bra $on; bar.sync 0; $on: bar.sync 1;",
        "a barrier that some threads do not reach",
    ),
    "a shuffle for some": (
        "setp.lt.u32 %p1, %r0, 7; @%p1 bra $on; shfl.sync.idx.b32 %r4, %r0, 0, 31, -1; $on:"
        "shfl.sync.idx.b32 %r4, %r0, 1, 31, -1;",
        "a whole warp's instruction that some threads do not reach",
    ),
    "a copy to what another thread reads": (
        "mov.u32 %r5, memory; setp.eq.u32 %p1, %r0, 40; @%p1 st.shared.b32 [%r5], %r3; bar.sync 0;"
        "@!%p1 ld.shared.b32 %r6, [%r5];"
        "@%p1 cp.async.ca.shared.global [%r5], [%d0], 4; cp.async.wait_all;",
        "a race.*copies to what another thread reads",
    ),
    "wgmma without a fence": (wgmma(fence=""), "wgmma of shared memory without a fence"),
    "a fence of one thread for others": (
        wgmma(fence=f"setp.eq.u32 %p2, %r0, 0; @%p2 {FENCE}"),
        "wgmma of shared memory without a fence",
    ),
    "descriptors that differ": (
        wgmma(change="cvt.u64.u32 %d6, %r0; add.u64 %d5, %d5, %d6;"),
        "descriptors that differ in a warp group",
    ),
    "wgmma without its own fence": (wgmma(before=""), "wgmma of registers without a fence"),
    "a register that is written after the fence": (
        wgmma(change="mov.b32 %r12, %r3;"),
        "wgmma of registers without a fence",
    ),
    "wgmma that is not committed": (
        wgmma(after="wgmma.wait_group.sync.aligned 0;"),
        "a result of wgmma that is not awaited",
    ),
    "wgmma that is read too early": (
        wgmma(after="wgmma.commit_group.sync.aligned;"),
        "a result of wgmma that is not awaited",
    ),
    "too many groups of wgmma left": (
        wgmma(after="wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;"),
        "a result of wgmma that is not awaited",
    ),
    "wgmma that is not awaited on one of two ways": (
        wgmma(
            after="wgmma.commit_group.sync.aligned; setp.eq.u32 %p2, %r1, 0; @%p2 bra $on;"
            "wgmma.wait_group.sync.aligned 0; $on:"
        ),
        "a result of wgmma that is not awaited",
    ),
    "wgmma that nobody awaits": (
        wgmma(after="wgmma.commit_group.sync.aligned; ret;"),
        "wgmma that nobody awaits",
    ),
    "wgmma of what another one computes": (
        wgmma(
            before=ZEROS + PRODUCT_FENCE,
            after=product(range(30, 38), range(14, 18)) + COMMIT_AND_WAIT,
        ),
        "a result of wgmma that is not awaited",
    ),
    "wgmma into what another one reads": (
        wgmma(
            before=ZEROS + PRODUCT_FENCE,
            after=product(range(10, 18), range(30, 34)) + COMMIT_AND_WAIT,
        ),
        "a use of a register that wgmma reads",
    ),
    "wgmma of an awaited result without another fence": (
        wgmma(
            before=ZEROS + PRODUCT_FENCE,
            after=COMMIT_AND_WAIT + product(range(30, 38), range(14, 18)) + COMMIT_AND_WAIT,
        ),
        "wgmma of registers without a fence",
    ),
    "wgmma of two shapes with the same registers": (
        wgmma(after=product(range(14, 18), range(10, 14), 8) + COMMIT_AND_WAIT),
        "wgmma of registers without a fence",
    ),
    "wgmma whose input is read": (
        wgmma(after=f"mov.b32 %r50, %r12; {COMMIT_AND_WAIT}"),
        "a use of a register that wgmma reads",
    ),
    "wgmma whose input changes": (
        wgmma(after=f"mov.b32 %r12, %r3; {COMMIT_AND_WAIT}"),
        "a use of a register that wgmma reads",
    ),
    "wgmma whose shared memory changes": (
        wgmma(after=f"st.shared.b32 [%r5], %r3; {COMMIT_AND_WAIT}"),
        "a change of shared memory that wgmma may read",
    ),
    "wgmma before a barrier": (
        wgmma(after=f"bar.sync 0; {COMMIT_AND_WAIT}"),
        "a change of shared memory that wgmma may read",
    ),
    "a copy that is read too early": (COPY.format(wait=""), "a copy that was not awaited"),
    "a copy that nobody awaits": (
        COPY.format(wait="").partition("ld.shared")[0],
        "a copy that nobody",
    ),
    "too many groups left": (
        COPY.format(wait="cp.async.wait_group 1;"),
        "a copy that was not awaited",
    ),
    "atomics of one block": (
        "atom.global.cta.relaxed.add.u32 %r4, [%d1], 1;",
        "an atomic of one block in a grid of several",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_findings(name: str):
    body, message = FOUND[name]
    given = np.zeros(2048, "u4")
    with pytest.raises(Finding, match=message):
        launch(body, given, np.full(256, 7, "u4"), blocks=2, threads=128, shared=2048)


def test_awaited_copies():
    given = np.arange(256, dtype="u4")
    result = launch(
        COPY.format(wait="cp.async.wait_group 0;"),
        given,
        np.zeros(64, "u4"),
        threads=64,
        shared=1024,
    )
    assert result.tolist() == given[::4].tolist()
    fewer = COPY.replace("[%d3], 16;", "[%d3], 16, 8;").replace("[%r5];\nmad", "[%r5+{part}];\nmad")
    for part, exact in ((4, given[1:128:4]), (8, np.zeros(32))):  # zeros after 8 bytes
        body = fewer.format(wait="cp.async.wait_all;", part=part)
        result = launch(body, given, np.ones(32, "u4"), shared=1024)
        assert result.tolist() == exact.tolist()


def test_awaited_products():
    """A loop that waits for all but its last product, and then for that."""

    def loop(before: str, left: int) -> str:
        return (
            f"mov.u32 %r6, 0; $loop: {before} {product(range(14, 22), range(10, 14))}"
            "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1; add.u32 %r6, %r6, 1;"
            f"setp.lt.u32 %p3, %r6, 3; @%p3 bra $loop; wgmma.wait_group.sync.aligned {left};"
        )

    def result(after: str) -> np.ndarray:
        given = np.tile(np.float16([1, 2]), 2048).view("u4")
        given[4 * 128 : 12 * 128] = 0  # C
        text = wgmma(after=after)
        return launch(text, given, np.zeros(1024, "u4"), threads=128, shared=2048).view("f4")

    once = result(COMMIT_AND_WAIT)
    assert (once > 0).all()
    assert (result(loop("", left=0)) == 4 * once).all()
    with pytest.raises(Finding, match="a result of wgmma that is not awaited"):
        result(loop("", left=1))
    with pytest.raises(Finding, match="a use of a register that wgmma reads"):
        result(loop("mov.b32 %r12, %r12;", left=0))


def test_new_memory():
    body = ADDRESS + "ld.global.b32 %r4, [%d2];"
    (kernel,) = kernels(KERNEL.format(body=body, threads=32, shared=""))
    new = np.full(32, CANARY, "u4")
    region = Region(new.ctypes.data, new.ctypes.data + new.nbytes, 4)
    region.unwritten = region.bytes.view("u4") == CANARY
    params = np.frombuffer(struct.pack("<QQ", 0, new.ctypes.data), np.uint8)
    launched = Launch(Program(kernel), (1, 1, 1), (32, 1, 1), params, 0, [region])
    with pytest.raises(Finding, match=r"unwritten memory \(global memory\).*thread 0"):
        run(launched)


def test_traffic():
    """A warp that takes one number in four asks for four times the sectors."""
    body = "mad.wide.u32 %d2, %r0, {step}, %d0; ld.global.b32 %r4, [%d2];"
    given = np.arange(1024, dtype="u4")
    given = given[-given.ctypes.data // 4 % 8 :][:512]  # begins at a sector
    for step, sectors in ((4, 4), (16, 16), (0, 1)):
        traffic: dict[str, Traffic] = {}
        launch(body.format(step=step), given, np.zeros(1, "u4"), traffic=traffic)
        counted = traffic["loads"]
        assert (counted.asked, counted.sectors) == (128, sectors)
        assert Traffic.moved(counted) == Traffic.moved(counted, counted) == sectors


def test_branches_that_never_ran():
    source = """
def kernel(x):
    y = x + 1
    if y > 2:
        y = 3
    else:
        for i in range(y):
            y += i
    return y
"""
    (function,) = ast.parse(source).body
    assert isinstance(function, ast.FunctionDef)
    compiled = {3, 4, 5, 7, 8}
    assert list(report._never_run(function.body, compiled, set())) == [3]
    assert list(report._never_run(function.body, compiled, {3, 4})) == [5, 7]
    assert list(report._never_run(function.body, compiled, {3, 4, 5, 7})) == [8]
    assert list(report._never_run(function.body, compiled, {3, 5, 8})) == []
    assert list(report._never_run(function.body, {3, 5}, {3, 5})) == []


def test_lines_that_call_run_with_what_was_inlined():
    text = """
.file 1 "/kernels/a.py"
.file 2 "/kernels/b.py"
.entry tested() {
    .loc 1 7 0
    mov.u32 %r1, 1;
    .loc 2 3 0, function_name $str, inlined_at 1 8 4
    add.u32 %r1, %r1, 1;
    ret;
}
"""
    (kernel,) = kernels(text)
    moved, added, *_ = (i for block in kernel.blocks for i in block.instructions)
    assert report.lines_run_by([moved]) == {"kernels/a.py:7"}
    assert report.lines_run_by([added]) == {"kernels/b.py:3", "kernels/a.py:8"}


def test_more_shared_memory_than_a_gpu_has():
    sources = SimpleNamespace(kernels=lambda: {1: "tested"}, modules=list)
    machine = cuda_launches.Machine(sources)
    assert machine.set_attribute(1, cuda_launches.DYNAMIC_SHARED_OF_BLOCK, 99 << 10)
    assert not machine.launch(1, (1, 1, 1), (32, 1, 1), (99 << 10) + 4, 0)
    assert "101380 bytes of shared" in str(machine.error)


@pytest.mark.parametrize(
    ("grid", "block"), [((1, 65_536, 1), (32, 1, 1)), ((1, 1, 1), (2048, 1, 1))]
)
def test_grids_that_gpus_refuse(grid: tuple[int, int, int], block: tuple[int, int, int]):
    program: Any = SimpleNamespace(kernel=SimpleNamespace(name="tested"))
    with pytest.raises(ValueError, match="tested: more blocks or threads than a GPU takes"):
        run(Launch(program, grid, block, np.zeros(0, np.uint8), 0, []))


def test_cleared_memory_is_of_a_tensor():
    machine = cuda_launches.Machine(SimpleNamespace(kernels=dict, modules=list))
    x = torch.ones(4)
    machine.tensors = [x]
    assert machine.fill(x.data_ptr() + 4, 0, 8) and x.tolist() == [1, 0, 0, 1]
    assert not machine.fill(x.data_ptr() + 4, 0, 16)
