"""What a user did wrong, with the exit status that the command ends with.

The message of each is one clear paragraph: what is wrong, where, and what to do about it. Everything else
that can go wrong is a defect of ours, and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class SheepopError(ValueError):
    """Base of all errors that are shown to the user as a paragraph."""

    exit_status = 1


class ConfigError(SheepopError):
    """A setting, an option or a combination of them that cannot be run."""

    exit_status = 2


class DataError(SheepopError):
    """Text or a prepared corpus that cannot be read or used."""

    exit_status = 3


class ChangedError(DataError):
    """A file that something wrote to while it was read."""


class WorkerLostError(DataError):
    """A process that worked on text was ended from outside; what the others did is kept."""


class CheckpointError(SheepopError):
    """A model file or checkpoint that is missing, damaged or made for something else."""

    exit_status = 4


class NonFiniteError(SheepopError):
    """Training met a loss or a gradient that is not a number."""

    exit_status = 5


class NoSpaceError(SheepopError):
    """The disk is full."""

    exit_status = 6


class LostProcessError(SheepopError):
    """One of several processes of a run is gone."""


class Interrupted(SheepopError):  # noqa: N818 - the word that users know
    """A signal ended the run after its state was saved; the exit status is 128 + the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_status = 128 + signal_number


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `" Did you mean 'x'?"` for the nearest of the choices, or an empty string if none is near."""
    nearest = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean '{nearest[0]}'?" if nearest else ""
