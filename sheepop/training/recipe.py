"""From minutes to settings: the size, the tokenizer and the schedule that promise the lowest loss, and which loss.

Pure functions of facts. `dial.py` finds the facts out: how much text there is, and how fast the machine is.

1. `step_seconds`: what a step of any size takes, from a few measured ones;
2. `steps_in_seconds` (`length.py`): how many of them fit into the time, so how many tokens are seen, how often;
3. `expected_bits_per_byte`: which loss that comes to, by a law fitted to short runs;
4. `choose`: the candidate with the lowest.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from sheepop.config import Config, load_config
from sheepop.models.sizing import (
    activation_bytes,
    count_parameters,
    inner_matrices,
    logits_bytes,
    training_bytes,
    training_flops_per_token,
)
from sheepop.training.length import LEAVING_SECONDS, steps_in_seconds
from sheepop.utils.devices import choose_precision
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import format_count

Settings = dict[str, object]

# Width and layers of the candidates; heads of 32 up to width 128, of 64 beyond.
SHAPES = (
    (32, 2), (48, 2), (64, 2), (64, 3), (96, 3), (128, 3), (128, 4), (192, 4), (192, 6), (256, 4), (256, 6), (384, 6),
    (384, 8), (512, 8), (640, 10), (768, 12), (1024, 16), (1280, 20), (1536, 24),
)  # fmt: skip
VOCABULARIES = (512, 1024, 2048, 4096, 8192)  # of byte-level BPE
# Embeddings of the last tokens together cut the time to a loss by three for characters and runs of seconds, but no
# stock class of `transformers` has them, and what the dial trains shall export. 4 would switch them on.
NGRAM_ORDER = 1
TOKENS_PER_ENTRY = 100  # a vocabulary's entries are learned from their occurrences
LEAST_PRODUCTS = 0.7  # share of the measured time that elementwise work may explain
MEMORY_SHARE = 0.5  # of what is free, for tensors
STARTING_SECONDS = 1.0  # from the choice to the first step, beside what was spent before it
PAUSE_SHARE = 0.006  # of the budget that a validation may take
SHORT_MINUTES = 1.5  # a run up to so long validates at its end alone
MOST_VALIDATED = 200_000  # tokens
LEAST_STEPS = 5


@dataclass(frozen=True)
class TokenizerFacts:
    """A tokenizer that could be used.

    Attributes:
        name: its kind, or path.
        vocab_size: its entries.
        bytes_per_token: of this text, in the mean.
        entries_asked: what to ask for to get it from the whole text.
    """

    name: str
    vocab_size: int
    bytes_per_token: float
    entries_asked: int


@dataclass(frozen=True)
class TextFacts:
    """What is known of the text.

    Attributes:
        train_bytes: UTF-8 bytes to train on.
        val_bytes: held out.
        compressed_bits: bits a byte that a compressor (bzip2) needs for such text: how hard it is to predict.
        tokenizers: the candidates; one alone where it is given.
        is_prepared: whether the tokenizer cannot be chosen any more.
    """

    train_bytes: int
    val_bytes: int
    compressed_bits: float
    tokenizers: tuple[TokenizerFacts, ...]
    is_prepared: bool = False


@dataclass(frozen=True)
class MachineFacts:
    """How fast steps are: seconds = overhead · (layers + 1) + FLOPs / speed + bytes / bandwidth.

    Attributes:
        device: as PyTorch names it.
        overhead: seconds a layer and step, whatever the number of tokens.
        speeds: FLOP/s inside of matrix products, by the name of the precision.
        bandwidth: bytes of activations a second, which stands for all elementwise work.
        memory: bytes that a run may take.
        num_processes: that share the work of a step.
    """

    device: str
    overhead: float
    speeds: Mapping[str, float]
    bandwidth: float
    memory: int = 2**62
    num_processes: int = 1


@dataclass(frozen=True)
class Probe:
    """The measured seconds of a training step with these settings, and the precision that it computed in."""

    config: Config
    precision: str
    seconds: float


@dataclass(frozen=True)
class Choice:
    """Settings for a run, and what is expected of it.

    Attributes:
        settings: dotted, all that the dial chose.
        config: with these settings and those that were given.
        seconds_per_step: by the cost model.
        steps, tokens, epochs: of the whole run.
        bits_per_byte: expected of the validation at the end.
        margin: of that, as a factor: two runs of three end between its quotient and its product.
        loss: the same in nats a token.
    """

    settings: Settings
    config: Config
    tokenizer: TokenizerFacts
    seconds_per_step: float
    steps: int
    tokens: int
    epochs: float
    bits_per_byte: float
    margin: float
    loss: float


@dataclass(frozen=True)
class Law:
    """How the loss falls with size and text, as a multiple of what a compressor needs.

    E + A / (parameters / 1e6)^a + B / (bytes seen / 1e6)^b, after Hoffmann et al. 2022; text that is read again counts
    less and less (Muennighoff et al. 2023, equation 5, where `repetitions` is 15.4).

    Constants of `benchmarks/recipe.py`, see there and `docs/log.md`, 2026-11-24.
    """

    floor: float = 0.5
    size_factor: float = 0.1
    size_exponent: float = 0.3
    text_factor: float = 0.2
    text_exponent: float = 0.4
    repetitions: float = 15.4
    margin: float = 1.06


LAW = Law()


def effective_tokens(tokens: float, epoch_tokens: float, repetitions: float) -> float:
    """Return how much new text is worth as much as `tokens` of a text of `epoch_tokens`, read again and again."""
    if tokens <= epoch_tokens:
        return tokens
    again = tokens / epoch_tokens - 1
    return epoch_tokens * (1 + repetitions * (1 - math.exp(-again / repetitions)))


def expected_bits_per_byte(
    config: Config, tokenizer: TokenizerFacts, text: TextFacts, *, tokens: float, law: Law = LAW
) -> float:
    """Return the validation loss that a run ends with, in bits a byte of the text."""
    epoch_tokens = text.train_bytes / tokenizer.bytes_per_token
    seen = effective_tokens(tokens, epoch_tokens, law.repetitions) * tokenizer.bytes_per_token
    parameters = count_parameters(config.model).total
    share = (
        law.floor
        + law.size_factor * (parameters / 1e6) ** -law.size_exponent
        + law.text_factor * (seen / 1e6) ** -law.text_exponent
    )
    return float(text.compressed_bits * share)


def step_seconds(config: Config, machine: MachineFacts) -> float:
    """Return about how long a step of a model takes."""
    model, training = config.model, config.training
    precision = choose_precision(
        torch.device(machine.device), use_amp=training.use_amp, d_model=model.d_model, asked=training.precision
    )
    speed = machine.speeds.get(precision.name) or max(machine.speeds.values())
    flops, traffic = step_work(config, precision.name, machine.device)
    work = (flops / speed + traffic / machine.bandwidth) / machine.num_processes
    return machine.overhead * (model.num_layers + 1) + work


def fit_machine(probes: Sequence[Probe], *, device: str, memory: int, num_processes: int = 1) -> MachineFacts:
    """Return the facts that explain measured steps.

    Args:
        probes: two of one model with few and with more tokens; a larger one, which with the second tells products from
            elementwise work; and others, the last of each precision telling its speed.
        device, memory, num_processes: see `MachineFacts`.
    """
    work = [step_work(probe.config, probe.precision, device) for probe in probes]
    batches = [probe.config.training.batch_size for probe in probes]
    few, more = probes[0].seconds, probes[1].seconds
    calls = (few * batches[1] - more * batches[0]) / (batches[1] - batches[0])  # at no tokens at all
    overhead = min(max(calls, 0.0), 0.9 * few) / (probes[0].config.model.num_layers + 1)
    # What is left of the second and the third: FLOPs · a + bytes · b, with a and b above zero.
    rest = [
        max(probe.seconds - overhead * (probe.config.model.num_layers + 1), 0.1 * probe.seconds) for probe in probes
    ]
    (flops_1, bytes_1), (flops_2, bytes_2) = work[1:3]
    determinant = flops_1 * bytes_2 - flops_2 * bytes_1
    per_byte = (flops_1 * rest[2] - flops_2 * rest[1]) / determinant if determinant else 0.0
    per_byte = min(max(per_byte, 0.0), LEAST_PRODUCTS * min(rest[1] / bytes_1, rest[2] / bytes_2))
    speeds = {
        probe.precision: flops / max(left - per_byte * size, (1 - LEAST_PRODUCTS) * left)
        for probe, (flops, size), left in list(zip(probes, work, rest, strict=True))[1:]
    }
    return MachineFacts(device, overhead, speeds, 1 / per_byte if per_byte else math.inf, memory, num_processes)


def step_work(config: Config, precision: str, device: str) -> tuple[float, float]:
    """Return the FLOPs of a step's matrix products, and the bytes that its elementwise operations work on."""
    model, training, context = config.model, config.training, config.data.max_length
    sequences = training.batch_size * training.gradient_accumulation_steps
    flops = sequences * context * training_flops_per_token(model, context)
    size = 4 if precision == "fp32" else 2
    kept = activation_bytes(
        model,
        batch_size=training.batch_size,
        context=context,
        bytes_per_number=size,
        document_mask=config.data.document_mask,
        on_gpu=torch.device(device).type != "cpu",
    )
    logits = logits_bytes(model, batch_size=training.batch_size, context=context, bytes_per_number=size)
    traffic = (kept + logits) * training.gradient_accumulation_steps
    if training.optimizer == "muon":
        # Five rounds of Newton-Schulz, for pieces of about D x D: 3 products of 2 D³ each.
        flops += 5 * 6 * model.d_model * inner_matrices(model)
    return flops, traffic + 4 * 6 * count_parameters(model).total


