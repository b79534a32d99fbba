"""Completions of a whole file of prompts, many at a time, that a kill cannot spoil."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.generation.completion import Completion, Transcript, prompt_tokens
from sheepop.generation.generate import FinishReason, check_length
from sheepop.generation.grammar import constraint_of
from sheepop.generation.prompt_file import Prompt, count_finished, unusable_lines
from sheepop.generation.request import Constraint, Request
from sheepop.generation.runner import runner_for
from sheepop.generation.speculation import Speculator
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError
from sheepop.utils.files import flush_to_disk
from sheepop.utils.logging import format_duration, is_terminal, log

GROUP = 8  # prompts in a group, as a multiple of those that are written at a time
SECONDS_BETWEEN_LINES = 10.0  # of progress, where no terminal shows a bar


def complete_file(
    model: TransformerModel,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    output: Path,
    *,
    batch_size: int,
    speculator: Speculator | None = None,
    int8_cache: bool = False,
) -> int:
    """Write the completions of all prompts to a file, a line each and in order; go on where the file ends.

    Prompts are computed in groups that have nothing in common. A run that goes on begins with the whole group that it
    was in, so that the same texts are computed together, and the output is that of an undisturbed run to the byte.

    Args:
        model, tokenizer: a pair.
        prompts: of `read_prompts`.
        output: the file; what it holds is kept.
        batch_size: samples that are written at the same time.
        speculator: guesses tokens ahead.
        int8_cache: keep keys and values in 8 bits; the logits then differ a little.

    Returns:
        How many tokens were drawn now.

    Raises:
        ConfigError: the file cannot be written or its content is not of these prompts, or an option is out of range.
        DataError: some of the prompts are too long for the model or its cache; nothing was written.
        CheckpointError: model and tokenizer do not fit, or the model's scores are not finite.
    """
    engine = Engine(
        model, max_batch_size=batch_size, int8_cache=int8_cache, runner=runner_for(model), speculator=speculator
    )
    size = GROUP * batch_size
    try:
        finished = count_finished(output, prompts)
        first = finished // size * size
        check_prompts(engine, tokenizer, prompts[first:])
        output.parent.mkdir(parents=True, exist_ok=True)
        file = output.open("ab")
    except OSError as error:
        raise ConfigError(
            f"The output {output} cannot be written: {error.strerror or error}. Name another --output."
        ) from None
    if finished:
        log(f"{output} has {finished} of {len(prompts)} completions; going on with the next.")
    constrain = constraint_of(prompts[0].options.grammar, model, tokenizer)
    progress = Progress(len(prompts), finished)
    with file:
        for begin in range(first, len(prompts), size):
            group = prompts[begin : begin + size]
            engine.forget()
            for number, completions in enumerate(complete_together(engine, tokenizer, group, constrain), start=begin):
                if number >= finished:
                    file.write(group[number - begin].with_result(completions))
                    file.flush()
                    progress.show(number + 1, sum(len(completion.token_ids) for completion in completions))
    progress.close()
    flush_to_disk(output)
    return progress.tokens


def check_prompts(engine: Engine, tokenizer: Tokenizer, prompts: Sequence[Prompt]) -> None:
    """See that an engine can continue all prompts, before the first is begun.

    Raises:
        DataError: it cannot; names their lines and says why.
        CheckpointError: model and tokenizer do not fit.
    """
    problems = []
    for prompt in prompts:
        request = request_of(prompt, tokenizer)
        try:
            check_length(request.prompt_ids, engine.max_seq_len)
            engine.check(request)
        except ConfigError as error:
            problems.append(f"line {prompt.line}: {error}")
    if problems:
        raise unusable_lines("The file of prompts", problems)


def request_of(prompt: Prompt, tokenizer: Tokenizer, constrain: Callable[[], Constraint] | None = None) -> Request:
    """Return what a line asks of the engine."""
    options = prompt.options
    return Request(
        prompt_tokens(tokenizer, prompt.text),
        options.sampling,
        options.max_new_tokens,
        options.seed,
        options.num_samples,
        tokenizer.end_of_text_id,
        constrain=constrain,
    )


def complete_together(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    constrain: Callable[[], Constraint] | None = None,
) -> Iterator[list[Completion]]:
    """Yield the completions of each prompt in order, computed side by side by an engine without other work."""
    transcripts: list[list[Transcript]] = []
    token_ids: list[list[list[int]]] = []
    reasons: list[list[FinishReason | None]] = []
    number_of: dict[int, int] = {}
    for number, prompt in enumerate(prompts):
        options = prompt.options
        number_of[engine.add(request_of(prompt, tokenizer, constrain))] = number
        transcripts.append([Transcript(tokenizer, options.stop, None) for _ in range(options.num_samples)])
        token_ids.append([[] for _ in range(options.num_samples)])
        reasons.append([None] * options.num_samples)
    next_number = 0
    while next_number < len(prompts):
        for event in engine.step():
            number, sample = number_of[event.request_id], event.sample
            if reasons[number][sample] is not None:  # guesses that came with the end of a stop string
                continue
            reasons[number][sample] = event.finish_reason
            if event.token_id is not None:
                token_ids[number][sample].append(event.token_id)
                if transcripts[number][sample].add(event.token_id):
                    engine.cancel(event.request_id, sample)
                    reasons[number][sample] = "stop"
        while next_number < len(prompts) and None not in reasons[next_number]:
            yield [
                Completion(transcript.finish(), ids, reason)
                for transcript, ids, reason in zip(
                    transcripts[next_number], token_ids[next_number], reasons[next_number], strict=True
                )
                if reason is not None
            ]
            next_number += 1


class Progress:
    """How far a file is: a bar that is rewritten on a terminal, a line now and then elsewhere."""

    def __init__(self, total: int, finished: int) -> None:
        self.tokens = 0
        self._total, self._finished_before = total, finished
        self._began = self._said = time.perf_counter()

    def show(self, finished: int, tokens: int) -> None:
        """Say that so many prompts are finished, the newest with so many tokens."""
        self.tokens += tokens
        now = time.perf_counter()
        if not is_terminal() and now - self._said < SECONDS_BETWEEN_LINES and finished < self._total:
            return
        self._said, seconds = now, now - self._began
        left = seconds / (finished - self._finished_before) * (self._total - finished)
        text = (
            f"{finished}/{self._total} prompts  {self.tokens / max(seconds, 1e-9):.0f} tokens/s  "
            f"{format_duration(left)} left"
        )
        if is_terminal():
            done = round(20 * finished / self._total)
            print(f"\r[{'#' * done}{'.' * (20 - done)}] {text}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            log(text)

    def close(self) -> None:
        """End the bar."""
        if is_terminal() and self.tokens:
            log()
