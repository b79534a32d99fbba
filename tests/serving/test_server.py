"""A real server in a process of its own, over HTTP."""

import json
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from running_server import CONTEXT, TOKENIZER, RunningServer, start_server, write_checkpoint

from sheepop.cli import main
from sheepop.data.chat_template import TEMPLATE_FILE
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.completion import complete, prompt_tokens
from sheepop.generation.request import Request
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.stream import token_logprobs
from sheepop.interop.convert import export_model, import_model

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ENDLESS = {"prompt": "the", "max_tokens": 100_000, "ignore_eos": True, "temperature": 1.0}
PROMPTS = ["the sheep", "", "a dog. 羊🐑", "see", "sheep sees sheep sees"]


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def text_of(events: list[Any], index: int = 0) -> str:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["text"] if "text" in choice else choice["delta"].get("content") or "" for choice in choices)


def test_the_model_is_listed(server: RunningServer) -> None:
    listed = server.client.get("/v1/models").json()
    assert [model["id"] for model in listed["data"]] == ["ewe"]
    assert listed["data"][0]["max_model_len"] == CONTEXT
    assert server.client.get("/v1/models/ewe").json() == listed["data"][0]
    assert server.client.get("/v1/models/ram").json()["error"]["code"] == "model_not_found"
    assert server.client.get("/health").json() == {"status": "ok"}
    assert "sheepop" in server.client.get("/").text
    assert "/v1/chat/completions" in server.client.get("/openapi.json").json()["paths"]


def test_tokens_of_a_text_and_back(server: RunningServer) -> None:
    text = "the 羊"
    told = server.post("/tokenize", {"prompt": text})
    assert told["tokens"] == prompt_tokens(TOKENIZER, text)
    assert told["count"] == len(told["tokens"]) == len(told["token_strs"])
    assert told["token_strs"][-3:] == ["bytes:\\xe7", "bytes:\\xbe", "bytes:\\x8a"]
    assert server.post("/tokenize", {"prompt": text, "add_special_tokens": False})["tokens"] == TOKENIZER.encode(text)
    assert server.post("/detokenize", {"tokens": told["tokens"]}) == {"prompt": text}


def test_a_text_is_that_of_generate(server: RunningServer, checkpoint: Path, capsys: Any) -> None:
    told = server.post(
        COMPLETIONS,
        {"model": "ewe", "prompt": "the sheep", "max_tokens": 60, "seed": 3, "n": 2, "temperature": 0.9, "top_p": 0.9},
    )
    options = "--max-new-tokens 60 --seed 3 --num-samples 2 --temperature 0.9 --top-p 0.9 --device cpu --json".split()
    with pytest.raises(SystemExit):
        main(["generate", "--checkpoint", str(checkpoint), "--prompt", "the sheep", *options])
    expected = json.loads(capsys.readouterr().out)["completions"]
    assert [choice["text"] for choice in told["choices"]] == [each["text"] for each in expected]
    assert [choice["finish_reason"] for choice in told["choices"]] == [each["finish_reason"] for each in expected]
    drawn = sum(len(each["token_ids"]) for each in expected)
    read = len(prompt_tokens(TOKENIZER, "the sheep"))
    assert told["usage"] == {"prompt_tokens": read, "completion_tokens": drawn, "total_tokens": read + drawn}


def test_many_at_once_are_what_each_is_alone(server: RunningServer) -> None:
    bodies = [
        {"prompt": prompt, "max_tokens": 30, "seed": seed, "stop": ["ee"], "top_k": top_k, "logit_bias": {"5": 2}}
        for seed, prompt in enumerate(PROMPTS)
        for top_k in (0, 5)
    ]
    alone = [server.post(COMPLETIONS, body) for body in bodies]
    with ThreadPoolExecutor(len(bodies)) as pool:
        together = list(pool.map(lambda body: server.post(COMPLETIONS, body), bodies))
        streamed = list(pool.map(lambda body: server.stream(COMPLETIONS, body), bodies))
    for one, other, events in zip(alone, together, streamed, strict=True):
        assert one["choices"] == other["choices"]
        assert one["usage"] == other["usage"]
        assert text_of(events) == one["choices"][0]["text"]
        assert events[-1]["choices"][0]["finish_reason"] == one["choices"][0]["finish_reason"]
    listed = server.post(COMPLETIONS, {"prompt": PROMPTS, "max_tokens": 20, "seed": 7, "n": 2})
    assert [choice["index"] for choice in listed["choices"]] == list(range(2 * len(PROMPTS)))
    one = server.post(COMPLETIONS, {"prompt": PROMPTS[2], "max_tokens": 20, "seed": 7, "n": 2})
    assert [choice["text"] for choice in listed["choices"][4:6]] == [choice["text"] for choice in one["choices"]]


