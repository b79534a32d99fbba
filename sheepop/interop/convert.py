"""Which format a model is in, or is to be in."""

from pathlib import Path

from sheepop.interop.gguf import export_gguf, import_gguf
from sheepop.interop.huggingface import export_huggingface, import_huggingface
from sheepop.interop.imported import refuse_to_replace
from sheepop.interop.llama2c import import_llama2c
from sheepop.interop.nanogpt import import_nanogpt
from sheepop.models.pretrained import CONFIG_FILE, read_settings, resolve_checkpoint
from sheepop.utils.errors import CheckpointError, ConfigError

FORMATS = ("hf", "gguf")


def export_model(checkpoint: Path, output: Path, *, file_format: str, encoding: str = "f32") -> None:
    """Write a checkpoint in another format, and prove that it computes the same there.

    Args:
        checkpoint: ours.
        output: what to write.
        file_format: one of FORMATS.
        encoding: how weights are stored; GGUF has several ways.

    Raises:
        ConfigError: there is no such format or encoding, or something is at `output`.
        CheckpointError: the format cannot express the model.
    """
    if file_format not in FORMATS:
        raise ConfigError(f"There is no format '{file_format}'. Choose {' or '.join(FORMATS)}.")
    refuse_to_replace(output)
    quantization = read_settings(resolve_checkpoint(checkpoint)).model.quantization
    if quantization != "none":
        raise CheckpointError(
            f"{checkpoint} is kept in {quantization} (model.quantization), which no other engine reads as we write it. "
            "Export the model that it was made of."
        )
    if file_format == "gguf":
        export_gguf(checkpoint, output, encoding=encoding)
    elif encoding == "f32":
        export_huggingface(checkpoint, output)
    else:
        raise ConfigError(f"Weights stored as '{encoding}' are for --format gguf; a Hugging Face folder has f32.")


def import_model(source: Path, output: Path, *, tokenizer: Path | None) -> None:
    """Write a model of another format as a checkpoint.

    Raises:
        CheckpointError: the model is of a kind that we do not have, or damaged.
        ConfigError: something is at `output`.
    """
    refuse_to_replace(output)
    if source.is_file() and source.suffix == ".bin":
        import_llama2c(source, output, tokenizer)
    elif source.is_file() and source.suffix == ".pt":
        import_nanogpt(source, output, tokenizer)
    elif source.is_file() and source.suffix == ".gguf":
        import_gguf(source, output, tokenizer)
    elif (source / CONFIG_FILE).is_file():
        import_huggingface(source, output, tokenizer)
    else:
        kind = "is of no known kind" if source.exists() else "does not exist"
        raise CheckpointError(
            f"{source} {'holds no config.json' if source.is_dir() else kind}. Name a Hugging Face folder (config.json, "
            "model.safetensors, tokenizer.json), a .gguf file, a model of llama2.c (.bin) or of nanoGPT (.pt)."
        )
