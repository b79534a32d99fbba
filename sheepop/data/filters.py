"""Which documents to leave out: too short or long, in another language, of low quality, or with personal data."""

from dataclasses import dataclass
from typing import Literal, get_args

from sheepop.data.languages import language_of
from sheepop.data.pii import find_pii, replace_pii
from sheepop.data.quality import quality_problem
from sheepop.utils.errors import ConfigError

PiiPolicy = Literal["keep", "drop", "replace"]

__all__ = ["FilterSettings", "find_pii", "language_of", "reason_to_drop", "replace_pii"]


@dataclass(frozen=True)
class FilterSettings:
    """What to leave out; the defaults leave everything in.

    Attributes:
        min_characters: of a document, white space at its ends not counted.
        max_characters: likewise; None for no limit.
        quality: whether to apply the rules of `quality.py`.
        languages: codes of ISO 639-1, such as "en"; empty for all.
        pii: what to do about personal data: keep it, drop the document, or replace it (by `replace_pii`).

    Raises:
        ConfigError: a value is out of range.
    """

    min_characters: int = 0
    max_characters: int | None = None
    quality: bool = False
    languages: tuple[str, ...] = ()
    pii: PiiPolicy = "keep"

    def __post_init__(self) -> None:
        if self.min_characters < 0:
            raise ConfigError(f"The least number of characters is {self.min_characters}, but must not be below 0.")
        if self.max_characters is not None and self.max_characters < max(1, self.min_characters):
            raise ConfigError(
                f"The greatest number of characters is {self.max_characters}, but must be at least 1 and not below "
                f"the least, {self.min_characters}."
            )
        if self.pii not in get_args(PiiPolicy):
            raise ConfigError(f"There is no way '{self.pii}' to treat personal data. Choose keep, drop or replace.")
        wrong = [code for code in self.languages if not (len(code) == 2 and code.isascii() and code.islower())]
        if wrong:
            raise ConfigError(f"'{wrong[0]}' is not the code of a language. Name two small letters, for instance en.")


def reason_to_drop(text: str, settings: FilterSettings) -> str | None:
    """Return why a document is left out, or None where it stays; the cheap tests come first.

    The words before a colon name the filter: `too short`, `too long`, `language: fr`, `quality: repeated lines`,
    `pii: email`.

    Raises:
        DataError: languages are asked for and the library is not installed.
    """
    length = len(text.strip()) if settings.min_characters or settings.max_characters is not None else 0
    if length < settings.min_characters:
        return "too short"
    if settings.max_characters is not None and length > settings.max_characters:
        return "too long"
    language = language_of(text) if settings.languages else None
    if language is not None and language not in settings.languages:
        return f"language: {language}"
    problem = quality_problem(text, is_english=language == "en") if settings.quality else None
    if problem is not None:
        return f"quality: {problem}"
    kinds = sorted(find_pii(text)) if settings.pii == "drop" else []
    return f"pii: {kinds[0]}" if kinds else None
