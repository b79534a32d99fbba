"""The model that a server has: what a request means for it, and whether it can be answered."""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from sheepop.data.chat_template import ChatTemplate, Message
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.generation.completion import prompt_tokens
from sheepop.generation.generate import check_length
from sheepop.generation.grammar import Grammar, GrammarCompiler
from sheepop.generation.request import Constraint, Request
from sheepop.generation.sampling import SamplingSettings
from sheepop.serving.errors import ApiError
from sheepop.serving.protocol import SHOWN, ChatBody, CompletionBody, GenerationBody
from sheepop.utils.errors import SheepopError

GRAMMARS_KEPT = 32


@dataclass(frozen=True)
class ServedModel:
    """The model that a server has, and what goes with it.

    Attributes:
        name: as `GET /v1/models` tells it.
        engine: only asked whether it could take on a request.
        max_new_tokens: the most that a request may ask for.
        created: when the server began, in seconds of Unix.
        chat_template: None where the model has none; a conversation is then one text, a line for each message.
    """

    name: str
    tokenizer: Tokenizer
    engine: Engine
    max_new_tokens: int
    chat_template: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    _encoding: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)
    _compile: Callable[[Grammar], Callable[[], Constraint]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        @lru_cache(maxsize=1)
        def compiler() -> GrammarCompiler:
            return GrammarCompiler(self.tokenizer, self.engine.model.config.vocab_size)

        @lru_cache(maxsize=GRAMMARS_KEPT)
        def compile_grammar(grammar: Grammar) -> Callable[[], Constraint]:
            return compiler().compile(grammar.kind, grammar.text)

        object.__setattr__(self, "_compile", compile_grammar)

    def check_name(self, name: str | None) -> None:
        """See that a request means this model; one that names none does.

        Raises:
            ApiError: 404.
        """
        if name not in (None, self.name):
            raise ApiError(
                f"There is no model '{name[:SHOWN]}' here, but '{self.name}'. Name that, or leave 'model' out.",
                status=404,
                param="model",
                code="model_not_found",
            )

    def prompt_tokens(self, text: str) -> list[int]:
        """Return the tokens of a text as the beginning of a document; for any thread, one of them at a time."""
        with self._encoding:
            return prompt_tokens(self.tokenizer, text)

    def completion_requests(self, body: CompletionBody) -> list[Request]:
        """Return what the engine is asked for, a request for each prompt.

        Raises:
            ApiError: the request cannot be answered.
        """
        token_ids = [self.prompt_tokens(each) if isinstance(each, str) else each for each in body.prompts]
        return self._requests(body, token_ids, body.max_tokens, body.logprobs, scores_prompt=body.echo)

    def chat_requests(self, body: ChatBody) -> list[Request]:
        """Return what the engine is asked for, as a list of one.

        Raises:
            ApiError: the request cannot be answered.
        """
        if self.chat_template is None:
            token_ids = self.prompt_tokens("".join(f"{message.text}\n" for message in body.messages))
            stop_ids: Sequence[int] = ()
        else:
            messages: list[Message] = [{"role": each.role, "content": each.text} for each in body.messages]
            with self._encoding:
                token_ids = self.chat_template.encode(messages, self.tokenizer)
            # Whatever its name, a token that is no text ends a message.
            stop_ids = [] if body.ignore_eos else list(self.tokenizer.special_ids.values())
        limits = [each for each in (body.max_completion_tokens, body.max_tokens) if each is not None]
        room = max(1, self.engine.max_seq_len - len(token_ids))
        most = min(limits) if limits else min(room, self.max_new_tokens)
        count = body.top_logprobs if body.logprobs else None
        return self._requests(body, [token_ids], most, count, stop_ids=stop_ids)

    def _requests(
        self,
        body: GenerationBody,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        logprobs: int | None,
        *,
        scores_prompt: bool = False,
        stop_ids: Sequence[int] = (),
    ) -> list[Request]:
        if max_new_tokens > self.max_new_tokens:
            raise ApiError(
                f"The request asks for {max_new_tokens} tokens, but {self.max_new_tokens} are the most here (option "
                "--max-new-tokens of the server). Ask for fewer.",
                param="max_tokens",
            )
        settings = SamplingSettings(
            body.temperature, max(body.top_k, 0), body.top_p, body.min_p, body.repetition_penalty
        )
        seed = secrets.randbits(63) if body.seed is None else body.seed
        try:
            constrain = self._compile(body.followed) if body.followed else None
        except SheepopError as error:
            raise ApiError(str(error), code="invalid_grammar") from None
        requests = [
            Request(
                token_ids,
                settings,
                max_new_tokens,
                seed,
                body.n,
                None if body.ignore_eos else self.tokenizer.end_of_text_id,
                stop_ids=[*stop_ids, *body.stop_token_ids],
                logit_bias=self._biases(body),
                logprobs=logprobs,
                prompt_logprobs=logprobs if scores_prompt else None,
                constrain=constrain,
            )
            for token_ids in prompts
        ]
        for request in requests:
            self._check(request)
        return requests

    def _biases(self, body: GenerationBody) -> dict[int, float]:
        vocab_size, biases = self.engine.model.config.vocab_size, {}
        for name, bias in body.logit_bias.items():
            if not name.isdecimal() or not name.isascii() or int(name[:12]) >= vocab_size:
                raise ApiError(
                    f"The field 'logit_bias' names the token '{name[:SHOWN]}', but must have whole numbers from 0 to "
                    f"{vocab_size - 1}. POST /tokenize tells them.",
                    param="logit_bias",
                )
            biases[int(name)] = bias
        return biases

    def _check(self, request: Request) -> None:
        self.check_tokens(request.prompt_ids, "prompt")
        try:
            check_length(request.prompt_ids, self.engine.max_seq_len)
        except SheepopError as error:
            raise ApiError(str(error), code="context_length_exceeded") from None
        try:
            self.engine.check(request)
        except SheepopError as error:
            raise ApiError(str(error)) from None

    def check_tokens(self, token_ids: Sequence[int], param: str) -> None:
        """See that tokens are in the model's vocabulary.

        Raises:
            ApiError: one is not.
        """
        vocab_size = self.engine.model.config.vocab_size
        largest = max(token_ids, default=0)
        if largest >= vocab_size:
            raise ApiError(
                f"The field '{param}' has the token {largest}, but this model knows those from 0 to {vocab_size - 1}.",
                param=param,
            )
