"""What clients get: answers in OpenAI's form, made of the parts that the scheduler tells.

A stream sends the parts; an answer in one piece is all of them joined, so that both say the same.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Literal

from pydantic import BaseModel

from sheepop.data.tokenizer import StreamDecoder, Tokenizer
from sheepop.generation.generate import FinishReason
from sheepop.generation.request import Request, TokenLogprobs
from sheepop.serving.choice import DrawnToken, Piece
from sheepop.serving.protocol import ChatBody, CompletionBody


class Usage(BaseModel):
    """Counts of tokens: those of each prompt once, and all that were drawn."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a text's tokens; a prompt's first token, which nothing precedes, has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One text, or a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(BaseModel):
    """The answer of `POST /v1/completions`, and a part of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class AlternativeToken(BaseModel):
    """A token, how likely the model found it, and its bytes where it has some."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(AlternativeToken):
    """A token that was drawn, with the likeliest ones in its place."""

    top_logprobs: list[AlternativeToken]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a message's tokens."""

    content: list[ChatToken]
    refusal: None = None


class ChatText(BaseModel):
    """A message, or a part of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatMessageChoice(BaseModel):
    """One message."""

    index: int
    message: ChatText
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatPartChoice(BaseModel):
    """A part of a message."""

    index: int
    delta: ChatText
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletion(BaseModel):
    """The answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatMessageChoice]
    usage: Usage | None = None


