"""How the order of tokens is told to the network: sinusoidal tables, rotary angles and their long-context scalings.

Learned positions are an embedding table in the model itself.
"""

import math

import torch
from torch import Tensor

from sheepop.config import ModelConfig

# YaRN's defaults for models of the Llama family: pairs that turn fewer than SLOW times over the trained context
# are interpolated in full, those that turn more than FAST times are left alone (Peng et al. 2023, section 3.4).
YARN_SLOW_TURNS = 1.0
YARN_FAST_TURNS = 32.0


def sinusoidal_table(length: int, d_model: int) -> Tensor:
    """Return the (length, d_model) table of Vaswani et al. 2017, section 3.5.

    Even columns hold sin(t / 10000^(2i/D)), odd columns the cosine of the same angle.
    """
    frequencies = torch.exp(torch.arange(0, d_model, 2, dtype=torch.float64) * (-math.log(10000.0) / d_model))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (T, D/2)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).reshape(length, d_model).float()


def rotary_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Return the (head_dim/2,) radians that each pair turns per token, and the factor on the rotated vectors.

    Su et al. 2021 (RoFormer): frequency i is theta^(-2i/C). Scalings to contexts `s` times longer than trained:

    - linear (Chen et al. 2023): all frequencies divided by s;
    - ntk (bloc97 2023): theta grown to theta * s^(C/(C-2)), so that the slowest pair is divided by s and the
      fastest hardly changes;
    - yarn (Peng et al. 2023): slow pairs divided by s, fast ones left, a ramp between, and attention
      sharpened by 0.1 ln s + 1 on queries and keys each.
    """
    width, scale = config.head_dim, config.rope_scaling_factor
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
    return frequencies, 1.0


def rotary_tables(config: ModelConfig, length: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines, each (length, head_dim), in the layout that `apply_rotary` expects.

    The first half of a head is paired with the second (the pairing of GPT-NeoX and Llama in `transformers`), so
    each angle stands twice; the sines of the first half are negated here, once, instead of in every layer.
    """
    frequencies, factor = rotary_frequencies(config)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (T, C/2)
    cosines, sines = angles.cos() * factor, angles.sin() * factor
    return torch.cat((cosines, cosines), dim=-1).float(), torch.cat((-sines, sines), dim=-1).float()


def apply_rotary(vectors: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Turn each pair (i, i + C/2) of `vectors` (..., C) by the angle of its position.

    `cosines` and `sines` come from `rotary_tables` and broadcast against `vectors`.
    """
    half = vectors.shape[-1] // 2
    swapped = torch.cat((vectors[..., half:], vectors[..., :half]), dim=-1)
    return torch.addcmul(vectors * cosines, swapped, sines)
