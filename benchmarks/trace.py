"""What looking inside costs: a whole trace, and taps that nobody listens to.

    python benchmarks/trace.py

A trace of 128 tokens of a model of some 12 M parameters is timed beside its plain forward pass. What silent taps cost
is too little to be seen beside a step's own spread, so it is counted: the number of taps that a pass goes by, times
the time of one call, over the time of the pass (training step, and one token with a cache without compiled kernels).
"""

import timeit
from functools import partial

import torch
from common import alternate, median, show

from sheepop.config import ModelConfig
from sheepop.learn.trace import point_names, trace
from sheepop.models.kv_cache import KVCache
from sheepop.models.sizing import count_parameters
from sheepop.models.taps import untapped
from sheepop.models.transformer import TransformerModel, inference

TOKENS, ROUNDS = 128, 9


def main() -> None:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=4096, d_model=320, num_layers=9, num_heads=5, d_ff=864, max_seq_len=256, dropout=0.0,
        activation="swiglu", norm="rmsnorm", bias=False,
    )  # fmt: skip
    model = TransformerModel(config).train()
    token_ids = torch.randint(config.vocab_size, (TOKENS,))
    cache = KVCache(config, 1, config.max_seq_len)

    def plain() -> None:
        with inference(model):
            model(token_ids[None])

    def decode() -> None:
        cache.reset()
        with inference(model):
            model(token_ids[None, :1], cache=cache)

    def train() -> None:
        model(token_ids.repeat(4, 1), targets=token_ids.repeat(4, 1)).backward()
        model.zero_grad(set_to_none=True)

    works = {"forward": plain, "trace": lambda: trace(model, token_ids), "decode one token": decode, "train": train}
    contestants = {name: partial(timeit.timeit, work, number=1) for name, work in works.items()}
    times = alternate(contestants, ROUNDS + 1)
    seconds = {name: median(found[1:]) for name, found in times.items()}  # the first round warms up
    tensor = torch.zeros(1)
    call = timeit.timeit(lambda: untapped("blocks", tensor), number=1_000_000) / 1e6
    taps = len(point_names(model))
    rows: list[dict[str, object]] = [
        {
            "what": name,
            "milliseconds": 1e3 * seconds[name],
            "silent taps, %": "" if name == "trace" else 100 * taps * call / seconds[name],
        }
        for name in works
    ]
    show(f"{count_parameters(config).total / 1e6:.1f} M parameters, {TOKENS} tokens, {taps} points", rows)


if __name__ == "__main__":
    main()
