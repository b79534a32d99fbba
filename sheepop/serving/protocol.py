"""What clients ask: the bodies of requests, in OpenAI's form.

A field that would change the text and that is not known here is refused by name; fields that change nothing, which
official clients send, are left out (`IGNORED`), and so are others as long as they hold what means nothing (`NEUTRAL`).
"""

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from sheepop.generation.grammar import Grammar
from sheepop.serving.errors import ApiError
from sheepop.utils.errors import did_you_mean

# Fields that say nothing about the text: who asks, how it is billed or kept.
IGNORED = frozenset(
    "metadata parallel_tool_calls prompt_cache_key prompt_cache_retention safety_identifier service_tier store "
    "user".split()
)
# Fields that clients send with a value that asks for nothing; any other is refused.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "presence_penalty": (0,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
}
MOST_PROMPTS, MOST_CHOICES, MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS, MOST_BIASES = 1024, 128, 16, 256, 20, 1024
LEAST_SEED, MOST_SEED = -(2**63), 2**63 - 1
LARGEST_GRAMMAR = 2**16  # characters; what takes longer to compile would keep the other texts waiting
SHOWN = 80  # characters of a wrong value, in an error

TokenId = Annotated[int, Field(ge=0, lt=2**32)]
StopString = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]
BodyType = TypeVar("BodyType", bound="RequestBody")


class Body(BaseModel):
    """The body of a request, or a part of it; a field's description says what it must be, for errors and the schema."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_means_nothing(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {
            key: each
            for key, each in value.items()
            if each is not None and key not in IGNORED and not any(each == neutral for neutral in NEUTRAL.get(key, ()))
        }


class RequestBody(Body):
    """The whole body of a request."""

    model: str | None = Field(None, description="the name of a model in GET /v1/models")


class StreamOptions(Body):
    """How a stream ends."""

    include_usage: bool = Field(False, description="true or false")


class JsonSchema(Body):
    """A schema with the name that its user gave it; the output follows it strictly in any case."""

    json_schema: dict[str, Any] = Field(alias="schema", description="a JSON schema")
    name: str = Field("schema", description="a text")
    description: str = Field("", description="a text")
    strict: bool = Field(True, description="true or false")


class ResponseFormat(Body):
    """What the output has to follow."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("'json_schema' belongs to the type 'json_schema', and only to it")
        return self


class GenerationBody(RequestBody):
    """What texts and messages have in common."""

    temperature: float = Field(1.0, ge=0, le=100, description="a number from 0 (always the likeliest token) to 100")
    top_p: float = Field(1.0, gt=0, le=1, description="a number above 0 and at most 1 (off)")
    top_k: int = Field(0, ge=-1, lt=2**32, description="a whole number from 0 (off) up")
    min_p: float = Field(0.0, ge=0, lt=1, description="a number from 0 (off) to below 1")
    repetition_penalty: float = Field(1.0, ge=0.1, le=10, description="a number from 0.1 to 10; 1 is off")
    n: int = Field(1, ge=1, le=MOST_CHOICES, description=f"a whole number from 1 to {MOST_CHOICES}")
    seed: int | None = Field(None, ge=LEAST_SEED, le=MOST_SEED, description="a whole number of 64 bits")
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS)] = Field(
        default_factory=list,
        description=f"a text or a list of at most {MOST_STOPS} texts, of 1 to {LONGEST_STOP} characters each",
    )
    stop_token_ids: list[TokenId] = Field(
        default_factory=list, max_length=MOST_BIASES, description="a list of token ids"
    )
    ignore_eos: bool = Field(False, description="true or false")
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict,
        max_length=MOST_BIASES,
        description=f"an object of at most {MOST_BIASES} token ids, each with a number from -100 to 100",
    )
    response_format: ResponseFormat | None = Field(
        None,
        description='an object whose "type" is "text", "json_object", or "json_schema" with {"json_schema": '
        '{"schema": ...}} beside it',
    )
    regex: str | None = Field(None, description="a regular expression that the whole output follows")
    grammar: str | None = Field(None, description="a Lark grammar that the output follows")
    stream: bool = Field(False, description="true or false")
    stream_options: StreamOptions | None = Field(
        None, description='an object with "include_usage", and only with "stream": true'
    )

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("'stream_options' goes with 'stream': true alone")
        asked = [self.regex, self.grammar, self.response_format and self.response_format.type != "text"]
        if sum(bool(each) for each in asked) > 1:
            raise ValueError("'response_format', 'regex' and 'grammar' each say all that the output may be; give one")
        if self.followed is not None and len(self.followed.text) > LARGEST_GRAMMAR:
            raise ValueError(f"the grammar or schema has more than {LARGEST_GRAMMAR} characters; give a shorter one")
        if any(asked) and self.ignore_eos:
            raise ValueError("'ignore_eos' does not go with a grammar, which says where the output ends")
        return self

    @property
    def stop_strings(self) -> list[str]:
        """The strings that end a text."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def followed(self) -> Grammar | None:
        """What the output has to follow."""
        if self.regex:
            return Grammar("regex", self.regex)
        if self.grammar:
            return Grammar("lark", self.grammar)
        if self.response_format is None or self.response_format.type == "text":
            return None
        schema = self.response_format.json_schema
        return Grammar("json_schema", json.dumps(schema.json_schema if schema else {"type": "object"}))


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`."""

    prompt: str | list[str] | list[TokenId] | list[list[TokenId]] = Field(
        "", description="a text, a list of texts, a list of token ids, or a list of such lists, none of them empty"
    )
    max_tokens: int = Field(16, ge=0, description="a whole number from 0 up")
    echo: bool = Field(False, description="true or false")
    logprobs: int | None = Field(
        None, ge=0, le=MOST_LOGPROBS, description=f"a whole number from 0 to {MOST_LOGPROBS}, of the likeliest tokens"
    )

    @model_validator(mode="after")
    def _has_prompts(self) -> Self:
        if self.prompt == [] or (isinstance(self.prompt, list) and [] in self.prompt):
            raise ValueError("'prompt' has an empty list; give at least one token, or \"\" to begin a text")
        if len(self.prompts) > MOST_PROMPTS:
            raise ValueError(f"'prompt' has {len(self.prompts)} prompts, of which {MOST_PROMPTS} are the most")
        if self.stream and self.echo and self.logprobs is not None and self.n > 1:
            raise ValueError("'stream' with 'echo' and 'logprobs' goes with one text, 'n': 1, alone")
        return self

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, of which one alone may stand by itself."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt


