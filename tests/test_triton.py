"""How many variants of the Triton kernels images of many sizes need. The kernels themselves run in
the machine for PTX, by `make proofs`."""

import pytest

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")


@pytest.mark.parametrize("stride", [4, 8])
def test_sizes_share_variants(stride: int):
    """Images are evaluated, and some are trained, in their own sizes. Each variant takes seconds to
    compile."""
    from kernels_report import native_sizes, variants

    found = variants("sm_90", native_sizes(stride))
    assert found["_softmax_moments_kernel"] <= 3
    assert found["_softmax_moments_bwd_kernel"] <= 4
