"""From minutes to settings: the size, the tokenizer and the schedule that promise the lowest loss, and which loss.

Pure functions of facts. `dial.py` finds the facts out: how much text there is, and how fast the machine is.

1. `step_seconds` (`speed.py`): what a step of any size takes, from a few measured ones;
2. `steps_in_seconds` (`length.py`): how many of them fit into the time, so how many tokens are seen, how often;
3. `expected_bits_per_byte`: which loss that comes to, by a law fitted to short runs;
4. `rank`: the candidates, that with the lowest first;
5. `finalists`: the best few, whose own steps are worth measuring, to choose again (`with_measured_step`).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch

from sheepop.config import Config, load_config
from sheepop.models.sizing import (
    count_parameters,
    training_bytes,
)
from sheepop.training.length import LEAVING_SECONDS, steps_in_seconds
from sheepop.training.shared_steps import shared_rows
from sheepop.training.speed import MachineFacts, step_seconds, tokens_of_step, with_step_time
from sheepop.utils.errors import ConfigError

Settings = dict[str, object]

# Width and layers of the candidates; heads of 32 up to width 128, of 64 beyond.
SHAPES = (
    (32, 2), (48, 2), (64, 2), (64, 3), (96, 3), (128, 3), (128, 4), (192, 4), (192, 6), (256, 4), (256, 6), (384, 6),
    (384, 8), (512, 8), (640, 10), (768, 12), (1024, 16), (1280, 20), (1536, 24),
)  # fmt: skip
VOCABULARIES = (512, 1024, 2048, 4096, 8192)  # of byte-level BPE
# Embeddings of the last tokens together cut the time to a loss by three for characters and runs of seconds, and short
# convolutions lowered that of short runs by 2 to 3 %, but no stock class of `transformers` has them, and what the dial
# trains shall export. 4 would switch on the one, `--model.conv_width 4` the other, and `--model.copy_width 64` a head
# that copies. That pays the more the more text it sees: with it the context is longer, and as models of this size learn
# little from further back, attention sees a part of it (`docs/log.md`, 2026-11-30).
NGRAM_ORDER = 1
COPY_CONTEXT, COPY_WINDOW = 4, 128  # times the context without; tokens
# Of the loss without copies: novels in BPE had 0.925 of it after 20 minutes and 0.905 after 2, one run each. Characters
# gained nothing, and are known by how few bytes a token has.
COPY_BITS, BYTES_OF_WORDS = 0.93, 1.5
TOKENS_PER_ENTRY = 100  # a vocabulary's entries are learned from their occurrences
MEMORY_SHARE = 0.5  # of what is free, for tensors
STARTING_SECONDS = 1.0  # from the choice to the first step, beside what was spent before it
PAUSE_SHARE = 0.003  # of the budget that a validation may take; ten are made
SHORT_MINUTES = 1.5  # a run up to so long validates at its end alone
MOST_VALIDATED = 200_000  # tokens
LEAST_STEPS = 5
ENOUGH_STEPS = 100  # fewer only where no model makes as many
# The share of a run over which weights remember: half an epoch, but no less and no more than such shares.
MEMORY_EPOCHS, LEAST_MEMORY, MOST_MEMORY = 0.54, 0.1, 0.44
MOST_DECAY = 0.6  # more was not tried in short runs
TOKEN_NOISE = 0.05  # beside dropout, where a text is read often
PARAMETERS_PER_BYTE = 2.0  # of the text, at most
# So near the best, the law is too flat for step times by formula to tell candidates apart.
FINALISTS, FINALIST_BITS = 4, 1.03


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
        compressed_bits: bits a byte that a compressor (zlib) needs for such text: how hard it is to predict.
        tokenizers: the candidates; one alone where it is given.
        is_prepared: whether the tokenizer cannot be chosen any more.
    """

    train_bytes: int
    val_bytes: int
    compressed_bits: float
    tokenizers: tuple[TokenizerFacts, ...]
    is_prepared: bool = False


