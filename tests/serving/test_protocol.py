"""What bodies mean for the engine."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import CONTEXT, TOKENIZER

from sheepop.data.chat_template import ChatTemplate
from sheepop.generation.completion import prompt_tokens
from sheepop.generation.sampling import SamplingSettings
from sheepop.serving.errors import ApiError
from sheepop.serving.protocol import IGNORED, NEUTRAL, ChatBody, CompletionBody, parse
from sheepop.serving.served_model import ServedModel


def completion(**fields: Any) -> CompletionBody:
    return parse(CompletionBody, json.dumps(fields).encode())


def chat(**fields: Any) -> ChatBody:
    return parse(ChatBody, json.dumps({"messages": [{"role": "user", "content": "the"}]} | fields).encode())


def test_defaults_are_openais(served: ServedModel) -> None:
    (request,) = served.completion_requests(completion(prompt="the"))
    assert request.prompt_ids == prompt_tokens(TOKENIZER, "the")
    assert request.settings == SamplingSettings()
    assert (request.max_new_tokens, request.num_samples) == (16, 1)
    assert request.end_of_text_id == TOKENIZER.end_of_text_id
    assert request.logprobs is request.prompt_logprobs is request.constrain is None
    (other,) = served.completion_requests(completion(prompt="the"))
    assert request.seed != other.seed


def test_all_that_can_be_asked(served: ServedModel) -> None:
    body = completion(
        prompt=["the", "dog"],
        temperature=0,
        top_p=0.5,
        top_k=-1,
        min_p=0.1,
        repetition_penalty=1.5,
        n=2,
        seed=-3,
        stop="ee",
        stop_token_ids=[4],
        ignore_eos=True,
        logit_bias={"5": -100, "6": 2.5},
        echo=True,
        logprobs=2,
        max_tokens=0,
    )
    requests = served.completion_requests(body)
    assert [request.prompt_ids for request in requests] == [prompt_tokens(TOKENIZER, each) for each in ("the", "dog")]
    for request in requests:
        assert request.settings == SamplingSettings(0.0, 0, 0.5, 0.1, 1.5)
        assert (request.seed, request.num_samples, request.max_new_tokens) == (-3, 2, 0)
        assert request.end_of_text_id is None
        assert request.stop_ids == [4]
        assert request.logit_bias == {5: -100, 6: 2.5}
        assert (request.logprobs, request.prompt_logprobs) == (2, 2)
    assert body.stop_strings == ["ee"]


def test_tokens_are_taken_as_they_are(served: ServedModel) -> None:
    assert [each.prompt_ids for each in served.completion_requests(completion(prompt=[3, 4]))] == [[3, 4]]
    assert [each.prompt_ids for each in served.completion_requests(completion(prompt=[[3], [4, 5]]))] == [[3], [4, 5]]


@pytest.mark.parametrize("name", sorted(IGNORED))
def test_fields_that_say_nothing_about_the_text(name: str) -> None:
    assert completion(**{name: {"any": "thing"}}) == completion()


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_fields_that_would_change_the_text_are_refused_by_name(name: str) -> None:
    for neutral in (None, *NEUTRAL[name]):
        assert chat(**{name: neutral}) == chat()
    with pytest.raises(ApiError, match=f"'{name}' is not known here") as refused:
        chat(**{name: [7]})
    assert refused.value.param == name


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=5,
)
FIELDS = st.sampled_from([*CompletionBody.model_fields, *ChatBody.model_fields, *NEUTRAL, "prompts"])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_whatever_a_body_holds_it_is_understood_or_refused(served: ServedModel, fields: dict[str, Any]) -> None:
    for kind, requests_of in ((CompletionBody, served.completion_requests), (ChatBody, served.chat_requests)):
        with suppress(ApiError):
            requests_of(parse(kind, json.dumps({"messages": [{"role": "user", "content": "a"}]} | fields).encode()))
        own = {name: value for name, value in fields.items() if name in kind.model_fields}
        with suppress(ApiError):
            requests_of(parse(kind, json.dumps(own, ensure_ascii=False).encode("utf-8", errors="replace")))


def test_how_long_an_answer_may_get(served: ServedModel) -> None:
    assert served.chat_requests(chat())[0].max_new_tokens == CONTEXT - len(prompt_tokens(TOKENIZER, "the\n"))
    assert served.chat_requests(chat(max_tokens=9))[0].max_new_tokens == 9
    assert served.chat_requests(chat(max_tokens=9, max_completion_tokens=5))[0].max_new_tokens == 5
    with pytest.raises(ApiError, match="51 tokens, but 50 are the most"):
        served.chat_requests(chat(max_tokens=51))


def test_a_conversation_goes_through_the_models_template(served: ServedModel) -> None:
    source = "{% for message in messages %}{{ message.role[0] }}{{ message.content }}{{ eos_token }}{% endfor %}"
    model = ServedModel("ewe", served.tokenizer, served.engine, 50, ChatTemplate(source))
    messages = [{"role": "assistant", "content": "a"}, {"role": "system", "content": [{"type": "text", "text": "dog"}]}]
    (request,) = model.chat_requests(chat(messages=messages))
    end = TOKENIZER.end_of_text_id
    assert request.prompt_ids == [*TOKENIZER.encode("aa"), end, *TOKENIZER.encode("sdog"), end]
    assert end in request.stop_ids
    assert model.chat_requests(chat(ignore_eos=True))[0].stop_ids == []


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"messages": []}, "'messages' is [], but must be a list of objects"),
        ({"messages": [{"role": "ram", "content": "a"}]}, "'messages' has \"ram\", but must be"),
        ({"messages": [{"role": "user", "content": None}]}, "'messages' has"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "'messages' has"),
        ({"top_logprobs": 2}, "'top_logprobs' goes with 'logprobs': true alone"),
        ({"response_format": {"type": "json_schema"}}, "'response_format' is"),
        ({"regex": "a", "grammar": "start: A"}, "give one"),
        ({"regex": "a" * 70_000}, "the grammar or schema has more than 65536 characters"),
        ({"regex": "a", "ignore_eos": True}, "'ignore_eos' does not go with a grammar"),
        ({"max_tokens": "9" * 200}, "…, but must be a whole number"),
    ],
)
def test_what_is_wrong_with_a_conversation(fields: Any, says: str) -> None:
    with pytest.raises(ApiError) as refused:
        chat(**fields)
    assert says in refused.value.message
    assert refused.value.status == 400
