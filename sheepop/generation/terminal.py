"""Generation for a person at a terminal, or for a program that reads JSON."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sheepop.data.tokenizer import Tokenizer, load_model_tokenizer
from sheepop.generation.completion import Generation, complete
from sheepop.generation.engine import decoder_for
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.pretrained import load_pretrained, resolve_checkpoint
from sheepop.models.quantization import quantize
from sheepop.models.quantized_layers import Quantization
from sheepop.models.transformer import TransformerModel
from sheepop.utils.devices import resolve_device
from sheepop.utils.files import to_json
from sheepop.utils.logging import log


def generate_text(
    checkpoint: Path,
    prompt: str,
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int,
    stop: Sequence[str],
    optimized: bool,
    quantization: Quantization | None,
    device: str,
    as_json: bool,
) -> None:
    """Continue a prompt and print prompt and completion; one sample appears as it is written.

    Raises:
        SheepopError: an option is out of range, or the checkpoint cannot be used.
    """
    settings.validate()
    model, tokenizer = load_model_and_tokenizer(checkpoint, device, quantization)
    streams = num_samples == 1 and not as_json
    if streams:
        _show(prompt)
    generation = complete(
        model,
        tokenizer,
        prompt,
        settings,
        max_new_tokens=max_new_tokens,
        seed=seed,
        num_samples=num_samples,
        stop=stop,
        optimized=optimized,
        decode=decoder_for(model) if optimized else None,
        on_text=_show if streams else None,
    )
    if as_json:
        print(to_json(asdict(generation), indent=None))
        return
    if streams:
        print()
    else:
        print(f"\n{'-' * 40}\n".join(prompt + completion.text for completion in generation.completions))
    _tell_speed(generation)


def chat(checkpoint: Path, settings: SamplingSettings, *, max_new_tokens: int, seed: int, device: str) -> None:
    """Take turns with a model: each line typed is added to the text, and the model continues all of it.

    The models trained here continue text; they were not taught to answer. An empty line ends the chat.
    """
    settings.validate()
    model, tokenizer = load_model_and_tokenizer(checkpoint, device)
    log("The model continues what you write. An empty line ends.")
    decode = decoder_for(model)
    text = ""
    for turn, line in enumerate(_lines()):
        text += line + "\n"
        generation = complete(
            model,
            tokenizer,
            text,
            settings,
            max_new_tokens=max_new_tokens,
            seed=seed + turn,
            decode=decode,
            on_text=_show,
        )
        text += generation.completions[0].text
        if not text.endswith("\n"):
            print()
            text += "\n"


def load_model_and_tokenizer(
    checkpoint: Path, device: str, quantization: Quantization | None = None
) -> tuple[TransformerModel, Tokenizer]:
    """Load the two halves of a checkpoint and see that they belong together; round the weights where that is asked.

    Raises:
        CheckpointError: one of them is missing or damaged, or their vocabularies differ.
    """
    folder = resolve_checkpoint(checkpoint)
    model = load_pretrained(folder, resolve_device(device))
    tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
    return quantize(model, quantization) if quantization else model, tokenizer


def _lines() -> Iterator[str]:
    """Yield what the person types until an empty line or the end of input."""
    while True:
        print("you> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().rstrip("\n")
        if not line:
            return
        yield line


def _tell_speed(generation: Generation) -> None:
    log(
        f"[{generation.tokens_per_second:.0f} tokens/s, first token after "
        f"{generation.time_to_first_token_seconds * 1000:.0f} ms]"
    )


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