@dataclass(frozen=True)
class Choice:
    """Settings for a run, and what is expected of it.

    Attributes:
        settings: dotted, all that the dial chose.
        config: with these settings and those that were given.
        seconds_per_step: by the cost model, or as measured.
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
    """How the loss in bits a byte falls with size and text.

    (compressed bits / 3.37)^d · (E + A / (parameters / 1e6)^a + B / (bytes seen / 1e6)^b), after Hoffmann et al. 2022;
    text that is read again counts less and less (Muennighoff et al. 2023, equation 5; for large models they found 15.4
    `repetitions`). In bytes instead of tokens one law serves all tokenizers: a token of a larger vocabulary is more
    text. `margin` and `wider` say how far from it runs end.

    The constants are those of `benchmarks/recipe.py`: 0.06 to 0.9 M parameters, 0.4 to 3.6 M tokens of novels,
    tinyshakespeare and TinyStories (`docs/log.md`, 2026-11-24); d was later made to go with another measure of the
    compressed bits (2026-11-29). Beyond these sizes they are a guess, and three runs of 4 M parameters and 9 to 19 M
    tokens of novels ended within 2 % of it.
    """

    floor: float = 0.88
    size_factor: float = 0.357
    size_exponent: float = 0.182
    text_factor: float = 1.07
    text_exponent: float = 0.234
    difficulty_exponent: float = 2.58
    repetitions: float = 9.79
    margin: float = 1.06
    wider: float = 0.1


LAW = Law()
REFERENCE_BITS = 3.37  # what zlib needs for a byte of the novels
MOST_BITS = 4.4  # zlib needs more only for texts too short for it


def effective_tokens(tokens: float, epoch_tokens: float, repetitions: float) -> float:
    """Return how much new text is worth as much as `tokens` of a text of `epoch_tokens`, read again and again."""
    if tokens <= epoch_tokens:
        return tokens
    again = tokens / epoch_tokens - 1
    return epoch_tokens * (1 + repetitions * (1 - math.exp(-again / repetitions)))


def expected_bits_per_byte(
    *,
    parameters: int,
    tokens: float,
    epoch_tokens: float,
    bytes_per_token: float,
    compressed_bits: float,
    law: Law = LAW,
) -> float:
    """Return the validation loss that a run ends with, in bits a byte of the text."""
    seen = effective_tokens(tokens, epoch_tokens, law.repetitions) * bytes_per_token
    bits = (
        law.floor
        + law.size_factor * (parameters / 1e6) ** -law.size_exponent
        + law.text_factor * (seen / 1e6) ** -law.text_exponent
    )
    difficulty = min(compressed_bits, MOST_BITS) / REFERENCE_BITS
    return float(bits * difficulty**law.difficulty_exponent)


def margin_of(seen_bytes: float, train_bytes: float) -> float:
    """Return the factor that the outcome is expected within: wider for each decade that leaves what was measured."""
    seen = math.log10(seen_bytes / 1e6)  # measured: 0.4 to 9 MB, of 1 MB and of 18 MB of text
    decades = max(0.0, seen - 1) + max(0.0, -0.4 - seen) + max(0.0, -math.log10(train_bytes / 1e6))
    return LAW.margin + LAW.wider * decades


def candidates(text: TextFacts, machine: MachineFacts, *, seconds: float, fixed: Mapping[str, object]) -> list[Choice]:
    """Return what a run of `seconds`, start and end included, could be, best first.

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
    # Where the law knows nothing: models that could learn the text by heart, and runs of a few steps.
    most = PARAMETERS_PER_BYTE * text.train_bytes
    return rank(
        [choice for choice in choices if count_parameters(choice.config.model).total <= most]
        or [min(choices, key=lambda choice: count_parameters(choice.config.model).total)]
    )


def rank(choices: Sequence[Choice]) -> list[Choice]:
    """Return those with enough steps, the lowest expected loss first; where none has enough, most steps first."""
    long_enough = [choice for choice in choices if choice.steps >= ENOUGH_STEPS]
    if not long_enough:
        return sorted(choices, key=lambda choice: -choice.steps)
    return sorted(long_enough, key=lambda choice: choice.bits_per_byte)