def test_a_stop_string_over_token_borders(server: RunningServer, pair: Any) -> None:
    model, tokenizer = pair
    whole = complete(model, tokenizer, "the", SamplingSettings(), max_new_tokens=40, seed=1).completions[0].text
    stop = whole[7:10]
    expected = complete(model, tokenizer, "the", SamplingSettings(), max_new_tokens=40, seed=1, stop=[stop])
    body = {"prompt": "the", "max_tokens": 40, "seed": 1, "stop": stop, "logprobs": 0}
    told = server.post(COMPLETIONS, body)
    assert told["choices"][0]["text"] == expected.completions[0].text == whole[: whole.index(stop)]
    assert told["choices"][0]["finish_reason"] == "stop"
    assert told["usage"]["completion_tokens"] == len(expected.completions[0].token_ids)
    assert all(offset < whole.index(stop) for offset in told["choices"][0]["logprobs"]["text_offset"])
    assert text_of(server.stream(COMPLETIONS, body)) == whole[: whole.index(stop)]


def test_logprobs_are_the_models(server: RunningServer, pair: Any) -> None:
    model, _ = pair
    token_ids = TOKENIZER.encode("the sheep sees")
    body = {"prompt": token_ids, "max_tokens": 9, "seed": 2, "echo": True, "logprobs": 3, "ignore_eos": True}
    told = server.post(COMPLETIONS, body)["choices"][0]
    drawn = generate_batched(Engine(model), Request(token_ids, max_new_tokens=9, seed=2))[0].token_ids
    every = [*token_ids, *drawn]
    assert told["text"].startswith("the sheep sees")
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([every]))[0]
    expected = token_logprobs(logits[:-1], every[1:], 3)
    said = told["logprobs"]
    assert said["token_logprobs"][0] is None
    assert said["top_logprobs"][0] is None
    assert said["text_offset"][: len(token_ids)] == list(range(len(token_ids)))
    assert len(said["tokens"]) == len(every)
    for logprob, top, each in zip(said["token_logprobs"][1:], said["top_logprobs"][1:], expected, strict=True):
        assert logprob == pytest.approx(each.logprob, abs=1e-4)
        assert sorted(top.values(), reverse=True) == pytest.approx([value for _, value in each.top], abs=1e-4)
    only_score = {"max_tokens": 0, "echo": True, "logprobs": 0}
    scored = server.post(COMPLETIONS, {"prompt": token_ids, **only_score})["choices"][0]
    assert scored["text"] == "the sheep sees"
    before = said["token_logprobs"][1 : len(token_ids)]
    assert scored["logprobs"]["token_logprobs"][1:] == pytest.approx(before, abs=1e-4)
    text = server.post(COMPLETIONS, {"prompt": "the", **only_score})["choices"][0]
    assert text["logprobs"]["tokens"] == ["t", "h", "e"]  # what begins a text is no part of it
    assert text["logprobs"]["token_logprobs"][0] is not None
    events = server.stream(COMPLETIONS, body)
    assert text_of(events) == told["text"]
    tokens = [token for event in events for choice in event["choices"] for token in choice["logprobs"]["tokens"]]
    assert tokens == said["tokens"]


def test_a_conversation_without_a_template_is_a_text_of_lines(server: RunningServer) -> None:
    messages = [{"role": "system", "content": "the"}, {"role": "user", "content": [{"type": "text", "text": "sheep"}]}]
    body = {"messages": messages, "max_completion_tokens": 12, "seed": 4, "logprobs": True, "top_logprobs": 2}
    told = server.post(CHAT, body)
    text = server.post(COMPLETIONS, {"prompt": "the\nsheep\n", "max_tokens": 12, "seed": 4})
    assert told["object"] == "chat.completion"
    assert told["choices"][0]["message"] == {"role": "assistant", "content": text["choices"][0]["text"]}
    assert told["usage"] == text["usage"]
    tokens = told["choices"][0]["logprobs"]["content"]
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    joined = bytes(byte for token in tokens for byte in token["bytes"] or [])
    assert joined.decode("utf-8", errors="replace") == text["choices"][0]["text"]
    events = server.stream(CHAT, body | {"stream_options": {"include_usage": True}})
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert text_of(events) == text["choices"][0]["text"]
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == text["usage"]
    whole = server.post(CHAT, {"messages": messages, "seed": 4})  # as far as the context goes
    assert whole["choices"][0]["finish_reason"] == "stop" or whole["usage"]["total_tokens"] == CONTEXT


