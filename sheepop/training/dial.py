"""The one dial: minutes in, a run out. It looks at text and machine for what `recipe.py` needs, and says the choice.

It is used where a time budget is all that was given: with a file or a preset, minutes set only the length.
"""

import json
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from sheepop.config import Config, load_config
from sheepop.data.corpus import is_prepared, open_corpus
from sheepop.data.dataset import Tokens
from sheepop.data.documents import documents_of_file, list_files
from sheepop.data.tokenizer import KINDS, Tokenizer, bytes_per_token
from sheepop.evaluation.plots import METRICS_FILE
from sheepop.models.sizing import count_parameters
from sheepop.models.transformer import TransformerModel
from sheepop.training.distributed import World
from sheepop.training.kernels import SETTINGS as KERNELS
from sheepop.training.kernels import by_kernels, use_of_kernels
from sheepop.training.length import measure_seconds_per_step
from sheepop.training.optimizer import make_optimizer
from sheepop.training.recipe import (
    ENOUGH_STEPS,
    SHORT_MINUTES,
    TOKENS_PER_ENTRY,
    VOCABULARIES,
    Choice,
    TextFacts,
    TokenizerFacts,
    candidates,
    finalists,
    rank,
    settings_for,
    with_measured_step,
)
from sheepop.training.speed import MachineFacts, Probe, fit_machine, precision_of, tokens_of_step, with_step_time
from sheepop.training.state import Learner, TrainingState
from sheepop.training.step import MicroBatch, train_step
from sheepop.utils.devices import peak_flops
from sheepop.utils.errors import CheckpointError, ConfigError, DataError
from sheepop.utils.files import read_json, write_json
from sheepop.utils.logging import format_count, log
from sheepop.utils.memory import available_bytes

EXPECTED_FILE = "expected.json"  # in the run's folder: what the dial chose, and what is to come of it
MEASURED_SHARE = 0.05  # of the budget, at most, for all that is measured
MEASURED_SECONDS = 10.0  # at most, for text and machine each a half
FINALIST_SECONDS = 3.0  # at most, for each
FINALIST_ROUNDS = 2  # one after the other, since another program may be busy for seconds
FINALIST_STEPS = 2  # at least, of a round, beside the first
OTHER_SPEED = 0.2  # from so large a difference in the number of steps on, it is said at the end
SAMPLE_BYTES = 600_000
SAMPLE_BYTES_A_SECOND = 10_000  # of the budget: short runs cannot pay for a large sample
PIECE_CHARACTERS = 10_000
COMPRESSED_BYTES = 2**14
MEASURE_EVERY = 5  # every fifth piece is measured and not trained on
MOST_FILES = 50  # that the sample is taken from
MOST_CHARACTERS = 4096  # entries asked of a character tokenizer


class Timed(NamedTuple):
    """A finalist as it was tried, the measured seconds of its step, and what it comes to with them."""

    tried: Choice
    seconds: float
    outcome: Choice


def is_dial(file: Path | None, preset: str | None, overrides: Mapping[str, object]) -> bool:
    """Say whether a time budget was given and nothing that says what to train in it."""
    named = file is not None or preset is not None or overrides.get("preset") is not None
    return not named and overrides.get("training.max_minutes") is not None


