"""Models as folders that `transformers` loads without code of ours, both ways; an export proves itself."""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.data.chat_template import LARGEST_TEMPLATE, TEMPLATE_FILE, load_chat_template
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_model_tokenizer
from sheepop.interop.imported import checked_settings, write_imported
from sheepop.interop.moves import weights_for, weights_from
from sheepop.interop.proof import prove_same
from sheepop.interop.stock_classes import GPT2, STOCK_CLASSES, StockClass, stock_class_for
from sheepop.models.positions import sinusoidal_table
from sheepop.models.pretrained import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_pretrained,
    read_tensors,
    resolve_checkpoint,
    save_tensors,
    stored_weights,
)
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError
from sheepop.utils.files import atomic_folder, read_json, write_atomic, write_json
from sheepop.utils.logging import log

TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
INDEX_FILE = "model.safetensors.index.json"
# Of logits in fp32, over their largest absolute value; two orders above what another order of sums makes.
TOLERANCE = 1e-4
LARGEST_JSON = 2**23  # bytes of settings, or of an index


def export_huggingface(checkpoint: Path, output: Path) -> None:
    """Write a checkpoint as a folder for `AutoModelForCausalLM` and `AutoTokenizer`, and prove that it is the same.

    Where `transformers` is not installed, the proof is left out and that is said.

    Raises:
        CheckpointError: no stock class can express the model, or what was written computes something else.
    """
    folder = resolve_checkpoint(checkpoint)
    model = load_pretrained(folder)
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    stock, settings, weights = as_stock(model.config, stored_weights(model))
    with atomic_folder(output) as temporary:
        write_json(temporary / CONFIG_FILE, settings_of(stock, settings, tokenizer))
        moved = weights_for(stock.moves(settings), weights, settings)
        save_tensors(moved, temporary / WEIGHTS_FILE, {"format": "pt"})
        write_tokenizer(temporary, tokenizer, settings.max_seq_len)
        template = load_chat_template(folder)
        if template is not None:
            write_atomic(temporary / TEMPLATE_FILE, template.source)
        prove(temporary, model, tokenizer)
    log(f"{output} holds a {stock.name} that transformers and what builds on it load without code of ours")


