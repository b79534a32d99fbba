"""How many tokens the loader alone delivers, and how long opening a corpus and seeking in it take.

Tokens a second are those of the training loop's own loader (order, reading, masks, tensors) in one thread on the CPU,
over a generated corpus whose documents have lognormal lengths. Opening is timed on a larger, sparse file too.

python benchmarks/loader.py
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from common import alternate, median, show

from sheepop.config import load_config
from sheepop.data.corpus import Corpus
from sheepop.data.dataset import num_windows, open_tokens, read_windows
from sheepop.data.packing import find_documents, open_plan, read_packed
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.training.batches import batch_loader
from sheepop.training.distributed import World
from sheepop.training.run import set_up
from sheepop.training.state import Run
from sheepop.utils.runtime import keep_freed_memory

SIZES = ((64, 1024), (16, 1024), (4, 256), (1, 1024), (256, 64))  # batch, context
LENGTH = 1024
MEDIAN_DOCUMENT = 400  # tokens


def make_corpus(folder: Path, num_tokens: int) -> Corpus:
    """Write random tokens, cut by end-of-text tokens into documents of lognormal lengths."""
    tokenizer = Tokenizer.train("char", ["sheep may safely graze"], vocab_size=300)
    tokenizer.save(folder / TOKENIZER_FILE)
    random = np.random.default_rng(5)
    tokens = random.integers(1, 60_000, num_tokens, dtype=np.uint16)
    tokens[tokens == tokenizer.end_of_text_id] += 1
    lengths = np.exp(random.normal(np.log(MEDIAN_DOCUMENT), 1.0, num_tokens // 300)).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    tokens[starts[starts < num_tokens]] = tokens[-1] = tokenizer.end_of_text_id
    for name in ("train", "val"):
        tokens.astype("<u2").tofile(folder / f"{name}.bin")
    counts = dict.fromkeys(("tokens", "documents", "bytes", "characters", "words"), num_tokens)
    splits = {"train": counts, "val": counts}
    return Corpus(folder, {"dtype": "uint16", "splits": splits, "files": {}})


def make_run(corpus: Corpus, packing: str, batch_size: int, length: int) -> Run:
    """Set up a run as training does; the model is as small as can be, for it does nothing here."""
    overrides: dict[str, object] = {
        "model.d_model": 8,
        "model.num_layers": 1,
        "model.num_heads": 1,
        "model.max_seq_len": length,
        "training.batch_size": batch_size,
        "data.packing": packing,
    }
    return set_up(load_config(overrides=overrides), corpus, device=torch.device("cpu"), world=World(0, 1))


def tokens_per_second(run: Run, seconds: float) -> float:
    """Load steps from all over the epoch for some seconds; targets a second."""
    load = batch_loader(run)
    for step in range(20):
        load(step)
    delivered, number = 0, 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        delivered += sum(batch.num_targets for batch in load(number))
        number += 1
    return delivered / spent


def milliseconds_to_open(file: Path, *, step: int) -> float:
    """Open a file of tokens and read the windows of a step, as a resumed run does."""
    started = time.perf_counter()
    tokens = open_tokens(file, "uint16")
    sampler = Sampler(num_windows(len(tokens), LENGTH, LENGTH), 64, 1, seed=step)
    read_windows(tokens, sampler.windows_of(step % sampler.steps_per_epoch) * LENGTH, LENGTH)
    return (time.perf_counter() - started) * 1e3


def milliseconds_to_open_packed(file: Path, kept: Path, end_of_text_id: int, *, step: int) -> float:
    """Open a file of tokens and its kept plan, and read the windows of a step."""
    started = time.perf_counter()
    tokens = open_tokens(file, "uint16")
    plan = open_plan(tokens, length=LENGTH, end_of_text_id=end_of_text_id, folder=kept, fingerprint="loader")
    sampler = Sampler(plan.num_windows, 64, 1, seed=step)
    read_packed(tokens, plan, sampler.windows_of(step % sampler.steps_per_epoch))
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000, help="of the generated corpus")
    parser.add_argument("--sparse-gigabytes", type=float, default=8, help="of the sparse file that is opened")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = make_corpus(folder, options.tokens)
        rows: list[dict[str, object]] = []
        for batch_size, length in SIZES:
            runs = {packing: make_run(corpus, packing, batch_size, length) for packing in ("concatenate", "best_fit")}
            results = alternate(
                {packing: lambda run=run: tokens_per_second(run, options.seconds) for packing, run in runs.items()},
                options.rounds,
            )
            rows += [
                {"batch": batch_size, "context": length, "packing": packing, "M tokens/s": median(values) / 1e6}
                for packing, values in results.items()
            ]
        show("the loader alone", rows)

        end_of_text_id, file, kept = corpus.tokenizer().end_of_text_id, folder / "train.bin", folder / "packing"
        tokens = open_tokens(file, "uint16")
        started = time.perf_counter()
        plan = open_plan(
            tokens,
            length=LENGTH,
            end_of_text_id=end_of_text_id,
            folder=kept,
            fingerprint="loader",
            keep_from_seconds=0,
        )
        seconds = time.perf_counter() - started
        borders = find_documents(tokens, end_of_text_id)
        firsts, lasts = borders[:-1], borders[1:] - 1
        show(
            f"making a plan for {options.tokens / 1e6:.0f} M tokens",
            [
                {
                    "seconds": seconds,
                    "sequences": plan.num_windows,
                    "filled": (len(tokens) - 1) / plan.num_windows / plan.length,
                    "bytes a sequence": (plan.starts.nbytes + plan.lengths.nbytes + plan.offsets.nbytes)
                    / plan.num_windows,
                    "documents": len(firsts),
                    "cut": int((lasts - firsts >= LENGTH).sum()),
                    "cut by concatenation": int((firsts // LENGTH != lasts // LENGTH).sum()),
                }
            ],
        )

        sparse = folder / "sparse.bin"
        with sparse.open("wb") as handle:
            handle.truncate(int(options.sparse_gigabytes * 1e9) // 2 * 2)
        random = np.random.default_rng(6)

        def any_step() -> int:
            return int(random.integers(10**9))

        results = alternate(
            {
                "concatenate": lambda: milliseconds_to_open(file, step=any_step()),
                f"concatenate, {options.sparse_gigabytes:g} GB": lambda: milliseconds_to_open(sparse, step=any_step()),
                "best_fit": lambda: milliseconds_to_open_packed(file, kept, end_of_text_id, step=any_step()),
            },
            20,
        )
        show(
            "open, and read the windows of any step",
            [{"what": what, "median ms": median(values), "max ms": max(values)} for what, values in results.items()],
        )


if __name__ == "__main__":
    main()
