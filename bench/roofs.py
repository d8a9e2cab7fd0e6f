"""What the device can do at most: copies and sums of a large tensor, and on a GPU exponentials.

    python bench/roofs.py [--rows ROWS.json]

A dry run needs TRITON_INTERPRET=1.
"""

from statistics import median
from typing import Any

import torch
import triton
import triton.language as tl
from record import head_of, parser_of, save

from anchorops.measure import bandwidth, in_turns

BLOCK, REPEATS = 1024, 1024  # numbers of a program; dependent exponentials of each


@triton.jit
def exponentials(x, BLOCK: tl.constexpr, REPEATS: tl.constexpr):
    """Four chains for each number, so that none waits for the one before."""
    at = x + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(at)
    b, c, d = a * 0.5, a * 0.25, a * 0.125
    for _ in range(REPEATS // 4):
        a, b, c, d = tl.exp2(-a), tl.exp2(-b), tl.exp2(-c), tl.exp2(-d)
    tl.store(at, a + b + c + d)


def exponentials_per_second(device: torch.device, programs: int) -> float:
    x = torch.rand(programs * BLOCK, device=device)

    def run() -> None:
        launch: Any = exponentials[(programs,)]
        launch(x, BLOCK, REPEATS, num_warps=8)

    run()
    (times,), _ = in_turns([run], device, seconds=0.0, rounds=10)
    return x.numel() * REPEATS / median(times)


def main() -> None:
    arguments = parser_of(__doc__).parse_args()
    device, tiny = torch.device(arguments.device), arguments.dry_run
    size = 2**16 if tiny else 2**28 if device.type == "cuda" else 2**26
    rates = bandwidth(torch.randn(size, device=device))
    rows = [{"name": name, "per_second": 1e9 * rates[f"{name}_gbps"]} for name in ("copy", "read")]
    if tiny or device.type == "cuda":
        rate = exponentials_per_second(device, 1 if tiny else 132 * 64)
        rows.append({"name": "exponentials", "per_second": rate})
    for row in rows:
        print(f"{row['name']:<14}{row['per_second']:.3g} a second")
    if arguments.rows:
        save(arguments.rows, "roofs", head_of(device), rows)


if __name__ == "__main__":
    main()
