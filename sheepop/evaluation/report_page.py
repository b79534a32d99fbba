"""The page of `report.py`, as a Jinja template. It may load nothing from anywhere: its policy forbids it."""

# The head of every page of this kind, with its style; `name` is the page's.
HEAD = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{{ name }} · sheepop report</title>
<style>
:root {
  --paper: #f6f7f9; --card: #ffffff; --ink: #1f2328; --muted: #5f6872; --line: #e1e4e8; --accent: #b84a05;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1115; --card: #171a1f; --ink: #e6e8eb; --muted: #939ba5; --line: #2b3037; --accent: #ff9a52;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif;
}
h1 { margin: 0; font-size: 1.7rem; overflow-wrap: anywhere; }
h2 { margin: 2.6rem 0 .8rem; font-size: 1.15rem; }
.muted { color: var(--muted); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(9rem, 22%), 1fr)); gap: .7rem; }
.figures { margin: 1.5rem 0 0; }
.figures div { padding: .8rem 1rem; display: flex; flex-direction: column; }
.figures dt { color: var(--muted); font-size: .85rem; }
.figures dd { margin: 0; }
.figures .value { font-size: 1.6rem; font-weight: 650; line-height: 1.3; font-variant-numeric: tabular-nums; }
.figures .detail { color: var(--muted); font-size: .8rem; }
.figures div:first-child .value { color: var(--accent); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: .7rem; }
.plots img { display: block; width: 100%; height: auto; border-radius: .6rem; }
figure { margin: 0 0 .7rem; padding: .9rem 1rem; }
figcaption { color: var(--muted); font-size: .85rem; margin-bottom: .3rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; font: .9rem/1.5 ui-monospace, monospace; }
pre .prompt { font-weight: 700; }
.commands pre { padding: .7rem 1rem; }
.commands p { margin: .9rem 0 .3rem; }
summary { cursor: pointer; padding: .4rem 0; }
table { width: 100%; border-collapse: collapse; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .35rem .8rem; border-top: 1px solid var(--line); }
thead th { border: 0; color: var(--muted); font-weight: 500; }
td, tbody th { overflow-wrap: anywhere; }
tbody th { font: .85rem/1.5 ui-monospace, monospace; }
.changed td:nth-child(2) { font-weight: 700; color: var(--accent); }
@media (max-width: 40rem) {
  thead { display: none; }
  tr { display: grid; grid-template-columns: 1fr auto; }
  td:nth-child(3) { grid-column: 1 / -1; border: 0; padding-top: 0; color: var(--muted); }
}
</style>
</head>
"""

PAGE = (
    HEAD
    + """\
<body>
<h1>{{ name }}</h1>
<div class="muted">a training run of sheepop</div>

{% if figures %}
<dl class="figures">
{% for figure in figures %}
  <div class="card">
    <dt>{{ figure.name }}</dt><dd class="value">{{ figure.value }}</dd><dd class="detail">{{ figure.detail }}</dd>
  </div>
{% endfor %}
</dl>
{% endif %}

<h2>How it learned</h2>
<div class="plots">
{% for title, light, dark in plots %}
  <picture class="card">
    <source srcset="{{ dark }}" media="(prefers-color-scheme: dark)">
    <img src="{{ light }}" alt="{{ title }} over the optimizer steps">
  </picture>
{% endfor %}
</div>

{% macro show(sample) %}
<figure class="card">
  <figcaption>step {{ "{:,}".format(sample.step) }}</figcaption>
  <pre><span class="prompt">{{ sample.prompt }}</span>{{ sample.text }}</pre>
</figure>
{% endmacro %}
{% if samples %}
<h2>What it wrote along the way</h2>
{% for sample in samples %}
{{ show(sample) }}
{% endfor %}
{% if other_samples %}
<details>
<summary>{{ other_samples | length }} more samples</summary>
{% for sample in other_samples %}
{{ show(sample) }}
{% endfor %}
</details>
{% endif %}
{% endif %}

<h2>What to do next</h2>
<div class="commands">
{% for purpose, command in commands %}
  <p>{{ purpose }}</p>
  <pre class="card">{{ command }}</pre>
{% endfor %}
</div>

{% if settings %}
<h2>Settings</h2>
<details>
<summary>All {{ settings | length }} settings; those in colour are not the defaults</summary>
<table class="card">
<thead><tr><th>setting</th><th>value</th><th>meaning</th></tr></thead>
<tbody>
{% for setting in settings %}
<tr{% if not setting.is_default %} class="changed"{% endif %}>
  <th scope="row">{{ setting.name }}</th><td>{{ setting.value }}</td><td>{{ setting.description }}</td>
</tr>
{% endfor %}
</tbody>
</table>
</details>
{% endif %}
</body>
</html>
"""
)
