"""Attention with its gradients on a CPU: by compiled kernels, in blocks, and by PyTorch's fused kernel, in turn.

python benchmarks/attention.py
"""

import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "30000")  # before torch is imported, see `wait_politely`

import torch
from common import alternate, median, show
from torch import Tensor
from torch.nn import functional as F

from sheepop.models.block_attention import block_attention
from sheepop.models.kernel_attention import kernel_attention

SIZES = ((12, 64, 4, 32), (12, 128, 3, 32), (13, 256, 3, 32), (12, 256, 4, 64), (16, 256, 6, 64), (3, 1024, 4, 64))
ROUNDS = 7
WAYS: dict[str, Callable[..., Tensor]] = {
    "kernels": kernel_attention,
    "kernels, dropout": partial(kernel_attention, dropout=0.1),
    "kernels, window": partial(kernel_attention, window=128),
    "blocks": block_attention,
    "blocks, dropout": partial(block_attention, dropout=0.1),
    "blocks, window": partial(block_attention, window=128),
    "fused": partial(F.scaled_dot_product_attention, is_causal=True),
}


def seconds(attend: Callable[..., Tensor], parts: list[Tensor], gradient: Tensor) -> Callable[[], float]:
    """Return what learns once and says how long it took."""

    def measure() -> float:
        started = time.perf_counter()
        torch.autograd.grad(attend(*parts), parts, gradient)
        return time.perf_counter() - started

    return measure


def main() -> None:
    rows: list[dict[str, object]] = []
    for batch, context, heads, width in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            *parts, gradient = (
                torch.randn(batch, context, heads, width, dtype=dtype).transpose(1, 2) for _ in range(4)
            )
            parts = [part.requires_grad_() for part in parts]
            measures = {way: seconds(attend, parts, gradient) for way, attend in WAYS.items()}
            for measure in measures.values():
                measure()  # loads and compiles
            times = alternate(measures, ROUNDS)
            row: dict[str, object] = {"tokens": f"{batch} x {context}", "heads": f"{heads} of {width}"}
            row |= {"type": str(dtype).removeprefix("torch.")}
            rows.append(row | {way: 1000 * median(times[way]) for way in WAYS})
    show("milliseconds of a layer's attention, forward and backward", rows)


if __name__ == "__main__":
    main()
