"""Preparing a large corpus: seconds, megabytes a second, and the peak memory of all processes together.

    python benchmarks/prepare.py --text FOLDER --tokenizer FOLDER --megabytes 500 2000 --scratch FOLDER

Documents are made of paragraphs of the given texts, shuffled, about 4 kB each; one in fifty is a copy of an earlier
one. Cleaning and exact deduplication are on, as they are by default. Memory is the proportional set size of the
process and its workers, sampled ten times a second in a second run, since asking for it takes a tenth of the time.
With two sizes or more, the growth of memory is fitted and extrapolated to 20 GB; engines are full from some 2 GB on.
Beside it, on one core and on the beginning of the same corpus, already decoded and in memory, encoding alone is timed
as one long pass: by our encoder, the making of its engine included, and by tiktoken.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import tiktoken
from common import show
from tiktoken_ext import openai_public

from sheepop.data.documents import iter_documents
from sheepop.data.shards import encode
from sheepop.data.tokenizer import Tokenizer

FILE_BYTES = 50_000_000
DOCUMENT_BYTES = 4_000
ENCODED_ALONE_BYTES = 200_000_000  # of the corpus; tiktoken, which does not get faster on the way, takes a tenth
SEPARATOR = "<|endoftext|>"


def make_corpus(texts: Path, folder: Path, size: int) -> None:
    """Write about `size` bytes of documents into files below `folder`."""
    paragraphs = [
        paragraph
        for document in iter_documents([texts], separator=None)
        for paragraph in document.text.split("\n\n")
        if len(paragraph) > 100
    ]
    rng = random.Random(0)
    folder.mkdir(parents=True)
    earlier: list[str] = []
    for number in range(max(1, size // FILE_BYTES)):
        with (folder / f"{number:04d}.txt").open("w", encoding="utf-8") as file:
            written = 0
            while written < min(FILE_BYTES, size):
                if earlier and rng.random() < 0.02:
                    document = rng.choice(earlier)
                else:
                    document, length = "", 0
                    while length < DOCUMENT_BYTES:
                        document += rng.choice(paragraphs) + f" {rng.randrange(10**6)}\n\n"
                        length = len(document)
                    earlier = [*earlier[-200:], document]
                written += file.write(f"{document}\n{SEPARATOR}\n")


def memory_of(group: int) -> int:
    """Return the bytes of memory of a process group, pages that processes share counted once."""
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(process.name)) == group:
                rollup = (process / "smaps_rollup").read_text()
                total += 1024 * int(next(line for line in rollup.splitlines() if line.startswith("Pss:")).split()[1])
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def prepare(corpus: Path, tokenizer: Path, output: Path, *, sampled: bool) -> tuple[float, int]:
    """Return seconds and, if `sampled`, peak bytes of memory."""
    command = [sys.executable, "-m", "sheepop", "prepare", str(corpus), "--output", str(output)]
    started, peak = time.perf_counter(), 0
    process = subprocess.Popen(
        [*command, "--tokenizer", str(tokenizer)], start_new_session=True, stdout=subprocess.DEVNULL
    )
    while sampled and process.poll() is None:
        peak = max(peak, memory_of(process.pid))
        time.sleep(0.1)
    assert process.wait() == 0
    return time.perf_counter() - started, peak


def encoding_alone(corpus: Path, tokenizer_path: Path) -> tuple[float, float]:
    """Return the MB/s of our encoder, from nothing, and of tiktoken, each on one core."""
    texts, size = [], 0
    for path in sorted(corpus.iterdir()):
        if size < ENCODED_ALONE_BYTES:
            texts.append(path.read_text(encoding="utf-8"))
            size += path.stat().st_size
    text = "".join(texts)
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    started = time.perf_counter()
    tokenizer = Tokenizer.load(tokenizer_path)
    encode(tokenizer, text, np.dtype("<u2"))
    ours = size / (time.perf_counter() - started) / 1e6

    assert tokenizer.token_bytes is not None
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes) if token}
    peer = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    sample = text[: len(text) // 10]
    started = time.perf_counter()
    peer.encode_to_numpy(sample, disallowed_special=())
    theirs = len(sample.encode()) / (time.perf_counter() - started) / 1e6
    os.sched_setaffinity(0, cores)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--tokenizer", required=True, type=Path)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[200])
    parser.add_argument("--scratch", required=True, type=Path)
    options = parser.parse_args()
    rows: list[dict[str, object]] = []
    peaks = []
    for megabytes in options.megabytes:
        corpus, output = options.scratch / f"text-{megabytes}", options.scratch / f"prepared-{megabytes}"
        make_corpus(options.text, corpus, megabytes * 10**6)
        size = sum(path.stat().st_size for path in corpus.iterdir())
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        ours, theirs = encoding_alone(corpus, options.tokenizer)
        seconds, _ = prepare(corpus, options.tokenizer, output, sampled=False)
        shutil.rmtree(output)
        _, peak = prepare(corpus, options.tokenizer, output, sampled=True)
        peaks.append((size, peak))
        rows.append(
            {
                "MB of text": size / 1e6,
                "seconds": seconds,
                "MB/s": size / 1e6 / seconds,
                "our encoder alone, one core, MB/s": ours,
                "over it": size / 1e6 / seconds / ours,
                "tiktoken alone, one core, MB/s": theirs,
                "over tiktoken": size / 1e6 / seconds / theirs,
                "peak MB of memory": peak / 1e6,
            }
        )
        shutil.rmtree(corpus)
        shutil.rmtree(output)
    show("sheepop prepare, cleaning and exact deduplication included", rows)
    if len(peaks) > 1:
        slope, constant = np.polyfit([size for size, _ in peaks], [peak for _, peak in peaks], 1)
        at_20_gb = (constant + slope * 20e9) / 1e6
        print(f"memory = {constant / 1e6:.0f} MB + {slope:.4f} bytes a byte: {at_20_gb:.0f} MB at 20 GB")


if __name__ == "__main__":
    main()