def as_stock(settings: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[StockClass, ModelConfig, dict[str, Tensor]]:
    """Return a stock class, and the model as an instance of it: absolute positions as a table of learned ones.

    Raises:
        CheckpointError: there is no such class.
    """
    learned, moved = with_learned_positions(settings, weights)
    if learned != settings and not GPT2.misfits(learned):
        return GPT2, learned, moved
    return stock_class_for(settings), settings, dict(weights)


def with_learned_positions(
    settings: ModelConfig, weights: Mapping[str, Tensor]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Return the same model with a table of learned positions, unless its positions are rotary.

    No positions are zeros; sinusoidal ones are the table of waves, with the scaling of the token embedding done
    beforehand, so that a tied head becomes one of its own.
    """
    weights = dict(weights)
    if settings.positions not in ("none", "sinusoidal"):
        return settings, weights
    changes: dict[str, Any] = {"positions": "learned"}
    if settings.positions == "none":
        weights["position_embedding.weight"] = torch.zeros(settings.max_seq_len, settings.d_model)
    else:
        weights["position_embedding.weight"] = sinusoidal_table(settings.max_seq_len, settings.d_model)
        weights.setdefault("head.weight", weights["token_embedding.weight"])
        weights["token_embedding.weight"] = weights["token_embedding.weight"] * math.sqrt(settings.d_model)
        changes["tie_weights"] = False
    return settings.model_copy(update=changes), weights


def settings_of(stock: StockClass, settings: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": [stock.name],
        "model_type": stock.model_types[0],
        "vocab_size": settings.vocab_size,
        "tie_word_embeddings": settings.tie_weights,
        "initializer_range": settings.init_std,
        "bos_token_id": tokenizer.begin_of_text_id,
        "eos_token_id": tokenizer.end_of_text_id,
        "torch_dtype": "float32",
        **stock.settings_for(settings),
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write a tokenizer as `AutoTokenizer` finds it."""
    tokenizer.save(folder / TOKENIZER_FILE)
    write_json(
        folder / TOKENIZER_SETTINGS_FILE,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.token_text(tokenizer.begin_of_text_id),
            "eos_token": tokenizer.end_of_text,
            "model_max_length": max_seq_len,
            "clean_up_tokenization_spaces": False,
        },
    )


def prove(folder: Path, model: TransformerModel, tokenizer: Tokenizer) -> None:
    """Load what was written with `transformers` and compare token ids, logits and greedy tokens; say the difference.

    Raises:
        CheckpointError: they differ.
    """
    if importlib.util.find_spec("transformers") is None:
        log(
            "transformers is not installed, so that the export was not compared with it: pip install 'sheepop[interop]'"
        )
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as their_logging

    their_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    their_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs.train(False)
    their_tokenizer = AutoTokenizer.from_pretrained(folder)
    prove_same(
        "transformers",
        model,
        tokenizer,
        encode=lambda text: their_tokenizer(text, add_special_tokens=False)["input_ids"],
        logits_of=lambda token_ids: theirs(token_ids).logits,
        tolerance=TOLERANCE,
    )


def import_huggingface(folder: Path, output: Path, tokenizer_path: Path | None = None) -> None:
    """Write a Hugging Face folder as a checkpoint of ours, with its tokenizer.

    Args:
        folder: `config.json`, `model.safetensors` (or its parts and their index), and `tokenizer.json`.
        output: the checkpoint.
        tokenizer_path: in place of the folder's.

    Raises:
        CheckpointError: the model is of a kind that we do not have, or files are missing or damaged.
    """
    theirs = read_json(folder / CONFIG_FILE, CheckpointError, most_bytes=LARGEST_JSON)
    stock = stock_class_of(theirs)
    weights = read_weights(folder)
    settings = settings_from(stock, theirs, weights, str(folder))
    moves = stock.moves(settings)
    moved = weights_from(moves, with_prefix(weights, moves[0].theirs[0]), settings, str(folder))
    tokenizer = load_model_tokenizer(tokenizer_path or folder, settings.vocab_size)
    if tokenizer_path is None:
        write_imported(output, settings, moved, with_marks_of(folder, tokenizer), template_of(folder))
    else:  # a template is full of names of the folder's own tokens
        write_imported(output, settings, moved, tokenizer)


def template_of(folder: Path) -> object:
    """Return the chat template of a folder, which has a file of its own or stands in the tokenizer's settings; or None.

    Where the settings have several, which a list names, it is the default one.
    """
    own, settings = folder / TEMPLATE_FILE, folder / TOKENIZER_SETTINGS_FILE
    if own.is_file() and own.stat().st_size <= LARGEST_TEMPLATE:
        return own.read_text(encoding="utf-8", errors="replace")
    if not settings.is_file():
        return None
    said = read_json(settings, CheckpointError, most_bytes=LARGEST_JSON).get("chat_template")
    if not isinstance(said, list):
        return said
    default = (each for each in said if isinstance(each, dict) and each.get("name") == "default")
    return next(default, {}).get("template")


def with_marks_of(folder: Path, tokenizer: Tokenizer) -> Tokenizer:
    """Return a tokenizer that begins and ends texts as a folder's other files say.

    The end is the first token for it that they name. What a text begins with is in `tokenizer.json` itself, in its
    template; without one nothing stands before a text, but where one token is both begin and end, as with GPT-2, a text
    begins with the end of the one before.
    """
    names = (TOKENIZER_SETTINGS_FILE, "generation_config.json", CONFIG_FILE)
    files = [
        read_json(folder / name, CheckpointError, most_bytes=LARGEST_JSON)
        for name in names
        if (folder / name).is_file()
    ]

    def said(mark: str) -> int | None:
        for value in (file.get(key) for file in files for key in (f"{mark}_token", f"{mark}_token_id")):
            first = value[0] if isinstance(value, list) and value else value
            name = first.get("content") if isinstance(first, dict) else first
            for special, number in tokenizer.special_ids.items():
                if name in (special, number):
                    return number
        return None

    begin, end = said("bos"), said("eos")
    adds = next((file["add_bos_token"] for file in files if file.get("add_bos_token") is not None), None)
    if end is None:
        return tokenizer
    if tokenizer.marks.start is not None and adds is not False:
        start = tokenizer.start_ids
    elif begin is not None and (adds or (adds is None and begin == end)):
        start = [begin]
    else:
        start = []
    if (start, end) == (tokenizer.start_ids, tokenizer.end_of_text_id):
        return tokenizer
    return tokenizer.with_marks(start, end)


def stock_class_of(theirs: Mapping[str, Any]) -> StockClass:
    """Return the class that `config.json` names.

    Raises:
        CheckpointError: we have none such; it says which we have.
    """
    kind = theirs.get("model_type")
    for stock in STOCK_CLASSES:
        if kind in stock.model_types:
            return stock
    known = ", ".join(name for stock in STOCK_CLASSES for name in stock.model_types)
    raise CheckpointError(f"The model is a '{kind}', which sheepop cannot import; known are {known}.")


def settings_from(
    stock: StockClass, theirs: Mapping[str, Any], weights: Mapping[str, Tensor], source: str
) -> ModelConfig:
    """Return our settings of a model.

    Raises:
        CheckpointError: they are missing, of a wrong type, or ask for what we do not have.
    """
    if theirs.get("quantization_config"):
        raise CheckpointError(f"{source} is quantized; import the model as it was before, or its GGUF file.")

    def ours() -> dict[str, Any]:
        has_head = any(name in weights for name in ("lm_head.weight", "embed_out.weight"))
        is_tied = bool(theirs.get("tie_word_embeddings", stock.model_types[0] == "gpt2"))
        embedding = {"vocab_size": theirs.get("vocab_size"), "tie_weights": is_tied or not has_head}
        return stock.settings_from(theirs) | embedding

    return checked_settings(ours, sum(tensor.numel() for tensor in weights.values()), f"{source}/{CONFIG_FILE}")


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read all weights of a folder, from one file or from the parts that an index names.

    Raises:
        CheckpointError: there are none that can be read without unpickling, or a file is damaged.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return read_tensors(folder / WEIGHTS_FILE)
    if not (folder / INDEX_FILE).is_file():
        has_pickle = any(folder.glob("pytorch_model*.bin"))
        hint = " Its pytorch_model.bin is a pickle, which may run code; convert it to safetensors." * has_pickle
        raise CheckpointError(f"There is no {WEIGHTS_FILE} in {folder}.{hint}")
    parts = read_json(folder / INDEX_FILE, CheckpointError, most_bytes=LARGEST_JSON).get("weight_map")
    names: list[Any] = list(parts.values()) if isinstance(parts, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{folder / INDEX_FILE} does not name the files of a model.")
    weights: dict[str, Tensor] = {}
    for name in sorted(set(names)):
        weights |= read_tensors(folder / name)
    return weights


def with_prefix(weights: Mapping[str, Tensor], example: str) -> dict[str, Tensor]:
    """Return weights under the names of the model with a head, where files have those of the model without."""
    prefix = example.partition(".")[0] + "."
    if any(name.startswith(prefix) for name in weights):
        return dict(weights)
    return {name if name.startswith(("lm_head.", "embed_out.")) else prefix + name: t for name, t in weights.items()}
