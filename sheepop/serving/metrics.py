"""What Prometheus is told about a server."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sheepop.generation.batching import Engine

FIRST_TOKEN_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class Metrics:
    """Counts and times of one server, in a registry of its own.

    Attributes:
        requests: by endpoint and HTTP status; a stream that broke off counts as 200, which its client was told.
        cancelled: requests whose client went away.
        tokens_in, tokens_out: of prompts, and drawn.
        first_token_seconds: from a request to its first token, time in the queue included.
        token_seconds: from a token of a text to its next.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "sheepop_requests", "Requests by endpoint and status.", ("endpoint", "status"), registry=registry
        )
        self.cancelled = Counter("sheepop_cancelled_requests", "Requests whose client went away.", registry=registry)
        self.tokens_in = Counter("sheepop_prompt_tokens", "Tokens of prompts that were taken on.", registry=registry)
        self.tokens_out = Counter("sheepop_completion_tokens", "Tokens that were drawn.", registry=registry)
        self.first_token_seconds = Histogram(
            "sheepop_time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=FIRST_TOKEN_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "sheepop_time_per_token_seconds",
            "From a token of a text to its next.",
            buckets=TOKEN_SECONDS,
            registry=registry,
        )

    def watch(self, engine: Engine) -> None:
        """Tell what the engine counts itself, as it stands when somebody asks."""
        self._registry.register(EngineCollector(engine))

    def page(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)


class EngineCollector(Collector):
    """Reads what an engine knows of itself."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the numbers as they stand."""
        engine, counters = self._engine, self._engine.counters
        yield GaugeMetricFamily("sheepop_running_samples", "Texts that are being written.", engine.num_running)
        yield GaugeMetricFamily("sheepop_waiting_samples", "Texts that wait for a place.", engine.num_waiting)
        for name, text, value in (
            ("prefix_cache_hit_tokens", "Tokens of prompts that were found in the cache.", counters.found),
            ("computed_tokens", "Tokens that went through the model.", counters.computed),
            ("preemptions", "How often a text gave its memory back for an older one.", counters.preempted),
        ):
            yield CounterMetricFamily(f"sheepop_{name}", text, value)
