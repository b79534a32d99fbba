"""The tokens that begin and end a text, and where a `tokenizer.json` keeps them: in its templates for one text and two.

The template of one text, `begin $A`, says what stands before it; that of two, `begin $A end begin $B`, what stands
between them, and so what ends the first. Files of others have the first at most; then the end is known by its name.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

import tokenizers
from tokenizers import processors

from sheepop.data.tokenizer_parts import END_OF_TEXT

# The names that others give to the token between documents, in the order in which they are looked for.
KNOWN_END_TOKENS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|bos|>", "<s>")


@dataclass(frozen=True)
class TextMarks:
    """The names of the tokens around a text.

    Attributes:
        start: before it; None where no template says so, which is to begin with `end`.
        end: after it; None where there is none that could be.
    """

    start: tuple[str, ...] | None
    end: str | None


def text_marks(layout: dict[str, Any], names: Container[str]) -> TextMarks:
    """Return the marks of a `tokenizer.json` with these names of tokens."""
    template = template_of(layout["post_processor"])
    start, end = None, None
    if template is not None:
        start, _ = specials(template["single"])
        _, between = specials(template["pair"])
        end = next(iter(between[: len(between) - len(start)]), None)  # what is left begins the second text
    if end is None:
        special = {added["content"] for added in layout["added_tokens"] if added["special"]}
        known = [name for name in KNOWN_END_TOKENS if name in names]
        end = next((name for name in known if name in special), next(iter(known), None))
    return TextMarks(start, end)


def template_of(processor: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the templates in what a `tokenizer.json` does after encoding, or None."""
    if processor is None or processor["type"] == "TemplateProcessing":
        return processor
    found = (template_of(part) for part in processor.get("processors", ()))
    return next((template for template in found if template is not None), None)


def specials(pieces: Sequence[dict[str, Any]]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the special tokens of a template before its first text, and those behind it up to the second."""
    runs: list[list[str]] = [[]]
    for piece in pieces:
        if "Sequence" in piece:
            runs.append([])
        else:
            runs[-1].append(piece["SpecialToken"]["id"])
    return tuple(runs[0]), tuple(runs[1] if len(runs) > 1 else ())


def set_text_marks(backend: tokenizers.Tokenizer, start: Sequence[str], end: str) -> None:
    """Let a text begin with the tokens `start` and end with `end`, all of which are in the vocabulary."""
    backend.post_processor = processors.TemplateProcessing(
        single=[*start, "$A:0"],
        pair=[*start, "$A:0", end, *start, "$B:0"],
        special_tokens=[(name, backend.token_to_id(name)) for name in sorted({*start, end})],
    )
