"""What every import ends with: a checkpoint of ours without the state of a run."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sheepop.config import Config, ModelConfig
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, save_weights, write_manifest
from sheepop.models.sizing import count_parameters
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import atomic_folder, write_json
from sheepop.utils.logging import format_count, log


def refuse_to_replace(output: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: there is.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"There is something at {output} already. Name another --output, or remove it.")


def write_imported(output: Path, settings: ModelConfig, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a checkpoint of a model that was trained elsewhere."""
    write_stateless(output, Config(model=settings), weights, tokenizer)


def write_stateless(output: Path, config: Config, weights: Mapping[str, Tensor], tokenizer: Tokenizer) -> None:
    """Write a checkpoint that is a pretrained model without the state of a run."""
    with atomic_folder(output) as temporary:
        write_json(temporary / CONFIG_FILE, config.model_dump())
        save_weights(weights, config.model, temporary / WEIGHTS_FILE)
        tokenizer.save(temporary / TOKENIZER_FILE)
        write_manifest(temporary, step=0)
    log(f"{output} holds the model: {format_count(count_parameters(config.model).total)} parameters")
