from typing import Any

import numpy as np
import pytest
import sympy
from hypothesis import given
from hypothesis import strategies as st

from sheepop.learn import evaluation
from sheepop.learn.evaluation import evaluate
from sheepop.learn.functions import Applied, ArgMax, Indicator, Nearest, Stacked
from sheepop.learn.notation import D, L, S, T, V, array, cases, equals, j, mean, over, s, t, times, u, v

RANDOM = np.random.default_rng(0)
A, X, Y = array("A", T, S), array("X", S), array("Y", T)


def test_a_product_of_a_matrix_and_a_vector() -> None:
    values = {"A": RANDOM.standard_normal((3, 5)), "X": RANDOM.standard_normal(5)}
    found = evaluate(equals(Y[t], over(times(A[t, s], X[s]), s, S)), values)
    np.testing.assert_allclose(found, values["A"] @ values["X"])


def test_long_sums_are_made_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "CELLS_AT_ONCE", 7)
    test_a_product_of_a_matrix_and_a_vector()


def test_bounds_of_a_sum_may_depend_on_another_index() -> None:
    triangle = equals(Y[t], sympy.Sum(X[s], (s, 0, t)))
    np.testing.assert_allclose(evaluate(triangle, {"X": [1, 2, 4, 8]}, (4,)), [1, 3, 7, 15])


def test_sums_within_each_other() -> None:
    values = {"A": RANDOM.standard_normal((3, 5))}
    found = evaluate(equals(sympy.Symbol("y"), over(over(A[t, s], s, S), t, T)), values)
    np.testing.assert_allclose(found, values["A"].sum())
    np.testing.assert_allclose(
        evaluate(equals(sympy.Symbol("y"), mean(A[t, 1], t, T)), values), values["A"][:, 1].mean()
    )


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9, unique=True))
def test_ranks_and_the_largest(numbers: list[int]) -> None:
    z, y = array("z", V), array("y", V)
    ranks = evaluate(equals(y[v], over(Indicator(z[u] > z[v]), u, V)), {"z": numbers})
    assert ranks.tolist() == [sum(other > number for other in numbers) for number in numbers]
    assert evaluate(equals(sympy.Symbol("x"), ArgMax(z[v], v, V)), {"z": numbers}) == np.argmax(numbers)


def test_an_index_may_be_looked_up() -> None:
    table, tokens = array("E", V, D), array("x", T)
    values = {"E": RANDOM.standard_normal((4, 3)), "x": [2, 0, 2, 3, 1]}
    found = evaluate(equals(array("Y", T, D)[t, j], table[tokens[t], j]), values)
    np.testing.assert_array_equal(found, values["E"][values["x"]])


def test_what_lies_outside_of_an_array_is_not_a_number() -> None:
    shifted = equals(Y[t], cases((0, sympy.Eq(t, 0)), otherwise=X[t - 1]))
    np.testing.assert_array_equal(evaluate(shifted, {"X": [5, 6, 7]}, (3,)), [0, 5, 6])
    assert np.isnan(evaluate(equals(Y[t], X[t - 1]), {"X": [5, 6, 7]}, (3,))[0])


def test_functions_are_called_one_behind_the_other() -> None:
    given_matrix, made = sympy.MatrixSymbol("X", T, D), sympy.MatrixSymbol("Y", T, D)
    values: dict[str, Any] = {
        "X": np.ones((2, 3)),
        "L": 3,
        "Block": lambda inside, number: 10 * inside + number,
        "Norm": lambda inside: -inside,
    }
    equation = equals(made, Applied(sympy.Symbol("Norm"), Stacked(sympy.Symbol("Block"), given_matrix, L)))
    np.testing.assert_array_equal(evaluate(equation, values), np.full((2, 3), -1012.0))


def test_the_nearest_whole_number_is_pythons() -> None:
    x = sympy.Symbol("x")
    numbers = [0.5, 1.5, 2.4, 2.6, -0.5]
    assert evaluate(equals(sympy.Symbol("y"), Nearest(x)), {"x": numbers}).tolist() == [round(x) for x in numbers]


def test_arrays_that_do_not_fit_are_errors() -> None:
    product = equals(Y[t], over(times(A[t, s], X[s]), s, S))
    with pytest.raises(ValueError, match=r"the size S is 5, but X has|the size S is 4, but A has"):
        evaluate(product, {"A": np.ones((3, 5)), "X": np.ones(4)})
    with pytest.raises(ValueError, match="but the formula has"):
        evaluate(product, {"A": np.ones(3), "X": np.ones(5)})
    with pytest.raises(KeyError):
        evaluate(product, {"A": np.ones((3, 5))})