def choose(text: TextFacts, machine: MachineFacts, *, seconds: float, fixed: Mapping[str, object]) -> Choice:
    """Return the settings with the lowest expected loss for a run of `seconds`, start and end included.

    Args:
        fixed: dotted settings that the user gave, which are kept; they must set the run's length.

    Raises:
        ConfigError: the given settings do not go together, or the time is too short for any run.
    """
    choices = []
    problem: ConfigError | None = None
    for tokenizer, shape in product(usable_tokenizers(text), SHAPES):
        try:
            choice = candidate(text, machine, tokenizer, shape, seconds=seconds, fixed=fixed)
        except ConfigError as error:
            problem = error
            continue
        if choice is not None:
            choices.append(choice)
    if not choices:
        raise problem or ConfigError(
            f"{seconds / 60:.2g} minutes are too short: what is left of them after the start does not suffice for a "
            "few steps and a validation even of the smallest model. Give it more --minutes."
        )
    return min(choices, key=lambda choice: choice.bits_per_byte)


def usable_tokenizers(text: TextFacts) -> Iterator[TokenizerFacts]:
    """Yield the tokenizers whose entries the text can fill; the smallest in any case."""
    smallest = min(text.tokenizers, key=lambda tokenizer: tokenizer.vocab_size)
    for tokenizer in text.tokenizers:
        tokens = text.train_bytes / tokenizer.bytes_per_token
        if tokenizer == smallest or tokens >= TOKENS_PER_ENTRY * tokenizer.vocab_size:
            yield tokenizer