def finalists(ranked: Sequence[Choice]) -> list[Choice]:
    """Return the best of each shape among the best few, the best of all first."""
    best: dict[tuple[int, int], Choice] = {}
    for choice in ranked:
        if choice.bits_per_byte <= FINALIST_BITS * ranked[0].bits_per_byte:
            best.setdefault(shape_of(choice), choice)
    return list(best.values())[:FINALISTS]


def shape_of(choice: Choice) -> tuple[int, int]:
    """Return its width and layers."""
    return choice.config.model.d_model, choice.config.model.num_layers


def with_measured_step(
    choice: Choice,
    measured: float,
    text: TextFacts,
    machine: MachineFacts,
    *,
    seconds: float,
    fixed: Mapping[str, object],
) -> Choice | None:
    """Return the run with the same tokenizer and shape where its steps take `measured` seconds.

    Its batch and the like follow from the other number of tokens, and the step's time from the batch.

    Returns:
        None where the time does not suffice for it.
    """
    slower = with_step_time(machine, choice.config, measured)
    return candidate(text, slower, choice.tokenizer, shape_of(choice), seconds=seconds, fixed=fixed)


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
    tokens, steps, micro_batches = 1e6, 500.0, machine.num_processes
    for _ in range(4):  # the settings depend on how many tokens are seen, and that on the settings
        while True:
            settings = settings_for(
                tokenizer,
                shape,
                tokens=tokens,
                epoch_tokens=epoch_tokens,
                minutes=seconds / 60,
                steps=steps,
                micro_batches=micro_batches,
                fixed=fixed,
            )
            config = load_config(
                preset="modern", overrides={**settings, **fixed, "model.vocab_size": tokenizer.vocab_size}
            )
            if tensor_bytes(config, machine) <= MEMORY_SHARE * machine.memory:
                break
            if settings.get("training.batch_size", 1) == 1:
                return None
            micro_batches *= 2
        per_step = tokens_of_step(config)
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
        if steps < LEAST_STEPS:
            return None
        tokens = steps * per_step
    bits = expected_bits_per_byte(
        parameters=count_parameters(config.model).total,
        tokens=tokens,
        epoch_tokens=epoch_tokens,
        bytes_per_token=tokenizer.bytes_per_token,
        compressed_bits=text.compressed_bits,
    )
    if config.model.copy_width and tokenizer.bytes_per_token > BYTES_OF_WORDS:
        bits *= COPY_BITS
    return Choice(
        settings=settings,
        config=config,
        tokenizer=tokenizer,
        seconds_per_step=step,
        steps=int(steps),
        tokens=int(tokens),
        epochs=tokens / epoch_tokens,
        bits_per_byte=bits,
        margin=margin_of(tokens * tokenizer.bytes_per_token, text.train_bytes),
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
        by_kernels=training.attention_kernels == "on",
        head_by_kernels=training.head_kernels == "on",
        optimizer=training.optimizer,
        shared_rows=shared_rows(config),
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
    micro_batches: int = 1,
) -> Settings:
    """Return the recipe for a model of a shape that is to see `tokens`, but for what is fixed.

    Where each number comes from: `docs/log.md`, 2026-11-24.
    """
    width = _whole(fixed.get("model.d_model"), shape[0])
    layers = _whole(fixed.get("model.num_layers"), shape[1])
    copies = _whole(fixed.get("model.copy_width"), 0) > 0
    context = context_for(tokens, epoch_tokens, times=COPY_CONTEXT if copies else 1)
    if "model.max_seq_len" in fixed or "data.max_length" in fixed:
        context = _whole(fixed.get("data.max_length"), _whole(fixed.get("model.max_seq_len"), context))
    wanted = tokens_per_step(tokens)
    head = 32 if width <= 128 else 64
    parameters = tokenizer.vocab_size * width + 12 * layers * width**2  # about
    dropout = dropout_for(tokens / epoch_tokens, parameters / epoch_tokens)
    validated = int(min(MOST_VALIDATED, max(8_192, PAUSE_SHARE * 3 * tokens)))
    is_short = minutes <= SHORT_MINUTES
    rate = learning_rate_for(width, str(fixed.get("training.optimizer", "muon")))
    given_rate = fixed.get("training.learning_rate")
    settings: Settings = {
        "data.tokenizer": tokenizer.name,
        "model.vocab_size": tokenizer.entries_asked,
        "model.d_model": width,
        "model.num_layers": layers,
        "model.num_heads": width // head if width % head == 0 else 1,
        "model.max_seq_len": context,
        "model.sliding_window": COPY_WINDOW if copies else 0,
        "model.dropout": dropout,
        "model.attention_dropout": 0.0,  # not found to help, and without kernels attention would take a half longer
        "model.zero_init_outputs": True,
        "model.ngram_order": NGRAM_ORDER,
        "training.batch_size": max(1, (math.ceil if copies else round)(wanted / context / micro_batches)),
        "training.gradient_accumulation_steps": micro_batches,
        "training.token_noise": TOKEN_NOISE if dropout else 0.0,
        "training.optimizer": "muon",
        "training.muon_beta2": 0.95,
        "training.shared_spelling": True,
        "training.muon_rounds": muon_rounds_for(width, wanted),
        "training.learning_rate": rate,
        "training.weight_decay": weight_decay_for(_above_zero(given_rate, rate), steps, tokens / epoch_tokens),
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


def context_for(tokens: float, epoch_tokens: float, *, times: int = 1) -> int:
    """Return the tokens of a sequence: longer for longer runs; at least eight sequences are in the text."""
    wanted = times * (128 if tokens < 4e6 else 256 if tokens < 3e8 else 512)
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


def weight_decay_for(rate: float, steps: float, epochs: float) -> float:
    """Return the decay by which weights forget what moved them in a share of the run that suits it.

    A weight is the sum of its updates, each of which fades over 1 / (rate · decay) steps (Wang and Aitchison 2024). Of
    text read for the first time the longer memory learned more, over 0.44 of the run rather than 0.15; of text read
    three times over 0.15 to 0.2, rather than 0.07, 0.44 or 0.63, by 0.7 to 1.8 % of the loss on other texts, with one
    seed (`docs/log.md`, 2026-11-29). Beyond that it is a guess.
    """
    share = max(LEAST_MEMORY, min(MOST_MEMORY, MEMORY_EPOCHS / epochs))
    return float(f"{min(MOST_DECAY, 1 / (rate * share * steps)):.2g}")


def muon_rounds_for(width: int, tokens_per_step: float) -> int:
    """Return 3 rounds of Muon's iteration where the other two were more than a fiftieth of a step, as in small batches.

    A weight takes some 6 operations for each token, and 6 D in a round. Three rounds instead of five cost 0.1 % of the
    loss at equal steps, about what 1 % of the tokens is worth (`docs/log.md`, 2026-11-29).
    """
    return 3 if 2 * width > tokens_per_step / 50 else 5


def dropout_for(epochs: float, parameters_per_token: float) -> float:
    """Return the dropout for a text that is read so often by a model of so many parameters for each of its tokens.

    New text needs none, and neither does a model too small to learn the text by heart: with a third of a parameter a
    token and 9 epochs, 0.1 cost 0.06 bits a byte and a third of the speed.
    """
    if epochs < 4 or parameters_per_token < 1:
        return 0.0
    return 0.1 if epochs < 10 else 0.2


def _above_zero(value: object, otherwise: float) -> float:
    """Return a given number above zero, or the other; checking it is left to the settings."""
    return float(value) if isinstance(value, int | float) and value > 0 else otherwise


def _whole(value: object, otherwise: int) -> int:
    """Return a given number of a setting, or the other where it is none; checking it is left to the settings."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else otherwise
