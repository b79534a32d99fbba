"""The linear layer, through the faster of the two matrix libraries that PyTorch carries for the CPU.

PyTorch sends fp32 products to MKL, which holds back on processors that its maker did not build. For the same product
the oneDNN library beside it takes up to a third less time on an AMD EPYC with AVX2 and less than half on one with whole
AVX-512 units (Zen 5), but up to a half more on an Intel Xeon (`benchmarks/linear.py`). Where an AMD processor shows
AVX2 alone the two may be equal, and MKL the faster for gradients, so that a run measures these
(`training/gradient_libraries.py`).
"""

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheepop.models.fp8 import fp8_linear

# oneDNN's calls cost some 20 microseconds more, which pays from about these sizes on (`benchmarks/linear.py`).
HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
LEAST_PRODUCTS = 2**22 if HAS_AVX512 else 2**23  # multiplications of the forward pass
MOST_AT_ONCE = 2**22  # numbers of a result that is copied
LEAST_WEIGHTS = 2**14 if HAS_AVX512 else 2**18  # entries of the weight, for the gradient that has its shape


class Linear(nn.Linear):
    """PyTorch's linear layer, without its own initialisation: the model draws all its weights in one place.

    With `learns_in_fp8` its products are made in 8 bits where it learns (`fp8.py`); evaluation and generation never do.
    Where oneDNN makes its products, two switches say whether it makes the gradients, too: of what the layer reads, and
    of a large weight.
    """

    learns_in_fp8 = False
    hidden_gradient_by_onednn = True
    weight_gradient_by_onednn = True

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        if self.learns_in_fp8 and self.training and torch.is_grad_enabled():
            return fp8_linear(hidden, self.weight, self.bias)
        by_onednn = self.hidden_gradient_by_onednn, self.weight_gradient_by_onednn
        return linear(hidden, self.weight, self.bias, gradients_by_onednn=by_onednn)


def linear(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gradients_by_onednn: tuple[bool, bool] = (True, True),
) -> Tensor:
    """Return `torch.nn.functional.linear(hidden, weight, bias)` within rounding: (..., I) to (..., O)."""
    if prefers_onednn(hidden, weight):
        of_hidden, of_weight = gradients_by_onednn
        of_weight = of_weight and weight.numel() >= LEAST_WEIGHTS
        return OneDNNLinear.apply(hidden, weight, bias, of_hidden, of_weight)  # type: ignore[no-untyped-call, no-any-return]
    return F.linear(hidden, weight, bias)


