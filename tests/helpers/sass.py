"""Machine code written by hand, for the time model."""

from time_model import blocks_of

NONE = 7  # no scoreboard


def line(text: str, stall: int = 1, write: int = NONE, read: int = NONE, wait: int = 0) -> str:
    """An instruction as `nvdisasm -hex` prints it."""
    high = (stall | write << 5 | read << 8 | wait << 11) << 41
    low = (
        "        /*0000*/                   {} ;   /* 0x00000a00ff017b82 */\n    /* 0x{:016x} */\n"
    )
    return low.format(text, high)


def path(*lines: str) -> list:
    (block, *_) = blocks_of("".join(lines))
    return block.instructions
