"""A run as one page: `report.html`, with its pictures inside, readable offline, on a phone, by day and by night."""

import base64
import json
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sheepop.config import Config, describe_settings, load_config, parse_config
from sheepop.evaluation.plots import (
    CONFIG_FILE,
    DARK,
    LIGHT,
    PLOTS,
    read_metrics,
    read_run,
    render,
    write_plots,
)
from sheepop.evaluation.report_page import PAGE
from sheepop.models.sizing import count_parameters
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import read_json, write_atomic
from sheepop.utils.logging import format_count, format_duration

SAMPLES_FILE = "samples.jsonl"
SAMPLES_SHOWN = 6  # the first, the last and others between; the rest opens on a click


class Figure(NamedTuple):
    """One headline figure."""

    name: str
    value: str
    detail: str


class Setting(NamedTuple):
    """One line of the table of settings."""

    name: str
    value: str
    description: str
    is_default: bool


def write_report(run: Path) -> Path:
    """Write the plots and `report.html` of a run, and return the page's path.

    Raises:
        CheckpointError: the folder is not a run, or its files are damaged.
    """
    from jinja2 import Environment, StrictUndefined

    record = read_run(run)
    config = _read_config(run)
    samples = _read_samples(run)
    shown = evenly_spread(samples, SAMPLES_SHOWN)
    write_plots(run)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(PAGE).render(
        name=run.resolve().name,
        figures=headline(record.train, record.val, config),
        plots=[
            (name.replace("_", " "), as_url(render(name, record, LIGHT)), as_url(render(name, record, DARK)))
            for name in PLOTS
        ],
        samples=shown,
        other_samples=[sample for sample in samples if sample not in shown],
        settings=resolved_settings(config) if config else [],
        commands=next_commands(run, config),
    )
    path = run / "report.html"
    write_atomic(path, page)
    return path


def headline(train: Sequence[dict[str, Any]], val: Sequence[dict[str, Any]], config: Config | None) -> list[Figure]:
    """Return the figures to see first: those of the best validation, the size of the model, and what it cost."""
    figures = []
    scored = [record for record in val if record.get("loss") is not None]
    if scored:
        best = min(scored, key=lambda record: record["loss"])
        figures.append(Figure("validation loss", f"{best['loss']:.3f}", f"nats per token, at step {best['step']:,}"))
        for key, name, form, detail in (
            ("perplexity", "perplexity", "{:.4g}", "as many equally likely tokens"),
            ("bits_per_byte", "bits per byte", "{:.3f}", "of the original text"),
            ("accuracy", "accuracy", "{:.1%}", "of next tokens guessed right"),
        ):
            if best.get(key) is not None:
                figures.append(Figure(name, form.format(best[key]), detail))
    if config is not None:
        parameters = count_parameters(config.model).total
        figures.append(Figure("parameters", format_count(parameters), f"{config.model.num_layers} layers"))
    rates = [record["tokens_per_second"] for record in train if record.get("tokens_per_second") is not None]
    if rates:
        figures.append(Figure("throughput", format_count(statistics.median(rates)), "tokens per second, median"))
    lines = [*train, *val]
    if lines:
        last = max(lines, key=lambda record: record["step"])
        figures.append(Figure("tokens trained on", format_count(last["tokens"]), f"{last['step']:,} steps"))
        figures.append(Figure("training time", format_duration(last["elapsed_seconds"]), f"{last['epoch']:.2f} epochs"))
    return figures


def evenly_spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of the items, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(index * (len(items) - 1) / (count - 1))] for index in range(count)]


def resolved_settings(config: Config) -> list[Setting]:
    """Return every setting with its value, and whether a run that sets nothing would have the same."""
    values, defaults = config.model_dump(mode="json"), load_config().model_dump(mode="json")
    table = []
    for name, _, _, description in describe_settings():
        section, _, key = name.rpartition(".")
        value, default = (level[section][key] if section else level[key] for level in (values, defaults))
        shown = value if isinstance(value, str) else json.dumps(value)
        table.append(Setting(name, shown, description, is_default=value == default))
    return table


def next_commands(run: Path, config: Config | None) -> list[tuple[str, str]]:
    """Return what to do with the run now: pairs of a purpose and a command to type."""
    folder = shlex.quote(str(run))
    commands = [
        ("Let the model write", f"sheepop generate --checkpoint {folder} --prompt 'Once upon a time'"),
        ("Write together with it", f"sheepop chat --checkpoint {folder}"),
        ("Measure it on the whole validation split", f"sheepop evaluate --checkpoint {folder} --json"),
    ]
    if config is not None and config.data.path:
        data = shlex.quote(config.data.path)
        commands.append(("Go on after an interruption", f"sheepop train --data {data} --output {folder} --resume auto"))
    return commands


def _read_config(run: Path) -> Config | None:
    if not (run / CONFIG_FILE).exists():
        return None
    try:
        return parse_config(read_json(run / CONFIG_FILE, CheckpointError), source=str(run / CONFIG_FILE))
    except ConfigError as error:
        raise CheckpointError(f"The settings of the run {run} cannot be used. {error}") from None


def _read_samples(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / SAMPLES_FILE) if (run / SAMPLES_FILE).exists() else []


def as_url(png: bytes) -> str:
    """Return a picture as an address that holds it."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")
