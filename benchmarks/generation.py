"""Cached against naive generation: tokens per second, and whether the tokens are the same.

python benchmarks/generation.py --checkpoint runs/demo
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from common import alternate, median, show

from sheepop.generation.engine import generate_cached
from sheepop.generation.generate import Continuation, generate_naive
from sheepop.generation.sampling import SamplingSettings
from sheepop.generation.terminal import load_model_and_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", required=True, type=Path)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model, tokenizer = load_model_and_tokenizer(options.checkpoint, "cpu")
    rows: list[dict[str, object]] = []
    for temperature in (0.0, 1.0):
        outputs: dict[str, list[int]] = {}

        def timed(
            name: str,
            generate: Callable[..., list[Continuation]],
            temperature: float = temperature,
            outputs: dict[str, list[int]] = outputs,
        ) -> Callable[[], float]:
            def measure() -> float:
                started = time.perf_counter()
                continuations = generate(
                    model,
                    [tokenizer.end_of_text_id],
                    SamplingSettings(temperature=temperature),
                    max_new_tokens=options.tokens,
                    seed=7,
                    end_of_text_id=None,  # never stop early
                )
                outputs[name] = continuations[0].token_ids
                return time.perf_counter() - started

            return measure

        results = alternate(
            {"naive": timed("naive", generate_naive), "cached": timed("cached", generate_cached)}, options.rounds
        )
        naive, cached = median(results["naive"]), median(results["cached"])
        rows.append(
            {
                "temperature": temperature,
                "naive tokens/s": options.tokens / naive,
                "cached tokens/s": options.tokens / cached,
                "ratio": naive / cached,
                "same tokens": outputs["naive"] == outputs["cached"],
            }
        )
    show(f"{options.tokens} tokens, context {model.config.max_seq_len}", rows)


if __name__ == "__main__":
    main()
