"""An inspection as one page with its pictures inside: a run's report in style, and loading nothing from anywhere."""

from pathlib import Path
from typing import Any

from sheepop.data.inspection_table import examples_of, rows_of
from sheepop.evaluation.inspection_plots import INSPECTION_PLOTS, render_inspection
from sheepop.evaluation.plots import DARK, LIGHT
from sheepop.evaluation.report import Figure, as_url
from sheepop.evaluation.report_page import HEAD
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import write_atomic
from sheepop.utils.logging import format_count

PAGE = (
    HEAD
    + """\
<body>
<h1>{{ name }}</h1>
<div class="muted">a text, inspected by sheepop</div>

<dl class="figures">
{% for figure in figures %}
  <div class="card">
    <dt>{{ figure.name }}</dt><dd class="value">{{ figure.value }}</dd><dd class="detail">{{ figure.detail }}</dd>
  </div>
{% endfor %}
</dl>

<h2>What to do with it</h2>
{% for text in advice %}
<p>{{ text }}</p>
{% endfor %}
{% if warnings %}
<h2>Mind</h2>
<ul>
{% for text in warnings %}
  <li>{{ text }}</li>
{% endfor %}
</ul>
{% endif %}

<h2>What is in it</h2>
<div class="plots">
{% for title, light, dark in plots %}
  <picture class="card">
    <source srcset="{{ dark }}" media="(prefers-color-scheme: dark)">
    <img src="{{ light }}" alt="{{ title }}">
  </picture>
{% endfor %}
</div>

<h2>Figures</h2>
<table class="card">
<tbody>
{% for row_name, value in rows %}
<tr><th scope="row">{{ row_name }}</th><td>{{ value }}</td></tr>
{% endfor %}
</tbody>
</table>

<h2>Tokens</h2>
<table class="card">
<thead><tr><th>tokenizer</th><th>entries</th><th>bytes per token</th><th>tokens of the whole text</th></tr></thead>
<tbody>
{% for row in tokenizers %}
<tr>
  <th scope="row">{{ row.name }}</th><td>{{ "{:,}".format(row.vocab_size) }}</td>
  <td>{{ "%.2f" | format(row.bytes_per_token) }}</td><td>{{ "{:,}".format(row.tokens) }}</td>
</tr>
{% endfor %}
</tbody>
</table>

{% for title, texts in examples %}
<h2>{{ title }}</h2>
{% for text in texts %}
<figure class="card"><pre>{{ text }}</pre></figure>
{% endfor %}
{% endfor %}
</body>
</html>
"""
)


def write_inspection_page(result: dict[str, Any], path: Path) -> None:
    """Write the page of what `inspect_sources` returned.

    Raises:
        ConfigError: `path` is a folder, or lies where nothing can be written.
    """
    if path.is_dir():
        raise ConfigError(f"The page {path} is a folder. Name a file, for instance {path / 'inspection.html'}.")
    page = inspection_page(result)
    try:
        write_atomic(path, page)
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise ConfigError(f"The page {path} cannot be written: {error.strerror}. Choose another place.") from None


def inspection_page(result: dict[str, Any]) -> str:
    """Return the page as HTML."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        name=", ".join(Path(source).name or source for source in result["sources"]),
        figures=figures_of(result),
        advice=result["advice"]["text"],
        warnings=result["warnings"],
        plots=[
            (name, *(as_url(render_inspection(name, result, theme)) for theme in (LIGHT, DARK)))
            for name in INSPECTION_PLOTS
        ],
        rows=rows_of(result),
        tokenizers=result["tokenizers"],
        examples=examples_of(result),
    )


def figures_of(result: dict[str, Any]) -> list[Figure]:
    """Return the figures to see first."""
    advice, duplicates = result["advice"], result["duplicates"]
    return [
        Figure("parameters", format_count(advice["parameters"]), "that this text can feed"),
        Figure("text", format_count(result["bytes"]), f"bytes in {result['documents']:,} documents"),
        Figure("tokens", format_count(advice["tokens"]), f"of a vocabulary of {advice['vocab_size']:,}"),
        Figure(
            "duplicates",
            f"{duplicates['exact']['share'] + duplicates['near']['share']:.1%}",
            "of the documents, near ones included",
        ),
    ]