class ChatCompletionPart(BaseModel):
    """A part of its stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatPartChoice]
    usage: Usage | None = None


class Answer:
    """What both kinds of answers have in common: their name, their date, and the counts of tokens."""

    prefix = ""

    def __init__(self, model: str, tokenizer: Tokenizer, requests: Sequence[Request]) -> None:
        self.model, self.tokenizer, self.requests = model, tokenizer, requests
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.num_choices = sum(request.num_samples for request in requests)
        self._num_drawn = 0

    def count(self, pieces: Sequence[Piece]) -> None:
        """Take note of the tokens that parts cost."""
        self._num_drawn += sum(piece.num_drawn for piece in pieces)

    @property
    def usage(self) -> Usage:
        """The counts so far."""
        read = sum(len(request.prompt_ids) for request in self.requests)
        return Usage(prompt_tokens=read, completion_tokens=self._num_drawn, total_tokens=read + self._num_drawn)


class CompletionAnswer(Answer):
    """The answer to a request for texts."""

    prefix = "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, requests: Sequence[Request], body: CompletionBody) -> None:
        super().__init__(model, tokenizer, requests)
        self._n, self._has_logprobs = body.n, body.logprobs is not None
        self._echoed: list[str] = []
        if body.echo:
            self._echoed = [each if isinstance(each, str) else tokenizer.decode(each) for each in body.prompts]
        # What stands before a prompt's text is no part of it.
        self._hidden = [len(tokenizer.start_ids) if isinstance(each, str) else 0 for each in body.prompts]
        self._prompt_logprobs: dict[int, list[TokenLogprobs | None]] = {}
        self._begun = set[int]()

    def beginning(self) -> Iterator[Completion]:
        """Yield what a stream says before the first part: nothing."""
        yield from ()

    def part(self, pieces: Sequence[Piece]) -> Completion:
        """Return parts that came together as a part of the stream."""
        self.count(pieces)
        return self._with([choice for piece in pieces for choice in self._choices(piece)])

    def end(self, *, includes_usage: bool) -> Iterator[Completion]:
        """Yield what a stream says after the last part."""
        if includes_usage:
            yield self._with([], self.usage)

    def whole(self, pieces: Sequence[Piece]) -> Completion:
        """Return all parts as one answer."""
        self.count(pieces)
        choices: dict[int, CompletionChoice] = {}
        for piece in sorted(pieces, key=lambda each: each.choice):  # sample 0 first, which knows the prompt's logprobs
            for part in self._choices(piece):
                _append(choices.setdefault(part.index, CompletionChoice(index=part.index, text="")), part)
        return self._with(list(choices.values()), self.usage)

    def _with(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _choices(self, piece: Piece) -> Iterator[CompletionChoice]:
        prompt = piece.choice // self._n
        if piece.prompt_logprobs is not None:
            self._prompt_logprobs[prompt] = piece.prompt_logprobs
        if self._echoed and piece.choice not in self._begun:
            self._begun.add(piece.choice)
            yield CompletionChoice(
                index=piece.choice,
                text=self._echoed[prompt],
                logprobs=self._of_prompt(prompt) if self._has_logprobs else None,
            )
        offset = len(self._echoed[prompt]) if self._echoed else 0
        yield CompletionChoice(
            index=piece.choice,
            text=piece.text,
            logprobs=self._of_tokens(piece.tokens, offset) if self._has_logprobs else None,
            finish_reason=piece.finish_reason,
        )

    def _of_prompt(self, prompt: int) -> CompletionLogprobs:
        hidden, token_ids = self._hidden[prompt], list(self.requests[prompt].prompt_ids)
        known = self._prompt_logprobs.get(prompt, [])
        decoder, offsets, length = StreamDecoder(self.tokenizer), list[int](), 0
        for token_id in token_ids[hidden:]:
            offsets.append(length)
            length += len(decoder.push(token_id))
        return _logprobs(self.tokenizer, token_ids[hidden:], known[hidden:], offsets)

    def _of_tokens(self, tokens: Sequence[DrawnToken], offset: int) -> CompletionLogprobs:
        return _logprobs(
            self.tokenizer,
            [token.token_id for token in tokens],
            [token.logprobs for token in tokens],
            [offset + token.offset for token in tokens],
        )


class ChatAnswer(Answer):
    """The answer to a conversation."""

    prefix = "chatcmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, requests: Sequence[Request], body: ChatBody) -> None:
        super().__init__(model, tokenizer, requests)
        self._has_logprobs = body.logprobs

    def beginning(self) -> Iterator[ChatCompletionPart]:
        """Yield what a stream says before the first part: who speaks."""
        yield self._with(
            [
                ChatPartChoice(index=index, delta=ChatText(role="assistant", content=""))
                for index in range(self.num_choices)
            ]
        )

    def part(self, pieces: Sequence[Piece]) -> ChatCompletionPart:
        """Return parts that came together as a part of the stream."""
        self.count(pieces)
        return self._with(
            [
                ChatPartChoice(
                    index=piece.choice,
                    delta=ChatText(content=piece.text),
                    logprobs=self._of_tokens(piece.tokens),
                    finish_reason=piece.finish_reason,
                )
                for piece in pieces
            ]
        )

    def end(self, *, includes_usage: bool) -> Iterator[ChatCompletionPart]:
        """Yield what a stream says after the last part."""
        if includes_usage:
            yield self._with([], self.usage)

    def whole(self, pieces: Sequence[Piece]) -> ChatCompletion:
        """Return all parts as one answer."""
        self.count(pieces)
        choices = []
        for index in range(self.num_choices):
            parts = [piece for piece in pieces if piece.choice == index]
            tokens = [token for piece in parts for token in piece.tokens]
            choices.append(
                ChatMessageChoice(
                    index=index,
                    message=ChatText(role="assistant", content="".join(piece.text for piece in parts)),
                    logprobs=self._of_tokens(tokens),
                    finish_reason=parts[-1].finish_reason,
                )
            )
        return ChatCompletion(id=self.id, created=self.created, model=self.model, choices=choices, usage=self.usage)

    def _with(self, choices: list[ChatPartChoice], usage: Usage | None = None) -> ChatCompletionPart:
        return ChatCompletionPart(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _of_tokens(self, tokens: Sequence[DrawnToken]) -> ChatLogprobs | None:
        if not self._has_logprobs:
            return None
        content = []
        for token in tokens:
            assert token.logprobs is not None
            drawn = self._alternative(token.token_id, token.logprobs.logprob)
            others = [self._alternative(token_id, logprob) for token_id, logprob in token.logprobs.top]
            content.append(ChatToken(**drawn.model_dump(), top_logprobs=others))
        return ChatLogprobs(content=content)

    def _alternative(self, token_id: int, logprob: float) -> AlternativeToken:
        known = own_bytes(self.tokenizer, token_id)
        return AlternativeToken(
            token=token_name(self.tokenizer, token_id), logprob=logprob, bytes=None if known is None else list(known)
        )


def own_bytes(tokenizer: Tokenizer, token_id: int) -> bytes | None:
    """Return the bytes of a token's text; None for one that has no text, or none without its neighbours."""
    table = tokenizer.token_bytes
    return (table[token_id] or None) if table is not None and token_id < len(table) else None


def token_name(tokenizer: Tokenizer, token_id: int) -> str:
    r"""Return a token as text, its name where it has none, or as `bytes:\xf0\x9f` where it is a part of a character."""
    if token_id >= tokenizer.vocab_size:  # a model may have more entries than its tokenizer
        return f"<|{token_id}|>"
    known = own_bytes(tokenizer, token_id)
    try:
        return tokenizer.token_text(token_id) if known is None else known.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known or b"")


def _logprobs(
    tokenizer: Tokenizer, token_ids: Sequence[int], known: Sequence[TokenLogprobs | None], offsets: Sequence[int]
) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[token_name(tokenizer, token_id) for token_id in token_ids],
        token_logprobs=[each and each.logprob for each in known],
        top_logprobs=[
            each and {token_name(tokenizer, token_id): logprob for token_id, logprob in each.top} for each in known
        ],
        text_offset=list(offsets),
    )


def _append(choice: CompletionChoice, part: CompletionChoice) -> None:
    choice.text += part.text
    choice.finish_reason = part.finish_reason
    if part.logprobs is None:
        return
    if choice.logprobs is None:
        choice.logprobs = part.logprobs
        return
    for name in CompletionLogprobs.model_fields:
        getattr(choice.logprobs, name).extend(getattr(part.logprobs, name))
