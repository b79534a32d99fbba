"""The head's loss with its gradients on a CPU, and what it copies: by compiled kernels and by operators, in turn.

python benchmarks/head.py
"""

import os
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch is imported, see `wait_politely`

import torch
from common import alternate, median, show
from torch import Tensor

from sheepop.models.copying import copy_sums, following
from sheepop.models.head_loss import summed_head_loss
from sheepop.utils.runtime import keep_freed_memory

# Tokens, entries and width of a head; texts, tokens and width of copies.
HEADS = (
    (4096, 256, 128),
    (4096, 1024, 128),
    (4096, 4096, 96),
    (4096, 4096, 128),
    (4096, 8192, 256),
    (1024, 50304, 512),
)
COPIES = ((16, 256, 64), (4, 1024, 64))
ROUNDS = 9


def in_turn(learn: Callable[[bool], object]) -> tuple[float, float]:
    """Return the median milliseconds by kernels and by operators."""

    def measure(by_kernels: bool) -> Callable[[], float]:
        def run() -> float:
            started = time.perf_counter()
            learn(by_kernels)
            return time.perf_counter() - started

        run()  # loads and compiles
        return run

    times = alternate({"kernels": measure(True), "operators": measure(False)}, ROUNDS)
    return 1000 * median(times["kernels"]), 1000 * median(times["operators"])


def time_head(tokens: int, entries: int, width: int) -> tuple[float, float]:
    hidden = torch.randn(1, tokens, width, requires_grad=True)
    weight = (0.05 * torch.randn(entries, width)).requires_grad_()
    targets = torch.randint(0, entries, (1, tokens))

    def learn(by_kernels: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(summed_head_loss(hidden, weight, targets, by_kernels=by_kernels), (hidden, weight))

    return in_turn(learn)


def time_copies(texts: int, tokens: int, width: int) -> tuple[float, float]:
    query, key = (torch.randn(texts, tokens, width, requires_grad=True) for _ in range(2))
    token_ids = torch.randint(0, 4096, (texts, tokens))
    gradient = torch.randn(2, texts, tokens)

    def learn(by_kernels: bool) -> tuple[Tensor, ...]:
        sums = copy_sums(query, key, token_ids, following(token_ids), by_kernels=by_kernels)
        return torch.autograd.grad(sums, (query, key), gradient)

    return in_turn(learn)


def main() -> None:
    keep_freed_memory()  # as a run does
    rows: list[dict[str, object]] = []
    for what, sizes, measure in (("head", HEADS, time_head), ("copies", COPIES, time_copies)):
        for size in sizes:
            by_kernels, by_operators = measure(*size)
            row: dict[str, object] = {"what": what, "size": " x ".join(map(str, size)), "kernels": by_kernels}
            rows.append(row | {"operators": by_operators, "share": by_kernels / by_operators})
    show("milliseconds forward and backward, fp32", rows)


if __name__ == "__main__":
    main()
