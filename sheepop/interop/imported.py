"""What every import ends with: a checkpoint of ours without the state of a run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from sheepop.config import Config, ModelConfig, parse_config
from sheepop.data.chat_template import TEMPLATE_FILE, ChatTemplate
from sheepop.data.tokenizer import TOKENIZER_FILE, Tokenizer
from sheepop.models.pretrained import CONFIG_FILE, WEIGHTS_FILE, save_weights, write_manifest
from sheepop.models.sizing import count_parameters
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import atomic_folder, write_atomic, write_json
from sheepop.utils.logging import format_count, log, warn

LONGEST = 2**24  # tokens of a context; a file that says more is damaged


def refuse_to_replace(output: Path) -> None:
    """Refuse to write where something is.

    Raises:
        ConfigError: there is.
    """
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ConfigError(f"There is something at {output} already. Name another --output, or remove it.")


def checked_settings(read: Callable[[], Mapping[str, Any]], num_stored: int, source: str) -> ModelConfig:
    """Return the settings of a model that a file of others tells.

    Args:
        read: gives our settings (of section `model`) for theirs.
        num_stored: how many numbers its weights have.
        source: where the settings are, for the message.

    Raises:
        CheckpointError: they are missing, of a wrong type, ask for what we do not have, or for other weights.
    """
    try:
        model = parse_config({"model": dict(read())}, source=source).model
    except CheckpointError:
        raise
    except ConfigError as error:
        raise CheckpointError(f"The model's settings cannot be used. {error}") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise CheckpointError(f"{source} is not the settings of a model ({error}).") from None
    needed = count_parameters(model).total
    if needed > 2 * num_stored or model.max_seq_len > LONGEST:  # up to half may be absent biases
        raise CheckpointError(
            f"{source} does not fit its own weights: it asks for {needed} numbers, of which there are {num_stored}, "
            f"and a context of {model.max_seq_len} tokens."
        )
    return model


def write_imported(
    output: Path,
    settings: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    template: object = None,
) -> None:
    """Write a checkpoint of a model that was trained elsewhere, with its chat template where that can be used."""
    write_stateless(output, Config(model=settings), weights, tokenizer, usable_template(template))


def usable_template(source: object) -> ChatTemplate | None:
    """Return a chat template of others; one that cannot be read is left out, since all but conversations go without."""
    if not isinstance(source, str):
        return None
    try:
        return ChatTemplate(source)
    except DataError as error:
        warn(f"{error} The model is imported without it.")
        return None


def write_stateless(
    output: Path,
    config: Config,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    template: ChatTemplate | None = None,
) -> None:
    """Write a checkpoint that is a pretrained model without the state of a run."""
    with atomic_folder(output) as temporary:
        write_json(temporary / CONFIG_FILE, config.model_dump())
        save_weights(weights, config.model, temporary / WEIGHTS_FILE)
        tokenizer.save(temporary / TOKENIZER_FILE)
        if template is not None:
            write_atomic(temporary / TEMPLATE_FILE, template.source)
        write_manifest(temporary, step=0)
    log(f"{output} holds the model: {format_count(count_parameters(config.model).total)} parameters")
