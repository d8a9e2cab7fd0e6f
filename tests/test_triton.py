"""How many variants of the Triton kernels images of many sizes need, and how many pixels a lane
has. The kernels themselves run in the machine for PTX, by `make proofs`."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="CPU builds of torch do not include Triton")


@pytest.mark.parametrize("stride", [4, 8])
def test_sizes_share_variants(stride: int):
    """Images are evaluated, and some are trained, in their own sizes. Each variant takes seconds to
    compile."""
    from without_gpu.machine_code import variants
    from without_gpu.variants import launch_keys, launch_loss, native_sizes

    for sums in (False, True):
        found = variants("sm_90", native_sizes(stride, launch_loss, sums))
        assert found["_softmax_moments_kernel"] <= 3
        assert found["_softmax_moments_bwd_kernel"] <= 4
    assert variants("sm_90", native_sizes(stride, launch_keys)) == {"_class_keys_kernel": 1}


@pytest.mark.parametrize(
    ("logits", "labels", "pixels"),
    [
        (torch.zeros(2, 3, 6, 10), torch.zeros(2, 6, 10), 4),
        (torch.zeros(4, 3, 6, 10)[::2], torch.zeros(6, 10).expand(2, 6, 10), 4),
        (torch.zeros(2, 3, 5, 9), torch.zeros(2, 5, 9), 1),  # an odd number
        (torch.zeros(2, 3, 6, 12)[..., :10], torch.zeros(2, 6, 10), 1),  # rows with gaps
        (torch.zeros(2, 3, 6, 10), torch.zeros(2, 10, 6).mT, 1),
        (torch.zeros(2, 3, 6, 10), torch.zeros(122)[2:].view(2, 6, 10), 1),  # not at 16 bytes
        (torch.zeros(2, 181).as_strided((2, 3, 6, 10), (181, 60, 10, 1)), torch.zeros(2, 6, 10), 1),
    ],
)
def test_pixels_of_a_lane_at_full_resolution(logits: Tensor, labels: Tensor, pixels: int):
    """Several, only if they follow each other in memory at addresses that one access can have."""
    from anchorops.kernels.upsampling import upsampling_of

    height, width = logits.shape[2:]
    found = upsampling_of(logits, height, width, False, maps=(labels, None))
    assert found.cells.x.pixels == pixels and found.cells.columns == (0,)
    assert found.lanes == logits[0, 0].numel() // pixels
    assert upsampling_of(logits, height, width, False).cells.x.pixels == 1


@pytest.mark.parametrize(("height", "width"), [(46_349, 46_351), (2**15, 2**16)])
def test_images_of_many_pixels_are_refused(height: int, width: int):
    """Programs number the pixels of an image in 32 bits."""
    from anchorops.kernels.class_keys import class_keys
    from anchorops.kernels.upsampling import upsampling_of

    logits = torch.empty(1, 2, height, width, dtype=torch.bfloat16, device="meta")
    labels = torch.empty(1, height, width, dtype=torch.uint8, device="meta")
    for maps in (None, (labels,)):
        with pytest.raises(ValueError, match=r"fewer than 2\^31 positions"):
            upsampling_of(logits, height, width, False, maps=maps)
    with pytest.raises(ValueError, match=r"class_keys: expected .* fewer than 2\^31 pixels"):
        class_keys(labels.mT, width, height, 2, False, 255)


MACHINE_CODE = """
.L_x_0:
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   MUFU.EX2 R6, R5 ;
        /*0030*/                   LDG.E.64 R4, desc[UR4][R8.64] ;
        /*0040*/                   IADD3 R8, R8, UR4, RZ ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 BRA `(.L_x_0) ;
.L_x_2:
        /*0070*/                   BRA `(.L_x_2) ;
"""


def test_loops_of_machine_code():
    """The innermost one, of four instructions, with one exponential. The load of R4 and R5
    is used three instructions later, in the next iteration; UR4 is another register."""
    from without_gpu.machine_code import loops_of

    assert loops_of(MACHINE_CODE) == [(4, 1, 1, 3)]
