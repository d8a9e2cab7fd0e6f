"""How many programs fill a GPU, and options of its compiler: fixed tables, no autotuning."""

from typing import Any

from triton.runtime import driver

# Enough programs to fill the device a few times, which balances tiles of unequal work.
_PROGRAMS = {"sm_80": 1536, "sm_90": 2048, "sm_100": 2304}
_PROGRAMS_ELSEWHERE = 2048
PARTIALS_IN_CACHE = 16 * 2**20  # bytes


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which is for kernels too, and therefore slow on the host."""
    return -(-a // b)


def architecture() -> str:
    target: Any = driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def programs() -> int:
    return _PROGRAMS.get(architecture(), _PROGRAMS_ELSEWHERE)


def registers(most: int) -> dict[str, int]:
    """An option that limits the registers of a thread, if the compiler has one."""
    return {"maxnreg": most} if architecture().startswith("sm_") else {}


def without_spills() -> dict[str, int]:
    """An option that lets ptxas use all registers. By default it would spill a few of them to run
    more programs at once than the memory needs."""
    return registers(255)