def prefers_onednn(hidden: Tensor, weight: Tensor) -> bool:
    """Say whether oneDNN is faster: fp32 on a CPU that is not Intel's, a large product, no autocast.

    Compiled code goes through here too: a question that PyTorch's compiler does not follow would cut it into pieces.
    """
    return (
        hidden.device.type == "cpu"
        and not IS_INTEL
        and hidden.dtype == weight.dtype == torch.float32
        and (hidden.numel() // hidden.shape[-1]) * weight.numel() >= LEAST_PRODUCTS
        and HAS_ONEDNN
        and not torch.is_autocast_enabled("cpu")
    )


def is_intel() -> bool:
    """Say whether Intel built this processor."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return "Intel" in platform.processor()


IS_INTEL = is_intel()


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left (N, I) times the transpose of right (O, I), without a gradient; in `out` if given."""
    if not prefers_onednn(left, right):
        return torch.mm(left, right.t(), out=out)
    if out is None:
        return onednn_product(left, right)
    for part in parts_of(out.t()):
        out[:, part] = onednn_product(left, right[part])
    return out


def add_weight_gradient(total: Tensor, inputs: Tensor, gradient: Tensor, *, is_first: bool) -> None:
    """Add to `total` (O, I) the gradient of a weight for inputs (N, I) and the gradient (N, O) of what came out.

    The first one replaces what was there.
    """
    by_onednn = prefers_onednn(inputs.t(), gradient.t()) and total.numel() <= MOST_AT_ONCE
    if inputs.dtype == total.dtype and not by_onednn:
        torch.addmm(total, gradient.t(), inputs, beta=0.0 if is_first else 1.0, out=total)
        return
    way = weight_gradient_by_onednn if by_onednn else weight_gradient_by_blas
    for part in parts_of(total):
        made = way(inputs, gradient[:, part])
        if is_first:
            total[part] = made
        else:
            total[part] += made


def parts_of(result: Tensor) -> Iterator[slice]:
    """Yield slices of the rows of a product, which oneDNN returns in memory of its own, of at most `MOST_AT_ONCE`."""
    rows = max(1, MOST_AT_ONCE // result.shape[1])
    return (slice(start, start + rows) for start in range(0, len(result), rows))


def onednn_product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return left (..., I) times the transpose of right (O, I), plus a bias (O,)."""
    right = right if is_dense(right) else right.contiguous()
    return (opaque_product if torch.compiler.is_compiling() else eager_product)(left, right, bias)


def is_dense(matrix: Tensor) -> bool:
    """Say whether rows or columns follow each other without gaps.

    oneDNN has fast code for such a right factor alone; another takes a thousand times as long.
    """
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def eager_product(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    """Do what `onednn_product` does where nothing is compiled."""
    return torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")  # type: ignore[no-any-return]


# PyTorch's compiler takes oneDNN's own operator only with weights that never change.
opaque_product = torch.library.custom_op("sheepop::opaque_product", eager_product, mutates_args=())


@opaque_product.register_fake
def shape_of_product(left: Tensor, right: Tensor, _bias: Tensor | None) -> Tensor:
    """Return what has the product's shape and type, for the compiler."""
    return left.new_empty(*left.shape[:-1], right.shape[0])


def weight_gradient_by_onednn(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient (O, I) of a weight for inputs (N, I) and the gradient (N, O) of what came out."""
    # The left one is copied, turned, which takes a tenth of the time; so would a right one be that has gaps.
    if inputs.shape[1] < gradient.shape[1] and is_dense(gradient):
        return onednn_product(turned(inputs), gradient.t()).t()
    return onednn_product(turned(gradient), inputs.t())


def turned(rows: Tensor) -> Tensor:
    """Return the transpose of rows, copied by the compiler where it compiles: in the pass that makes them, say.

    Elsewhere the copy is left to the product, which makes it by the same operator.
    """
    return rows.t().contiguous() if torch.compiler.is_compiling() else rows.t()


def hidden_gradient_by_onednn(weight: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient (N, I) of what a layer read, for its weight (O, I) and that of what came out, (N, O)."""
    return onednn_product(gradient, weight.t())


def hidden_gradient_by_blas(weight: Tensor, gradient: Tensor) -> Tensor:
    """Do the same by the library that PyTorch uses by itself, MKL on x86."""
    return gradient @ weight


def weight_gradient_by_blas(inputs: Tensor, gradient: Tensor) -> Tensor:
    """Do what `weight_gradient_by_onednn` does by that library."""
    return gradient.t() @ inputs


class OneDNNLinear(torch.autograd.Function):
    """A linear layer by oneDNN, whose stock PyTorch operator has no gradient; gradients by it or by BLAS."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, of_hidden: bool, of_weight: bool
    ) -> Tensor:
        """Map (..., I) to (..., O); the last two say whether oneDNN makes these gradients."""
        ctx.save_for_backward(hidden, weight)
        ctx.of_hidden, ctx.of_weight = of_hidden, of_weight
        return onednn_product(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias, for the gradient (..., O) of what came out."""
        hidden, weight = ctx.saved_tensors
        rows = gradient.flatten(0, -2)  # (N, O)
        hidden_gradient = weight_gradient = bias_gradient = None
        if ctx.needs_input_grad[0]:
            of_hidden = hidden_gradient_by_onednn if ctx.of_hidden else hidden_gradient_by_blas
            hidden_gradient = of_hidden(weight, rows).view_as(hidden)
        if ctx.needs_input_grad[1]:
            of_weight = weight_gradient_by_onednn if ctx.of_weight else weight_gradient_by_blas
            weight_gradient = of_weight(hidden.flatten(0, -2), rows)
        if ctx.needs_input_grad[2]:
            bias_gradient = rows.sum(0)
        return hidden_gradient, weight_gradient, bias_gradient, None, None
