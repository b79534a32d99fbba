import math

import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.models.positions import apply_rotary, rotary_frequencies, rotary_table, sinusoidal_table, turn


def config(**changes):
    return ModelConfig(**{"d_model": 24, "num_heads": 2, "head_dim": 12, "max_seq_len": 64} | changes)


def test_sinusoidal_entries_are_the_papers():
    table = sinusoidal_table(7, 10)
    for position in (0, 3, 6):
        for pair in range(5):
            angle = position / 10000 ** (2 * pair / 10)
            assert table[position, 2 * pair] == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * pair + 1] == pytest.approx(math.cos(angle), abs=1e-6)


def test_rotary_turns_each_pair_by_its_angle():
    table = rotary_table(config(), 20)
    vector = torch.randn(12, generator=torch.Generator().manual_seed(1))
    turned = apply_rotary(vector, table[13])
    for pair in range(6):
        angle = 13 * 10000 ** (-2 * pair / 12)
        x, y = float(vector[2 * pair]), float(vector[2 * pair + 1])
        assert turned[2 * pair] == pytest.approx(x * math.cos(angle) - y * math.sin(angle), abs=1e-5)
        assert turned[2 * pair + 1] == pytest.approx(x * math.sin(angle) + y * math.cos(angle), abs=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    table = rotary_table(config(), 64)
    query, key = torch.randn(2, 12, generator=torch.Generator().manual_seed(2))

    def score(query_position, key_position):
        return float(apply_rotary(query, table[query_position]) @ apply_rotary(key, table[key_position]))

    assert score(9, 4) == pytest.approx(score(60, 55), abs=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 5), abs=1e-2)


def test_the_gradient_of_a_rotation_is_autograds():
    table = rotary_table(config(), 7)[:, None]
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(2, 7, 3, 12, generator=generator, requires_grad=True)
    weights = torch.randn(2, 7, 3, 12, generator=generator)
    (by_hand,) = torch.autograd.grad((apply_rotary(vectors, table) * weights).sum(), vectors)
    (by_autograd,) = torch.autograd.grad((turn(vectors, table, back=False) * weights).sum(), vectors)
    torch.testing.assert_close(by_hand, by_autograd)
    (of_a_sum,) = torch.autograd.grad(apply_rotary(vectors, table).sum(), vectors)  # a gradient without strides
    torch.testing.assert_close(of_a_sum, turn(torch.ones(2, 7, 3, 12), table, back=True))


@pytest.mark.parametrize("back", [False, True])
def test_rotation_in_real_numbers_equals_the_complex_one(back):
    table = rotary_table(config(), 7)[:, None]
    vectors = torch.randn(2, 7, 3, 12, generator=torch.Generator().manual_seed(4))
    by_complex = turn(vectors, table, back=back)
    torch.testing.assert_close(turn(vectors.double(), table, back=back), by_complex.double(), rtol=1e-6, atol=1e-6)
    halves = turn(vectors.bfloat16(), table, back=back)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), by_complex, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scaling", [{}, {"rope_scaling": "yarn", "rope_scaling_factor": 4.0}])
def test_numbers_behind_the_rotary_dim_stay(scaling):
    whole, part = config(head_dim=4, **scaling), config(head_dim=10, rotary_dim=4, **scaling)
    vectors = torch.randn(3, 10)
    turned = apply_rotary(vectors, rotary_table(part, 3))
    torch.testing.assert_close(turned[:, :4], apply_rotary(vectors[:, :4], rotary_table(whole, 3)))
    assert turned[:, 4:].equal(vectors[:, 4:])


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


def test_llama3_scaling_is_that_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = transformers.LlamaConfig(
        hidden_size=128,
        num_attention_heads=1,
        max_position_embeddings=131072,
        rope_parameters={**rope, "rope_theta": 5e5, "original_max_position_embeddings": 8192},
    )
    expected, factor = ROPE_INIT_FUNCTIONS["llama3"](theirs, "cpu")
    ours = ModelConfig(
        d_model=128,
        num_heads=1,
        max_seq_len=131072,
        rope_theta=5e5,
        rope_scaling="llama3",
        rope_scaling_factor=8.0,
        rope_trained_len=8192,
    )
    found, own_factor = rotary_frequencies(ours)
    torch.testing.assert_close(found.float(), expected, rtol=1e-6, atol=0)
    assert factor == own_factor == 1.0
    plain, _ = rotary_frequencies(ours.model_copy(update={"rope_scaling": "none"}))
    assert set((plain / found).round(decimals=3).tolist()) > {1.0, 8.0}  # some are kept, some divided, some between
