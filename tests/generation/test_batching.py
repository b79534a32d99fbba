import random
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.generation.batching import Engine, generate_batched
from sheepop.generation.generate import Continuation, context_start, generate_naive
from sheepop.generation.request import Request, TokenEvent, TokenLogprobs
from sheepop.generation.runner import Chunk, KernelRunner, ModelRunner, Runner
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.speculation import LookUp
from sheepop.models.paged_cache import PagedCache
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError, ConfigError

CONTEXT, VOCABULARY, END = 14, 31, 17
FAMILIES: dict[str, dict[str, object]] = {
    "classic": {},
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "num_kv_heads": 2, "tie_weights": False},
    "learned": {"positions": "learned", "bias": True},
    "sinusoidal": {"positions": "sinusoidal"},
    "no positions": {"positions": "none"},
    "sliding window": {"sliding_window": 5},
    "sinks": {"sliding_window": 5, "attention_sinks": 2},
    "sinks as long as the context": {"sliding_window": 3, "attention_sinks": 14, "positions": "learned"},
    "reference with sinks": {"attention": "reference", "sliding_window": 3, "attention_sinks": 3},
    "convolutions": {"conv_width": 4},
    "convolutions in a window": {"conv_width": 4, "sliding_window": 2},
    "copying": {"copy_width": 8},
    "copying beyond the window": {"copy_width": 8, "sliding_window": 2, "attention_sinks": 1, "ngram_order": 2},
    "n-grams": {"ngram_order": 2, "ngram_entries": 97},
    "longer n-grams": {"ngram_order": 4, "ngram_entries": 97, "positions": "learned"},
    "parallel": {"parallel_residual": True, "rotary_dim": 2},
    "reference attention": {"attention": "reference", "num_kv_heads": 2, "sliding_window": 3},
}
GREEDY = SamplingSettings(temperature=0.0)
Result = dict[int, list[Continuation]]


def tiny(**changes: object) -> TransformerModel:
    torch.manual_seed(11)
    sizes = {"vocab_size": VOCABULARY, "d_model": 24, "num_layers": 3, "num_heads": 4, "d_ff": 40}
    # Wide initial weights: the untrained model's tokens then differ, and their scores are far apart.
    return TransformerModel(
        ModelConfig.model_validate({**sizes, "max_seq_len": CONTEXT, "init_std": 0.4, "dropout": 0.3, **changes})
    )


MODELS = {name: tiny(**changes) for name, changes in FAMILIES.items()}
CLASSIC = MODELS["classic"]


def naive(model: TransformerModel, request: Request) -> list[Continuation]:
    return generate_naive(
        model,
        request.prompt_ids,
        request.settings,
        max_new_tokens=request.max_new_tokens,
        seed=request.seed,
        num_samples=request.num_samples,
        end_of_text_id=request.end_of_text_id,
    )


def gather(events: Sequence[TokenEvent]) -> Result:
    """Put the events of each request together; each sample must end, once, and with its last event."""
    texts: dict[tuple[int, int], list[int]] = {}
    reasons: dict[tuple[int, int], str] = {}
    for event in events:
        key = event.request_id, event.sample
        assert key not in reasons
        texts.setdefault(key, []).extend([] if event.token_id is None else [event.token_id])
        if event.finish_reason is not None:
            reasons[key] = event.finish_reason
    assert reasons.keys() == texts.keys()
    results: Result = {}
    for key in sorted(texts):
        results.setdefault(key[0], []).append(Continuation(texts[key], reasons[key]))  # type: ignore[arg-type]
    return results


def run(engine: Engine) -> list[TokenEvent]:
    events = []
    while engine.has_work:
        events += engine.step()
    assert engine.cache.num_free == engine.cache.num_pages
    return events


