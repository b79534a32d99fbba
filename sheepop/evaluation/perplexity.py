"""Scores on held-out text: loss, accuracy, and the figures that compare models with different tokenizers."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sheepop.config import DataConfig
from sheepop.data.corpus import is_prepared, open_corpus
from sheepop.data.dataset import IGNORE_INDEX, Tokens, document_ids, num_windows, read_windows
from sheepop.data.documents import iter_documents
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_model_tokenizer
from sheepop.models.copying import QUERIES_AT_ONCE
from sheepop.models.pretrained import load_pretrained, read_settings, resolve_checkpoint
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.devices import resolve_device
from sheepop.utils.errors import CheckpointError, ConfigError, DataError

# Logits of so many numbers exist at one time: 64 MiB in fp32, whatever the batch, the context and the vocabulary.
LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Scores:
    """Means over the scored targets.

    Attributes:
        loss: nats per token.
        accuracy: share of targets that were the model's first choice.
        top5_accuracy: share of targets among its first five.
        tokens: number of targets scored.
    """

    loss: float
    accuracy: float
    top5_accuracy: float
    tokens: int


def perplexity(loss: float) -> float:
    """Return e^loss: the number of equally likely tokens that would be as hard to guess. Infinite past 1e308."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(loss: float, *, tokens: int, num_bytes: int) -> float:
    """Return the bits that the model needs per UTF-8 byte of the original text, whatever its tokenizer.

    Args:
        loss: nats per token.
        tokens: of the text; where only a part was scored, those of the whole.
        num_bytes: of the same text.
    """
    return loss / math.log(2) * tokens / num_bytes if num_bytes else math.inf


def word_perplexity(loss: float, *, tokens: int, words: int) -> float:
    """Return the perplexity per word of the original text (between white space), whatever the tokenizer.

    Args:
        loss: nats per token.
        tokens: of the text, as in `bits_per_byte`.
        words: of the same text.
    """
    return perplexity(loss * tokens / words) if words else math.inf


def evaluate_tokens(
    model: TransformerModel,
    tokens: Tokens,
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    document_mask: bool = False,
    end_of_text_id: int | None = None,
    autocast_dtype: torch.dtype | None = None,
    before_batch: Callable[[], None] | None = None,
) -> Scores:
    """Score every token after the first, each once.

    Args:
        model: is put into evaluation mode, and back afterwards.
        tokens: (N,) ids, in memory or memory-mapped.
        context: tokens of a window, at most the model's `max_seq_len`.
        stride: tokens from one window to the next; None means `context`, so windows do not overlap and the first
            tokens of each are predicted from little. With a smaller stride (sliding context) each target has at
            least context - stride tokens before it, where the text has them, at context / stride times the cost.
        batch_size: windows of one forward pass; it does not change the result beyond rounding.
        max_tokens: score about so many targets, in windows spread evenly over the text; None scores all.
        document_mask: tokens see only their own document.
        end_of_text_id: the token that begins a document; needed for `document_mask`.
        autocast_dtype: lower precision of the forward pass; loss and sums are in fp32 and fp64 in any case.
        before_batch: called before each forward pass; what it raises ends the scoring.

    Raises:
        ConfigError: a window, stride or batch size that cannot be.
        DataError: fewer than two tokens.
    """
    stride = context if stride is None else stride
    if not 1 <= context <= model.config.max_seq_len:
        raise ConfigError(f"The context is {context}, but must be 1 to {model.config.max_seq_len} for this model.")
    if not 1 <= stride <= context:
        raise ConfigError(
            f"The stride is {stride}, but must be 1 to the context ({context}); else tokens are left out."
        )
    if batch_size < 1:
        raise ConfigError(f"The batch size is {batch_size}, but must be at least 1.")
    if len(tokens) < 2:
        raise DataError(
            f"There are {len(tokens)} tokens to score, but the first only serves as context; give more text."
        )
    windows = _choose_windows(num_windows(len(tokens), context, stride), stride, max_tokens)
    loss_sum = 0.0
    top1_hits = top5_hits = scored = 0
    autocast = torch.autocast(model.device.type, autocast_dtype, enabled=autocast_dtype is not None)
    with inference(model), autocast:
        for first in range(0, len(windows), batch_size):
            if before_batch is not None:
                before_batch()
            batch = windows[first : first + batch_size]
            inputs, targets = read_windows(tokens, batch * stride, context)  # (B, T) each
            targets[batch > 0, : context - stride] = IGNORE_INDEX  # the window before has scored them
            documents = None
            if document_mask:
                assert end_of_text_id is not None
                documents = torch.from_numpy(document_ids(inputs, end_of_text_id)).to(model.device)
            wanted = torch.from_numpy(targets).to(model.device)
            for logits, answers in logits_of(model, torch.from_numpy(inputs).to(model.device), wanted, documents):
                loss_sum += F.cross_entropy(logits, answers, reduction="none").double().sum().item()
                hits = logits.topk(min(5, logits.shape[-1])).indices == answers[:, None]  # (n, 5), best first
                top1_hits += int(hits[:, 0].sum())
                top5_hits += int(hits.sum())
                scored += len(answers)
    return Scores(loss_sum / scored, top1_hits / scored, top5_hits / scored, scored)


