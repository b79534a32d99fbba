import math

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.models.positions import apply_rotary, rotary_frequencies, rotary_tables, sinusoidal_table


def config(**changes):
    return ModelConfig(d_model=24, num_heads=2, head_dim=12, max_seq_len=64, **changes)


def test_sinusoidal_entries_are_the_papers():
    table = sinusoidal_table(7, 10)
    for position in (0, 3, 6):
        for pair in range(5):
            angle = position / 10000 ** (2 * pair / 10)
            assert table[position, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotary_turns_each_pair_by_its_angle():
    cosines, sines = rotary_tables(config(), 20)
    vector = torch.randn(12, generator=torch.Generator().manual_seed(1))
    turned = apply_rotary(vector, cosines[13], sines[13])
    for pair in range(6):
        angle = 13 * 10000 ** (-2 * pair / 12)
        x, y = float(vector[pair]), float(vector[pair + 6])
        assert turned[pair] == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-5)
        assert turned[pair + 6] == pytest.approx(x * math.sin(angle) + y * math.cos(angle), abs=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    cosines, sines = rotary_tables(config(), 64)
    query, key = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))

    def score(query_position, key_position):
        return float(
            apply_rotary(query, cosines[query_position], sines[query_position])
            @ apply_rotary(key, cosines[key_position], sines[key_position])
        )

    assert score(9, 4) == pytest.approx(score(60, 55), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_linear_scaling_divides_every_frequency():
    plain, _ = rotary_frequencies(config())
    scaled, factor = rotary_frequencies(config(rope_scaling="linear", rope_scaling_factor=4.0))
    torch.testing.assert_close(scaled, plain / 4)
    assert factor == 1.0


def test_ntk_scaling_keeps_the_fastest_pair_and_divides_the_slowest():
    plain, _ = rotary_frequencies(config())
    scaled, factor = rotary_frequencies(config(rope_scaling="ntk", rope_scaling_factor=4.0))
    assert scaled[0] == plain[0]
    assert scaled[-1] == pytest.approx(float(plain[-1]) / 4)
    assert factor == 1.0


def test_yarn_keeps_fast_pairs_and_divides_slow_ones():
    wide = ModelConfig(d_model=128, num_heads=1, max_seq_len=4096, rope_scaling="yarn", rope_scaling_factor=4.0)
    plain, _ = rotary_frequencies(wide.model_copy(update={"rope_scaling": "none", "rope_scaling_factor": 1.0}))
    scaled, factor = rotary_frequencies(wide)
    turns = plain * 1024 / (2 * math.pi)  # over the trained context, 4096 / 4
    torch.testing.assert_close(scaled[turns > 40], plain[turns > 40])
    torch.testing.assert_close(scaled[turns < 0.8], plain[turns < 0.8] / 4)
    between = (turns < 20) & (turns > 2)
    assert ((scaled < plain) & (scaled > plain / 4))[between].all()
    assert factor == pytest.approx(0.1 * math.log(4) + 1)
