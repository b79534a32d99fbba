"""Weights in 8 or 4 bits: a quarter or an eighth of the memory to keep and, for one token, of the time to read.

Only the matrices are rounded; what passes through them stays as it is. Of 8 bits each row has one scale, symmetric
about zero. Of 4 bits each group of 32 neighbours in a row has a scale and a lowest value, as in Q4_1 of GGUF, with
which a weight takes 5.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from sheepop.config import ModelConfig
from sheepop.models.linear import Linear, linear
from sheepop.utils.runtime import has_numba

Quantization = Literal["int8", "int4"]

GROUP = 32  # weights that share a scale in 4 bits
PAIR = 2 * GROUP  # weights of two groups, which lie in the halves of the same bytes
LEVELS = 15  # the largest number in 4 bits
LARGEST = 127
SMALLEST = torch.finfo(torch.float32).tiny  # a scale that is not zero
# Cutting off a group's outermost weights costs them and spares the others: of these shares of the range the best is
# taken, by the squared error (`docs/log.md`).
SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
# Weights whose candidates are in memory at one time: on a CPU few enough for its caches, elsewhere few operators.
WEIGHTS_AT_ONCE, WEIGHTS_AT_ONCE_ELSEWHERE = 2**17, 2**22
PARTS = 8  # sums of a group's squares, before they are added to one: the order that PyTorch had here
KERNELS_FROM = 2**18  # weights of a matrix with which loading compiled code is repaid


class QuantizedLinear(nn.Module):
    """A linear layer whose weight (O, I) is kept in 8 or 4 bits, for inference alone.

    In 4 bits two groups share their bytes: byte j holds weight j of the first in its lower half and of the second in
    its upper. A layer whose inputs are no multiple of two groups is kept in 8 bits.
    """

    values: Tensor
    scale: Tensor
    lowest: Tensor
    bias: Tensor | None

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool, quantization: Quantization = "int8") -> None:
        super().__init__()
        self.num_inputs = num_inputs
        self.is_packed = quantization == "int4" and num_inputs % PAIR == 0
        if self.is_packed:
            shape = num_outputs, num_inputs // GROUP
            self.register_buffer("values", torch.empty((num_outputs, num_inputs // PAIR, GROUP), dtype=torch.uint8))
            self.register_buffer("scale", torch.empty(shape, dtype=torch.bfloat16))
            self.register_buffer("lowest", torch.empty(shape, dtype=torch.bfloat16))
        else:
            self.register_buffer("values", torch.empty((num_outputs, num_inputs), dtype=torch.int8))
            self.register_buffer("scale", torch.empty(num_outputs))
        self.register_buffer("bias", torch.empty(num_outputs) if bias else None)

    @property
    def weight(self) -> Tensor:
        """The weight (O, I) as fp32, made anew each time."""
        return self.rows(slice(None))

    def rows(self, which: Tensor | slice) -> Tensor:
        """Return rows of the weight as fp32: (..., I)."""
        values, scale = self.values[which], self.scale[which, ..., None].float()
        if not self.is_packed:
            return values.float() * scale
        numbers = torch.stack((values & 15, values >> 4), dim=-2).flatten(-3, -2).float()  # (..., G, 32)
        return (numbers * scale + self.lowest[which, ..., None].float()).flatten(-2)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., I) to (..., O)."""
        return linear(hidden, self.weight, self.bias)

    @torch.no_grad()
    def fill(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take a weight (O, I) and a bias (O,), rounded."""
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)
        if has_kernels(weight):
            from sheepop.models import rounding_kernels

            if self.is_packed:
                rounding_kernels.fill_groups(weight.float(), self.values, self.scale, self.lowest)
            else:
                rounding_kernels.fill_rows(weight.float(), self.values, self.scale)
            return
        most = WEIGHTS_AT_ONCE if weight.device.type == "cpu" else WEIGHTS_AT_ONCE_ELSEWHERE
        at_once = max(1, most // self.num_inputs)
        for start in range(0, len(weight), at_once):
            part = slice(start, start + at_once)
            if self.is_packed:
                numbers, self.scale[part], self.lowest[part] = round_groups(weight[part].float())
                self.values[part] = numbers[:, 0::2] | numbers[:, 1::2] << 4
            else:
                self.values[part], self.scale[part] = round_rows(weight[part].float())


class QuantizedEmbedding(nn.Module):
    """A table (V, D) in 8 bits of which rows are looked up."""

    def __init__(self, matrix: QuantizedLinear) -> None:
        super().__init__()
        self.matrix = matrix

    def forward(self, token_ids: Tensor) -> Tensor:
        """Map (B, T) to (B, T, D)."""
        return self.matrix.rows(token_ids)


def use_quantized_layers(model: nn.Module, config: ModelConfig) -> None:
    """Put quantized layers, to be filled, in the place of a model's own.

    The token embedding and the head have 8 bits in any case: rounding them costs the most.
    """
    assert config.quantization != "none"
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Linear):
                bits: Quantization = "int8" if module is model else config.quantization
                inputs, outputs = layer.in_features, layer.out_features
                setattr(module, name, QuantizedLinear(inputs, outputs, bias=layer.bias is not None, quantization=bits))
    table = model.head if config.tie_weights else QuantizedLinear(config.d_model, config.vocab_size, bias=False)
    assert isinstance(table, QuantizedLinear)
    model.token_embedding = QuantizedEmbedding(table)


def has_kernels(weight: Tensor) -> bool:
    """Say whether a weight is rounded by compiled code, several times as fast as by PyTorch's operators."""
    is_large = weight.device.type == "cpu" and weight.numel() >= KERNELS_FROM
    return is_large and has_numba()


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round rows (O, I) to 8 bits: numbers -127 to 127 as int8, and the scale of each row (O,)."""
    scale = weight.abs().amax(1).clamp(min=SMALLEST) / LARGEST
    return (weight / scale[:, None]).round().to(torch.int8), scale


def round_groups(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Round rows (O, I) to 4 bits: numbers 0 to 15 as uint8 (O, G, 32), scale and lowest value of each group (O, G)."""
    groups = weight.view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    middle, half = (low + high) / 2, (high - low) / 2
    least = torch.full_like(low, torch.inf)
    numbers, scale, lowest = torch.zeros_like(groups, dtype=torch.uint8), torch.zeros_like(low), torch.zeros_like(low)
    for shrink in SHRINKS:
        begin, step = middle - shrink * half, (2 * shrink * half / LEVELS).clamp(min=SMALLEST)
        begin, step = (each.bfloat16().float() for each in (begin, step))  # as they are kept
        found = ((groups - begin[..., None]) / step[..., None]).round().clamp(0, LEVELS)
        error = sum_in_order((found * step[..., None] + begin[..., None] - groups).square())  # (O, G)
        is_better = error < least
        least, lowest, scale = (
            torch.where(is_better, new, old) for new, old in ((error, least), (begin, lowest), (step, scale))
        )
        numbers = torch.where(is_better[..., None], found.to(torch.uint8), numbers)
    return numbers, scale, lowest


def sum_in_order(squares: Tensor) -> Tensor:
    """Return the sums (O, G) of squares (O, G, 32), in one order on each machine, so that all choose alike."""
    totals = torch.stack(torch.split(squares, PARTS, dim=-1))  # (4, O, G, 8)
    for dim in (0, -1):
        first, *others = totals.unbind(dim)
        totals = sum(others, first)
    return totals