def logits_of(
    model: TransformerModel, inputs: Tensor, wanted: Tensor, documents: Tensor | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield logits (n, V) in fp32 and their targets (n,) for those of `wanted` (B, T) that are to be scored."""
    hidden = model.hidden_states(inputs, document_ids=documents)  # (B, T, D)
    copies = model.copies(hidden, inputs, document_ids=documents)
    is_scored = wanted != IGNORE_INDEX
    rows = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    if copies is None:
        hidden, wanted = hidden[is_scored], wanted[is_scored]  # (N, D), (N,)
        for row in range(0, len(wanted), rows):
            here = slice(row, row + rows)
            yield F.linear(hidden[here], model.head.weight).float(), wanted[here]
        return
    rows = min(rows, QUERIES_AT_ONCE)
    for text in range(len(inputs)):
        for place in range(0, inputs.shape[1], rows):
            here = slice(place, place + rows)
            logits = copies.at(text, here).add_to(model.logits(hidden[text : text + 1, here]))[0]  # (n, V)
            yield logits[is_scored[text, here]], wanted[text, here][is_scored[text, here]]


def evaluate_checkpoint(
    checkpoint: Path,
    data: Path | None = None,
    *,
    device: str = "auto",
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    split: str = "val",
) -> dict[str, Any]:
    """Score a checkpoint over a whole text.

    Args:
        checkpoint: what `resolve_checkpoint` takes.
        data: a prepared folder, whose `split` is scored; or text files or a folder of them, scored whole; None is
            the prepared corpus that the checkpoint was trained on.
        device: `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.
        context: tokens of a window; None: as many as in training (of a foreign model: as many as it sees).
        stride: as in `evaluate_tokens`.
        batch_size: windows of one forward pass.
        split: of a prepared folder.

    Returns:
        `loss, perplexity, word_perplexity, bits_per_byte, accuracy, top5_accuracy, tokens, bytes, words, context,
        stride, split, checkpoint, data`, ready for JSON: a figure that is not finite is None.

    Raises:
        CheckpointError: the checkpoint is damaged, or its tokenizer is not the corpus's.
        ConfigError: no data to score, or a context or stride that does not fit.
        DataError: the data cannot be read.
    """
    folder = resolve_checkpoint(checkpoint)
    settings = read_settings(folder)
    tokenizer = load_model_tokenizer(folder, settings.model.vocab_size)
    text = _open_text(data, split, tokenizer, settings.data, folder)
    model = load_pretrained(folder, resolve_device(device))
    context = settings.data.max_length if context is None else context
    scores = evaluate_tokens(
        model,
        text.tokens,
        context=context,
        stride=stride,
        batch_size=batch_size,
        document_mask=settings.data.document_mask,
        end_of_text_id=tokenizer.end_of_text_id,
    )
    return {
        "loss": _for_json(scores.loss),
        "perplexity": _for_json(perplexity(scores.loss)),
        "word_perplexity": _for_json(word_perplexity(scores.loss, tokens=scores.tokens, words=text.words)),
        "bits_per_byte": _for_json(bits_per_byte(scores.loss, tokens=scores.tokens, num_bytes=text.num_bytes)),
        "accuracy": scores.accuracy,
        "top5_accuracy": scores.top5_accuracy,
        "tokens": scores.tokens,
        "bytes": text.num_bytes,
        "words": text.words,
        "context": context,
        "stride": context if stride is None else stride,
        "split": text.split,
        "checkpoint": str(folder),
        "data": str(text.path),
    }


@dataclass(frozen=True)
class _Text:
    """What is scored, and the sizes of the original text."""

    tokens: Tokens
    num_bytes: int
    words: int
    split: str | None
    path: Path


def _open_text(data: Path | None, split: str, tokenizer: Tokenizer, settings: DataConfig, folder: Path) -> _Text:
    if data is None:
        if settings.path is None:
            raise ConfigError(f"The checkpoint {folder} does not say what it was trained on. Name a text with --data.")
        data = Path(settings.path)
        if not is_prepared(data):
            raise DataError(
                f"The checkpoint {folder} was trained on the prepared folder {data}, which is not there any more. Name "
                "a prepared folder, or text files, with --data."
            )
    if not is_prepared(data):
        return _encode_text(data, tokenizer, settings.document_separator)
    corpus = open_corpus(data)
    if corpus.tokenizer().fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"The corpus {data} was prepared with another tokenizer than that of the checkpoint {folder}, so its "
            f"numbers mean other words. Prepare the text with `--tokenizer {folder / TOKENIZER_FILE}`, or give the "
            "text itself."
        )
    part = corpus.split(split)
    return _Text(part.tokens, part.num_bytes, part.num_words, split, data)


def _encode_text(data: Path, tokenizer: Tokenizer, separator: str | None) -> _Text:
    """Encode text files as a prepared split is: each document begins with the end of text, and one closes the last."""
    end_of_text = np.array([tokenizer.end_of_text_id], dtype=np.uint32)
    pieces = []
    num_bytes = words = 0
    for document in iter_documents([data], separator=separator):
        pieces += [end_of_text, np.array(tokenizer.encode(document.text), dtype=np.uint32)]
        num_bytes += len(document.text.encode("utf-8"))
        words += len(document.text.split())
    return _Text(np.concatenate([*pieces, end_of_text]), num_bytes, words, None, data)


def _choose_windows(count: int, stride: int, max_tokens: int | None) -> NDArray[np.int64]:
    """Return the windows to score: all, or as many as `max_tokens` pays for, spread evenly."""
    chosen = count if max_tokens is None else min(count, max(1, max_tokens // stride))
    return np.arange(chosen, dtype=np.int64) * count // chosen


def _for_json(figure: float) -> float | None:
    return figure if math.isfinite(figure) else None
