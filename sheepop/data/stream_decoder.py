"""Text from tokens one by one."""

import codecs
from typing import TYPE_CHECKING

from sheepop.data.tokenizer_parts import REPLACEMENT

if TYPE_CHECKING:
    from sheepop.data.tokenizer import Tokenizer


class StreamDecoder:
    """Text from tokens as they come, never half a character: a character's last byte brings it out."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        self._tokenizer = tokenizer
        self._table = tokenizer.token_bytes
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # For tokenizers without a byte table: the last tokens whose text was returned, and the ones after them. The
        # first are decoded along, because the text of a token may depend on whether it is the first.
        self._context: list[int] = []
        self._waiting: list[int] = []

    def push(self, token_id: int) -> str:
        """Return the text that is complete now."""
        if self._table is not None:
            # A model may have more entries than its tokenizer; those have no text.
            return self._bytes.decode(self._table[token_id]) if token_id < len(self._table) else ""
        self._waiting.append(token_id)
        text = self._text_of_waiting()
        if not text or text.endswith(REPLACEMENT):
            return ""
        self._context, self._waiting = self._waiting, []
        return text

    def flush(self) -> str:
        """Return what is left at the end; bytes that never became a character give U+FFFD."""
        if self._table is not None:
            return self._bytes.decode(b"", final=True)
        return self._text_of_waiting()

    def _text_of_waiting(self) -> str:
        decode = self._tokenizer.decode
        return decode(self._context + self._waiting)[len(decode(self._context)) :]
