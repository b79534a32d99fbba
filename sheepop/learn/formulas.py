"""All formulas by name: the one place from which the docs, the pages and the notebooks take them."""

from sheepop.learn.chapters import (
    attention,
    block,
    costs,
    embedding,
    feed_forward,
    generation,
    loss,
    normalization,
    optimization,
    schedules,
)
from sheepop.learn.formula import Formula
from sheepop.utils.errors import ConfigError, did_you_mean

CHAPTERS: dict[str, tuple[Formula, ...]] = {
    "embedding": embedding.FORMULAS,
    "attention": attention.FORMULAS,
    "feed_forward": feed_forward.FORMULAS,
    "normalization": normalization.FORMULAS,
    "block": block.FORMULAS,
    "loss": loss.FORMULAS,
    "generation": generation.FORMULAS,
    "optimization": optimization.FORMULAS,
    "schedules": schedules.FORMULAS,
    "costs": costs.FORMULAS,
}
FORMULAS = {formula.name: formula for formulas in CHAPTERS.values() for formula in formulas}


def formula_of(name: str) -> Formula:
    """Return the formula of that name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in FORMULAS:
        hint = did_you_mean(name, FORMULAS) or f" There are: {', '.join(FORMULAS)}."
        raise ConfigError(f"There is no formula '{name}'.{hint}")
    return FORMULAS[name]
