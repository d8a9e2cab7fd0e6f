"""The program anchorops-train. It handles signals before the imports, which take seconds."""

from collections.abc import Sequence

from .signals import end_at_once


def main(arguments: Sequence[str] | None = None) -> None:
    with end_at_once.installed():
        from . import commands

        commands.main(arguments)


if __name__ == "__main__":
    main()
