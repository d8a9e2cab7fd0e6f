import pytest
import torch
from emulator import BACKEND

import anchorops as ao
from anchorops.ops.next_seed import next_seed


@pytest.mark.parametrize("update", [False, True])
@pytest.mark.parametrize("offset", [0, 5 << 32, (2**31 - 1) << 32])
def test_equals_the_formula(offset, update):
    seeds = []
    for backend in (BACKEND, "reference"):
        step = torch.tensor(2**33 + 7)
        with ao.use_backend(backend):
            seeds.append([next_seed(step, offset, update=update) for _ in "ab"])
        assert step == 2**33 + 7 + 2 * update
    assert seeds[0] == seeds[1] and seeds[0][0].shape == ()
    assert seeds[0][0].dtype == torch.int64


def test_registered_as_torch_expects():
    operator = getattr(torch.ops.anchorops.next_seed, BACKEND)
    for update in (False, True):
        torch.library.opcheck(operator, (torch.tensor(3), 1 << 32, update))
