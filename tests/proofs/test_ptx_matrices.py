"""Where the PTX machine finds the elements of matrices in registers and shared memory, against the
layouts that the PTX manual draws. Needs neither Triton nor nvcc."""

import numpy as np
import pytest

from tests.helpers.ptx_kernels import launch, load_words, wgmma

RANDOM = np.random.default_rng(0)


def two(x: np.ndarray, y: np.ndarray, dtype: str) -> np.ndarray:
    """A register with x below and y above."""
    return bits_of(x, dtype) | bits_of(y, dtype) << 16


def bits_of(x: np.ndarray, dtype: str) -> np.ndarray:
    return x.astype("f2").view("u2").astype("u4") if dtype == "f16" else x.view("u4") >> 16


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_matrix_products(dtype: str):
    """Fragments as the manual draws them."""
    a, b, c = (RANDOM.integers(-8, 9, size).astype("f4") for size in ((16, 16), (16, 8), (16, 8)))
    lane = np.arange(32)
    g, t = lane // 4, lane % 4
    at = [(g + 8 * (i % 2), 2 * t + 8 * (i // 2)) for i in range(4)]
    of_a = [two(a[r, s], a[r, s + 1], dtype) for r, s in at]
    of_b = [two(b[r, g], b[r + 1, g], dtype) for r in (2 * t, 2 * t + 8)]
    of_c = [c[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)]
    given = np.stack([x.view("u4") for x in (*of_a, *of_b, *of_c)])
    regs = [f"%r{10 + i}" for i in range(len(given))]
    join = lambda x: "{" + ", ".join(x) + "}"  # noqa: E731
    operands = (regs[:4], regs[4:-4], regs[-4:])
    body = load_words(len(given)) + (
        f"mma.sync.aligned.m16n8k16.row.col.f32.{dtype}.{dtype}.f32 {{%f1, %f2, %f3, %f4}}, "
        f"{', '.join(map(join, operands))}; mad.wide.u32 %d3, %r0, 4, %d1;"
    )
    body += "".join(f"st.global.b32 [%d3+{128 * i}], %f{1 + i};" for i in range(4))
    result = launch(body, given, np.zeros((4, 32), "f4"))
    exact = np.array([(a @ b + c)[g + 8 * (i // 2), 2 * t + i % 2] for i in range(4)])
    np.testing.assert_array_equal(result, exact)


ROW_OF_LANE = """
mad.wide.u32 %d2, %r0, 16, %d0; ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%d2];
mov.u32 %r5, memory; shl.b32 %r4, %r0, 4; add.u32 %r5, %r5, %r4;
"""


@pytest.mark.parametrize("flip", [False, True])
def test_matrix_moves(flip: bool):
    """ldmatrix and stmatrix of four matrices of 8 × 8: lane i has the address of row i."""
    trans = ".trans" if flip else ""
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2 + np.arange(2)[:, None]  # of what a lane's register holds
    elements = np.arange(256, dtype="u2")
    result = launch(
        ROW_OF_LANE + "st.shared.v4.b32 [%r5], {%r10, %r11, %r12, %r13}; bar.sync 0;"
        f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r20, %r21, %r22, %r23}}, [%r5];"
        "mad.wide.u32 %d3, %r0, 16, %d1; st.global.v4.b32 [%d3], {%r20, %r21, %r22, %r23};",
        elements.view("u4"),
        np.zeros(128, "u4"),
        shared=512,
    )
    matrices = elements.reshape(4, 8, 8)
    matrices = matrices.swapaxes(1, 2) if flip else matrices
    exact = matrices[:, row, column].transpose(2, 0, 1)  # [lane, matrix, half]
    assert (result.view("u2").reshape(32, 4, 2) == exact).all()
    result = launch(
        ROW_OF_LANE
        + f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r5], {{%r10, %r11, %r12, %r13}};"
        "bar.sync 0; ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r5];"
        "mad.wide.u32 %d3, %r0, 16, %d1; st.global.v4.b32 [%d3], {%r20, %r21, %r22, %r23};",
        elements.view("u4"),
        np.zeros(128, "u4"),
        shared=512,
    )
    exact = np.zeros((4, 8, 8), "u2")
    exact[:, row, column] = elements.reshape(32, 4, 2).transpose(1, 2, 0)
    exact = exact.swapaxes(1, 2) if flip else exact
    assert (result.view("u2").reshape(4, 8, 8) == exact).all()


@pytest.mark.parametrize("n_major", [0, 1])
@pytest.mark.parametrize(("swizzle", "width"), [(1, 128), (2, 64), (3, 32)])
@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_products_of_warp_groups(dtype: str, swizzle: int, width: int, n_major: int):
    """Parts of 16 bytes of B are swizzled by bits 7 and up of their address."""
    a, b, c = (RANDOM.integers(-8, 9, size).astype("f4") for size in ((64, 16), (16, 16), (64, 16)))
    thread = np.arange(128)
    g, t, w = thread % 32 // 4, thread % 4, 16 * (thread // 32)
    at = [(w + g + 8 * (i % 2), 2 * t + 8 * (i // 2)) for i in range(4)]
    of_a = [two(a[r, s], a[r, s + 1], dtype) for r, s in at]
    of_c = [(w + g + 8 * (i // 2 % 2), 8 * (i // 4) + 2 * t + i % 2) for i in range(8)]
    memory = np.zeros(1024, "u2")
    for k in range(16):
        for n in range(16):
            row, inner = (k, n) if n_major else (n, k)
            address = row * width + 2 * inner
            address ^= (address >> 7 & width // 16 - 1) << 4
            memory[address // 2] = bits_of(b[k, n : n + 1], dtype)[0]
    given = np.stack(
        [*of_a, *(c[at].view("u4") for at in of_c), *memory.view("u4").reshape(4, 128)]
    )
    text = wgmma(swizzle, width, n_major, dtype)
    result = launch(text, given, np.zeros((8, 128), "f4"), threads=128, shared=2048)
    exact = a @ b + c
    np.testing.assert_array_equal(result, [exact[at] for at in of_c])
