"""llama.cpp in a process of its own: where it finds a file wrong, it ends the process that it runs in."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.utils.errors import CheckpointError

_engine: Any = None  # in the process of its own


@contextmanager
def llama_cpp(
    path: Path, *, context: int, batch: int, threads: int
) -> Iterator[tuple[Callable[[str], list[int]], Callable[[list[int]], NDArray[np.float32]]]]:
    """Yield two functions of a GGUF file: the token ids of a text, and the logits (T, V) of T token ids, in fp32.

    Args:
        path: the file.
        context: the longest text in tokens.
        batch: tokens that are computed at once.
        threads: to compute with.

    Raises:
        CheckpointError: llama.cpp does not load the file, or ends while it works.
    """
    arguments = (str(path), context, batch, threads)
    with ProcessPoolExecutor(1, get_context("spawn"), _load, arguments) as process:

        def ask(function: Callable[..., Any], *values: object) -> Any:
            try:
                return process.submit(function, *values).result()
            except BrokenProcessPool:
                raise CheckpointError(
                    "llama.cpp does not load the exported file, or ended while it computed with it. Please report this "
                    "with the model's config.json."
                ) from None

        yield (lambda text: ask(_encode, text)), (lambda token_ids: ask(_logits, token_ids))


def _load(path: str, context: int, batch: int, threads: int) -> None:
    global _engine
    from llama_cpp import GGML_TYPE_F32, Llama

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it warns of contexts that nobody computes with
    _engine = Llama(
        path,
        n_ctx=context,
        n_batch=batch,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        verbose=False,
    )


def _encode(text: str) -> list[int]:
    ids: list[int] = _engine.tokenize(text.encode("utf-8"), add_bos=True)
    return ids


def _logits(token_ids: list[int]) -> NDArray[np.float32]:
    known = _engine.input_ids[: _engine.n_tokens].tolist()
    same = next((n for n, pair in enumerate(zip(known, token_ids, strict=False)) if pair[0] != pair[1]), len(known))
    _engine.n_tokens = min(same, len(token_ids) - 1)  # the rest is computed anew
    _engine.eval(token_ids[_engine.n_tokens :])
    logits: NDArray[np.float32] = _engine.scores[: len(token_ids)].copy()
    return logits
