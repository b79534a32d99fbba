"""The products of a linear layer in 8-bit floats, for training (Micikevicius et al. 2022).

Inputs and weights are rounded to e4m3 (4 bits of exponent, 3 of fraction), gradients, whose sizes differ more, to e5m2.
Each tensor is first divided by a scale that brings its largest entry to the largest number of the type. The scale is
found anew at every use and stays on the device, so that nothing is kept between steps and nothing waits. Sums are made
in fp32, results are bf16, and the weights themselves stay what they are.

Shape letters: N rows (tokens), I inputs, O outputs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LEAST_WIDTH = 1024  # below, rounding is likely to cost more than the products gain: an estimate, not measured on a GPU
MULTIPLE = 16  # cuBLAS reads rows of 16 bytes
FORWARD_TYPE, GRADIENT_TYPE = torch.float8_e4m3fn, torch.float8_e5m2


def suits_fp8(weight: Tensor) -> bool:
    """Say whether a weight (O, I) is large enough to gain by 8 bits, and of sizes that the kernels take."""
    return min(weight.shape) >= LEAST_WIDTH and not any(size % MULTIPLE for size in weight.shape)


def fp8_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return about `torch.nn.functional.linear(hidden, weight, bias)`: (..., I) to (..., O), in bf16.

    Rows that are no multiple of 16, as in the short last batch of an epoch, are left to PyTorch's own layer.
    """
    rows = hidden.reshape(-1, hidden.shape[-1])  # (N, I)
    if len(rows) % MULTIPLE:
        return F.linear(hidden, weight, bias)
    result: Tensor = Fp8Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    result = result.view(*hidden.shape[:-1], len(weight))
    return result if bias is None else result + bias.to(result.dtype)


def round_to_fp8(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the tensor in 8 bits, its rows in one piece, and the scale, (), by which it is to be multiplied.

    What is not finite becomes NaN, which the guard of the training step then finds.
    """
    scale = tensor.abs().amax().float() / torch.finfo(dtype).max
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a tensor of zeros
    return (tensor.float() / scale).to(dtype).contiguous(), scale


def fp8_product(left: Tensor, right: Tensor, scale: Tensor, other_scale: Tensor, *, is_fast: bool = False) -> Tensor:
    """Return left (N, I) times the transpose of right (O, I), both of 8 bits, in bf16.

    cuBLAS knows this form alone: both lie in memory by rows of what is summed over. With `is_fast`, tensor cores of
    the Hopper generation sum with fewer bits.
    """
    return torch._scaled_mm(left, right.t(), scale, other_scale, out_dtype=torch.bfloat16, use_fast_accum=is_fast)


class Fp8Product(torch.autograd.Function):
    """Rows (N, I) times the transpose of a weight (O, I); the backward pass reads what the forward pass rounded."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        """Map (N, I) to (N, O)."""
        small_rows, row_scale = round_to_fp8(rows, FORWARD_TYPE)
        small_weight, weight_scale = round_to_fp8(weight, FORWARD_TYPE)
        ctx.save_for_backward(small_rows, row_scale, small_weight, weight_scale)
        ctx.types = rows.dtype, weight.dtype
        return fp8_product(small_rows, small_weight, row_scale, weight_scale, is_fast=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of rows and weight, for the gradient (N, O) of what came out."""
        small_rows, row_scale, small_weight, weight_scale = ctx.saved_tensors
        small, scale = round_to_fp8(gradient, GRADIENT_TYPE)  # (N, O)
        row_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            turned = small_weight.t().contiguous()  # (I, O)
            row_gradient = fp8_product(small, turned, scale, weight_scale).to(ctx.types[0])  # (N, I)
        if ctx.needs_input_grad[1]:
            turned = small_rows.t().contiguous()  # (I, N)
            weight_gradient = fp8_product(small.t().contiguous(), turned, scale, row_scale).to(ctx.types[1])  # (O, I)
        return row_gradient, weight_gradient