REQUESTS = st.builds(
    Request,
    # A few beginnings, so that prompts share some.
    prompt_ids=st.builds(
        lambda length, rest: [(7 * n) % 31 for n in range(length)] + rest,
        st.integers(0, 40),
        st.lists(st.integers(0, 30), min_size=1, max_size=4),
    ),
    settings=st.sampled_from(
        [
            GREEDY,
            SamplingSettings(),
            SamplingSettings(0.7, top_k=5),
            SamplingSettings(1.0, top_p=0.8, repetition_penalty=1.3),
            SamplingSettings(0.0, repetition_penalty=1.3),
        ]
    ),
    max_new_tokens=st.integers(0, 30),
    seed=st.integers(0, 9),
    num_samples=st.sampled_from([1, 1, 1, 3]),
    end_of_text_id=st.sampled_from([END, None]),
)


@settings(deadline=None, max_examples=25)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    requests=st.lists(REQUESTS, min_size=1, max_size=6),
    waits=st.lists(st.integers(0, 6), min_size=6, max_size=6),
    max_batch_size=st.integers(1, 7),
    page_size=st.sampled_from([1, 2, 3, 4, 16]),
    spare_pages=st.integers(0, 20),
    chunk_size=st.sampled_from([1, 2, 5, 8, 64]),
    num_guesses=st.integers(0, 4),
)
def test_each_request_gets_the_tokens_that_it_gets_alone(
    family: str,
    requests: list[Request],
    waits: list[int],
    max_batch_size: int,
    page_size: int,
    spare_pages: int,
    chunk_size: int,
    num_guesses: int,
) -> None:
    model = MODELS[family]
    engine = Engine(
        model,
        max_batch_size=max_batch_size,
        num_pages=-(-CONTEXT // page_size) + spare_pages,  # tiny: as good as always someone gives way
        page_size=page_size,
        chunk_size=chunk_size,
        speculator=LookUp(num_guesses, longest=2) if num_guesses else None,
    )
    events: list[TokenEvent] = []
    for request, steps in zip(requests, waits, strict=False):
        for _ in range(steps):
            events += engine.step()
        engine.add(request)
    results = gather(events + run(engine))
    for number, request in enumerate(requests):
        assert results[number] == naive(model, request)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_far_beyond_the_context(family: str, temperature: float) -> None:
    model, chosen = MODELS[family], SamplingSettings(temperature)
    engine = Engine(model, max_batch_size=4, page_size=3, num_pages=12, chunk_size=4)
    requests = [Request(list(range(length)), chosen, 40, length, 2, END) for length in (1, 5, 14, 15, 30)]
    for request in requests:
        engine.add(request)
    results = gather(run(engine))
    assert [results[number] for number in range(len(requests))] == [naive(model, request) for request in requests]


class Spy:
    """A runner that remembers how many tokens each chunk had, for each step."""

    def __init__(self, model: TransformerModel) -> None:
        self.run, self.steps = ModelRunner(model), list[list[int]]()

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        self.steps.append([len(chunk.token_ids) for chunk in chunks])
        return self.run(chunks, cache)


LONG = tiny(max_seq_len=200)


def long_prompt(length: int, seed: int = 0) -> list[int]:
    draws = random.Random(seed)
    return [draws.randrange(VOCABULARY) for _ in range(length)]


def test_a_long_prompt_is_read_in_chunks_while_others_are_written() -> None:
    spy = Spy(LONG)
    engine = Engine(LONG, chunk_size=24, page_size=8, runner=spy)
    engine.add(Request([3], GREEDY, 30))
    engine.add(Request([4], GREEDY, 30))
    engine.step()
    spy.steps.clear()
    engine.add(Request(long_prompt(150), GREEDY, 5))
    told = [len(engine.step()) for _ in range(7)]
    assert told == [2] * 6 + [3]  # the others got a token with each step
    assert spy.steps == [[1, 1, 24]] * 6 + [[1, 1, 6]]


def test_prompts_share_the_tokens_of_a_chunk() -> None:
    spy = Spy(LONG)
    engine = Engine(LONG, chunk_size=20, page_size=4, runner=spy)
    for seed in range(3):
        engine.add(Request(long_prompt(15, seed), GREEDY, 1))
    run(engine)
    assert all(sum(step) <= 20 for step in spy.steps)
    assert spy.steps == [[15, 4], [11, 8], [7]]


def test_what_two_prompts_begin_with_is_computed_once() -> None:
    engine = Engine(LONG, page_size=8)
    common = long_prompt(100)
    first, second = Request([*common, 1, 2], GREEDY, 4), Request([*common, 5], GREEDY, 4)
    engine.add(first)
    run(engine)
    assert (engine.counters.computed, engine.counters.found) == (102 + 3, 0)
    engine.add(second)  # the first one has ended; its pages are still there
    events = run(engine)
    assert (engine.counters.computed, engine.counters.found) == (105 + 101 - 96 + 3, 96)
    assert gather(events)[1] == naive(LONG, second)


def test_what_samples_and_prompts_that_came_together_begin_with_is_computed_once() -> None:
    engine = Engine(LONG, page_size=8, chunk_size=64)
    common = long_prompt(100)
    requests = [Request([*common, 1], SamplingSettings(), 3, 0, 4), Request([*common, 2], SamplingSettings(), 3, 1, 2)]
    for request in requests:
        engine.add(request)
    results = gather(run(engine))
    assert engine.counters.computed == 101 + 5 * (101 - 96) + 6 * 2
    assert [results[0], results[1]] == [naive(LONG, request) for request in requests]


def test_what_a_text_wrote_is_found_by_the_next_turn() -> None:
    engine = Engine(LONG, page_size=8)
    [turn] = generate_batched(engine, Request(long_prompt(30), GREEDY, 35))
    before = engine.counters.computed
    engine.add(Request([*long_prompt(30), *turn.token_ids, 7], GREEDY, 1))
    run(engine)
    assert engine.counters.computed - before == 66 - 64


def test_with_an_8_bit_cache_texts_are_about_as_likely() -> None:
    request = Request(long_prompt(60), SamplingSettings(0.0), 5, prompt_logprobs=0)
    exact, close = (
        [each.logprob for each in run_one(Engine(LONG, page_size=8, int8_cache=on), request) if each is not None]
        for on in (False, True)
    )
    assert exact != close
    assert close == pytest.approx(exact, abs=0.3)
    assert sum(close) == pytest.approx(sum(exact), rel=0.01)


def run_one(engine: Engine, request: Request) -> list[TokenLogprobs | None]:
    engine.add(request)
    [told] = [event.prompt_logprobs for event in run(engine) if event.prompt_logprobs is not None]
    return told


def compiled(model: TransformerModel) -> KernelRunner:
    pytest.importorskip("numba")
    from sheepop.generation.fast_decoding import FastDecoder

    return KernelRunner(model, FastDecoder(model))


@pytest.mark.parametrize("runner", [ModelRunner, compiled])
@pytest.mark.parametrize(("sinks", "sink_pages"), [(0, 0), (3, 1), (6, 2)])
def test_with_a_sliding_window_a_long_text_takes_few_pages(
    sinks: int, sink_pages: int, runner: Callable[[TransformerModel], Runner]
) -> None:
    model = tiny(max_seq_len=200, sliding_window=9, attention_sinks=sinks)
    engine = Engine(model, page_size=4, chunk_size=8, runner=runner(model))
    request, free = Request(long_prompt(90), SamplingSettings(), 80), []
    engine.add(request)
    events = []
    while engine.has_work:
        events += engine.step()
        free.append(engine.cache.num_free)
    assert gather(events)[0] == naive(model, request)
    # 8 tokens of the chunk and 8 before them, which begin anywhere.
    assert engine.cache.num_pages - min(free) <= 5 + sink_pages
    assert engine.cache.num_free == engine.cache.num_pages


def test_the_youngest_gives_way_and_gets_the_same_tokens_later() -> None:
    engine = Engine(LONG, page_size=4, num_pages=12, max_batch_size=3)
    requests = [Request(long_prompt(8, seed), SamplingSettings(), 38, seed) for seed in range(3)]
    for request in requests:
        engine.add(request)
    results = gather(events := run(engine))
    assert engine.counters.preempted > 0
    assert [results[number] for number in range(3)] == [naive(LONG, request) for request in requests]
    ends = [event.request_id for event in events if event.finish_reason]
    assert ends == sorted(ends)


def test_no_more_than_the_batch_size_are_written_at_a_time() -> None:
    spy = Spy(CLASSIC)
    engine = Engine(CLASSIC, max_batch_size=3, runner=spy)
    for seed in range(7):
        engine.add(Request([seed], SamplingSettings(), 3 + seed))
    run(engine)
    assert max(map(len, spy.steps)) == 3


def test_logprobs_are_those_of_a_whole_forward_pass() -> None:
    model, prompt = CLASSIC.eval(), [3, 1, 4, 1, 5]
    engine = Engine(model, page_size=2, chunk_size=2)
    chosen = SamplingSettings(0.7, top_k=3, repetition_penalty=1.5)
    for request in (Request(prompt, chosen, 6, logprobs=4, prompt_logprobs=2), Request(prompt, chosen, 6, logprobs=0)):
        engine.add(request)
        events = run(engine)
        tokens = [event.token_id for event in events if event.token_id is not None]
        with torch.no_grad():
            expected = model(torch.tensor([prompt + tokens]))[0].log_softmax(-1)
        for place, event in enumerate(events, start=len(prompt) - 1):
            assert event.logprobs is not None
            assert event.logprobs.logprob == pytest.approx(float(expected[place, event.token_id]), abs=1e-5)
            top = expected[place].topk(request.logprobs or 0)
            assert [token_id for token_id, _ in event.logprobs.top] == top.indices.tolist()
            assert [logprob for _, logprob in event.logprobs.top] == pytest.approx(top.values.tolist(), abs=1e-5)
        told = events[0].prompt_logprobs
        assert all(event.prompt_logprobs is None for event in events[1:])
        if request.prompt_logprobs is None:
            assert told is None
            continue
        assert told is not None
        assert told[0] is None
        for place, each in enumerate(told[1:]):
            assert each is not None
            assert each.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-5)
            assert [token_id for token_id, _ in each.top] == expected[place].topk(2).indices.tolist()


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(1, 30),
    chunk_size=st.integers(1, 9),
    page_size=st.integers(1, 5),
    max_new_tokens=st.sampled_from([0, 1, 5]),
    others=st.integers(0, 3),
)
def test_prompt_logprobs_alone_however_the_prompt_is_read(
    length: int, chunk_size: int, page_size: int, max_new_tokens: int, others: int
) -> None:
    model, prompt = CLASSIC.eval(), long_prompt(length)
    engine = Engine(model, page_size=page_size, chunk_size=chunk_size, num_pages=-(-CONTEXT // page_size) + 2)
    for seed in range(others):  # older ones, which make it give way now and then
        engine.add(Request(prompt[: 5 + seed], SamplingSettings(), 12, seed))
    number = engine.add(Request(prompt, GREEDY, max_new_tokens, num_samples=2, prompt_logprobs=0))
    events = [event for event in run(engine) if event.request_id == number]
    first = next(event for event in events if event.sample == 0)
    assert all(event.prompt_logprobs is None for event in events if event is not first)
    told = first.prompt_logprobs
    assert told is not None
    assert len(told) == length
    start = context_start(length, CONTEXT)  # what a prompt beyond the context has before it is not seen
    with torch.no_grad():
        expected = model(torch.tensor([prompt[start:]]))[0].log_softmax(-1)
    assert all(each is None for each in told[: start + 1])
    for place, each in enumerate(told[start + 1 :]):
        assert each is not None
        assert each.logprob == pytest.approx(float(expected[place, prompt[start + 1 + place]]), abs=1e-4)
    if max_new_tokens == 0:
        assert [(event.token_id, event.finish_reason) for event in events] == [(None, "length")] * 2


def test_a_bias_makes_tokens_certain_or_impossible() -> None:
    engine = Engine(CLASSIC)
    [sample] = generate_batched(engine, Request([3], SamplingSettings(), 8, logit_bias={5: 100}))
    assert sample.token_ids == [5] * 8
    [plain] = generate_batched(engine, Request([3], GREEDY, 8))
    [without] = generate_batched(engine, Request([3], GREEDY, 8, logit_bias={plain.token_ids[0]: -100.0}))
    assert plain.token_ids[0] not in without.token_ids


def test_stop_tokens_are_not_part_of_the_text_and_stop_sequences_are() -> None:
    engine = Engine(CLASSIC)
    [endless] = generate_batched(engine, Request([3], SamplingSettings(), 30, seed=2))
    token, pair = endless.token_ids[4], endless.token_ids[6:8]
    [ended] = generate_batched(engine, Request([3], SamplingSettings(), 30, seed=2, stop_ids=[END, token]))
    cut = min(endless.token_ids.index(each) for each in (END, token) if each in endless.token_ids)
    assert ended == Continuation(endless.token_ids[:cut], "stop")
    [ended] = generate_batched(engine, Request([3], SamplingSettings(), 30, seed=2, stop_sequences=[[99], pair]))
    assert ended.finish_reason == "stop"
    assert ended.token_ids == endless.token_ids[: len(ended.token_ids)]
    assert ended.token_ids[-2:] == pair


class Alternating:
    """Lets even and odd tokens take turns, and ends after five."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def allowed(self, token_ids: Sequence[int]) -> Tensor | None:
        assert list(token_ids) == self.accepted
        if len(token_ids) == 5:
            return torch.zeros(VOCABULARY, dtype=torch.bool)
        if not token_ids:
            return None
        return (torch.arange(VOCABULARY) + token_ids[-1]) % 2 == 1

    def accept(self, token_id: int) -> None:
        self.accepted.append(token_id)


@pytest.mark.parametrize("num_guesses", [0, 3])
def test_a_constraint_says_what_may_come_and_when_it_ends(num_guesses: int) -> None:
    engine = Engine(CLASSIC, speculator=LookUp(num_guesses) if num_guesses else None)
    samples = generate_batched(engine, Request([3, 4, 3, 4, 3], SamplingSettings(), 9, 1, 3, constrain=Alternating))
    for sample in samples:
        assert sample.finish_reason == "stop"
        assert len(sample.token_ids) == 5
        assert all((one + other) % 2 for one, other in zip(sample.token_ids, sample.token_ids[1:], strict=False))


def test_cancelling_frees_pages_at_any_time_and_leaves_the_others_alone() -> None:
    engine = Engine(LONG, page_size=4, max_batch_size=3, chunk_size=16, speculator=LookUp(2))
    kept = Request(long_prompt(10), SamplingSettings(), 30, seed=5, num_samples=2)
    running, waiting = (engine.add(Request(long_prompt(60, seed), SamplingSettings(), 30)) for seed in (1, 2))
    reading = engine.add(Request(long_prompt(80), SamplingSettings(), 30))
    nothing = engine.add(Request([3], GREEDY, 0))
    number = engine.add(kept)
    engine.cancel(nothing)
    events = engine.step()
    for gone in (running, waiting, reading, reading, 12345):
        engine.cancel(gone)
    events += run(engine)
    assert {event.request_id for event in events if event.finish_reason} == {number}
    assert gather([event for event in events if event.request_id == number])[number] == naive(LONG, kept)


def test_one_sample_can_be_cancelled() -> None:
    engine = Engine(CLASSIC)
    number = engine.add(Request([3], SamplingSettings(), 6, num_samples=2))
    engine.step()
    engine.cancel(number, 1)
    assert {event.sample for event in run(engine)} == {0}


def test_on_token_ends_a_sample() -> None:
    seen: list[int] = []

    def on_token(sample: int, token_id: int) -> bool:
        seen.append(sample)
        return sample == 1

    first, second = generate_batched(Engine(CLASSIC), Request([3], SamplingSettings(), 3, num_samples=2), on_token)
    assert seen == [0, 1, 0, 0]
    assert (len(first.token_ids), len(second.token_ids), second.finish_reason) == (3, 1, "stop")


def test_training_goes_on_undisturbed() -> None:
    CLASSIC.train()
    before = torch.get_rng_state()
    generate_batched(Engine(CLASSIC), Request([3], SamplingSettings(), 4))
    assert CLASSIC.training
    assert torch.equal(torch.get_rng_state(), before)
    CLASSIC(torch.tensor([[1, 2, 3]])).sum().backward()


def test_a_full_context_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(CLASSIC)
    generate_batched(engine, Request([3], GREEDY, 13))
    assert capsys.readouterr().err == ""
    generate_batched(engine, Request([3] * 40, GREEDY, 30, num_samples=2))
    assert capsys.readouterr().err.count(f"context of {CONTEXT} tokens is full") == 1


def test_scores_that_are_not_finite_are_said() -> None:
    model = tiny()
    with torch.no_grad():
        model.final_norm.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        generate_batched(Engine(model), Request([3], GREEDY, 4))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": -1}, "'max_new_tokens' is -1"),
        ({"num_samples": 0}, "'num_samples' is 0"),
        ({"settings": SamplingSettings(top_p=1.5)}, "'top_p' is 1.5"),
        ({"prompt_ids": []}, "prompt is empty"),
        ({"prompt_ids": [3, 31]}, "token 31, but the model knows only 31"),
        ({"logprobs": -1}, "'logprobs' is -1"),
        ({"prompt_logprobs": 32}, "'prompt_logprobs' is 32"),
        ({"stop_sequences": [[1], []]}, "'stop_sequences' is empty"),
        ({"logit_bias": {31: 1.0}}, "'logit_bias' has 1.0 for the token 31"),
        ({"logit_bias": {3: torch.inf}}, "'logit_bias' has inf"),
        ({"max_new_tokens": 9}, r"cache of 11 tokens \(6\.75 KiB\), but there is room for 10 \(5\.62 KiB\)"),
    ],
)
def test_requests_that_cannot_be_are_refused_at_once(changes: dict[str, object], message: str) -> None:
    engine = Engine(CLASSIC, num_pages=5, page_size=2)
    request = {"prompt_ids": [1, 2, 3], "settings": GREEDY, "max_new_tokens": 8} | changes
    with pytest.raises((ConfigError, CheckpointError), match=message):
        engine.add(Request(**request))  # type: ignore[arg-type]
    assert not engine.has_work
    engine.add(Request([1, 2, 3], GREEDY, 8))
    assert gather(run(engine))[0] == naive(CLASSIC, Request([1, 2, 3], GREEDY, 8))


@pytest.mark.parametrize("name", ["max_batch_size", "page_size", "chunk_size", "num_pages"])
def test_sizes_that_cannot_be_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"'{name}' is 0"):
        Engine(CLASSIC, **{name: 0})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_request_gets_the_tokens_that_it_gets_alone_on_a_gpu(temperature: float) -> None:
    model = tiny().cuda()
    engine = Engine(model, page_size=3, num_pages=12, chunk_size=4, speculator=LookUp(2))
    requests = [Request(list(range(length)), SamplingSettings(temperature), 40, length, 2) for length in (1, 5, 14, 30)]
    for request in requests:
        engine.add(request)
    results = gather(run(engine))
    assert [results[number] for number in range(len(requests))] == [naive(model, request) for request in requests]