def candidate(
    text: TextFacts,
    machine: MachineFacts,
    tokenizer: TokenizerFacts,
    shape: tuple[int, int],
    *,
    seconds: float,
    fixed: Mapping[str, object],
) -> Choice | None:
    """Return what a run with this tokenizer and shape would be, or None where the time does not suffice for it."""
    epoch_tokens = text.train_bytes / tokenizer.bytes_per_token
    tokens, steps = 1e6, 500.0
    for _ in range(4):  # the settings depend on how many tokens are seen, and that on the settings
        settings = settings_for(
            tokenizer, shape, tokens=tokens, epoch_tokens=epoch_tokens, minutes=seconds / 60, steps=steps, fixed=fixed
        )
        config = load_config(preset="modern", overrides={**settings, **fixed, "model.vocab_size": tokenizer.vocab_size})
        per_step = config.training.batch_size * config.training.gradient_accumulation_steps * config.data.max_length
        step = step_seconds(config, machine)
        scored = min(text.val_bytes / tokenizer.bytes_per_token, config.training.eval_max_tokens)
        pause = step / 3 * scored / per_step + 0.1
        steps = steps_in_seconds(
            seconds - STARTING_SECONDS - LEAVING_SECONDS,
            seconds_per_step=step,
            seconds_per_pause=pause,
            eval_interval=config.training.eval_interval,
            steps_per_epoch=max(1, round(epoch_tokens / per_step)),
        )
        if steps < LEAST_STEPS or tensor_bytes(config, machine) > MEMORY_SHARE * machine.memory:
            return None
        tokens = steps * per_step
    bits = expected_bits_per_byte(config, tokenizer, text, tokens=tokens)
    return Choice(
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        seconds_per_step=step,
        steps=int(steps),
        tokens=int(tokens),
        epochs=tokens / epoch_tokens,
        bits_per_byte=bits,
        margin=LAW.margin,
        loss=bits * math.log(2) * tokenizer.bytes_per_token,
    )


def tensor_bytes(config: Config, machine: MachineFacts) -> int:
    """Return the bytes of weights, moments, gradients and activations of a run."""
    training = config.training
    return training_bytes(
        config.model,
        batch_size=training.batch_size,
        context=config.data.max_length,
        on_gpu=torch.device(machine.device).type != "cpu",
        optimizer=training.optimizer,
    ).peak


