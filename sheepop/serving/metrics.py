"""What Prometheus is told about a server."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

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
        now: tuple[tuple[str, str, Callable[[], float]], ...] = (
            ("sheepop_running_samples", "Texts that are being written.", lambda: engine.num_running),
            ("sheepop_waiting_samples", "Texts that wait for a place.", lambda: engine.num_waiting),
            (
                "sheepop_prefix_cache_hit_tokens_total",
                "Tokens of prompts that were found in the cache.",
                lambda: engine.counters.found,
            ),
            ("sheepop_computed_tokens_total", "Tokens that went through the model.", lambda: engine.counters.computed),
            (
                "sheepop_preemptions_total",
                "How often a text gave its memory back for an older one.",
                lambda: engine.counters.preempted,
            ),
        )
        for name, text, read in now:
            Gauge(name, text, registry=self._registry).set_function(read)

    def page(self) -> bytes:
        """Return all of it in Prometheus' text format."""
        return generate_latest(self._registry)