def test_output_that_follows_a_schema(server: RunningServer) -> None:
    pytest.importorskip("llguidance", reason="needs the extra 'grammar'")
    schema = {"type": "object", "properties": {"dogs": {"type": "integer", "maximum": 9}}, "required": ["dogs"]}
    schema["additionalProperties"] = False
    asked = {"type": "json_schema", "json_schema": {"name": "dogs", "strict": True, "schema": schema}}
    message = {"role": "user", "content": "how many?"}
    told = server.post(CHAT, {"messages": [message], "response_format": asked, "max_tokens": 40, "seed": 1})
    assert json.loads(told["choices"][0]["message"]["content"])["dogs"] <= 9
    told = server.post(COMPLETIONS, {"prompt": "a", "regex": "(sheep|dog)\\.", "max_tokens": 40, "seed": 3})
    assert told["choices"][0]["text"] in ("sheep.", "dog.")
    assert told["choices"][0]["finish_reason"] == "stop"
    refused = server.post(COMPLETIONS, {"prompt": "a", "regex": "("}, status=400)
    assert refused["error"]["code"] == "invalid_grammar"


def test_the_official_client(server: RunningServer) -> None:
    openai = pytest.importorskip("openai", reason="needs the package openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    assert [model.id for model in client.models.list()] == ["ewe"]
    text = client.completions.create(model="ewe", prompt="the", max_tokens=8, seed=1, user="a person", logprobs=1)
    parts = client.completions.create(model="ewe", prompt="the", max_tokens=8, seed=1, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text.choices[0].text
    messages = [{"role": "user", "content": "the"}]
    answer = client.chat.completions.create(model="ewe", messages=messages, max_tokens=8, seed=1)
    stream = client.chat.completions.create(model="ewe", messages=messages, max_tokens=8, seed=1, stream=True)
    assert "".join(part.choices[0].delta.content for part in stream) == answer.choices[0].message.content
    with pytest.raises(openai.NotFoundError, match="no model 'ram'"):
        client.completions.create(model="ram", prompt="the")
    with pytest.raises(openai.BadRequestError, match="tools"):
        client.chat.completions.create(model="ewe", messages=messages, tools=[{"type": "function"}])


def test_a_client_that_goes_away_frees_its_place(server: RunningServer) -> None:
    cancelled = server.metric("sheepop_cancelled_requests_total")
    for _ in range(3):  # more than there are places, one after the other
        with server.client.stream("POST", COMPLETIONS, json={**ENDLESS, "n": 5, "stream": True}) as answer:
            lines = answer.iter_lines()  # which ends the stream when nobody holds it any more
            next(lines)
            assert server.metric("sheepop_running_samples") == 5
        wait_until(lambda: server.metric("sheepop_running_samples") == 0)
    address = server.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as connection:  # and without a stream
        content = json.dumps(ENDLESS).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        connection.sendall(head.encode() + f"Content-Length: {len(content)}\r\n\r\n".encode() + content)
        wait_until(lambda: server.metric("sheepop_running_samples") == 1)
    wait_until(lambda: server.metric("sheepop_running_samples") == 0)
    assert server.metric("sheepop_cancelled_requests_total") == cancelled + 4


def test_a_client_that_does_not_read_stalls_nobody(server: RunningServer) -> None:
    with server.client.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True, "logprobs": 5}):
        for _ in range(3):
            assert server.post(COMPLETIONS, {"prompt": "the", "max_tokens": 20})["choices"]
    wait_until(lambda: server.metric("sheepop_running_samples") == 0)


def test_what_is_counted(server: RunningServer) -> None:
    names = {
        "in": "sheepop_prompt_tokens_total",
        "out": "sheepop_completion_tokens_total",
        "requests": f'sheepop_requests_total{{endpoint="{COMPLETIONS}",status="200"}}',
        "first": "sheepop_time_to_first_token_seconds_count",
        "between": "sheepop_time_per_token_seconds_count",
        "found": "sheepop_prefix_cache_hit_tokens_total",
    }
    before = {key: server.metric(name) for key, name in names.items()}
    prompt = "the sheep sees a dog. the dog sees a sheep"
    usage = [server.post(COMPLETIONS, {"prompt": prompt, "max_tokens": 4, "ignore_eos": True}) for _ in range(2)]
    after = {key: server.metric(name) - before[key] for key, name in names.items()}
    assert after["in"] == sum(each["usage"]["prompt_tokens"] for each in usage)
    assert after["out"] == 8
    assert after["requests"] == after["first"] == 2
    assert after["between"] == 6
    assert after["found"] >= 16


