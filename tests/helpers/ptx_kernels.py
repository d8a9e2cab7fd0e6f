"""Kernels of a few lines of PTX for the tests of the PTX machine (tests/proofs/ptx)."""

import struct

import numpy as np
from ptx.machine import Launch, Traffic, run
from ptx.memory import Region
from ptx.program import Program
from ptx.text import kernels

KERNEL = """
.version 8.0
.target sm_90
.address_size 64
.file 1 "source.py"
{shared}
.visible .entry tested(.param .u64 .ptr .global .align 1 in, .param .u64 .ptr .global .align 1 out)
.reqntid {threads}
{{
.reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<99>; .reg .b64 %d<99>; .reg .b32 %f<99>;
.loc 1 7 1
ld.param.u64 %d0, [in];
ld.param.u64 %d1, [out];
mov.u32 %r0, %tid.x;
mov.u32 %r1, %ctaid.x;
mov.u32 %r2, %ntid.x;
mad.lo.s32 %r3, %r1, %r2, %r0;
{body}
ret;
}}
"""
SHARED = ".extern .shared .align 16 .b8 memory[];"


def launch(
    body: str,
    given: np.ndarray,
    result: np.ndarray,
    *,
    blocks: int = 1,
    threads: int = 32,
    shared: int = 0,
    seed: int | None = None,
    traffic: dict[str, Traffic] | None = None,
) -> np.ndarray:
    """%d0 and %d1 are the addresses of `given` and `result`, %r3 the thread in the grid."""
    text = KERNEL.format(body=body, threads=threads, shared=SHARED if shared else "")
    (kernel,) = kernels(text)
    regions = []
    for x in (given, result):
        begin = x.ctypes.data
        regions.append(Region(begin, begin + x.nbytes, x.itemsize))
    regions[1].track(threads, replicas=True)
    params = np.frombuffer(struct.pack("<QQ", given.ctypes.data, result.ctypes.data), np.uint8)
    regions.sort(key=lambda region: region.begin)
    program = Program(kernel)
    run(Launch(program, (blocks, 1, 1), (threads, 1, 1), params, shared, regions), seed, traffic)
    return result


def load_words(count: int, lanes: int = 32) -> str:
    """[count, lanes] words into %r10, %r11, …"""
    loads = (f"ld.global.b32 %r{10 + i}, [%d2+{4 * lanes * i}];" for i in range(count))
    return "mad.wide.u32 %d2, %r0, 4, %d0;" + "".join(loads)


FENCE = "fence.proxy.async.shared::cta;"
COMMIT_AND_WAIT = "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"


def wgmma(
    swizzle: int = 1,
    width: int = 128,
    n_major: int = 0,
    dtype: str = "f16",
    fence: str = FENCE,
    change: str = "",
    before: str = "wgmma.fence.sync.aligned;",
    after: str = COMMIT_AND_WAIT,
) -> str:
    """Each of 128 threads loads four words of A, eight of C, and four of B, which lies in shared
    memory in rows of `width` bytes. `change`: of the product's descriptor %d5. `before` and `after`
    the product: how it is fenced and awaited."""
    store_b = "".join(f"st.shared.b32 [%r5+{512 * i}], %r{22 + i};" for i in range(4))
    store_c = "".join(f"st.global.b32 [%d3+{512 * i}], %r{14 + i};" for i in range(8))
    return f"""
    {load_words(16, 128)}
    mov.u32 %r5, memory; shl.b32 %r4, %r0, 2; add.u32 %r5, %r5, %r4;
    {store_b} {fence} bar.sync 0;
    {before}
    mov.b64 %d5, {(8 * width >> 4) << 32 | swizzle << 62};
    setp.eq.u32 %p1, %r0, %r0; {change}
    wgmma.mma_async.sync.aligned.m64n16k16.f32.{dtype}.{dtype} {{%r14, %r15, %r16, %r17, %r18, %r19,
    %r20, %r21}}, {{%r10, %r11, %r12, %r13}}, %d5, %p1, 1, 1, {n_major};
    {after}
    mad.wide.u32 %d3, %r0, 4, %d1; {store_c}
    """
