"""Every `sheepop …` command line that a page shows is one: the command, its options and its settings are known."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from sheepop.cli import app
from sheepop.config import load_config, parse_overrides
from sheepop.utils.errors import ConfigError

PROJECT = Path(__file__).parents[2]
MADE = {"commands.md", "settings.md"}  # from the code itself
PAGES = sorted(path for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md")] if path.name not in MADE)
PROGRAM: Any = typer.main.get_command(app)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # Typer does not name it


def commands_in(page: str) -> list[tuple[str, bool]]:
    """Return the command lines of a page, without `sheepop`, and whether each is whole: one of a block is."""
    found = []
    for block in re.findall(r"^ *```(?:bash|text)\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE):
        found += [(line, True) for line in re.findall(r"^ *(?:torchrun .*-m )?sheepop (.+)$", block, re.MULTILINE)]
    inside = re.sub(r"^ *```.*?^ *```", "", page, flags=re.DOTALL | re.MULTILINE)
    return found + [(line, False) for line in re.findall(r"`(?:torchrun [^`]*-m )?sheepop ([^`]+)`", inside)]


def check(line: str, *, is_whole: bool) -> None:
    """Raise what the program would say to a command line; one that is not whole may lack what is needed."""
    words = [word for word in shlex.split(line.replace("…", ""), comments=True) if word not in ("--debug", "--help")]
    if not words:  # of all commands together
        return
    if not is_whole:  # capitals stand for a value
        words = ["1" if word.isupper() else word for word in words]
    command = PROGRAM.commands.get(words[0])
    if command is None:
        raise UsageError(f"there is no command '{words[0]}'")
    try:
        context = command.make_context(words[0], words[1:])
    except UsageError as error:
        if is_whole or type(error).__name__ not in ("MissingParameter", "BadOptionUsage"):
            raise
        return
    if command.context_settings.get("allow_extra_args"):
        overrides = parse_overrides(context.args)
        load_config(None, preset=context.params.get("preset"), overrides=overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
def test_command_lines_of_a_page_are_known(page: Path) -> None:
    for line, is_whole in commands_in(page.read_text(encoding="utf-8")):
        try:
            check(line, is_whole=is_whole)
        except (UsageError, ConfigError, ValueError) as error:
            pytest.fail(f"`sheepop {line}`: {error.format_message() if hasattr(error, 'format_message') else error}")


def test_command_lines_are_found_in_blocks_and_in_words() -> None:
    page = "Say `sheepop demo`.\n\n```bash\nsheepop report runs/a\ntorchrun -m sheepop train --data a\n```\n"
    assert commands_in(page) == [("report runs/a", True), ("train --data a", True), ("demo", False)]


@pytest.mark.parametrize(
    "line",
    [
        "trian --data a",
        "generate --checkpoint a --warmth 2",
        "train --data a --training.learning_rat 1",
        "train --data a --training.learning_rate fast",
        "quantize --checkpoint a --output b --to int3",
        "evaluate --data a",
    ],
)
def test_a_wrong_command_line_would_be_found(line: str) -> None:
    with pytest.raises((UsageError, ConfigError)):
        check(line, is_whole=True)
