"""What the pictures of the benchmarks share."""

from collections.abc import Sequence

from matplotlib.axes import Axes

OURS, PALE, OTHER, GREY = "#1f6f54", "#9ecae1", "#b9c2bd", "#555555"


def machine(run: dict) -> str:
    cuda = f", CUDA {run['cuda']}" if run["device_type"] == "cuda" else ""
    return (
        f"{run['device']}; torch {run['torch']}{cuda}, anchorops {run['anchorops']} at commit "
        f"{run['commit']}"
    )


def medians(run: dict) -> str:
    """The caption of a picture of times."""
    return f"{machine(run)}; medians"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def bars(
    axis: Axes, values: dict[str, float], texts: Sequence[str], colours: Sequence[str], title: str
) -> None:
    """Horizontal bars by their names, with texts at their ends."""
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    drawn = axis.barh([*values], [*values.values()], color=colours)
    axis.bar_label(drawn, texts, padding=4, fontsize=8, bbox=clear)
    axis.set_xlim(0, 1.35 * max(values.values()))
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold")
