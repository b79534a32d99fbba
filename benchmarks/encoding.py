"""Encoding with GPT-2's vocabulary on one core, against tiktoken and `tokenizers`, and training a vocabulary.

The engines take turns on the same documents. `sheepop` is `Tokenizer.encode_array` over pieces, as preparation calls
it, with what guards its parity; its first pass, with an engine that has seen no word, is a row of its own. All ids
are compared before anything is timed. Training uses all cores.

python benchmarks/encoding.py FILE_OR_FOLDER --vocabulary FOLDER
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # before the library counts the cores

import numpy as np
import tiktoken
import tokenizers
from common import alternate, median, show
from tiktoken_ext import openai_public

from sheepop.data.tokenizer import Tokenizer, bytes_per_token


def engines(tokenizer: Tokenizer) -> dict[str, Callable[[str], object]]:
    """Return the ways to encode a text with one vocabulary."""
    assert tokenizer.token_bytes is not None
    ranks = {token: rank for rank, token in enumerate(tokenizer.token_bytes) if token}
    encoding = tiktoken.Encoding("gpt2", pat_str=openai_public.r50k_pat_str, mergeable_ranks=ranks, special_tokens={})
    backend = tokenizers.Tokenizer.from_str(tokenizer.to_json())
    backend.encode_special_tokens = True
    return {
        "tiktoken": encoding.encode_ordinary,
        "tiktoken to numpy": lambda text: encoding.encode_to_numpy(text, disallowed_special=()),
        "tokenizers": lambda text: [
            token_id
            for piece in tokenizer.cut(text)
            for token_id in backend.encode(piece, add_special_tokens=False).ids
        ],
        "sheepop": lambda text: encode_pieces(tokenizer, text),
        "sheepop to lists": tokenizer.encode,
    }


def encode_pieces(tokenizer: Tokenizer, text: str) -> np.ndarray:
    return np.concatenate([tokenizer.encode_array(piece) for piece in tokenizer.cut(text)])


def seconds(encode: Callable[[str], object], texts: list[str]) -> float:
    begin = time.perf_counter()
    for text in texts:
        encode(text)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="text files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="folder with encoder.json and vocab.bpe")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train-size", type=int, default=8192)
    arguments = parser.parse_args()
    files = sorted(arguments.source.rglob("*.txt")) if arguments.source.is_dir() else [arguments.source]
    texts = [path.read_text(encoding="utf-8") for path in files]
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    tokenizer = Tokenizer.load(arguments.vocabulary)
    contestants = engines(tokenizer)
    for text in texts:
        ids = [np.asarray(encode(text)) for encode in contestants.values()]
        if not all(np.array_equal(ids[0], other) for other in ids[1:]):
            raise SystemExit("The engines do not give the same tokens.")
    print(f"{megabytes:.1f} MB, the same tokens from all; {bytes_per_token(tokenizer, texts):.3f} bytes a token")

    def first_pass() -> float:
        fresh = Tokenizer.load(arguments.vocabulary)
        return seconds(lambda text: encode_pieces(fresh, text), texts)

    runs: dict[str, Callable[[], float]] = {
        name: lambda encode=encode: seconds(encode, texts) for name, encode in contestants.items()
    }
    times = alternate({**runs, "sheepop, first pass": first_pass}, arguments.rounds)
    speed = {name: megabytes / median(values) for name, values in times.items()}
    rows = [{"engine": name, "MB/s": speed[name], "over tiktoken": speed[name] / speed["tiktoken"]} for name in times]
    show("encoding, GPT-2's vocabulary, one core", rows)
    os.sched_setaffinity(0, cores)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    begin = time.perf_counter()
    size = Tokenizer.train("bpe", texts, vocab_size=arguments.train_size).vocab_size
    show("training", [{"entries": size, "MB": megabytes, "seconds": time.perf_counter() - begin, "cores": len(cores)}])


if __name__ == "__main__":
    main()
