"""Models as GGUF files, which llama.cpp and what builds on it run, both ways; an export proves itself."""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.data.chat_template import load_chat_template
from sheepop.data.tokenizer import Tokenizer, load_model_tokenizer
from sheepop.interop.gguf_architectures import (
    IMPORTED,
    ROPE_DIVISORS,
    as_architecture,
    fields_for,
    moves_of,
    rope_divisors,
    settings_from,
)
from sheepop.interop.gguf_file import GgufFile, gguf_library
from sheepop.interop.gguf_tokenizer import read_tokenizer, tokenizer_fields
from sheepop.interop.imported import checked_settings, write_imported
from sheepop.interop.llama_cpp_engine import llama_cpp
from sheepop.interop.moves import weights_for, weights_from
from sheepop.interop.proof import LONGEST_PROOF, PROOF_TEXT, PROOF_TOKENS, prove_same
from sheepop.models.pretrained import load_pretrained, resolve_checkpoint, stored_weights
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import atomic_file
from sheepop.utils.logging import log


@dataclass(frozen=True)
class Encoding:
    """How the matrices of a file are stored.

    Attributes:
        file_type: its number in `general.file_type`.
        rounding: the largest error of a weight, over the largest of its tensor.
        tolerance: of logits, over the largest: llama.cpp multiplies weights of 16 and 8 bits by activations that it
            rounds to as many.
    """

    file_type: int
    rounding: float
    tolerance: float


SMALLEST_FP16 = 2**-24
ENCODINGS = {"f32": Encoding(0, 0.0, 1e-4), "f16": Encoding(1, 2**-11, 5e-3), "q8_0": Encoding(7, 1 / 127, 0.15)}
CHAT_TEMPLATE = "tokenizer.chat_template"
GELU_TOLERANCE = 5e-3  # more, where llama.cpp looks GELU up in a table of fp16


def import_gguf(file: Path, output: Path, tokenizer_path: Path | None = None) -> None:
    """Write a GGUF file as a checkpoint of ours, with its tokenizer; packed weights become fp32.

    Args:
        file: the model.
        output: the checkpoint.
        tokenizer_path: in place of the file's own tokenizer.

    Raises:
        CheckpointError: the model, its tokenizer or a type of its tensors is of a kind that we do not have, or the file
            is damaged.
    """
    stored = GgufFile(file)
    settings, weights = read_model(stored, str(file))
    if tokenizer_path is None:
        tokenizer = read_tokenizer(stored.fields, settings.vocab_size, str(file))
        template = stored.fields.get(CHAT_TEMPLATE)
    else:
        tokenizer, template = load_model_tokenizer(tokenizer_path, settings.vocab_size), None
    write_imported(output, settings, weights, tokenizer, template)


def read_model(file: GgufFile, source: str) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return our settings and weights of a model.

    Raises:
        CheckpointError: it is of a kind that we do not have, or damaged.
    """
    name = file.fields.get("general.architecture")
    architecture = next((known for known in IMPORTED if known.name == name), None)
    if architecture is None:
        known = ", ".join(architecture.name for architecture in IMPORTED)
        raise CheckpointError(f"The model is a '{name}', which sheepop cannot import; known are {known}.")
    if file.fields.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{source} is one of several parts of a model. Put them together (llama-gguf-split --merge)."
        )
    settings = checked_settings(lambda: settings_from(architecture, file), file.num_stored, source)
    moves = moves_of(architecture, settings)
    known_names = {name for move in moves for name in move.theirs}
    if architecture.has_rope_divisors:
        known_names.add(ROPE_DIVISORS)
    strange = sorted(file.keys() - known_names)
    if strange:
        raise CheckpointError(
            f"{source} has weights for which sheepop has no place: {', '.join(strange[:5])}"
            + ", and others" * (len(strange) > 5)
            + ". They change what the model computes."
        )
    return settings, weights_from(moves, file, settings, source)


def export_gguf(checkpoint: Path, output: Path, *, encoding: str = "f32") -> None:
    """Write a checkpoint as a GGUF file, and prove that it is the same.

    Args:
        checkpoint: ours.
        output: the file.
        encoding: `f32`, `f16` or `q8_0`: how matrices are stored; vectors and learned positions stay in fp32, and
            matrices whose rows do not fill blocks of 32 are in fp16 in place of `q8_0`.

    Raises:
        ConfigError: there is no such encoding.
        CheckpointError: llama.cpp cannot express the model or its tokenizer, or what was written computes something
            else.
    """
    if encoding not in ENCODINGS:
        raise ConfigError(f"Weights cannot be stored as '{encoding}'. Choose {', '.join(ENCODINGS)}.")
    folder = resolve_checkpoint(checkpoint)
    model = load_pretrained(folder)
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    architecture, settings, weights = as_architecture(model.config, stored_weights(model))
    fields = {
        "general.name": folder.resolve().name,
        "general.file_type": ENCODINGS[encoding].file_type,
        "general.quantization_version": 2,
        **fields_for(architecture, settings),
        **tokenizer_fields(tokenizer, settings.vocab_size),
    }
    chat_template = load_chat_template(folder)
    if chat_template is not None:
        fields[CHAT_TEMPLATE] = chat_template.source
    moved = weights_for(moves_of(architecture, settings), weights, settings)
    if settings.rope_scaling == "llama3":
        moved[ROPE_DIVISORS] = rope_divisors(settings).float()
    with atomic_file(output) as temporary:
        write_gguf(temporary, architecture.name, fields, moved, encoding)
        prove(temporary, model, tokenizer, encoding)
    log(f"{output} holds a {architecture.name} that llama.cpp and what builds on it run")


def write_gguf(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Tensor], encoding: str
) -> None:
    """Write a file: numbers in 32 bits, matrices in an encoding."""
    gguf = gguf_library()
    writer = gguf.GGUFWriter(path, architecture)
    add: dict[type, Callable[[str, Any], None]] = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in fields.items():
        add[type(value)](key, value)
    for name, tensor in tensors.items():
        kind = gguf.GGMLQuantizationType[encoding_of(name, tensor, encoding).upper()]
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def encoding_of(name: str, tensor: Tensor, encoding: str) -> str:
    """Return how a tensor is stored where matrices are stored in an encoding."""
    if tensor.dim() < 2 or name.startswith("position"):
        return "f32"
    return "f16" if encoding == "q8_0" and tensor.shape[-1] % 32 else encoding


def prove(path: Path, model: TransformerModel, tokenizer: Tokenizer, encoding: str) -> None:
    """Read what was written and compare weights and tokenizer, and where llama.cpp is, what that computes.

    Args:
        path: the file.
        model, tokenizer: what was exported.
        encoding: of the file's matrices.

    Raises:
        CheckpointError: something differs.
    """
    stored = GgufFile(path)
    settings, weights = read_model(stored, str(path))
    _, _, expected = as_architecture(model.config, stored_weights(model))
    rounding = ENCODINGS[encoding].rounding
    for name, tensor in weights.items():
        original = expected.get(name, torch.zeros(()))  # a bias that we lack
        limit = rounding * float(original.abs().max()) + SMALLEST_FP16 * (rounding > 0)
        if not float((tensor - original).abs().max()) <= limit:
            raise CheckpointError(f"The export is not the same model: read again, its weight {name} differs.")
    theirs = read_tokenizer(stored.fields, settings.vocab_size, str(path))
    found, wanted = ([one.start_ids, one.end_of_text_id, one.encode(PROOF_TEXT)] for one in (theirs, tokenizer))
    if found != wanted:
        raise CheckpointError("The export is not the same model: read again, its tokenizer gives other tokens.")
    if importlib.util.find_spec("llama_cpp") is None:
        log(
            "read back it is the same; llama-cpp-python is not installed, so that the export was not compared with "
            "llama.cpp itself: pip install llama-cpp-python"
        )
        return
    if rounding:  # llama.cpp computes with the rounded weights
        model = TransformerModel(settings, initialize=False)
        model.load_state_dict(weights, strict=False)
    prove_with_llama_cpp(path, model, tokenizer, encoding)


def prove_with_llama_cpp(path: Path, model: TransformerModel, tokenizer: Tokenizer, encoding: str) -> None:
    """Load a file with llama.cpp and compare token ids, logits and, of a file in fp32, greedy tokens.

    Raises:
        CheckpointError: they differ, or it does not load.
    """
    length = min(model.config.max_seq_len, LONGEST_PROOF)
    # Its kernels for several tokens and packed weights end in a segmentation fault on some CPUs (AMX, version 0.3.36).
    batch = length if encoding == "f32" else 1
    with llama_cpp(path, context=length, batch=batch, threads=torch.get_num_threads()) as (tokens_of, logits_of):

        def encode(text: str) -> list[int]:
            ids, start = tokens_of(text), tokenizer.start_ids
            if ids[: len(start)] != start:
                raise CheckpointError(f"llama.cpp begins a text with the token {ids[0]}, not with {start[0]}.")
            return ids[len(start) :]

        prove_same(
            "llama.cpp",
            model,
            tokenizer,
            encode=encode,
            logits_of=lambda token_ids: torch.stack([torch.tensor(logits_of(row)) for row in token_ids.tolist()]),
            tolerance=ENCODINGS[encoding].tolerance + GELU_TOLERANCE * (model.config.activation == "gelu_tanh"),
            greedy_tokens=PROOF_TOKENS if encoding == "f32" else 0,
        )