def choose_settings(
    overrides: Mapping[str, object], *, device: torch.device, began: float, num_processes: int = 1
) -> Choice:
    """Choose what to train in the time budget that `overrides` give, and say what was measured, chosen and expected.

    Args:
        overrides: dotted settings of the command line, which are kept.
        device: to train on.
        began: reading of `time.perf_counter` from which the budget counts.
        num_processes: that share the work.

    Raises:
        ConfigError: the time is too short, or 8-bit floats were asked for.
        DataError: there is no text.
    """
    asked = load_config(preset="modern", overrides=overrides)
    assert asked.training.max_minutes is not None
    if asked.training.precision == "fp8":
        raise ConfigError(
            "training.precision 'fp8' is for models wider than minutes alone choose, and their steps are not timed in "
            "it. Name the model (--preset or --config) beside the minutes, or use 'auto'."
        )
    budget = 60 * asked.training.max_minutes
    seconds = min(MEASURED_SECONDS, MEASURED_SHARE * budget) / 2
    looked = time.perf_counter()
    log(f"choosing a run of {asked.training.max_minutes:g} minutes: a look at the text and some steps on {device}")
    kernels = use_of_kernels(asked, device, steps=None, has_size=False).training
    fixed = dict(overrides) | {f"training.{name}": getattr(kernels, name) for name in KERNELS}
    text = look_at_text(asked, overrides, seconds=seconds, sample_bytes=sample_size(budget))
    machine = measure_machine(device, seconds=seconds, num_processes=num_processes, fixed=fixed)
    left = budget - (time.perf_counter() - began)
    ranked = candidates(text, machine, seconds=left, fixed=fixed)
    timed: list[Timed] = []
    if asked.training.max_minutes > SHORT_MINUTES:
        spare = MEASURED_SHARE * budget - (time.perf_counter() - looked)
        measured = time_finalists(finalists(ranked), device, seconds=spare, num_processes=num_processes)
        left = budget - (time.perf_counter() - began)
        for tried, step in measured:
            outcome = with_measured_step(tried, step, text, machine, seconds=left, fixed=fixed)
            timed += [] if outcome is None else [Timed(tried, step, outcome)]
        if measured and all(finalist.outcome.steps < ENOUGH_STEPS for finalist in timed):
            # So much slower than by formula that another size, slowed as much, may do better than all of them.
            tried, step = measured[0]
            slower = with_step_time(machine, tried.config, step)
            timed, ranked = [], candidates(text, slower, seconds=left, fixed=fixed)
    choice = rank([finalist.outcome for finalist in timed] or ranked)[0]
    for line in explain(choice, text, machine, timed):
        log(f"  {line}")
    return choice


def explain(choice: Choice, text: TextFacts, machine: MachineFacts, timed: Sequence[Timed] = ()) -> list[str]:
    """Say in a few lines what was chosen and why, and what to expect.

    Args:
        timed: finalists, of which `choice` is the best.
    """
    config, tokenizer = choice.config, choice.tokenizer
    counts = count_parameters(config.model)
    speeds = ", ".join(
        f"{format_count(speed).replace('B', 'G')}FLOP/s in {name}" for name, speed in machine.speeds.items()
    )
    low, high = choice.bits_per_byte / choice.margin, choice.bits_per_byte * choice.margin
    named = {"char": "characters", "bpe": "byte-level BPE", "word": "words"}.get(tokenizer.name, "its own tokenizer")
    why_tokens = "the text is prepared" if text.is_prepared else "lowest expected loss that the text can fill"
    rereading = "no dropout: it will not learn the text by heart"
    if config.model.dropout:
        rereading = (
            f"dropout {config.model.dropout:g} and {config.training.token_noise:g} of the tokens replaced, or it would "
            "learn the text by heart"
        )
    return [
        f"measured: {format_count(text.train_bytes)} bytes to train on; products at {speeds} at best, "
        f"{machine.overhead * 1000:.2g} ms of calls a layer on {machine.device}",
        *(
            f"timed: {tried.config.model.num_layers} layers of width {tried.config.model.d_model}, "
            f"{tried.tokenizer.vocab_size} entries: {seconds * 1000:.3g} ms a step of "
            f"{tokens_of_step(tried.config)} tokens, {outcome.bits_per_byte:.3f} bits per byte expected"
            for tried, seconds, outcome in timed
        ),
        f"tokens: {named}, {tokenizer.vocab_size} entries, {tokenizer.bytes_per_token:.2f} bytes each ({why_tokens})",
        f"model: {config.model.num_layers} layers of width {config.model.d_model}, {format_count(counts.total)} "
        f"parameters: smaller ones learn less from a token, larger ones see fewer in the time",
        f"training: about {choice.steps} steps of {tokens_of_step(config)} tokens (context {config.data.max_length}) "
        f"at {choice.seconds_per_step * 1000:.3g} ms, {choice.epochs:.2g} epochs ({rereading}); "
        f"{config.training.optimizer}, learning rate {config.training.learning_rate:g} falling to "
        f"{config.training.min_learning_rate_ratio:g} of it",
        f"expected: {choice.bits_per_byte:.2f} bits per byte ({low:.2f} to {high:.2f}), a loss of {choice.loss:.2f} "
        f"nats a token",
    ]