BAD_BODIES = [
    b"",
    b"{",
    b"[]",
    b'"the"',
    b"null",
    b"\xff\xfe",
    b'{"prompt": "\\ud800"}',
    b'{"temperature": NaN}',
    b'{"temperature": 1e999}',
    b"[" * 100_000,
    b'{"prompt": ' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    b'{"seed": ' + b"9" * 4_000 + b"}",
    *(
        json.dumps(body).encode()
        for body in (
            {"prompt": 3},
            {"prompt": []},
            {"prompt": [[]]},
            {"prompt": [1, "a"]},
            {"prompt": [True]},
            {"prompt": [-1]},
            {"prompt": [TOKENIZER.vocab_size]},
            {"prompt": [2**40]},
            {"prompt": [[1]] * 2000},
            {"prompt": ["a"] * 500},
            {"prompt": "the " * CONTEXT},
            {"temperature": -1},
            {"temperature": "hot"},
            {"temperature": True},
            {"top_p": 0},
            {"top_p": 1.5},
            {"top_k": 0.5},
            {"min_p": 1},
            {"repetition_penalty": 0},
            {"n": 0},
            {"n": 10**6},
            {"max_tokens": -1},
            {"max_tokens": 10**9},
            {"max_tokens": 1.5},
            {"seed": "one"},
            {"seed": 2**70},
            {"stop": ""},
            {"stop": ["a", ""]},
            {"stop": ["a"] * 99},
            {"stop": 5},
            {"stop_token_ids": ["a"]},
            {"logprobs": 99},
            {"logprobs": True},
            {"logit_bias": {"a": 1}},
            {"logit_bias": {"5": 1000}},
            {"logit_bias": {"99999999999999999999": 1}},
            {"logit_bias": [1]},
            {"stream": "yes"},
            {"stream_options": {"include_usage": True}},
            {"stream": True, "stream_options": {"surprise": 1}},
            {"response_format": {"type": "xml"}},
            {"response_format": {"type": "json_schema"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "sheep"}}}},
            {"response_format": {"type": "json_object"}, "regex": "a"},
            {"grammar": "start: ???"},
            {"presence_penalty": 0.5},
            {"best_of": 3},
            {"suffix": "end"},
            {"tempratur": 1},
            {"model": "ram"},
            {"model": 5},
        )
    ),
]


def test_bad_bodies_are_refused_and_harm_nobody(server: RunningServer) -> None:
    json_type = {"Content-Type": "application/json"}
    with server.client.stream("POST", COMPLETIONS, json={**ENDLESS, "stream": True}):
        for content in BAD_BODIES:
            answer = server.client.post(COMPLETIONS, content=content, headers=json_type)
            assert 400 <= answer.status_code < 500, (content[:80], answer.text)
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"].endswith((".", "?")), error
            assert len(error["message"]) < 900
    for path in ("/tokenize", "/detokenize", CHAT):
        for body in ({}, {"prompt": 5, "tokens": "a", "messages": "a"}, {"tokens": [-1]}, {"messages": []}):
            assert server.post(path, body, status=400)["error"]["message"]


@pytest.mark.parametrize(
    ("body", "says", "param"),
    [
        ({"temperature": -1}, "The field 'temperature' is -1, but must be a number from 0", "temperature"),
        ({"prompt": ["a", 1]}, "The field 'prompt' has [\"a\", 1], but must be a text, a list of texts", "prompt"),
        ({"tempratur": 1}, "Did you mean 'temperature'?", "tempratur"),
        ({"frequency_penalty": 0.5}, "'frequency_penalty' is not known here", "frequency_penalty"),
        ({"prompt": "the " * CONTEXT}, f"the model can read {CONTEXT} at the most", None),
        ({"prompt": [99999]}, "'prompt' has the token 99999", "prompt"),
    ],
)
def test_an_error_says_what_is_wrong(server: RunningServer, body: Any, says: str, param: str | None) -> None:
    error = server.post(COMPLETIONS, body, status=400)["error"]
    assert says in error["message"]
    assert error["param"] == param