def settings_for(
    tokenizer: TokenizerFacts,
    shape: tuple[int, int],
    *,
    tokens: float,
    epoch_tokens: float,
    minutes: float,
    steps: float,
    fixed: Mapping[str, object],
) -> Settings:
    """Return the recipe for a model of a shape that is to see `tokens`, but for what is fixed.

    Where each number comes from: `docs/log.md`, 2026-11-24.
    """
    width = _whole(fixed.get("model.d_model"), shape[0])
    layers = _whole(fixed.get("model.num_layers"), shape[1])
    context = context_for(tokens, epoch_tokens)
    if "model.max_seq_len" in fixed or "data.max_length" in fixed:
        context = _whole(fixed.get("data.max_length"), _whole(fixed.get("model.max_seq_len"), context))
    wanted = tokens_per_step(tokens)
    head = 32 if width <= 128 else 64
    validated = int(min(MOST_VALIDATED, max(8_192, PAUSE_SHARE * 3 * tokens)))
    is_short = minutes <= SHORT_MINUTES
    settings: Settings = {
        "data.tokenizer": tokenizer.name,
        "model.vocab_size": tokenizer.entries_asked,
        "model.d_model": width,
        "model.num_layers": layers,
        "model.num_heads": width // head if width % head == 0 else 1,
        "model.max_seq_len": context,
        "model.dropout": dropout_for(tokens / epoch_tokens),
        "model.ngram_order": NGRAM_ORDER,
        "training.batch_size": max(1, round(wanted / context)),
        "training.optimizer": "muon",
        "training.learning_rate": learning_rate_for(width, str(fixed.get("training.optimizer", "muon"))),
        "training.schedule": "linear",
        "training.min_learning_rate_ratio": 0.0,
        "training.warmup_steps": max(1, min(100, round(0.08 * steps))),
        "training.beta1": 0.8 if tokens < 5e6 else 0.9,
        # A run of a minute cannot pay for more than the validation at its end, which is in any case.
        "training.eval_interval": 1_000_000 if is_short else None,
        "training.eval_max_tokens": 100_000 if is_short else validated,
    }
    if minutes >= 1:
        settings["training.log_interval"] = 50
    return {key: value for key, value in settings.items() if key not in fixed}


def context_for(tokens: float, epoch_tokens: float) -> int:
    """Return the tokens of a sequence: longer for longer runs; at least eight sequences are in the text."""
    wanted = 128 if tokens < 4e6 else 256 if tokens < 3e8 else 512
    while wanted > 16 and 8 * wanted > epoch_tokens:
        wanted //= 2
    return wanted


def tokens_per_step(tokens: float) -> float:
    """Return the batch of a step in tokens: larger for longer runs, in which the gradient's noise matters more."""
    return float(1536 * max(1.0, tokens / 1.5e6) ** (1 / 3))


def learning_rate_for(width: int, optimizer: str) -> float:
    """Return the peak rate: smaller for wider models, and a fifth of Muon's where AdamW moves all weights."""
    rate = 0.02 if optimizer == "muon" else 0.004
    return float(f"{rate * min(1.0, math.sqrt(96 / width)):.3g}")


def dropout_for(epochs: float) -> float:
    """Return the dropout for a text that is read so often; new text needs none, and it costs time on a CPU."""
    return 0.0 if epochs < 4 else 0.1 if epochs < 10 else 0.2


def explain(choice: Choice, text: TextFacts, machine: MachineFacts) -> list[str]:
    """Say in a few lines what was chosen and why, and what to expect."""
    config, tokenizer = choice.config, choice.tokenizer
    counts = count_parameters(config.model)
    speeds = ", ".join(
        f"{format_count(speed).replace('B', 'G')}FLOP/s in {name}" for name, speed in machine.speeds.items()
    )
    low, high = choice.bits_per_byte / choice.margin, choice.bits_per_byte * choice.margin
    named = {"char": "characters", "bpe": "byte-level BPE", "word": "words"}.get(tokenizer.name, "its own tokenizer")
    why_tokens = "the text is prepared" if text.is_prepared else "lowest expected loss that the text can fill"
    rereading = f"dropout {config.model.dropout:g}" + (
        ", since it is read again" if config.model.dropout else ", since text is hardly repeated"
    )
    return [
        f"measured: {format_count(text.train_bytes)} bytes to train on; {speeds} inside of products, "
        f"{machine.overhead * 1000:.2g} ms of calls a layer on {machine.device}",
        f"tokens: {named}, {tokenizer.vocab_size} entries, {tokenizer.bytes_per_token:.2f} bytes each ({why_tokens})",
        f"model: {config.model.num_layers} layers of width {config.model.d_model}, {format_count(counts.total)} "
        f"parameters: smaller ones learn less from a token, larger ones see fewer in the time",
        f"training: about {choice.steps} steps of {config.training.batch_size} x {config.data.max_length} tokens at "
        f"{choice.seconds_per_step * 1000:.3g} ms, {choice.epochs:.2g} epochs ({rereading}); "
        f"{config.training.optimizer}, learning rate {config.training.learning_rate:g} falling to "
        f"{config.training.min_learning_rate_ratio:g} of it",
        f"expected: {choice.bits_per_byte:.2f} bits per byte ({low:.2f} to {high:.2f}), a loss of {choice.loss:.2f} "
        f"nats a token",
    ]


def _whole(value: object, otherwise: int) -> int:
    """Return a given number of a setting, or the other where it is none; checking it is left to the settings."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise
