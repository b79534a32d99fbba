"""Models as folders that `transformers` loads without code of ours, both ways; an export proves itself."""

import importlib.util
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig, parse_config
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer, load_model_tokenizer
from sheepop.interop.imported import write_imported
from sheepop.interop.moves import weights_for, weights_from
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
from sheepop.models.sizing import count_parameters
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.errors import CheckpointError, ConfigError
from sheepop.utils.files import atomic_folder, read_json, write_json
from sheepop.utils.logging import log

INDEX_FILE = "model.safetensors.index.json"
PROOF_TEXT = "The proof of the pudding is in the eating: 3 cups of flour, Σ x² ≥ 0, naïve café.\n"
PROOF_TOKENS = 64
LONGEST = 2**24  # tokens of a context; a file that says more is damaged
# Of logits in fp32, over their largest absolute value; two orders above what another order of sums makes.
TOLERANCE = 1e-4


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
        write_json(temporary / CONFIG_FILE, settings_of(stock, settings, tokenizer.end_of_text_id))
        moved = weights_for(stock.moves(settings), weights, settings)
        save_tensors(moved, temporary / WEIGHTS_FILE, {"format": "pt"})
        write_tokenizer(temporary, tokenizer, settings.max_seq_len)
        prove(temporary, model, tokenizer)
    log(f"{output} holds a {stock.name} that transformers and what builds on it load without code of ours")


def as_stock(settings: ModelConfig, weights: Mapping[str, Tensor]) -> tuple[StockClass, ModelConfig, dict[str, Tensor]]:
    """Return a stock class, and the model as an instance of it: absolute positions as a table of learned ones.

    No positions are zeros; sinusoidal ones are the table of waves, with the scaling of the token embedding done
    beforehand, so that a tied head becomes one of its own.

    Raises:
        CheckpointError: there is no such class.
    """
    weights = dict(weights)
    learned = settings.model_copy(update={"positions": "learned"})
    if settings.positions not in ("none", "sinusoidal") or GPT2.misfits(learned):
        return stock_class_for(settings), settings, weights
    if settings.positions == "none":
        weights["position_embedding.weight"] = torch.zeros(settings.max_seq_len, settings.d_model)
    else:
        weights["position_embedding.weight"] = sinusoidal_table(settings.max_seq_len, settings.d_model)
        weights.setdefault("head.weight", weights["token_embedding.weight"])
        weights["token_embedding.weight"] = weights["token_embedding.weight"] * math.sqrt(settings.d_model)
        learned = learned.model_copy(update={"tie_weights": False})
    return GPT2, learned, weights


def settings_of(stock: StockClass, settings: ModelConfig, end_of_text_id: int) -> dict[str, Any]:
    """Return the content of `config.json`."""
    return {
        "architectures": [stock.name],
        "model_type": stock.model_types[0],
        "vocab_size": settings.vocab_size,
        "tie_word_embeddings": settings.tie_weights,
        "initializer_range": settings.init_std,
        "bos_token_id": end_of_text_id,
        "eos_token_id": end_of_text_id,
        "torch_dtype": "float32",
        **stock.settings_for(settings),
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, max_seq_len: int) -> None:
    """Write a tokenizer as `AutoTokenizer` finds it."""
    tokenizer.save(folder / TOKENIZER_FILE)
    end = tokenizer.end_of_text
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": end,
            "eos_token": end,
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
    their_ids = AutoTokenizer.from_pretrained(folder)(PROOF_TEXT, add_special_tokens=False)["input_ids"]
    own_ids = tokenizer.encode(PROOF_TEXT)
    if their_ids != own_ids:
        raise CheckpointError(f"The exported tokenizer differs: it gives {their_ids[:20]}, ours {own_ids[:20]}.")
    generator = torch.Generator().manual_seed(0)
    length = min(model.config.max_seq_len, 512)
    token_ids = torch.randint(0, model.config.vocab_size, (2, length), generator=generator)  # (B, T)
    text = (own_ids * length)[:length]
    token_ids[0] = torch.tensor(text)
    prompt = text[: max(1, length // 2)]
    count = min(PROOF_TOKENS, model.config.max_seq_len - len(prompt))
    with inference(model), torch.inference_mode():
        own, other = model(token_ids), theirs(token_ids).logits
        is_same_text = greedy(model, prompt, count) == greedy(lambda ids: theirs(ids).logits, prompt, count)
    difference, largest = float((own - other).abs().max()), float(own.abs().max())
    if not difference <= TOLERANCE * largest:
        raise CheckpointError(
            f"The export is not the same model: its logits differ by up to {difference:.3g}, of {largest:.3g} at most. "
            "Please report this with the model's config.json."
        )
    if not is_same_text:
        raise CheckpointError("The export is not the same model: its greedy tokens differ.")
    log(f"proved with transformers: logits differ by at most {difference:.2g}, {count} greedy tokens are the same")


def greedy(logits_of: Callable[[Tensor], Tensor], prompt: list[int], count: int) -> list[int]:
    """Return the likeliest tokens after a prompt, one after the other."""
    written = list(prompt)
    for _ in range(count):
        written.append(int(logits_of(torch.tensor([written]))[0, -1].argmax()))
    return written[len(prompt) :]


def import_huggingface(folder: Path, output: Path, tokenizer_path: Path | None = None) -> None:
    """Write a Hugging Face folder as a checkpoint of ours, with its tokenizer.

    Args:
        folder: `config.json`, `model.safetensors` (or its parts and their index), and `tokenizer.json`.
        output: the checkpoint.
        tokenizer_path: in place of the folder's.

    Raises:
        CheckpointError: the model is of a kind that we do not have, or files are missing or damaged.
    """
    theirs = read_json(folder / CONFIG_FILE, CheckpointError)
    stock = stock_class_of(theirs)
    weights = read_weights(folder)
    settings = settings_from(stock, theirs, weights, str(folder))
    moves = stock.moves(settings)
    moved = weights_from(moves, with_prefix(weights, moves[0].theirs[0]), settings, str(folder))
    write_imported(output, settings, moved, load_model_tokenizer(tokenizer_path or folder, settings.vocab_size))


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
    try:
        ours = stock.settings_from(theirs)
        head = next((name for name in ("lm_head.weight", "embed_out.weight") if name in weights), None)
        is_tied = theirs.get("tie_word_embeddings", stock.model_types[0] == "gpt2")
        ours |= {"vocab_size": theirs.get("vocab_size"), "tie_weights": bool(is_tied) or head is None}
        model = parse_config({"model": ours}, source=f"{source}/{CONFIG_FILE}").model
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"The model's settings cannot be used. {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{source}/{CONFIG_FILE} is not the settings of a model ({error}).") from None
    stored = sum(tensor.numel() for tensor in weights.values())
    if count_parameters(model).total > 2 * stored or model.max_seq_len > LONGEST:  # up to half may be absent biases
        raise CheckpointError(
            f"{source} does not fit its own settings: they ask for {count_parameters(model).total} weights, of which "
            f"there are {stored}, and a context of {model.max_seq_len} tokens."
        )
    return model


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
    parts = read_json(folder / INDEX_FILE, CheckpointError).get("weight_map")
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
