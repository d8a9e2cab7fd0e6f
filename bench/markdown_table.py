"""Tables of the documents and of the reports."""

from collections.abc import Collection, Iterable, Sequence


def markdown_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, words: Collection[int] = (0,)
) -> str:
    """words: the columns that contain words; the others contain numbers, at the right."""

    def line(cells: Sequence[object]) -> str:
        return f"| {' | '.join(map(str, cells))} |"

    aligned = ("---" if column in words else "--:" for column in range(len(header)))
    return "\n".join([line(header), f"|{'|'.join(aligned)}|", *map(line, rows)])
