"""Seeds derived from names, so that every random choice has its own stream and none depends on history."""

import hashlib

import numpy as np
from numpy.typing import NDArray


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every part, the same on all machines and Python versions.

    `derive_seed(seed, "dropout", step, micro_step)` gives each micro-step its own stream: a run that resumes
    needs no stored generator state, and one that is shared among processes draws the same numbers.
    """
    digest = hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of each value over all others: the finaliser of SplitMix64 (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
