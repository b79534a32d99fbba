"""Generation for a person at a terminal, or for a program that reads JSON."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from sheepop.data.chat_template import Message, load_chat_template
from sheepop.data.tokenizer import Tokenizer, load_model_tokenizer
from sheepop.generation.completion import Generation, Transcript, complete, prompt_tokens
from sheepop.generation.draft_model import DraftModel
from sheepop.generation.engine import decode_for, generate_cached, uses_kernels
from sheepop.generation.file_completion import complete_file
from sheepop.generation.generate import check_length
from sheepop.generation.grammar import Grammar, GrammarKind, constraint_of
from sheepop.generation.prompt_file import PromptOptions, read_prompts
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import LookUp, Speculator
from sheepop.models.pretrained import read_model, resolve_checkpoint, verified_meanwhile
from sheepop.models.quantization import quantize
from sheepop.models.quantized_layers import Quantization
from sheepop.models.transformer import TransformerModel
from sheepop.utils.devices import resolve_device
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import to_json
from sheepop.utils.logging import log
from sheepop.utils.runtime import load_numba_alone

LARGEST_GRAMMAR = 2**20  # bytes; one of a few more takes seconds and hundreds of megabytes to compile


def check_combination(
    *,
    prompt: str | None,
    prompts: Path | None,
    output: Path | None,
    optimized: bool,
    speculate: str | None,
    grammar: Grammar | None,
    int8_cache: bool,
    compiles: bool,
) -> None:
    """Check options of `generate` that do not all go together.

    Raises:
        ConfigError: says which do not.
    """
    if speculate is not None and not optimized:
        raise ConfigError("--speculate guesses for the generation with a cache; leave out --no-optimized.")
    if grammar is not None and not optimized:
        raise ConfigError("A grammar needs the generation with a cache; leave out --no-optimized.")
    if int8_cache and not optimized:
        raise ConfigError("--cache says how keys and values are kept; leave out --no-optimized, which keeps none.")
    if compiles and (
        prompts is not None or speculate is not None or grammar is not None or int8_cache or not optimized
    ):
        raise ConfigError(
            "--compile is for the steps of a single prompt's texts; it does not go with --prompts, --speculate, a "
            "grammar, --cache or --no-optimized."
        )
    if (prompts is None) != (output is None):
        raise ConfigError(
            "--prompts FILE and --output FILE go together: the prompts, and the file that the completions are written "
            "to. A single --prompt is continued on standard output."
        )
    if prompts is not None and (prompt is not None or not optimized):
        raise ConfigError("--prompts does not go with --prompt or --no-optimized; leave out one of them.")
    if prompts is not None and output is not None and output.exists() and output.samefile(prompts):
        raise ConfigError(f"--prompts and --output are the same file, {output}. Name another --output.")


def read_grammar(json_schema: Path | None, regex: str | None, lark: Path | None) -> Grammar | None:
    """Return what the output has to follow, of which at most one is given.

    Raises:
        ConfigError: two are given, or a file cannot be read, or is larger than any grammar.
    """
    given: dict[GrammarKind, Path | str | None] = {"json_schema": json_schema, "regex": regex, "lark": lark}
    grammars = [(kind, source) for kind, source in given.items() if source is not None]
    if not grammars:
        return None
    if len(grammars) > 1:
        raise ConfigError("--json-schema, --regex and --grammar each say all that the output may be; give one of them.")
    ((kind, source),) = grammars
    if isinstance(source, str):
        return Grammar(kind, source)
    name = f"The {kind.replace('_', ' ')} {source}"
    try:
        if source.stat().st_size > LARGEST_GRAMMAR:
            raise ConfigError(f"{name} has {source.stat().st_size} bytes, of which {LARGEST_GRAMMAR} are the most.")
        return Grammar(kind, source.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"{name} cannot be read: {why}.") from None


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
    compiles: bool,
    quantization: Quantization | None,
    speculate: str | None,
    grammar: Grammar | None,
    int8_cache: bool,
    device: str,
    as_json: bool,
) -> None:
    """Continue a prompt and print prompt and completion; one sample appears as it is written.

    Raises:
        SheepopError: an option is out of range, the prompt is longer than the model's context, or the checkpoint cannot
            be used.
    """
    settings.validate()
    model, tokenizer = load_model_and_tokenizer(checkpoint, device, quantization)
    check_length(prompt_tokens(tokenizer, prompt), model.config.max_seq_len)
    constrain = constraint_of(grammar, model, tokenizer)
    uses_engine = speculate is not None or constrain is not None or int8_cache
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
        decode=decode_for(model, compiles=compiles) if optimized and not uses_engine else None,
        speculator=load_speculator(speculate, model, tokenizer, max_batch_size=max(num_samples, 1)),
        constrain=constrain,
        int8_cache=int8_cache,
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


def generate_from_file(
    checkpoint: Path,
    prompts: Path,
    output: Path,
    settings: SamplingSettings,
    *,
    max_new_tokens: int,
    seed: int,
    num_samples: int,
    stop: Sequence[str],
    batch_size: int,
    quantization: Quantization | None,
    speculate: str | None,
    grammar: Grammar | None,
    int8_cache: bool,
    device: str,
    as_json: bool,
) -> None:
    """Continue every prompt of a file into another file, and print that file's name; see `complete_file`.

    Raises:
        SheepopError: an option is out of range, a line of the prompts cannot be used, or the checkpoint cannot.
    """
    settings.validate()
    lines = read_prompts(prompts, PromptOptions(settings, max_new_tokens, seed, num_samples, tuple(stop), grammar))
    model, tokenizer = load_model_and_tokenizer(checkpoint, device, quantization)
    began = time.perf_counter()
    tokens = complete_file(
        model,
        tokenizer,
        lines,
        output,
        batch_size=batch_size,
        speculator=load_speculator(speculate, model, tokenizer, max_batch_size=batch_size),
        int8_cache=int8_cache,
    )
    seconds = time.perf_counter() - began
    if as_json:
        print(
            to_json({"output": str(output), "prompts": len(lines), "tokens": tokens, "seconds": seconds}, indent=None)
        )
    else:
        print(output)


def load_speculator(
    speculate: str | None, model: TransformerModel, tokenizer: Tokenizer, *, max_batch_size: int
) -> Speculator | None:
    """Return what guesses tokens ahead: None for nothing, `lookup`, or the checkpoint of a small model.

    Raises:
        ConfigError: the small model has another tokenizer.
        CheckpointError: it cannot be used.
    """
    if speculate is None:
        return None
    if speculate == "lookup":
        return LookUp()
    draft, its_tokenizer = load_model_and_tokenizer(Path(speculate), str(model.device))
    if its_tokenizer.fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"The draft model {speculate} has another tokenizer than the model whose tokens it shall guess. "
            "Use one that was trained on the same prepared text."
        )
    return DraftModel(draft, model.config, max_batch_size=max_batch_size)


def chat(
    checkpoint: Path, settings: SamplingSettings, *, max_new_tokens: int, seed: int, device: str, compiles: bool
) -> None:
    """Take turns with a model. An empty line ends the chat.

    A model that has a chat template answers each line typed. Others, such as those trained here, were not taught to
    answer: each line is added to one text, and the model continues all of it.
    """
    settings.validate()
    model, tokenizer = load_model_and_tokenizer(checkpoint, device)
    template = load_chat_template(resolve_checkpoint(checkpoint))
    log(f"The model {'answers' if template else 'continues'} what you write. An empty line ends.")
    decode = decode_for(model, compiles=compiles)
    # Whatever its name, a token that is no text ends an answer.
    ends = set(tokenizer.special_ids.values()) if template else set[int]()
    messages: list[Message] = []
    text = ""
    for turn, line in enumerate(_lines()):
        messages.append({"role": "user", "content": line})
        text += line + "\n"
        transcript = Transcript(tokenizer, (), _show)

        def on_token(_: int, token_id: int, answer: Transcript = transcript) -> bool:
            return token_id in ends or answer.add(token_id)

        generate_cached(
            model,
            template.encode(messages, tokenizer) if template else prompt_tokens(tokenizer, text),
            settings,
            max_new_tokens=max_new_tokens,
            seed=seed + turn,
            end_of_text_id=tokenizer.end_of_text_id,
            on_token=on_token,
            decode=decode,
        )
        answer = transcript.finish()
        messages.append({"role": "assistant", "content": answer})
        text += answer
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
    with verified_meanwhile(folder):
        model = read_model(folder, resolve_device(device), shares_file=quantization is not None)
        tokenizer = load_model_tokenizer(folder, model.config.vocab_size)
        if quantization or uses_kernels(model):
            load_numba_alone()
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
