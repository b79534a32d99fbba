"""Output that follows a JSON schema, a regular expression or a grammar, through `llguidance` (the extra `grammar`).

The library walks the grammar over the bytes of the vocabulary's tokens and says which of them may come next; what may
not gets no probability, and the model chooses among the rest.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.request import Constraint
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError
from sheepop.utils.logging import warn

if TYPE_CHECKING:
    import llguidance

GrammarKind = Literal["json_schema", "regex", "lark"]

# JSON as `json.dumps` writes it. With any white space allowed, a small model likes to write nothing else.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Grammar:
    """What an output has to follow.

    Attributes:
        kind: "json_schema", "regex" (of the whole output), or "lark".
        text: the schema as JSON, the expression, or the grammar.
    """

    kind: GrammarKind
    text: str


class GrammarCompiler:
    """Makes constraints over the tokens of one tokenizer. Making the compiler takes a while; it is made once.

    Args:
        tokenizer: the model's own; its token that ends a text must be the request's `end_of_text_id`.
        vocab_size: the model's, which may have more entries than the tokenizer; those never come.

    Raises:
        ConfigError: `llguidance` is not installed, or the tokenizer cannot spell every text byte by byte.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        try:
            import llguidance
        except ImportError:
            raise ConfigError(
                "Output by a grammar needs the package llguidance, which is not installed. "
                "Install it with: pip install 'sheepop[grammar]'"
            ) from None
        if tokenizer.token_bytes is None or tokenizer.kind == "word":
            raise ConfigError(
                "This model's tokenizer cannot spell every text from parts, so that a grammar cannot tell which token "
                "may come. Use a model with a character tokenizer or a byte-level BPE one."
            )
        self._library, self._vocab_size = llguidance, vocab_size
        self._tokenizer = llguidance.LLTokenizer(
            llguidance.TokenizerWrapper(_Vocabulary(tokenizer, tokenizer.token_bytes))
        )

    def compile(self, kind: GrammarKind, text: str) -> Callable[[], Constraint]:
        """Return what makes the constraint of each sample, for `Request.constrain`.

        Args:
            kind: "json_schema", "regex" (of the whole output), or "lark".
            text: the schema as JSON, the expression, or the grammar.

        Raises:
            ConfigError: there is no such kind, or the text is not valid; says where.
        """
        if kind not in get_args(GrammarKind):
            raise ConfigError(
                f"There is no grammar of kind '{kind}'. Choose one of {', '.join(get_args(GrammarKind))}."
            )
        try:
            if kind == "json_schema":
                grammar = self._library.LLMatcher.grammar_from_json_schema(text, defaults=JSON_STYLE)
            else:
                grammar = self._library.grammar_from(kind, text)
            problem = self._library.LLMatcher.validate_grammar(grammar, self._tokenizer)
        except ValueError as error:  # not even JSON
            problem = str(error)
        if problem and not problem.startswith("WARNING"):
            # Without the lines that repeat the text and point into it.
            said = re.sub(r"^( *\d+ \|.*|\s*\^)$", "", problem, flags=re.MULTILINE)
            raise ConfigError(f"The {kind.replace('_', ' ')} cannot be used: {' '.join(said.split())}.")
        return lambda: GrammarConstraint(self._library.LLMatcher(self._tokenizer, grammar), self._vocab_size)


def constraint_of(
    grammar: Grammar | None, model: TransformerModel, tokenizer: Tokenizer
) -> Callable[[], Constraint] | None:
    """Return what makes the constraint of each sample, None where the output is free; errors as of the compiler."""
    if grammar is None:
        return None
    return GrammarCompiler(tokenizer, model.config.vocab_size).compile(grammar.kind, grammar.text)


class GrammarConstraint:
    """A `Constraint` by a grammar; the sample ends where the grammar does."""

    def __init__(self, matcher: "llguidance.LLMatcher", vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def allowed(self, token_ids: Sequence[int]) -> Tensor:  # noqa: ARG002 - the matcher has seen them
        """Return which tokens may follow, (V,) booleans."""
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        if self._matcher.is_error():
            warn(f"the grammar is given up, and the text ends: {self._matcher.get_error().splitlines()[0]}")
        elif not self._matcher.is_stopped():
            bits = np.unpackbits(np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
            known = min(self._vocab_size, len(bits))
            mask[:known] = bits[:known]
        return torch.from_numpy(mask)

    def accept(self, token_id: int) -> None:
        """Take note of the sample's next token."""
        self._matcher.consume_token(token_id)


class _Vocabulary:
    """A tokenizer as `llguidance` reads it."""

    def __init__(self, tokenizer: Tokenizer, token_bytes: Sequence[bytes]) -> None:
        self._encode = tokenizer.encode
        self.eos_token_id, self.bos_token_id = tokenizer.end_of_text_id, None
        self.special_token_ids = [token_id for token_id, content in enumerate(token_bytes) if not content]
        self.tokens = [content or b"<|%d|>" % token_id for token_id, content in enumerate(token_bytes)]

    def __call__(self, text: Any) -> list[int]:
        return self._encode(text.decode("utf-8") if isinstance(text, bytes) else text)