def test_what_is_not_there(server: RunningServer) -> None:
    assert server.client.get("/v2").status_code == 404
    assert server.client.get("/v2").json()["error"]["type"] == "not_found_error"
    assert server.client.get(COMPLETIONS).status_code == 405
    assert server.client.post(COMPLETIONS, content=b"{}").status_code == 415  # another site's page can send this
    large = server.client.post(COMPLETIONS, json={"prompt": "a" * 5_000_000})
    assert large.status_code == 413
    assert "bytes" in large.json()["error"]["message"]


def test_harmless_fields_are_left_out(server: RunningServer) -> None:
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": False, "presence_penalty": 0, "frequency_penalty": 0.0}
    neutral = {"suffix": None, "best_of": 1, "logit_bias": None, "stream_options": None, "stop": None}
    assert server.post(COMPLETIONS, {"prompt": "the", **harmless, **neutral})["choices"]
    assert server.post(CHAT, {"messages": [{"role": "user", "content": "a"}], **harmless, "tools": []})["choices"]


def test_a_full_queue_a_key_and_the_end(checkpoint: Path) -> None:
    options = "--batch-size 1 --max-queue 1 --api-key wool --max-new-tokens 10000000 --grace 0.3".split()
    server = start_server(checkpoint, *options, key="wool")
    assert server.client.get("/v1/models", headers={"Authorization": "Bearer silk"}).status_code == 401
    assert server.client.get("/health", headers={"Authorization": ""}).status_code == 200
    assert server.post(COMPLETIONS, {"prompt": "the", "n": 3}, status=400)["error"]["message"]
    endless = ENDLESS | {"max_tokens": 10_000_000, "stream": True}
    with ThreadPoolExecutor(1) as pool, server.client.stream("POST", COMPLETIONS, json=endless) as running:
        lines = running.iter_lines()
        next(lines)
        waits = pool.submit(server.client.post, COMPLETIONS, json=ENDLESS)
        wait_until(lambda: server.metric("sheepop_waiting_samples") == 1)
        refused = server.client.post(COMPLETIONS, json={"prompt": "the"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.headers["retry-after"] == "1"
        server.process.send_signal(signal.SIGTERM)
        *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        assert waits.result().status_code == 503
    assert server.process.wait(timeout=60) == 143


def test_an_imported_model_with_its_template_and_an_end_that_waits(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra 'interop'")
    folder = write_checkpoint(tmp_path / "ours", activation="gelu_tanh")
    (folder / TEMPLATE_FILE).write_text("{% for message in messages %}{{ message.content }}{{ eos_token }}{% endfor %}")
    export_model(folder, tmp_path / "ewe.gguf", file_format="gguf")
    import_model(tmp_path / "ewe.gguf", tmp_path / "ram", tokenizer=None)
    server = start_server(tmp_path / "ram", "--no-optimized", "--grace", "60", "--quantize", "int8", "--name", "lamb")
    messages = [{"role": "user", "content": "the"}]
    told = server.post(CHAT, {"model": "lamb", "messages": messages, "max_tokens": 9, "seed": 1})
    special = list(TOKENIZER.special_ids.values())
    token_ids = [*TOKENIZER.encode("the"), TOKENIZER.end_of_text_id]
    text = {"prompt": token_ids, "max_tokens": 9, "seed": 1, "stop_token_ids": special}
    assert told["choices"][0]["message"]["content"] == server.post(COMPLETIONS, text)["choices"][0]["text"]
    assert told["usage"]["prompt_tokens"] == len(token_ids)
    body = {"prompt": "the", "max_tokens": 150, "ignore_eos": True, "stream": True}
    with server.client.stream("POST", COMPLETIONS, json=body) as running:
        lines = running.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)
        *_, last = (line for line in lines if line)
    assert last == "data: [DONE]"
    assert server.process.wait(timeout=60) == 130


def test_a_package_that_is_missing(checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name in ("process", "app"):
        monkeypatch.delitem(sys.modules, f"sheepop.serving.{name}", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as ended:
        main(["serve", "--checkpoint", str(checkpoint)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "needs the package uvicorn" in error
    assert "pip install 'sheepop[serve]'" in error


def test_addresses_that_cannot_be_had(server: RunningServer, checkpoint: Path, capsys: Any) -> None:
    taken = server.url.rpartition(":")[2]
    cases = [
        (["--port", taken], taken),
        (["--port", "99999"], "99999"),
        (["--host", "no.such.host.invalid"], "no.such"),
        (["--speculate", "lookup", "--no-optimized"], "--speculate"),
    ]
    for options, said in cases:
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--checkpoint", str(checkpoint), *options])
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert said in error
        assert "Traceback" not in error
