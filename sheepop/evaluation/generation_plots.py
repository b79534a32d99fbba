"""Pictures of a comparison of ways to generate, in the colours of a run's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sheepop.evaluation.plots import LIGHT, new_axes, plain_log_ticks, set_title, to_png
from sheepop.utils.files import write_atomic

# Of each picture the figure, its title, what stands below it, and by what it is divided.
PICTURES = {
    "first_token": ("time_to_first_token_seconds", "Time to the first token", "milliseconds, logarithmic", 1e-3),
    "tokens_per_second": ("tokens_per_second", "Tokens per second", "after the first one, logarithmic", 1.0),
    "memory": ("memory_bytes", "Memory beside the model", "megabytes", 1e6),
}


def write_generation_plots(measurements: Sequence[Any], folder: Path) -> list[Path]:
    """Draw each of `PICTURES` over the length of the prompt, a line for each way, and return the files.

    Args:
        measurements: with `prompt_tokens`, `way`, and the figures.
        folder: is made.
    """
    from matplotlib.ticker import FuncFormatter

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, (figure_name, title, detail, unit) in PICTURES.items():
        figure, axes = new_axes(LIGHT)
        set_title(axes, LIGHT, title, detail)
        for way, color in (("naive", LIGHT.val), ("optimized", LIGHT.train)):
            own = [each for each in measurements if each.way == way]
            lengths, values = [each.prompt_tokens for each in own], [getattr(each, figure_name) / unit for each in own]
            axes.plot(lengths, values, color=color, marker="o", linewidth=2, label=way)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        if "logarithmic" in detail:
            axes.set_yscale("log")
            plain_log_ticks(axes)
        else:
            axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of the prompt", color=LIGHT.muted, fontsize=10)
        axes.legend(frameon=False, labelcolor=LIGHT.ink, fontsize=10)
        paths.append(folder / f"{name}.png")
        write_atomic(paths[-1], to_png(figure))
    return paths