def sample_size(budget: float) -> int:
    """Return how many bytes of the text are looked at in a budget of so many seconds."""
    return int(min(SAMPLE_BYTES, SAMPLE_BYTES_A_SECOND * budget))


def look_at_text(
    asked: Config, given: Mapping[str, object], *, seconds: float, sample_bytes: int = SAMPLE_BYTES
) -> TextFacts:
    """Return what is known of the text: of a prepared folder from its manifest, else from a sample of its files.

    Args:
        asked: settings whose `data` says where the text is.
        given: the settings among them that the user gave.
        seconds: after which no larger vocabulary is tried.
        sample_bytes: that are read and tokenized.
    """
    assert asked.data.path is not None
    path = Path(asked.data.path)
    if is_prepared(path):
        corpus = open_corpus(path)
        train, tokenizer = corpus.split("train"), corpus.tokenizer()
        some = spread_text(train.tokens, tokenizer, sample_bytes // 2).encode("utf-8", errors="replace")
        facts = TokenizerFacts(
            asked.data.tokenizer, tokenizer.vocab_size, train.num_bytes / train.num_tokens, tokenizer.vocab_size
        )
        return TextFacts(
            train.num_bytes, corpus.split("val").num_bytes, bits_of_compressor(some), (facts,), is_prepared=True
        )
    pieces, total = sample_text(path, asked.data.document_separator, sample_bytes)
    train_bytes = round(total * (1 - asked.data.val_fraction))
    return TextFacts(
        train_bytes,
        total - train_bytes,
        bits_of_compressor("".join(pieces).encode("utf-8", errors="replace")),
        tuple(look_at_tokenizers(pieces, train_bytes, asked, given, seconds=seconds)),
    )


def spread_text(tokens: Tokens, tokenizer: Tokenizer, wanted: int) -> str:
    """Return the text of about `wanted` tokens in slices all over `tokens`, so that no document stands for all."""
    size = -(-wanted // MOST_FILES)
    starts = range(0, len(tokens), max(size, -(-len(tokens) // MOST_FILES)))
    return "".join(tokenizer.decode(tokens[start : start + size].tolist()) for start in starts)


def sample_text(path: Path, separator: str | None, sample_bytes: int) -> tuple[list[str], int]:
    """Return pieces from the beginnings of files all over the text, and about how many bytes there are in all.

    Raises:
        DataError: there is no text in it.
    """
    files = list_files([path])
    chosen = files[:: -(-len(files) // MOST_FILES)]
    pieces: list[str] = []
    read = size_of_read = 0  # of files that were read to their ends: text and size on the disk
    for file in chosen:
        taken, is_whole = 0, True
        for document in documents_of_file(file, separator=separator, skipped=[]):
            text = document.text[: sample_bytes // len(chosen) - taken + 1]
            pieces += [text[start : start + PIECE_CHARACTERS] for start in range(0, len(text), PIECE_CHARACTERS)]
            taken += len(text.encode("utf-8", errors="replace"))
            if taken > sample_bytes // len(chosen):
                is_whole = False
                break
        if is_whole:
            read, size_of_read = read + taken, size_of_read + file.stat().st_size
    if not pieces:
        raise DataError(f"There is no text in {path}. Name files with text inside, or a folder that holds some.")
    share = read / size_of_read if size_of_read else 1.0  # archives hold more text than their size says
    return pieces, max(1, round(share * sum(file.stat().st_size for file in files)))


def look_at_tokenizers(
    pieces: list[str], train_bytes: int, asked: Config, given: Mapping[str, object], *, seconds: float
) -> list[TokenizerFacts]:
    """Return the tokenizers that may be used, trained on most of a sample of the text and measured on the rest."""
    began = time.perf_counter()
    measured = pieces[MEASURE_EVERY - 1 :: MEASURE_EVERY] or pieces
    trained_on = [piece for number, piece in enumerate(pieces) if number % MEASURE_EVERY != MEASURE_EVERY - 1]
    name, entries = asked.data.tokenizer, asked.model.vocab_size
    is_name_given, are_entries_given = "data.tokenizer" in given, "model.vocab_size" in given

    def facts(kind: str, tokenizer: Tokenizer, wanted: int) -> TokenizerFacts:
        return TokenizerFacts(kind, tokenizer.vocab_size, bytes_per_token(tokenizer, measured) or 1.0, wanted)

    if is_name_given and name not in KINDS:
        return [facts(name, Tokenizer.load(Path(name)), entries)]
    found: list[TokenizerFacts] = []
    for kind in (name,) if is_name_given else ("char", "bpe"):
        for wanted in sizes_of(kind, train_bytes, entries if are_entries_given else None):
            if found and time.perf_counter() - began > seconds:
                break
            found.append(facts(kind, Tokenizer.train(kind, trained_on, vocab_size=wanted), wanted))
    return found


def sizes_of(kind: str, train_bytes: int, given: int | None) -> list[int]:
    """Return the vocabulary sizes to try for a kind of tokenizer: what was given, else what the text may fill."""
    if given is not None:
        return [given]
    if kind == "char":
        return [MOST_CHARACTERS]
    fillable = [size for size in VOCABULARIES if size * TOKENS_PER_ENTRY * 2 <= train_bytes]
    return fillable or [VOCABULARIES[0]]


def bits_of_compressor(text: bytes) -> float:
    """Return the bits a byte that zlib needs for pieces of 16 KiB: of one size, as it learns from what was before."""
    size = min(COMPRESSED_BYTES, max(1, len(text)))
    pieces = [text[start : start + size] for start in range(0, max(1, len(text) - size + 1), size)]
    return 8 * sum(len(zlib.compress(piece, 9)) for piece in pieces) / (size * len(pieces))


# Width, layers, tokens and vocabulary: two of one model for what calls cost, one with the head of a real vocabulary,
# which is much of a small model's step, and wider ones, each in its width's precision.
PROBES = {
    "cpu": ((64, 2, 256, 512), (64, 2, 2048, 512), (64, 2, 2048, 4096), (256, 4, 1024, 512)),
    "other": ((128, 4, 512, 512), (128, 4, 16384, 512), (512, 4, 16384, 512), (1024, 4, 16384, 512)),
}
PROBED_CONTEXT = 128
PROBED_AS_GIVEN = ("training.precision", "training.use_amp", *(f"training.{name}" for name in KERNELS))


def measure_machine(
    device: torch.device, *, seconds: float, num_processes: int = 1, fixed: Mapping[str, object]
) -> MachineFacts:
    """Return how fast training is on the device, from real steps of a few sizes, in about so many seconds.

    Args:
        fixed: dotted settings that were given, of which those of the precision matter.
    """
    configs = [probed_settings(*sizes, fixed=fixed) for sizes in PROBES.get(device.type, PROBES["other"])]
    precisions = [precision_of(config, device) for config in configs]
    speeds = {each.name: peak_flops(device, each.autocast_dtype) for each in dict.fromkeys(precisions)}
    probes = [
        Probe(config, precision.name, time_steps(config, device, seconds=seconds / len(configs)))
        for config, precision in zip(configs, precisions, strict=True)
    ]
    return fit_machine(
        probes, speeds=speeds, device=str(device), memory=available_bytes(device), num_processes=num_processes
    )


def probed_settings(width: int, layers: int, tokens: int, vocab_size: int, *, fixed: Mapping[str, object]) -> Config:
    """Return the settings of the recipe's model of a size, for steps of so many tokens."""
    facts = TokenizerFacts("bpe", vocab_size, 2.0, vocab_size)
    settings = settings_for(facts, (width, layers), tokens=1e6, epoch_tokens=1e6, minutes=1.0, steps=100.0, fixed={})
    sizes = {"model.max_seq_len": PROBED_CONTEXT, "training.batch_size": tokens // PROBED_CONTEXT}
    given = {key: fixed[key] for key in PROBED_AS_GIVEN if key in fixed}
    return load_config(preset="modern", overrides=settings | sizes | given)


def time_finalists(
    choices: Sequence[Choice], device: torch.device, *, seconds: float, num_processes: int = 1
) -> list[tuple[Choice, float]]:
    """Return as many of the choices, from the first on, as can be measured in so many seconds, with those of a step.

    They take turns, and the quicker of the turns counts.
    """
    began = time.perf_counter()
    turns: list[list[float]] = []
    turn = longest = 0.0
    for count in range(len(choices), 0, -1):
        turn = seconds / count / FINALIST_ROUNDS
        if all((1 + FINALIST_STEPS) * choice.seconds_per_step <= turn for choice in choices[:count]):
            turns = [[] for _ in choices[:count]]
            break
    for _ in range(FINALIST_ROUNDS):
        for choice, measured in zip(choices, turns, strict=False):
            started = time.perf_counter()
            if started - began + max(turn, longest) <= seconds:  # not so where steps take longer than the model says
                share = min(turn, FINALIST_SECONDS / FINALIST_ROUNDS)
                measured.append(time_steps(choice.config, device, seconds=share, num_processes=num_processes))
                longest = max(longest, time.perf_counter() - started)
    return [(choice, min(measured)) for choice, measured in zip(choices, turns, strict=False) if measured]


def time_steps(config: Config, device: torch.device, *, seconds: float, num_processes: int = 1) -> float:
    """Return the seconds of a training step with these settings on random tokens, for one of the processes."""
    model = TransformerModel(config.model).to(device).train()
    model.learn_by_kernels(**by_kernels(config))
    if config.training.activation_checkpointing:
        model.recompute_activations()
    optimizer = make_optimizer(model, config.training)
    state = TrainingState(total_steps=1, data_fingerprint="")
    learner = Learner(config, model, model, optimizer, precision_of(config, device), World(), "none", state)
    shape = (config.training.batch_size, config.data.max_length)
    token_ids = torch.randint(0, config.model.vocab_size, shape, device=device)  # (B, T)
    documents = torch.zeros_like(token_ids) if config.data.document_mask else None
    batches = [
        MicroBatch(index, token_ids, token_ids, token_ids.numel(), documents)
        for index in range(-(-config.training.gradient_accumulation_steps // num_processes))
    ]
    return measure_seconds_per_step(
        lambda step: train_step(learner, batches, step=step, learning_rate=0.0),
        device=device,
        first_step=0,
        seconds=seconds,
        at_least=FINALIST_STEPS,
    )


def note_expectation(run: Path, choice: Choice) -> None:
    """Write down in the run's folder what is expected of it, for its end, which another process may see."""
    expected = {
        "minutes": choice.config.training.max_minutes,
        "bits_per_byte": choice.bits_per_byte,
        "from": choice.bits_per_byte / choice.margin,
        "to": choice.bits_per_byte * choice.margin,
        "loss": choice.loss,
        "steps": choice.steps,
        "epochs": choice.epochs,
        "seconds_per_step": choice.seconds_per_step,
        "settings": choice.settings,
    }
    write_json(run / EXPECTED_FILE, expected)


def compare_with_expectation(run: Path) -> str | None:
    """Say what a run came to against what was expected; None for a run that the dial did not choose."""
    if not (run / EXPECTED_FILE).exists():
        return None
    expected = read_json(run / EXPECTED_FILE, CheckpointError)
    lines = [json.loads(line) for line in (run / METRICS_FILE).read_text(encoding="utf-8").split("\n")[:-1]]
    scores = [line for line in lines if line["type"] == "val" and line["bits_per_byte"] is not None]
    if not scores:
        return None
    found = scores[-1]["bits_per_byte"]
    low, high = expected["from"], expected["to"]
    verdict = (
        "as expected" if low <= found <= high else "better than expected" if found < low else "worse than expected"
    )
    steps, planned = scores[-1]["step"], expected["steps"]
    outcome = (
        f"{found:.3f} bits per byte at the end, {verdict}: {expected['bits_per_byte']:.2f} ({low:.2f} to {high:.2f})"
    )
    if abs(steps / planned - 1) < OTHER_SPEED:
        return outcome
    speed = "slower" if steps < planned else "faster"
    return f"{outcome}; the machine was {speed} than measured, {steps} steps instead of {planned}"
