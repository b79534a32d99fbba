"""Where the constants of `sheepop/training/recipe.py` come from: short runs of several sizes, vocabularies and lengths.

    python benchmarks/recipe.py run --text shakespeare=input.txt --text novels=FOLDER --results runs.json --seconds 170
    python benchmarks/recipe.py fit --results runs.json

`run` trains what is not yet in the results file, by the recipe's own rules, and stops before `--seconds` are over, so
that it can be repeated until all is there; `--only WORD` takes the runs whose name has the word. Losses are over
100,000 tokens spread over the held-out tenth. `fit` prints the table and the constants.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from common import show

from sheepop.config import load_config
from sheepop.data.prepare import prepare_on_the_way
from sheepop.models.sizing import count_parameters
from sheepop.training.dial import SAMPLE_BYTES, bits_of_compressor, sample_text
from sheepop.training.recipe import LAW, Law, TokenizerFacts, expected_bits_per_byte, settings_for
from sheepop.training.run import start_run

# Text, tokenizer, entries, (width, layers), millions of tokens seen.
GRID = [
    *product(["novels"], [("char", 0), ("bpe", 1024)], [(64, 2), (128, 4)], [0.4, 1.2]),
    *product(["shakespeare"], [("char", 0), ("bpe", 1024)], [(64, 2)], [0.4, 1.2]),
    ("shakespeare", ("bpe", 1024), (64, 2), 3.6),
    *product(["novels"], [("bpe", 4096)], [(64, 2)], [0.4, 1.2]),
    ("shakespeare", ("bpe", 1024), (128, 4), 1.2),
    ("shakespeare", ("bpe", 2048), (64, 2), 1.2),
    ("shakespeare", ("bpe", 512), (64, 2), 1.2),
    ("novels", ("bpe", 1024), (64, 2), 3.6),
    ("novels", ("bpe", 4096), (128, 4), 0.4),
    ("novels", ("bpe", 8192), (64, 2), 1.2),
    ("novels", ("bpe", 1024), (192, 6), 0.4),
    ("novels", ("bpe", 4096), (32, 2), 1.2),
    ("novels", ("bpe", 1024), (32, 2), 1.2),
    ("stories", ("bpe", 1024), (64, 2), 0.4),
    ("stories", ("bpe", 1024), (64, 2), 1.2),
]


def name_of(row: tuple[str, tuple[str, int], tuple[int, int], float]) -> str:
    text, (kind, entries), (width, layers), millions = row
    return f"{text} {kind}{entries or ''} {width}x{layers} {millions}M"


def train(text: str, path: Path, kind: str, entries: int, shape: tuple[int, int], tokens: float) -> dict[str, Any]:
    """Train one of the grid's runs, and return what it was and came to."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(tempfile.gettempdir()) / "recipe-data"
        corpus = prepare_on_the_way(
            [path],
            data,
            tokenizer=kind,
            vocab_size=entries or 10_000,
            val_fraction=0.1,
            seed=42,
            separator="<|endoftext|>",
        )
        split = corpus.split("train")
        tokenizer = TokenizerFacts(
            kind, corpus.tokenizer().vocab_size, split.num_bytes / split.num_tokens, corpus.tokenizer().vocab_size
        )
        steps = 500.0
        for _ in range(3):
            settings = settings_for(
                tokenizer, shape, tokens=tokens, epoch_tokens=split.num_tokens, minutes=1, steps=steps, fixed={}
            )
            config = load_config(preset="modern", overrides=settings)
            steps = tokens / config.training.batch_size / config.data.max_length
        run = start_run(
            None,
            preset="modern",
            overrides=settings
            | {
                "data.path": str(corpus.path),
                "training.save_dir": folder + "/run",
                "training.max_steps": round(steps),
                "training.eval_max_tokens": 100_000,
                "training.sample_tokens": 0,
                "training.log_interval": max(1, round(steps / 4)),
            },
            resume=None,
        )
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    validation = lines[-1]
    speeds = [line["tokens_per_second"] for line in lines if line["type"] == "train"]
    return {
        "text": text,
        "tokenizer": f"{kind}{entries or ''}",
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": tokenizer.bytes_per_token,
        "width": shape[0],
        "layers": shape[1],
        "parameters": count_parameters(replace_vocabulary(config.model, tokenizer.vocab_size)).total,
        "tokens": validation["tokens"],
        "epoch_tokens": split.num_tokens,
        "compressed_bits": compressed_bits(path),
        "tokens_per_second": max(speeds),
        "loss": validation["loss"],
        "bits_per_byte": validation["bits_per_byte"],
    }


def replace_vocabulary(model: Any, vocab_size: int) -> Any:
    return model.model_copy(update={"vocab_size": vocab_size})


def compressed_bits(path: Path) -> float:
    pieces, _ = sample_text(path, "<|endoftext|>", SAMPLE_BYTES)
    return bits_of_compressor("".join(pieces).encode())


def fit(runs: Sequence[dict[str, Any]]) -> tuple[Law, list[float]]:
    """Return the law whose relative errors over the runs have the least squares, and each run's error."""

    def errors(law: Law) -> list[float]:
        return [math.log(predicted(run, law) / run["bits_per_byte"]) for run in runs]

    names = [name for name in asdict(LAW) if name not in ("margin", "wider")]
    law = minimize(lambda law: sum(error**2 for error in errors(law)), names)
    return law, errors(law)


def predicted(run: dict[str, Any], law: Law) -> float:
    keys = ("parameters", "tokens", "epoch_tokens", "bytes_per_token", "compressed_bits")
    return expected_bits_per_byte(**{key: run[key] for key in keys}, law=law)


def minimize(cost: Callable[[Law], float], names: list[str]) -> Law:
    """Walk along one constant after another, by factors that become smaller: a few constants need no library."""
    law, factor = LAW, 1.5
    best = cost(law)
    while factor > 1.0002:
        improved = False
        for name, by in product(names, (factor, 1 / factor)):
            other = replace(law, **{name: getattr(law, name) * by})
            if cost(other) < best:
                law, best, improved = other, cost(other), True
        if not improved:
            factor = math.sqrt(factor)
    return law


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["run", "fit"])
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--results", required=True, type=Path)
    parser.add_argument("--only", default="", help="runs whose name has this word")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no run that would end later")
    options = parser.parse_args()
    results = json.loads(options.results.read_text()) if options.results.exists() else {}
    if options.what == "run":
        texts = {name: Path(path) for name, _, path in (text.partition("=") for text in options.text)}
        began = time.perf_counter()
        longest = 0.0
        for row in GRID:
            name = name_of(row)
            if name in results or options.only not in name or row[0] not in texts:
                continue
            if time.perf_counter() - began + 1.2 * longest > options.seconds:
                break
            started = time.perf_counter()
            text, (kind, entries), shape, millions = row
            results[name] = train(text, texts[text], kind, entries, shape, millions * 1e6)
            longest = max(longest, time.perf_counter() - started)
            options.results.write_text(json.dumps(results, indent=1))
        return
    law, errors = fit(list(results.values()))
    rows: list[dict[str, object]] = [
        {key: run[key] for key in ("text", "tokenizer", "width", "layers", "parameters", "tokens", "tokens_per_second")}
        | {"epochs": run["tokens"] / run["epoch_tokens"], "bits_per_byte": run["bits_per_byte"], "error": error}
        for run, error in zip(results.values(), errors, strict=True)
    ]
    show("short runs, and the law's relative error", rows)
    print(law)
    print(f"root of the mean square of the errors: {math.sqrt(sum(e**2 for e in errors) / len(errors)):.2%}")


if __name__ == "__main__":
    main()
