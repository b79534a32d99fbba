"""Many clients and one engine, in this process."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from torch import Tensor

from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.batching import Engine
from sheepop.generation.completion import complete, prompt_tokens
from sheepop.generation.request import Request
from sheepop.generation.runner import Chunk, ModelRunner
from sheepop.generation.sampling import SamplingSettings
from sheepop.models.paged_cache import PagedCache
from sheepop.models.transformer import TransformerModel
from sheepop.serving.errors import ApiError
from sheepop.serving.metrics import Metrics
from sheepop.serving.scheduler import Job, Scheduler

Pair = tuple[TransformerModel, Tokenizer]


class Stumbling(ModelRunner):
    """Fails once when it meets a token."""

    stumbles_at: int | None = None

    def __call__(self, chunks: Sequence[Chunk], cache: PagedCache) -> list[Tensor]:
        if any(self.stumbles_at in chunk.token_ids for chunk in chunks):
            self.stumbles_at = None
            raise RuntimeError("a stone")
        return super().__call__(chunks, cache)


@asynccontextmanager
async def scheduler(pair: Pair, *, max_waiting: int = 2) -> AsyncIterator[tuple[Scheduler, Engine, Stumbling]]:
    model, tokenizer = pair
    runner = Stumbling(model)
    engine = Engine(model, max_batch_size=2, runner=runner)
    running = Scheduler(engine, tokenizer, max_waiting=max_waiting, metrics=Metrics())
    computing = asyncio.create_task(asyncio.to_thread(running.run))
    try:
        yield running, engine, runner
    finally:
        await asyncio.to_thread(running.close)
        await computing


def request(tokenizer: Tokenizer, text: str, tokens: int, **options: Any) -> Request:
    end = options.pop("end", tokenizer.end_of_text_id)
    return Request(prompt_tokens(tokenizer, text), SamplingSettings(), tokens, end_of_text_id=end, **options)


async def text_of(job: Job) -> str:
    return "".join([piece.text async for pieces in job.pieces() for piece in pieces])


async def until_idle(running: Scheduler, engine: Engine) -> None:
    async with asyncio.timeout(60):
        while not running.is_idle or engine.has_work:
            await asyncio.sleep(0.01)


def test_a_job_is_what_complete_writes(pair: Pair) -> None:
    async def main() -> list[str]:
        async with scheduler(pair) as (running, _, _):
            jobs = [running.submit([request(pair[1], text, 20, seed=3)], ["s"]) for text in ("the", "a dog", "see")]
            return list(await asyncio.gather(*map(text_of, jobs)))

    expected = [
        complete(*pair, text, SamplingSettings(), max_new_tokens=20, seed=3, stop=["s"]).completions[0].text
        for text in ("the", "a dog", "see")
    ]
    assert asyncio.run(main()) == expected


def test_a_full_queue_and_the_place_of_who_goes(pair: Pair) -> None:
    async def main() -> None:
        async with scheduler(pair) as (running, engine, _):
            with pytest.raises(ApiError, match="holds 4 at the most") as refused:
                running.submit([request(pair[1], "the", 5, num_samples=5)], [])
            assert refused.value.status == 400
            endless = [running.submit([request(pair[1], "the", 10**6, end=None)], []) for _ in range(4)]
            with pytest.raises(ApiError, match="is busy") as refused:
                running.submit([request(pair[1], "the", 5)], [])
            assert refused.value.status == 429
            for job in endless:
                running.cancel(job)
                running.cancel(job)  # twice is once
            await until_idle(running, engine)
            assert engine.cache.num_free == engine.cache.num_pages
            assert len(await text_of(running.submit([request(pair[1], "the", 5, end=None, num_samples=4)], [])))
            for job in endless:
                with pytest.raises(ApiError, match="went away"):
                    await text_of(job)

    asyncio.run(main())


def test_a_step_that_fails_ends_who_waits_and_nobody_else(pair: Pair, capsys: Any) -> None:
    async def main() -> None:
        async with scheduler(pair) as (running, engine, runner):
            runner.stumbles_at = pair[1].encode("羊")[0]
            job = running.submit([request(pair[1], "羊", 5)], [])
            with pytest.raises(ApiError, match="a stone") as failed:
                await text_of(job)
            assert failed.value.status == 500
            await until_idle(running, engine)
            assert len(await text_of(running.submit([request(pair[1], "羊", 5, end=None)], [])))

    asyncio.run(main())
    assert "RuntimeError" in capsys.readouterr().err


def test_the_end(pair: Pair) -> None:
    async def main() -> None:
        async with scheduler(pair) as (running, _, _):
            job = running.submit([request(pair[1], "the", 10**6, end=None)], [])
            running.drain()
            assert running.is_draining
            with pytest.raises(ApiError, match="shutting down") as refused:
                running.submit([request(pair[1], "the", 5)], [])
            assert refused.value.status == 503
            await asyncio.to_thread(running.close)
            with pytest.raises(ApiError, match="before this text was finished"):
                await text_of(job)
            assert running.is_idle

    asyncio.run(main())
