"""Models and tokenizers in the `.bin` files of llama2.c (karpathy/llama2.c, `run.c` and `tokenizer.py`)."""

import struct
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.data.tokenizer_parts import byte_name, special_token
from sheepop.interop.imported import write_imported
from sheepop.interop.scored_pieces import SPACE, merges_of, scored_pieces
from sheepop.utils.errors import CheckpointError

HEADER = struct.Struct("<7i")
TOKEN_HEADER = struct.Struct("<fi")  # score and bytes of a piece
LARGEST = 2**24  # of a number in the header: more is no model but another file
MOST_LAYERS = 2**10
FIRST_BYTE = 3  # behind the unknown token and the two marks
BEGINNING = "<s>"
TOKENIZER_NAMES = ("tokenizer.bin", "tok{vocab_size}.bin")


def import_llama2c(file: Path, output: Path, tokenizer: Path | None) -> None:
    """Write a `.bin` model as a checkpoint.

    Args:
        file: the model.
        output: the checkpoint.
        tokenizer: its `.bin` tokenizer; None looks for one beside the model.

    Raises:
        CheckpointError: a file is damaged, or there is no tokenizer.
    """
    settings, weights = read_model(file)
    names = [file.with_name(name.format(vocab_size=settings.vocab_size)) for name in TOKENIZER_NAMES]
    path = tokenizer or next((name for name in names if name.is_file()), None)
    if path is None:
        raise CheckpointError(
            f"There is no tokenizer beside {file} ({' or '.join(name.name for name in names)}). Name it with "
            "--tokenizer PATH."
        )
    write_imported(output, settings, weights, read_tokenizer(path, settings.vocab_size))


def read_model(file: Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the settings and our weights of a model: Llama's, with neighbours turned together as ours are.

    Raises:
        CheckpointError: the header is not that of a model, or the file has another size than it says.
    """
    content = np.memmap(file, dtype=np.uint8, mode="r") if file.stat().st_size else np.zeros(0, np.uint8)
    if len(content) < HEADER.size:
        raise CheckpointError(f"{file} has {len(content)} bytes, fewer than the header of a llama2.c model.")
    width, inner, layers, heads, kv_heads, vocab_size, length = HEADER.unpack(content[: HEADER.size].tobytes())
    is_tied = vocab_size > 0
    vocab_size = abs(vocab_size)
    sizes = (width, inner, layers, heads, kv_heads, vocab_size, length)
    if (
        not all(0 < size < LARGEST for size in sizes)
        or layers > MOST_LAYERS
        or width % heads
        or heads % kv_heads
        or (width // heads) % 2
    ):
        raise CheckpointError(f"{file} is not a llama2.c model: its header says {', '.join(map(str, sizes))}.")
    C = width // heads
    parts: list[tuple[str, tuple[int, ...]]] = [
        ("token_embedding.weight", (vocab_size, width)),
        ("attention_norm", (layers, width)),
        ("query", (layers, heads * C, width)),
        ("key", (layers, kv_heads * C, width)),
        ("value", (layers, kv_heads * C, width)),
        ("attention.output", (layers, width, heads * C)),
        ("feed_forward_norm", (layers, width)),
        ("gate", (layers, inner, width)),
        ("feed_forward.output", (layers, width, inner)),
        ("linear", (layers, inner, width)),
        ("final_norm.weight", (width,)),
        ("rotary", (2, length, C // 2)),  # cosines and sines, which follow from the settings
        *([] if is_tied else [("head.weight", (vocab_size, width))]),
    ]
    expected = HEADER.size + 4 * sum(int(np.prod([*shape], dtype=object)) for _, shape in parts)
    if len(content) != expected:
        raise CheckpointError(f"{file} has {len(content)} bytes, but a model with its header has {expected}.")
    numbers = content[HEADER.size :].view("<f4")
    found: dict[str, Tensor] = {}
    for name, shape in parts:
        size = int(np.prod(shape))
        found[name], numbers = torch.from_numpy(numbers[:size].astype(np.float32).reshape(shape)), numbers[size:]
    whole = ("token_embedding.weight", "final_norm.weight", "head.weight")
    weights: dict[str, Tensor] = {name: found[name] for name in whole if name in found}
    for layer in range(layers):
        block = f"blocks.{layer}"
        weights[f"{block}.attention.query_key_value.weight"] = torch.cat(
            [found[name][layer] for name in ("query", "key", "value")]
        )
        weights[f"{block}.feed_forward.input.weight"] = torch.cat([found[name][layer] for name in ("gate", "linear")])
        for name in ("attention_norm", "attention.output", "feed_forward_norm", "feed_forward.output"):
            weights[f"{block}.{name}.weight"] = found[name][layer]
    settings = ModelConfig(
        vocab_size=vocab_size,
        d_model=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        d_ff=inner,
        max_seq_len=length,
        dropout=0.0,
        activation="swiglu",
        norm="rmsnorm",
        layer_norm_eps=1e-5,
        tie_weights=is_tied,
    )
    return settings, weights


def read_tokenizer(file: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a `.bin` file: pieces of SentencePiece with scores; the best-scored pair merges first.

    Raises:
        CheckpointError: the file is damaged.
    """
    content = file.read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4  # behind the length of the longest piece
    try:
        for _ in range(vocab_size):
            score, size = TOKEN_HEADER.unpack_from(content, at)
            at += TOKEN_HEADER.size
            if not 0 <= size <= len(content) - at:
                raise ValueError(f"a piece of {size} bytes")
            pieces.append((content[at : at + size].decode("utf-8"), score))
            at += size
        if at != len(content):
            raise ValueError(f"{len(content) - at} bytes too many")
    except (struct.error, ValueError) as error:
        raise CheckpointError(
            f"{file} is not the tokenizer of a model with {vocab_size} tokens: {error}, after {len(pieces)} pieces."
        ) from None
    names = ["<unk>", BEGINNING, "</s>", *(byte_name(byte) for byte in range(256))]
    names += [piece.replace(" ", SPACE) for piece, _ in pieces[len(names) :]]
    names = names[:vocab_size]
    ids = {name: number for number, name in reversed(list(enumerate(names)))}
    try:
        merges = merges_of(ids, [score for _, score in pieces], names[FIRST_BYTE + 256 :])
    except ValueError as error:
        raise CheckpointError(f"{file} is not a tokenizer: {error}.") from None
    backend = scored_pieces(ids, merges, unknown="<unk>", prefix=True)
    # llama2.c begins every text with this mark and ends it at the next.
    backend.add_special_tokens([special_token(BEGINNING)])
    return Tokenizer(backend)
