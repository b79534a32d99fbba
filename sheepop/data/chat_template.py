"""A conversation as the tokens that a model was taught to read it in, by the template that came with the model.

The template is a program in Jinja's language (the form that Hugging Face's files have), run in its sandbox. What people
wrote never becomes a special token, not even where it spells the name of one.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TypedDict

from sheepop.data.tokenizer import Tokenizer
from sheepop.utils.errors import CheckpointError, DataError

TEMPLATE_FILE = "chat_template.jinja"
LARGEST_TEMPLATE = 2**20  # bytes
# Stand-ins for the names of special tokens in what people wrote: one character each, of those that nobody uses.
FIRST_STAND_IN = 0x10_0000


class Message(TypedDict):
    """Who says what."""

    role: str
    content: str


class ChatTemplate:
    """How a conversation becomes one text.

    Args:
        source: the template.

    Raises:
        DataError: it is not one.
    """

    def __init__(self, source: str) -> None:
        import jinja2
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols], keep_trailing_newline=True
        )
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise DataError(f"The chat template cannot be read: {error.message} in line {error.lineno}.") from None
        self.source = source

    def encode(self, messages: Sequence[Message], tokenizer: Tokenizer) -> list[int]:
        """Return the tokens of a conversation up to where the model's answer begins.

        Raises:
            DataError: the template does not take such a conversation; says why.
        """
        import jinja2

        special = {name: token_id for name, token_id in tokenizer.special_ids.items() if name}
        if any(ord(character) >= FIRST_STAND_IN for message in messages for character in message["content"]):
            raise DataError("A message has characters of the last private plane of Unicode; leave them out.")
        stand_ins = {name: chr(FIRST_STAND_IN + number) for number, name in enumerate(special)}
        names = {character: name for name, character in stand_ins.items()}
        # Longer names first, of which shorter ones may be a part.
        pattern = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)")
        hidden: list[Message] = [
            {"role": each["role"], "content": pattern.sub(lambda found: stand_ins[found[0]], each["content"])}
            for each in messages
        ]
        begin = [name for name, token_id in special.items() if token_id in tokenizer.start_ids[:1]]
        try:
            text = self._template.render(
                messages=hidden,
                add_generation_prompt=True,
                bos_token=next(iter(begin), ""),
                eos_token=tokenizer.end_of_text,
            )
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, AttributeError, LookupError) as error:
            raise DataError(f"The model's chat template does not take this conversation: {error}.") from None
        token_ids: list[int] = []
        end = 0
        for found in [*pattern.finditer(text), None]:
            plain = text[end : found.start() if found else None]
            token_ids += tokenizer.encode("".join(names.get(character, character) for character in plain))
            if found:
                token_ids.append(special[found[0]])
                end = found.end()
        return token_ids


def load_chat_template(folder: Path) -> ChatTemplate | None:
    """Return the template that a checkpoint has, or None.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = folder / TEMPLATE_FILE
    if not path.is_file():
        return None
    try:
        if path.stat().st_size > LARGEST_TEMPLATE:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, of which {LARGEST_TEMPLATE} are the most.")
        return ChatTemplate(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, DataError) as error:
        raise CheckpointError(f"The chat template {path} cannot be used. {error}") from None


def _refuse(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)
