"""What of the text becomes part of a corpus: the choices that `prepare` offers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sheepop.data.cleaning import CLEANINGS, Cleaning
from sheepop.data.filters import FilterSettings
from sheepop.utils.errors import ConfigError, did_you_mean

Deduplicate = Literal["none", "exact", "near"]


@dataclass(frozen=True)
class Selection:
    """What of the text becomes part of the corpus; the defaults keep all of it as it is.

    Attributes:
        cleaning: `none`, `standard` or `repair`; see `cleaning.clean`.
        deduplicate: `none`; `exact` keeps the first of identical documents; `near` the first of similar ones too.
        near_threshold: share of common word sequences (Jaccard) from which documents count as similar.
        filters: which documents are dropped, and what becomes of personal data.
        include, exclude: patterns of file names below folders.
        strict: a file that cannot be read is an error; else it is listed and left out.
        weights: how often the documents of a source are used, by the source's path; 1 where it is not named.
    """

    cleaning: Cleaning = "none"
    deduplicate: Deduplicate = "none"
    near_threshold: float = 0.8
    filters: FilterSettings = field(default_factory=FilterSettings)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    weights: Mapping[str, float] = field(default_factory=dict)

    def validate(self, sources: Sequence[Path]) -> None:
        """Check the values.

        Raises:
            ConfigError: names the option, its value and what is allowed.
        """
        for name, value, allowed in (
            ("cleaning", self.cleaning, CLEANINGS),
            ("deduplicate", self.deduplicate, ("none", "exact", "near")),
        ):
            if value not in allowed:
                raise ConfigError(f"The option '{name}' is '{value}', but must be one of {', '.join(allowed)}.")
        if not 0 < self.near_threshold <= 1:
            raise ConfigError(f"The option 'near_threshold' is {self.near_threshold}, but must be in (0, 1].")
        named = {str(source) for source in sources}
        for source, weight in self.weights.items():
            if source not in named:
                raise ConfigError(
                    f"There is a weight for '{source}', which is no source.{did_you_mean(source, sorted(named))}"
                )
            if not 0 <= weight <= 255:
                raise ConfigError(f"The weight of '{source}' is {weight}, but must be between 0 and 255.")


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Read weights of sources, each `SOURCE=W`.

    Raises:
        ConfigError: a text is not of that form.
    """
    weights = {}
    for text in texts:
        source, equals, number = text.rpartition("=")
        try:
            weights[source] = float(number)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"A weight is written SOURCE=W, for instance notes=2, but not '{text}'.")
    return weights
