"""Pictures of an inspection, in the colours of a run's."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sheepop.evaluation.plots import Theme, new_axes, set_title, to_png

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Draw = Callable[["Axes", dict[str, Any], Theme], None]
BARS = 8


def render_inspection(name: str, result: dict[str, Any], theme: Theme) -> bytes:
    """Draw one of `INSPECTION_PLOTS` and return it as PNG."""
    figure, axes = new_axes(theme)
    INSPECTION_PLOTS[name](axes, result, theme)
    return to_png(figure)


def _draw_lengths(axes: "Axes", result: dict[str, Any], theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    from sheepop.utils.logging import format_count

    histogram = result["lengths"]["histogram"]
    edges = np.array(histogram["edges"], dtype=np.float64)
    set_title(axes, theme, "Length of documents", "characters, logarithmic")
    for key, color, label in (("documents", theme.train, "documents"), ("characters", theme.val, "text in them")):
        counts = np.array(histogram[key], dtype=np.float64)
        axes.stairs(counts / max(1.0, counts.sum()), edges, fill=True, color=color, alpha=0.35)
        axes.stairs(counts / max(1.0, counts.sum()), edges, color=color, linewidth=1.6, label=label)
    filled = np.flatnonzero(np.array(histogram["documents"]))
    axes.set_xscale("log")
    axes.set_xlim(edges[filled[0]] / 1.3, edges[filled[-1] + 1] * 1.3)
    axes.xaxis.set_major_locator(LogLocator(subs=(1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0%}"))
    axes.set_xlabel("characters of a document", color=theme.muted, fontsize=10)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, labelcolor=theme.ink, fontsize=10, loc="upper left")


def _draw_tokenizers(axes: "Axes", result: dict[str, Any], theme: Theme) -> None:
    set_title(axes, theme, "Bytes per token", "on a sample; more is shorter for the model")
    rows = result["tokenizers"]
    names = [row["name"] if row["trained_here"] else "…" + row["name"][-14:] for row in rows]
    colors = [theme.train if row["trained_here"] else theme.val for row in rows]
    _bars(axes, theme, names, [row["bytes_per_token"] for row in rows], colors, "{:.2f}")


def _draw_languages(axes: "Axes", result: dict[str, Any], theme: Theme) -> None:
    set_title(axes, theme, "Languages", "share of the text, by a guess from its letters")
    shares = list(result["languages"]["shares"].items())
    shown = shares[:BARS] + ([("others", sum(share for _, share in shares[BARS:]))] if len(shares) > BARS else [])
    _bars(axes, theme, [code for code, _ in shown], [share for _, share in shown], [theme.train] * len(shown), "{:.1%}")


def _draw_problems(axes: "Axes", result: dict[str, Any], theme: Theme) -> None:
    set_title(axes, theme, "What filters would drop", "share of documents")
    quality, pii = result["quality"], result["pii"]
    shares = {
        "exact duplicates": result["duplicates"]["exact"]["share"],
        "near duplicates": result["duplicates"]["near"]["share"],
        "personal data": pii["documents_with"] / max(1, pii["documents"]),
    }
    shares |= {rule: count / max(1, quality["documents"]) for rule, count in list(quality["broken"].items())[:5]}
    _bars(axes, theme, list(shares), list(shares.values()), [theme.train] * 3 + [theme.val] * 5, "{:.1%}")


def _bars(axes: "Axes", theme: Theme, names: list[str], values: list[float], colors: list[str], text: str) -> None:
    places = range(len(names))
    axes.barh(places, values, color=colors[: len(names)], height=0.62)
    for place, value in zip(places, values, strict=True):
        axes.annotate(
            text.format(value),
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=theme.ink,
            fontsize=10,
        )
    axes.set_yticks(places, names, color=theme.ink)
    axes.set_ylim(max(4, len(names)) - 0.4, -0.6)  # the first on top, and few bars no thicker than many
    axes.set_xlim(0, 1.15 * max([*values, 1e-9]))
    axes.set(xlabel="", xticks=[])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)


INSPECTION_PLOTS: dict[str, Draw] = {
    "lengths": _draw_lengths,
    "tokenizers": _draw_tokenizers,
    "languages": _draw_languages,
    "problems": _draw_problems,
}
