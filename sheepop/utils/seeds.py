"""Seeds derived from names, so that every random choice has its own stream and none depends on history."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Return a seed in [0, 2^63) that depends on every part, the same on all machines and Python versions.

    `derive_seed(seed, "dropout", step, micro_step)` gives each micro-step its own stream: a run that resumes
    needs no stored generator state, and one that is shared among processes draws the same numbers.
    """
    digest = hashlib.blake2b(repr(parts).encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
