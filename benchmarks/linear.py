"""Matrix products of a linear layer, forward and backward: PyTorch's stock path (MKL) against oneDNN.

python benchmarks/linear.py
"""

import time
from collections.abc import Callable

import torch
from common import alternate, median, show

from sheepop.models.linear import onednn_product, weight_gradient_by_blas, weight_gradient_by_onednn

SIZES = ((128, 128), (128, 512), (512, 128), (128, 4096), (384, 1536))
ROWS = (16, 64, 256, 1024, 4096)


def seconds(product: Callable[[], torch.Tensor]) -> Callable[[], float]:
    """Return what runs the product once and says how long it took."""

    def measure() -> float:
        started = time.perf_counter()
        product()
        return time.perf_counter() - started

    return measure


def main() -> None:
    rows: list[dict[str, object]] = []
    for inputs, outputs in SIZES:
        for count in ROWS:
            hidden, weight, gradient = (
                torch.randn(count, inputs),
                torch.randn(outputs, inputs),
                torch.randn(count, outputs),
            )
            ways = {
                "forward": (lambda h=hidden, w=weight: h @ w.t(), lambda h=hidden, w=weight: onednn_product(h, w)),
                "input gradient": (
                    lambda g=gradient, w=weight: g @ w,
                    lambda g=gradient, w=weight: onednn_product(g, w.t()),
                ),
                "weight gradient": (
                    lambda g=gradient, h=hidden: weight_gradient_by_blas(h, g),
                    lambda g=gradient, h=hidden: weight_gradient_by_onednn(h, g),
                ),
            }
            row: dict[str, object] = {"inputs": inputs, "outputs": outputs, "rows": count}
            for name, (stock, onednn) in ways.items():
                times = alternate({"stock": seconds(stock), "oneDNN": seconds(onednn)}, 40)
                row[f"{name}, stock/oneDNN"] = median(times["stock"]) / median(times["oneDNN"])
            rows.append(row)
    show("time of the stock path over oneDNN's", rows)


if __name__ == "__main__":
    main()
