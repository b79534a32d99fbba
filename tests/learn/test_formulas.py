from typing import Any

import numpy as np
import pytest
import torch

from sheepop.config import ModelConfig
from sheepop.learn.formula import Formula, relative_difference
from sheepop.learn.formulas import FORMULAS, formula_of
from sheepop.learn.trace import Trace, trace
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import ConfigError

TOLERANCE = 1e-6  # relative: fp32's own


@pytest.fixture(params=FORMULAS)
def formula(request: pytest.FixtureRequest) -> Formula:
    return FORMULAS[request.param]


@pytest.mark.parametrize("seed", range(3))
def test_a_formula_equals_its_implementation_on_random_numbers(formula: Formula, seed: int) -> None:
    found, expected = formula.sampled(np.random.default_rng(seed))
    assert relative_difference(found, expected) < TOLERANCE


def test_every_formula_names_a_line_of_code_and_prints(formula: Formula) -> None:
    path, number, text = formula.implementation()
    assert path.read_text().splitlines()[number - 1].strip() == text
    assert "<math" in formula.mathml
    assert formula.latex


SIZES: dict[str, Any] = {
    "vocab_size": 37,
    "d_model": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "d_ff": 44,
    "max_seq_len": 13,
}


@pytest.fixture(scope="module")
def traces() -> list[Trace]:
    found = []
    for changed in ({}, {"norm": "rmsnorm", "activation": "swiglu", "qk_norm": True, "sliding_window": 3}):
        torch.manual_seed(5)
        model = TransformerModel(ModelConfig(**SIZES | changed))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=0.3 * (parameter.dim() == 1), std=0.3)
        found.append(trace(model, [5, 0, 36, 7, 7, 21, 3]))
    return found


def test_a_formula_equals_its_implementation_in_a_real_run(formula: Formula, traces: list[Trace]) -> None:
    about = [seen for seen in traces if not formula.missing(seen.model.config)]
    if not formula.is_traced:
        with pytest.raises(ConfigError, match="not about a forward pass"):
            formula.traced(about[0])
        return
    for seen in about:
        for layer in range(2):
            assert relative_difference(*formula.traced(seen, layer)) < TOLERANCE


def test_an_unknown_formula_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'attention_scores'"):
        formula_of("atention_scores")
