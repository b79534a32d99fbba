"""Which documents of a corpus are used, how often, and on which side: a pure function of content, settings and seed."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sheepop.utils.seeds import derive_seed, mix

# Behind the first document that does not fit into what is held out, this many more are tried.
TRIES_FOR_THE_REST = 1000


@dataclass(frozen=True)
class Plan:
    """One entry a document, in the order of the sources.

    Attributes:
        copies: how often it stands in its split; 0 leaves it out.
        held_out: whether it is on the validation side.
        train_share: for a single text the share of its characters that is trained on, the rest held out; else None.
        how: the split in words.
    """

    copies: NDArray[np.uint8]
    held_out: NDArray[np.bool_]
    train_share: float | None
    how: str


def first_occurrences(hashes: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Say of each document whether no earlier one has its hash."""
    order = np.argsort(hashes, kind="stable")
    in_order = hashes[order]
    first = np.ones(len(hashes), dtype=bool)
    first[order[1:][in_order[1:] == in_order[:-1]]] = False
    return first


def copies_by_weight(hashes: NDArray[np.uint64], weights: NDArray[np.float64], *, seed: int) -> NDArray[np.uint8]:
    """Return how often each document is used: its weight, rounded up or down by a draw that its content decides.

    Documents of a source with weight 2.5 stand twice, and half of them a third time.
    """
    whole = np.floor(weights)
    draw = mix(hashes ^ np.uint64(derive_seed(seed, "weight"))).astype(np.float64) / 2.0**64
    return (whole + (draw < weights - whole)).astype(np.uint8)


def make_plan(
    hashes: NDArray[np.uint64],
    sizes: NDArray[np.int64],
    copies: NDArray[np.uint8],
    *,
    val_fraction: float,
    seed: int,
) -> Plan:
    """Hold out about `val_fraction` of the bytes, by a seeded order of the content: names and order do not matter.

    Documents with one hash are on the same side. Held-out documents stand once, whatever their weight.

    Args:
        hashes: of the documents' content.
        sizes: bytes of each.
        copies: how often each is used; 0 for those that are left out.
    """
    order = np.flatnonzero(copies)
    keys = mix(hashes[order] ^ np.uint64(derive_seed(seed, "split")))  # one to one: equal keys are equal content
    by_key = np.argsort(keys, kind="stable")
    order, keys = order[by_key], keys[by_key]
    begins = np.flatnonzero(
        np.concatenate((np.ones(min(1, len(keys)), bool), keys[1:] != keys[:-1]))
    )  # of each content
    del by_key, keys  # with millions of documents, these arrays are the memory that planning takes
    if len(begins) <= 1:
        share = 1 - val_fraction
        return Plan(copies, np.zeros(len(hashes), bool), share, f"by position, the last {val_fraction:.0%} held out")
    group_sizes = np.add.reduceat(sizes[order], begins)
    target = val_fraction * int(group_sizes.sum())

    # Taken where that brings the share nearer to what was asked for, and something is left to train on.
    too_far = np.cumsum(group_sizes) - group_sizes / 2 > target
    count = min(int(np.argmax(too_far)) if too_far.any() else len(begins), len(begins) - 1)
    is_taken = np.arange(len(begins)) < count
    total = int(group_sizes[:count].sum())
    for candidate, size in enumerate(group_sizes[count : count + TRIES_FOR_THE_REST].tolist(), start=count):
        if total + size / 2 <= target and count + 1 < len(begins):
            is_taken[candidate] = True
            total += size
            count += 1
    if not count:
        is_taken[np.argmin(group_sizes)] = True
    held_out = np.zeros(len(hashes), dtype=bool)
    held_out[order] = np.repeat(is_taken, np.diff(begins, append=len(order)))
    copies = np.where(held_out, np.minimum(copies, 1), copies).astype(np.uint8)
    return Plan(copies, held_out, None, f"by document, {np.count_nonzero(is_taken)} of {len(begins)} held out")
