"""Pictures of a run, drawn from its `metrics.jsonl`."""

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sheepop.utils.errors import CheckpointError
from sheepop.utils.files import read_json, write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; blue and orange are told apart by nearly everyone."""

    paper: str
    ink: str
    muted: str
    grid: str
    train: str
    val: str


LIGHT = Theme(paper="#ffffff", ink="#1f2328", muted="#6e7781", grid="#e6e9ec", train="#2166c4", val="#d1570a")
DARK = Theme(paper="#171a1f", ink="#e6e8eb", muted="#939ba5", grid="#2b3037", train="#6aa7ff", val="#ff9a52")


@dataclass(frozen=True)
class RunRecord:
    """The lines of `metrics.jsonl` by type, and the size of the vocabulary where the run's settings tell it."""

    train: list[dict[str, Any]]
    val: list[dict[str, Any]]
    vocab_size: int | None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a `metrics.jsonl` or `samples.jsonl`; a last line that is still being written is left out.

    Raises:
        CheckpointError: there is no such file, or a line before the last is not a JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"There is no {path.name} in {path.parent}, so it is not the folder of a run. Name the folder that "
            "`sheepop train` wrote to."
        ) from None
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError("not an object")
        except ValueError:
            if number == len(lines):
                break
            raise CheckpointError(f"Line {number} of {path} is damaged: it is not a JSON object.") from None
        records.append(record)
    return records


def read_run(run: Path) -> RunRecord:
    """Read what the pictures of a run are drawn from.

    Raises:
        CheckpointError: the folder is not a run, or its files are damaged.
    """
    records = read_metrics(run / METRICS_FILE)
    config = read_json(run / CONFIG_FILE, CheckpointError) if (run / CONFIG_FILE).exists() else {}
    return RunRecord(
        train=[record for record in records if record.get("type") == "train"],
        val=[record for record in records if record.get("type") == "val"],
        vocab_size=config.get("model", {}).get("vocab_size"),
    )


def write_plots(run: Path) -> list[Path]:
    """Draw `plots/{loss,perplexity,learning_rate,grad_norm,throughput}.png` of a run and return their paths.

    Raises:
        CheckpointError: the folder is not a run.
    """
    record = read_run(run)
    paths = []
    for name in PLOTS:
        path = run / "plots" / f"{name}.png"
        write_atomic(path, render(name, record, LIGHT))
        paths.append(path)
    return paths


def render(name: str, record: RunRecord, theme: Theme) -> bytes:
    """Draw one of `PLOTS` and return it as PNG."""
    figure, axes = new_axes(theme)
    PLOTS[name](axes, record, theme)
    axes.set_xlim(left=0)
    if not axes.lines:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color=theme.muted)
    return to_png(figure)


def new_axes(theme: Theme) -> tuple["Figure", "Axes"]:
    """Return an empty picture in the project's size and colours, its x axis made for optimizer steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.7), dpi=180, facecolor=theme.paper, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.16, h_pad=0.14)  # type: ignore[union-attr, call-arg]
    axes = figure.add_subplot(facecolor=theme.paper)
    _prepare(axes, theme)
    return figure, axes


def to_png(figure: "Figure") -> bytes:
    """Return a picture as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def series(records: Sequence[dict[str, Any]], key: str) -> tuple[Floats, Floats]:
    """Return the steps at which `key` was recorded and is a number, and its values."""
    points = [(record["step"], record[key]) for record in records if isinstance(record.get(key), (int, float))]
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


def smooth(values: Floats) -> Floats:
    """Return a curve through noisy values: a running mean over a twenty-fifth of the series, taken twice.

    The window is centred, so the curve does not lag behind. It opens from the first value on, so the steep beginning
    of a training run keeps its shape, and at the end it reaches back only.
    """
    index = np.arange(len(values))
    reach = len(values) // 50
    first = np.maximum(index - reach, 0)
    last = np.minimum(index + np.minimum(index, reach), len(values) - 1)
    for _ in range(2):
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[last + 1] - sums[first]) / (last + 1 - first)
    return values


