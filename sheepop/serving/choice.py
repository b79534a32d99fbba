"""One text that a client waits for, as its tokens come: whole characters, stop strings, the tokens of each part."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import Transcript
from sheepop.generation.generate import FinishReason
from sheepop.generation.request import TokenEvent, TokenLogprobs


@dataclass(frozen=True)
class DrawnToken:
    """A token of a text.

    Attributes:
        offset: characters of the text before it.
        logprobs: if they were asked for.
    """

    token_id: int
    offset: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True)
class Piece:
    """The next part of a text: what is certain by now.

    Attributes:
        choice: which of the request's texts, from 0.
        tokens: those that the text of this part is made of; none that belongs to a stop string.
        finish_reason: with the last part, else None.
        num_drawn: tokens that were drawn since the part before, those of a stop string included.
        prompt_logprobs: as of `TokenEvent`.
    """

    choice: int
    text: str = ""
    tokens: list[DrawnToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_drawn: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


class Choice:
    """One sample on its way to the client.

    Attributes:
        is_finished: whether its last part is out.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.index, self.is_finished = index, False
        self._certain: list[str] = []
        self._transcript = Transcript(tokenizer, stop, self._certain.append)
        self._held: list[DrawnToken] = []
        self._told = 0  # characters
        self._num_drawn = 0  # since the last part

    def take(self, event: TokenEvent) -> Piece | None:
        """Take what the engine tells; return the next part of the text, or None while nothing is certain."""
        transcript, is_stopped = self._transcript, False
        if event.token_id is not None:
            self._num_drawn += 1
            self._held.append(DrawnToken(event.token_id, len(transcript.text), event.logprobs))
            is_stopped = transcript.add(event.token_id)
        reason: FinishReason | None = "stop" if is_stopped else event.finish_reason
        if reason is not None:
            self.is_finished = True
            transcript.finish()
        text = "".join(self._certain)
        if not text and reason is None and event.prompt_logprobs is None:
            return None
        self._certain.clear()
        self._told += len(text)
        ends_by_itself = reason is not None and not is_stopped
        tokens = [token for token in self._held if token.offset < self._told or ends_by_itself]
        self._held = self._held[len(tokens) :]
        drawn, self._num_drawn = self._num_drawn, 0
        return Piece(self.index, text, tokens, reason, drawn, event.prompt_logprobs)
