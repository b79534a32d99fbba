from pathlib import Path

import numpy as np
import pytest
import sympy
import torch

from sheepop.config import ModelConfig
from sheepop.data.tokenizer import Tokenizer
from sheepop.interop.convert import import_model
from sheepop.learn.formula import Formula, relative_difference
from sheepop.learn.formulas import CHAPTERS, FORMULAS, formula_of
from sheepop.learn.notation import SIZES, counters
from sheepop.learn.trace import Trace, trace
from sheepop.models.pretrained import load_pretrained
from sheepop.utils.errors import ConfigError, DataError

TOLERANCE = 1e-6  # relative: fp32's own


@pytest.fixture(params=FORMULAS)
def formula(request: pytest.FixtureRequest) -> Formula:
    return FORMULAS[request.param]


@pytest.mark.parametrize("seed", range(3))
def test_a_formula_equals_its_implementation_on_random_numbers(formula: Formula, seed: int) -> None:
    found, expected = formula.sampled(np.random.default_rng(seed))
    assert expected.size
    assert relative_difference(found, expected) < TOLERANCE


def test_every_formula_names_a_line_of_code_and_prints(formula: Formula) -> None:
    path, number, text = formula.implementation()
    assert path.read_text().splitlines()[number - 1].strip() == text
    assert "<math" in formula.mathml
    assert formula.latex


def test_every_letter_has_one_meaning_and_no_meaning_is_without_its_letter(formula: Formula) -> None:
    equation = formula.equation
    letters = {symbol.name for symbol in equation.atoms(sympy.Symbol, sympy.MatrixSymbol)}
    assert formula.meanings.keys() <= letters
    assert letters - formula.meanings.keys() <= SIZES.keys() | {index for index, _ in counters(formula.equation)}


def test_every_formula_is_explained_in_two_voices(formula: Formula) -> None:
    for text in (formula.kids, formula.scientists):
        assert 2 <= sum(text.count(end) for end in (". ", "? ", "! ")) + 1 <= 5, text
    assert formula.pitfalls
    assert formula.source
    assert formula.title


def about(formula: Formula, runs: dict[str, Trace]) -> dict[str, Trace]:
    return {family: run for family, run in runs.items() if not formula.missing(run.model.config)}


def test_a_formula_equals_its_implementation_in_a_real_run(formula: Formula, runs: dict[str, Trace]) -> None:
    found = about(formula, runs)
    assert found
    if not formula.is_traced:
        with pytest.raises(ConfigError, match="not about a forward pass"):
            formula.traced(next(iter(found.values())))
        return
    for family, run in found.items():
        for layer in range(2):
            assert relative_difference(*formula.traced(run, layer)) < TOLERANCE, (family, layer)


def test_a_formula_about_a_part_that_a_model_lacks_names_the_setting(formula: Formula, runs: dict[str, Trace]) -> None:
    for family in runs.keys() - about(formula, runs).keys():
        with pytest.raises(ConfigError, match=rf"'{formula.name}' is not about this model: .*model\.[a-z_]+ is "):
            formula.traced(runs[family])


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    """A run of a random Llama of `transformers`, imported."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = Tokenizer.train("bpe", ["the sheep sees the dog"], vocab_size=260)
    theirs = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=24,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=13,
        rms_norm_eps=1e-3,
        initializer_range=0.3,
    )
    torch.manual_seed(2)
    transformers.LlamaForCausalLM(theirs).save_pretrained(folder / "theirs")
    tokenizer.save(folder / "tokenizer.json")
    import_model(folder / "theirs", folder / "ours", tokenizer=folder / "tokenizer.json")
    return trace(load_pretrained(folder / "ours"), [5, 0, 36, 7, 7, 21, 3])


def test_formulas_hold_for_an_imported_model(formula: Formula, llama: Trace) -> None:
    assert llama.model.config.activation == "swiglu"
    if formula.is_traced and not formula.missing(llama.model.config):
        for layer in range(2):
            assert relative_difference(*formula.traced(llama, layer)) < TOLERANCE


def test_the_loss_of_one_token_is_not_seen(runs: dict[str, Trace]) -> None:
    with pytest.raises(DataError, match="no next one"):
        FORMULAS["cross_entropy"].traced(trace(runs["classic"].model, [3]))


def test_a_formula_whose_line_is_gone_says_so() -> None:
    changed = Formula(**{**vars(FORMULAS["gelu"]), "line": "nobody wrote this"})
    with pytest.raises(LookupError, match="0 lines with 'nobody wrote this'"):
        changed.implementation()


def test_an_unknown_formula_is_an_error_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'attention_scores'"):
        formula_of("atention_scores")
    assert sum(map(len, CHAPTERS.values())) == len(FORMULAS)


def test_what_a_model_lacks_is_known_from_its_settings() -> None:
    assert FORMULAS["swiglu"].missing(ModelConfig()) == "its model.activation is 'gelu', not 'swiglu'"
    assert Path(FORMULAS["swiglu"].implementation()[0]).name == "blocks.py"
