"""A checkpoint in fewer bits, as a checkpoint of its own."""

from pathlib import Path

from sheepop.data.chat_template import load_chat_template
from sheepop.data.tokenizer import load_model_tokenizer
from sheepop.interop.imported import refuse_to_replace, write_stateless
from sheepop.models.pretrained import read_model, read_settings, resolve_checkpoint, stored_weights, verified_meanwhile
from sheepop.models.quantization import quantize
from sheepop.models.quantized_layers import Quantization


def quantize_checkpoint(checkpoint: Path, output: Path, quantization: Quantization) -> None:
    """Write a checkpoint with its matrices in 8 or 4 bits, which generates and is evaluated like any other.

    Raises:
        ConfigError: something is at `output`, or the checkpoint is quantized already.
        CheckpointError: there is no checkpoint, or it is damaged.
    """
    refuse_to_replace(output)
    folder = resolve_checkpoint(checkpoint)
    with verified_meanwhile(folder):
        model = quantize(read_model(folder, shares_file=True), quantization)
    settings = read_settings(folder).model_copy(update={"model": model.config})
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    write_stateless(output, settings, stored_weights(model), tokenizer, load_chat_template(folder))