class TextPart(Body):
    """A part of a message that is a text; this API knows no others."""

    type: Literal["text"]
    text: str


class ChatMessage(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """Its whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatBody(GenerationBody):
    """The body of `POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(
        min_length=1,
        max_length=10_000,
        description="a list of objects with a 'role' (system, developer, user or assistant) and a text as 'content'",
    )
    max_tokens: int | None = Field(None, ge=0, description="a whole number from 0 up")
    max_completion_tokens: int | None = Field(None, ge=0, description="a whole number from 0 up")
    logprobs: bool = Field(False, description="true or false")
    top_logprobs: int = Field(
        0, ge=0, le=MOST_LOGPROBS, description=f"a whole number from 0 to {MOST_LOGPROBS}, with 'logprobs': true"
    )

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("'top_logprobs' goes with 'logprobs': true alone")
        return self


class TokenizeBody(RequestBody):
    """The body of `POST /tokenize`."""

    prompt: str = Field(description="a text")
    add_special_tokens: bool = Field(True, description="true or false")


class DetokenizeBody(RequestBody):
    """The body of `POST /detokenize`."""

    tokens: list[TokenId] = Field(description="a list of token ids")


def parse(kind: type[BodyType], content: bytes) -> BodyType:
    """Read the body of a request.

    Raises:
        ApiError: it is not JSON, or a field is wrong or not known; names the field and what it must be.
    """
    try:
        value = from_json(content, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(f"The body is not valid JSON: {error}. Send one object in UTF-8.", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(f"The body is a {type(value).__name__}, but must be an object in braces.", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _first_problem(kind, error) from None


def _first_problem(kind: type[Body], error: ValidationError) -> ApiError:
    problem = error.errors()[0]
    path, what = problem["loc"], problem["type"]
    if not path:  # fields that do not go together
        return ApiError(f"{problem['msg'].removeprefix('Value error, ')}.")
    name = str(path[0])
    if what == "extra_forbidden":
        where = ".".join(map(str, path))
        near = did_you_mean(name, kind.model_fields) if len(path) == 1 else ""
        text = (
            f"The field '{where}' is not known here, and might change the result, so it is refused.{near} Leave it out."
        )
        return ApiError(text, param=where, code="unknown_field")
    described = kind.model_fields[name].description
    if what == "missing" and len(path) == 1:
        return ApiError(f"The field '{name}' is missing; it must be {described}.", param=name, code="missing_field")
    # Behind the name the path has more than places in the user's list: which kinds of value were tried, too.
    said = json.dumps(problem["input"], ensure_ascii=False, default=str)
    shown = said if len(said) <= SHOWN else f"{said[:SHOWN]}…"
    verb = "is" if len(path) == 1 else "has"
    text = f"The field '{name}' {verb} {shown}, but must be {described}."
    return ApiError(text, param=name, code="invalid_value")