def _draw_loss(axes: "Axes", record: RunRecord, theme: Theme) -> None:
    set_title(axes, theme, "Loss", "nats per token, lower is better")
    steps, losses = series(record.train, "loss")
    _raw_and_smooth(axes, steps, losses, theme, label="training")
    val_steps, val_losses = series(record.val, "loss")
    _validation(axes, val_steps, val_losses, theme, best=np.argmin, text="{:.3f}")
    if record.vocab_size and axes.lines:
        blind = math.log(record.vocab_size)
        axes.axhline(blind, color=theme.muted, linewidth=1.2, linestyle=(0, (1, 2)))
        axes.annotate(
            f"guessing blindly: ln {record.vocab_size:,} = {blind:.2f}",
            (1, blind),
            xycoords=("axes fraction", "data"),
            xytext=(-4, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            color=theme.muted,
            fontsize=9.5,
        )
    _legend(axes, theme)


def _draw_perplexity(axes: "Axes", record: RunRecord, theme: Theme) -> None:
    set_title(axes, theme, "Perplexity", "lower is better")
    axes.set_yscale("log")
    steps, losses = series(record.train, "loss")
    _raw_and_smooth(axes, steps, np.exp(np.minimum(losses, 700)), theme, label="training", smooth_in_log=True)
    val_steps, perplexities = series(record.val, "perplexity")
    _validation(axes, val_steps, perplexities, theme, best=np.argmin, text="{:.4g}")
    plain_log_ticks(axes)
    _legend(axes, theme)


def _draw_learning_rate(axes: "Axes", record: RunRecord, theme: Theme) -> None:
    set_title(axes, theme, "Learning rate", "")
    steps, rates = series(record.train, "learning_rate")
    _line(axes, steps, rates, theme.train)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylim(bottom=0)


def _draw_grad_norm(axes: "Axes", record: RunRecord, theme: Theme) -> None:
    set_title(axes, theme, "Gradient norm", "before clipping")
    axes.set_yscale("log")
    steps, norms = series(record.train, "grad_norm")
    positive = norms > 0
    _raw_and_smooth(axes, steps[positive], norms[positive], theme, label="", smooth_in_log=True)
    plain_log_ticks(axes)


def _draw_throughput(axes: "Axes", record: RunRecord, theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter

    steps, rates = series(record.train, "tokens_per_second")
    _, utilisation = series(record.train, "mfu")
    detail = "tokens per second"
    if len(rates):
        detail += f", median {np.median(rates):,.0f}"
    if len(utilisation):
        detail += f"; {np.median(utilisation):.0%} of peak FLOPs"
    set_title(axes, theme, "Throughput", detail)
    _raw_and_smooth(axes, steps, rates, theme, label="")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_ylim(bottom=0)


PLOTS: dict[str, Callable[["Axes", RunRecord, Theme], None]] = {
    "loss": _draw_loss,
    "perplexity": _draw_perplexity,
    "learning_rate": _draw_learning_rate,
    "grad_norm": _draw_grad_norm,
    "throughput": _draw_throughput,
}


def _prepare(axes: "Axes", theme: Theme) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(theme.muted)
    axes.grid(axis="y", color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=theme.muted, labelsize=10, length=0, pad=6)
    axes.tick_params(axis="y", which="minor", labelsize=10, length=0)
    axes.yaxis.offsetText.set_color(theme.muted)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("optimizer step", color=theme.muted, fontsize=10)
    axes.margins(x=0.02, y=0.08)


def set_title(axes: "Axes", theme: Theme, name: str, detail: str) -> None:
    """Write a bold title on the left, and behind it a detail in grey."""
    title = axes.set_title(name, loc="left", color=theme.ink, fontsize=13, fontweight="bold", pad=12)
    text = axes.annotate(
        detail, (1, 0.22), xycoords=title, xytext=(9, 0), textcoords="offset points", color=theme.muted, fontsize=10.5
    )
    text.set_in_layout(False)


def _line(axes: "Axes", steps: Floats, values: Floats, color: str, *, label: str = "", width: float = 2.0) -> None:
    if len(steps):
        marker = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=color, linewidth=width, marker=marker, label=label, solid_capstyle="round")


def _raw_and_smooth(
    axes: "Axes", steps: Floats, values: Floats, theme: Theme, *, label: str, smooth_in_log: bool = False
) -> None:
    """Draw what was recorded faintly, and over it what it amounts to."""
    smoothed = np.exp(smooth(np.log(values))) if smooth_in_log else smooth(values)
    if len(steps) > 1:
        axes.plot(steps, values, color=theme.train, linewidth=0.8, alpha=0.3)
    _line(axes, steps, smoothed, theme.train, label=label)


def _validation(
    axes: "Axes", steps: Floats, values: Floats, theme: Theme, *, best: Callable[[Floats], Any], text: str
) -> None:
    """Draw the validations as points, and write the number at the best one."""
    if not len(steps):
        return
    from matplotlib.patheffects import withStroke

    axes.plot(
        steps,
        values,
        color=theme.val,
        linewidth=1.4,
        marker="o",
        markersize=5,
        markeredgecolor=theme.paper,
        label="validation",
        zorder=3,
    )
    at = int(best(values))
    axes.annotate(
        text.format(values[at]),
        (steps[at], values[at]),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right" if steps[at] > 0.9 * axes.get_xlim()[1] else "center",
        color=theme.val,
        fontsize=11,
        fontweight="bold",
        path_effects=[withStroke(linewidth=3, foreground=theme.paper)],
        zorder=4,
    )


def _legend(axes: "Axes", theme: Theme) -> None:
    if axes.get_legend_handles_labels()[0]:
        axes.legend(
            loc="lower right",
            bbox_to_anchor=(1.02, 1.012),
            ncols=2,
            frameon=False,
            labelcolor=theme.ink,
            fontsize=10.5,
            handlelength=1.4,
            columnspacing=1.2,
        )


def plain_log_ticks(axes: "Axes") -> None:
    """Write 20 and 0.5 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
