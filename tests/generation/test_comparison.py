from pathlib import Path

import torch

from sheepop.config import ModelConfig
from sheepop.evaluation.generation_plots import PICTURES, write_generation_plots
from sheepop.generation.comparison import compare_ways, format_measurements, prompt_lengths
from sheepop.models.transformer import TransformerModel


def test_lengths_grow_to_the_longest_prompt_that_fits() -> None:
    assert prompt_lengths(300) == [16, 64, 256, 300]
    assert prompt_lengths(9) == [9]
    assert prompt_lengths(0) == [1]


def test_both_ways_are_measured_at_each_length_and_drawn(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = TransformerModel(
        ModelConfig(vocab_size=41, d_model=24, num_layers=2, num_heads=4, d_ff=40, max_seq_len=96, init_std=0.3)
    )
    measurements = compare_ways(model, new_tokens=5)
    assert [(each.prompt_tokens, each.way) for each in measurements] == [
        (length, way) for length in (16, 64, 91) for way in ("naive", "optimized")
    ]
    for each in measurements:
        assert each.time_to_first_token_seconds > 0
        assert each.tokens_per_second > 0
        assert each.memory_bytes >= 0
        assert each.same_tokens
    assert len(format_measurements(measurements).splitlines()) == 7
    paths = write_generation_plots(measurements, tmp_path / "new" / "folder")
    assert [path.stem for path in paths] == list(PICTURES)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
