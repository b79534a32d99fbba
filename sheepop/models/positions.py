"""How the order of tokens is told to the network: sinusoidal tables, rotary angles and their long-context scalings.

Learned positions are an embedding table in the model itself.
"""

import math
from typing import Any

import torch
from torch import Tensor

from sheepop.config import ModelConfig

# YaRN's defaults for models of the Llama family: pairs that turn fewer than SLOW times over the trained context
# are interpolated in full, those that turn more than FAST times are left alone (Peng et al. 2023, section 3.4).
YARN_SLOW_TURNS = 1.0
YARN_FAST_TURNS = 32.0
# The same of Llama 3.1, whose ramp runs along the turns and not along the pairs.
LLAMA3_SLOW_TURNS = 1.0
LLAMA3_FAST_TURNS = 4.0


def sinusoidal_table(length: int, d_model: int) -> Tensor:
    """Return the (length, d_model) table of Vaswani et al. 2017, section 3.5.

    Even columns hold sin(t / 10000^(2i/D)), odd columns the cosine of the same angle.
    """
    frequencies = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (T, D/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, d_model).float()


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the (R/2,) radians that each pair turns per token, and the factor on the rotated vectors.

    Su et al. 2021 (RoFormer): frequency i is theta^(-2i/R), where R is `turned_dim`. Scalings to contexts `s` times
    longer than trained:

    - linear (Chen et al. 2023): all frequencies divided by s;
    - ntk (bloc97 2023): theta grown to theta * s^(R/(R-2)), so that the slowest pair is divided by s and the
      fastest hardly changes;
    - yarn (Peng et al. 2023): slow pairs divided by s, fast ones left, a ramp between, and attention
      sharpened by 0.1 ln s + 1 on queries and keys each;
    - llama3 (Grattafiori et al. 2024, and the models' own configuration): as yarn with another ramp, and no sharpening.
    """
    width, scale = config.turned_dim, config.rope_scaling_factor
    theta = config.rope_theta
    if config.rope_scaling == "ntk" and width > 2:
        theta *= scale ** (width / (width - 2))
    exponents = torch.arange(0, width, 2, dtype=torch.float64) / width
    frequencies = theta**-exponents
    if config.rope_scaling == "linear":
        return frequencies / scale, 1.0
    if config.rope_scaling == "yarn":
        # The index of the pair that makes the given number of turns over the trained context.
        def pair_with(turns: float) -> float:
            return width * math.log(config.trained_seq_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair_with(YARN_FAST_TURNS)), 0)
        high = min(math.ceil(pair_with(YARN_SLOW_TURNS)), width - 1)
        pairs = torch.arange(width // 2, dtype=torch.float64)
        ramp = ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # 0: keep, 1: interpolate
        return frequencies * (1 - ramp) + frequencies / scale * ramp, 0.1 * math.log(scale) + 1.0
    if config.rope_scaling == "llama3":
        turns = config.trained_seq_len * frequencies / (2 * math.pi)
        kept = ((turns - LLAMA3_SLOW_TURNS) / (LLAMA3_FAST_TURNS - LLAMA3_SLOW_TURNS)).clamp(0, 1)
        return frequencies * kept + frequencies / scale * (1 - kept), 1.0
    return frequencies, 1.0


def rotary_table(config: ModelConfig, length: int) -> Tensor:
    """Return the cosine and sine of each pair's angle at each position, (length, C/2, 2), for `apply_rotary`.

    The pairs behind `turned_dim` stay where they are, which is to be turned by nothing.
    """
    frequencies, factor = rotary_frequencies(config)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (T, R/2)
    turned = torch.stack((angles.cos(), angles.sin()), dim=-1) * factor
    still = torch.tensor((1.0, 0.0)).expand(length, (config.head_dim - config.turned_dim) // 2, 2)
    return torch.cat((turned, still), dim=1).float()


def apply_rotary(vectors: Tensor, table: Tensor) -> Tensor:
    """Turn each pair (2i, 2i + 1) of `vectors` (..., C) by the angle of its position.

    Neighbours make a pair, as in the paper, Llama's own code and GGUF; GPT-NeoX and `transformers` pair i with
    i + C/2, which is the same network with the rows of the query and key projections in another order.

    Args:
        table: (..., C/2, 2) from `rotary_table`, broadcast against `vectors`; it gets no gradient.
    """
    return Rotation.apply(vectors, table)  # type: ignore[no-untyped-call, no-any-return]


class Rotation(torch.autograd.Function):
    """The gradient of a rotation is the rotation back, which is cheaper than what autograd finds on its own."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, table: Tensor) -> Tensor:
        """Turn the pairs of `vectors`."""
        ctx.save_for_backward(table)
        return turn(vectors, table, back=False)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Turn the gradient back."""
        (table,) = ctx.saved_tensors
        return turn(gradient, table, back=True), None


def turn(vectors: Tensor, table: Tensor, *, back: bool) -> Tensor:
    """Turn the pairs of `vectors` (..., C) by the angles of `table` (..., C/2, 2), or back by them.

    A pair is a complex number and a rotation a product of two, which in eager mode reads and writes everything once
    instead of three times. Compilers know little of complex numbers, and there are no complex bfloat16 ones.
    """
    if vectors.dtype == table.dtype == torch.float32 and not torch.compiler.is_compiling():
        if vectors.stride(-1) != 1:
            vectors = vectors.contiguous()
        rotations = torch.view_as_complex(table)
        pairs = torch.view_as_complex(vectors.view(*vectors.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * (rotations.conj() if back else rotations)).flatten(-2)
    cosines, sines = table.unbind(-1)
    if back:
        sines = -sines
    first, second = vectors[..., 0::2], vectors[..., 1::2]  # (..., C/2) each
    turned = torch.stack((first * cosines - second * sines, first * sines + second * cosines), dim=-1)
    return turned.flatten(-2).to(vectors.dtype)


def document_starts(document_ids: Tensor) -> Tensor:
    """Return for each token of (B, T) the index at which its document begins in the row."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(begins, index, 0).cummax(dim=1).values
