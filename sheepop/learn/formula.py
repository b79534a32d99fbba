"""One formula: an equation that is printed and evaluated, tied to the code that implements it and to a real run."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sympy
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.learn import notation
from sheepop.learn.evaluation import Part, evaluate, name_of
from sheepop.learn.trace import Trace
from sheepop.utils.errors import ConfigError

Value = ArrayLike | Tensor | Part  # what can be called is a part of the model, of which only what it makes is seen


@dataclass(frozen=True)
class Meaning:
    """What a symbol stands for, and where a run shows it.

    Attributes:
        text: in a few words, as the legend under the formula has them.
        point: the model's point whose tensor it is, such as `blocks.{layer}.attention.query`.
        value: where it is no point's tensor: how it follows from a trace and a layer.
    """

    text: str
    point: str = ""
    value: Callable[[Trace, int], Value] | None = None

    def of(self, trace: Trace, layer: int) -> NDArray[np.float64] | Part:
        """Return its value in a run, in float64; of a function that is a part of the model, what can be called."""
        found = self.value(trace, layer) if self.value else trace[self.point.format(layer=layer)]
        return found if callable(found) else as_float64(found)


@dataclass(frozen=True)
class Formula:
    """A formula with all that is to be said of it.

    Attributes:
        name: by which it is asked for.
        title: as a heading has it.
        equation: what is printed and what is evaluated; the left side is what it defines.
        meanings: of its symbols by name, but for sizes and indices, which `notation.py` explains.
        code: what implements it, `module:function`, `module:Class.method` or `module:TABLE`.
        line: what stands in that line of it which the formula is, nowhere else in it.
        kids: the idea for a child: something to see or to touch.
        scientists: what it does, why, and what it assumes.
        pitfalls: what usually goes wrong.
        source: the paper.
        sample: draws values of the symbols, and returns beside them what the implementation makes of the same.
        missing: why a model has no such part; None where it has.
    """

    name: str
    title: str
    equation: sympy.Eq
    meanings: Mapping[str, Meaning]
    code: str
    line: str
    kids: str
    scientists: str
    pitfalls: str
    source: str
    sample: Callable[[np.random.Generator], tuple[Mapping[str, Value], ArrayLike | Tensor]]
    missing: Callable[[ModelConfig], str | None] = lambda _: None

    def __post_init__(self) -> None:
        for name in ("kids", "scientists", "pitfalls"):  # written over several lines, read as one
            object.__setattr__(self, name, " ".join(getattr(self, name).split()))

    @property
    def left_name(self) -> str:
        """The name of what the formula defines."""
        left = self.equation.lhs
        return name_of(left.base if isinstance(left, sympy.Indexed) else left)

    @property
    def latex(self) -> str:
        """The equation for Markdown and notebooks."""
        return notation.latex(self.equation)

    @property
    def mathml(self) -> str:
        """The equation for pages."""
        return notation.mathml(self.equation)

    @property
    def is_traced(self) -> bool:
        """Whether a forward pass shows both sides."""
        return all(meaning.point or meaning.value for meaning in self.meanings.values())

    def evaluate(self, values: Mapping[str, Value], shape: tuple[int, ...] | None = None) -> NDArray[np.float64]:
        """Return the right side in float64 for values of its symbols; see `evaluation.evaluate`."""
        given = {name: value if callable(value) else as_float64(value) for name, value in values.items()}
        return evaluate(self.equation, given, shape)

    def sampled(self, random: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what the formula and what the implementation make of the same random numbers."""
        values, result = self.sample(random)
        expected = as_float64(result)
        return self.evaluate(values, expected.shape), expected

    def traced(self, trace: Trace, layer: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what the formula makes of a run's tensors, and what the run itself made of them.

        They agree within 1e-6 of the largest number where the run's sums are in fp32 and not much longer than
        1000 numbers. Of a wider model trace a copy in float64 (`copy.deepcopy(model).double()`).

        Raises:
            ConfigError: the model has no such part, or a forward pass does not show it; says why.
        """
        values = self.values_in(trace, layer)
        expected = values.pop(self.left_name)
        assert not callable(expected)
        return self.evaluate(values, expected.shape), expected

    def values_in(self, trace: Trace, layer: int = 0) -> dict[str, NDArray[np.float64] | Part]:
        """Return the values of all symbols in a run, see `Meaning.of`, the left side's included; errors as `traced`."""
        why = self.missing(trace.model.config)
        if why:
            raise ConfigError(f"The formula '{self.name}' is not about this model: {why}.")
        if not self.is_traced:
            raise ConfigError(f"The formula '{self.name}' is not about a forward pass, so a trace does not show it.")
        return {name: meaning.of(trace, layer) for name, meaning in self.meanings.items()}

    def implementation(self) -> tuple[Path, int, str]:
        """Return the file, the number and the text of the line that implements the formula.

        Raises:
            LookupError: the code has no such line, or several: it has changed, and the formula has to follow.
        """
        module_name, _, path = self.code.partition(":")
        module = importlib.import_module(module_name)
        symbol: Any = module
        for name in path.split("."):
            symbol = getattr(symbol, name)
        if not inspect.isroutine(symbol):  # a table is no code of its own, and is looked for in all of its module
            symbol = module
        lines, first = inspect.getsourcelines(symbol)
        first = max(first, 1)  # of a module it is 0
        found = [(number, text) for number, text in enumerate(lines, start=first) if self.line in text]
        if len(found) != 1:
            raise LookupError(
                f"{self.code} has {len(found)} lines with '{self.line}', which formula '{self.name}' names"
            )
        number, text = found[0]
        return Path(inspect.getfile(module)), number, text.strip()


def relative_difference(found: ArrayLike, expected: ArrayLike) -> float:
    """Return the largest difference over the largest size of what is expected; infinities have to agree."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape or not np.array_equal(np.isinf(found), np.isinf(expected)):
        return float("inf")
    is_finite = ~np.isinf(expected)
    difference = np.abs(found[is_finite] - expected[is_finite]).max(initial=0.0)
    size = np.abs(expected[is_finite]).max(initial=0.0)
    return float(difference / size if size else difference)


def as_float64(value: ArrayLike | Tensor) -> NDArray[np.float64]:
    """Return an array in float64."""
    if isinstance(value, torch.Tensor):
        value = value.detach().to(dtype=torch.float64, device="cpu").numpy()
    return np.asarray(value, dtype=np.float64)
