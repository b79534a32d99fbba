"""A file of prompts, one JSON object a line, and how much of its output is there already."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NoReturn

from sheepop.data.records import is_unicode
from sheepop.generation.completion import Completion
from sheepop.generation.grammar import Grammar
from sheepop.generation.sampling import SamplingSettings
from sheepop.utils.errors import ConfigError, DataError
from sheepop.utils.files import to_json
from sheepop.utils.seeds import derive_seed

SAMPLING_OPTIONS = tuple(field.name for field in fields(SamplingSettings))
WRITTEN_KEYS = ("settings", "completions")
MAX_PROBLEMS = 10  # listed in an error
ENOUGH_PROBLEMS = 1000  # a file with so many is read no further: it is something else
LONGEST_LINE = 2**23  # bytes; `[],[],` takes twenty times its size as objects


@dataclass(frozen=True)
class PromptOptions:
    """What a line of a file may say for itself, and what holds where it does not.

    Attributes:
        stop: strings that end a sample.
        grammar: what each completion has to follow, the same for all lines.
    """

    sampling: SamplingSettings
    max_new_tokens: int
    seed: int
    num_samples: int = 1
    stop: tuple[str, ...] = ()
    grammar: Grammar | None = None

    def as_json(self) -> dict[str, object]:
        """Return all of it under the names that lines use."""
        values = {key: value for key, value in asdict(self).items() if key != "sampling" and value is not None}
        return asdict(self.sampling) | values | {"stop": list(self.stop)}


@dataclass(frozen=True)
class Prompt:
    """One line: the object as it stands, the text to continue, how, and the line's number in the file, from 1."""

    record: dict[str, Any]
    text: str
    options: PromptOptions
    line: int = 0

    def with_result(self, completions: Sequence[Completion]) -> bytes:
        """Return the line of the output: all keys of the prompt's own, its settings, and the completions."""
        written = {"settings": self.options.as_json(), "completions": [asdict(each) for each in completions]}
        return (to_json(self.record | written, indent=None) + "\n").encode("utf-8")


def read_prompts(path: Path, defaults: PromptOptions) -> list[Prompt]:
    """Read all lines that are not blank and check them, before anything is computed.

    A line without a `seed` gets one that follows from the default and its place, so that the same prompt twice has two
    continuations.

    Raises:
        DataError: the file is missing or empty, or lines are malformed; names them and what is wrong.
    """
    prompts: list[Prompt] = []
    problems: list[str] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not content.strip():
                    continue
                seed = derive_seed(defaults.seed, "prompt", len(prompts) + len(problems))
                try:
                    prompts.append(replace(parse_prompt(content, replace(defaults, seed=seed)), line=number))
                except ValueError as error:
                    problems.append(f"line {number}: {error}")
                if len(problems) == ENOUGH_PROBLEMS:
                    break
    except OSError as error:
        raise DataError(f"The file of prompts {path} cannot be read: {error.strerror or error}.") from None
    if problems:
        raise unusable_lines(f"The file of prompts {path}", problems)
    if not prompts:
        raise DataError(
            f'The file of prompts {path} is empty. Each line must be an object such as {{"prompt": "..."}}.'
        )
    return prompts


def unusable_lines(file: str, problems: Sequence[str]) -> DataError:
    """Return the error for lines that cannot be used, each with its number and what is wrong."""
    at_least = "at least " if len(problems) == ENOUGH_PROBLEMS else ""
    more = f"; and {at_least}{len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
    listed = "; ".join(problem.rstrip(".") for problem in problems[:MAX_PROBLEMS])
    return DataError(
        f"{file} has lines that cannot be used, so nothing was run: {listed}{more}. Mend them, or leave them out."
    )


def parse_prompt(line: bytes, defaults: PromptOptions) -> Prompt:
    """Read one line.

    Raises:
        ValueError: says what is wrong with it.
    """
    if len(line) > LONGEST_LINE:
        raise ValueError(f"it has {len(line)} bytes, of which {LONGEST_LINE} are the most")
    try:
        record = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict):
        raise ValueError(f"it is not an object in braces, but a {type(record).__name__}")
    if not isinstance(record.get("prompt"), str):
        raise ValueError('it has no text under "prompt"')
    if not is_unicode(to_json(record, indent=None)):
        raise ValueError("it has half of a surrogate pair, which is no character")
    for key in WRITTEN_KEYS:
        if key in record:
            raise ValueError(f'it has the key "{key}", which is that of the output')
    return Prompt(record, record["prompt"], _options(record, defaults))


def count_finished(path: Path, prompts: Sequence[Prompt]) -> int:
    """Return how many prompts have their line in the output, of which a torn end is cut off.

    Raises:
        ConfigError: a line does not belong to its prompt: the prompts, or the options, were others.
    """
    if not path.exists():
        return 0
    content = path.read_bytes()
    lines, end = content.splitlines(keepends=True), 0
    for number, line in enumerate(lines):
        try:
            record = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            record = None
        if record is None and number == len(lines) - 1:  # a kill came between
            with path.open("r+b") as file:
                file.truncate(end)
            return number
        prompt = prompts[number] if number < len(prompts) else None
        if prompt is None or record is None or not _belongs(record, prompt):
            raise ConfigError(
                f"Line {number + 1} of {path} is not what these prompts and options lead to. Name another --output, or "
                "give the same prompts and options as before to go on with this one."
            )
        end += len(line)
    return len(lines)


def _belongs(record: object, prompt: Prompt) -> bool:
    if not isinstance(record, dict) or "completions" not in record:
        return False
    written = prompt.record | {"settings": prompt.options.as_json()}
    return {key: value for key, value in record.items() if key != "completions"} == written


def _options(record: Mapping[str, Any], defaults: PromptOptions) -> PromptOptions:
    """Return what a line says for itself, and the defaults for the rest."""
    sampling: dict[str, Any] = {name: _number(record, name) for name in SAMPLING_OPTIONS if name in record}
    counts: dict[str, Any] = {
        name: _integer(record, name) for name in ("max_new_tokens", "seed", "num_samples") if name in record
    }
    if "top_k" in sampling:
        sampling["top_k"] = _integer(record, "top_k")
    stop = record.get("stop", defaults.stop)
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or not all(isinstance(string, str) and string for string in stop):
        raise ValueError('"stop" must be a text or a list of texts, none of them empty')
    options = replace(defaults, sampling=replace(defaults.sampling, **sampling), stop=tuple(stop), **counts)
    options.sampling.validate()
    for name, least in (("max_new_tokens", 0), ("num_samples", 1)):
        if getattr(options, name) < least:
            raise ValueError(f'"{name}" is {getattr(options, name)}, but must be at least {least}')
    return options


def _number(record: Mapping[str, Any], name: str) -> float:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'"{name}" must be a number, not {to_json(value, indent=None)}')
    return value


def _integer(record: Mapping[str, Any], name: str) -> int:
    value = record[name]
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f'"{name}" must be a whole number, not {to_json(value, indent=None)}')
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it has {name}, which is not valid JSON")
