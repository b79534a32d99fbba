"""The best model of equal minutes: ours and nanoGPT's on the same texts, scored in bits per byte of a held-out one.

    python benchmarks/equal_minutes.py --held-out jane_eyre.txt --minutes 20 novels/*.txt
    python benchmarks/equal_minutes.py --held-out jane_eyre.txt --minutes 20 --nanogpt FOLDER novels/*.txt
    python benchmarks/equal_minutes.py --held-out … --minutes 3 --nanogpt FOLDER --tune novels/*.txt

The held-out text is left out of the others by name. Both use the same byte-level BPE, trained on the others. Ours has
the minutes from the start of its process; nanoGPT has them for its steps (compiling and loading are not counted), with
as many steps as its own step time allows and its learning rate decayed over them. `--tune` runs all of nanoGPT's
settings for the given minutes, for the choice of one; a checkout of nanoGPT is `FOLDER`.
"""

import argparse
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from common import median, show
from peers import nanogpt_nats, train_nanogpt_on

from sheepop.data.corpus import open_corpus

# Sizes and rates around what nanoGPT documents for small data; the first is the best of `--tune` (`docs/log.md`).
SMALL = {"n_head": 4, "n_embd": 256, "block_size": 256, "batch_size": 16}
FASTER = {"learning_rate": 2e-3, "min_lr": 2e-4}
NANOGPT_SETTINGS: dict[str, dict[str, object]] = {
    "4 x 256, rate 2e-3": {"n_layer": 4, **SMALL, **FASTER},
    "4 x 256": {"n_layer": 4, **SMALL},
    "6 x 256, rate 2e-3": {"n_layer": 6, **SMALL, **FASTER},
    "6 x 256": {"n_layer": 6, **SMALL},
    "6 x 384": {"n_layer": 6, **SMALL, "n_head": 6, "n_embd": 384},
}
TIMED_STEPS = 25


def score_ours(prepared: Path, held_out: Path, minutes: float, options: list[str]) -> dict[str, object]:
    """Train ours for the minutes and return its bits per byte on the held-out text."""
    with tempfile.TemporaryDirectory() as folder:
        run = f"{folder}/run"
        command = [sys.executable, "-m", "sheepop", "train", "--data", str(prepared), "--output", run]
        subprocess.run([*command, "--minutes", str(minutes), *options], check=True)
        command = [sys.executable, "-m", "sheepop", "evaluate", "--checkpoint", run, "--data", str(held_out), "--json"]
        scores = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        last = json.loads(Path(run, "metrics.jsonl").read_text().splitlines()[-1])
    return {"who": "sheepop", "bits/byte": scores["bits_per_byte"], "tokens": last["tokens"]}


def score_nanogpt(checkout: Path, name: str, prepared: Path, held_out: Path, minutes: float) -> dict[str, object]:
    """Train nanoGPT with one of its settings for the minutes and return its bits per byte on the held-out text."""
    corpus = open_corpus(prepared)
    tokenizer = corpus.tokenizer()
    text = held_out.read_text(encoding="utf-8")
    end = [tokenizer.end_of_text_id]
    held = np.array([*end, *tokenizer.encode(text), *end], dtype=np.uint16)
    train, val = (np.asarray(corpus.split(split).tokens[:], dtype=np.uint16) for split in ("train", "val"))
    settings = {"compile": True, "always_save_checkpoint": True, **NANOGPT_SETTINGS[name]}
    with tempfile.TemporaryDirectory() as folder:

        def run(steps: int, eval_iters: int) -> list[float]:
            length = {"max_iters": steps, "lr_decay_iters": steps, "eval_interval": steps, "eval_iters": eval_iters}
            found = train_nanogpt_on(checkout, Path(folder), train, val, tokenizer.vocab_size, **settings, **length)
            return [float(time) for time in re.findall(r"time ([\d.]+)ms", found.output)]

        milliseconds = median(run(TIMED_STEPS, 1)[5:])
        steps = int(minutes * 60e3 / milliseconds)
        run(steps, 20)
        nats = nanogpt_nats(checkout, Path(folder, "out", "ckpt.pt"), held)
    tokens = steps * int(settings["batch_size"]) * int(settings["block_size"])  # type: ignore[call-overload]
    bits = nats / math.log(2) / len(text.encode("utf-8"))
    return {"who": f"nanoGPT {name}", "bits/byte": bits, "tokens": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--held-out", required=True, type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--tune", action="store_true", help="all of nanoGPT's settings, and not ours")
    parser.add_argument("--ours", nargs=argparse.REMAINDER, default=[], help="more options of `sheepop train`; last")
    options = parser.parse_args()
    texts = [text for text in options.texts if text.name != options.held_out.name]
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared"
        command = [sys.executable, "-m", "sheepop", "prepare", *map(str, texts), "--output", str(prepared)]
        command += ["--tokenizer", "bpe", "--vocab-size", str(options.vocab_size)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows: list[dict[str, object]] = []
        if not options.tune:
            rows.append(score_ours(prepared, options.held_out, options.minutes, options.ours))
        if options.nanogpt:
            names = list(NANOGPT_SETTINGS)[: None if options.tune else 1]
            rows += [
                score_nanogpt(options.nanogpt, name, prepared, options.held_out, options.minutes) for name in names
            ]
    show(f"{options.held_out.stem} after {options.minutes:g} minutes", rows)


if __name__ == "__main__":
    main()
