"""Which windows make step n: a pure function of (seed, n), so that the position in the data is one integer."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sheepop.utils.seeds import derive_seed, mix

FEISTEL_ROUNDS = 4
PERMUTE_AT_ONCE = 4096  # places: hundreds cost hardly more than one


@dataclass(frozen=True)
class Sampler:
    """Every window once an epoch, in an order of its own, whatever the number of processes.

    Steps count from 0 over the whole run. The last step of an epoch takes what is left, so epochs do not overlap.
    """

    num_windows: int
    batch_size: int
    gradient_accumulation_steps: int
    seed: int

    @property
    def windows_per_step(self) -> int:
        """Sequences of one full step."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def steps_per_epoch(self) -> int:
        """Steps that visit each window once."""
        return -(-self.num_windows // self.windows_per_step)

    def epoch_of(self, step: int) -> int:
        """Return the epoch, counted from 0, that a step belongs to."""
        return step // self.steps_per_epoch

    def shift_of(self, step: int, stride: int) -> int:
        """Return how many tokens earlier than usual the windows of a step begin: none in the first epoch.

        Windows `stride` apart, all of them moved by as much, the first over the beginning to the text's end, still
        have every token as a target. A text that is read again and again is learned by heart later where it is cut in
        other places: in one run of three epochs the loss on other texts was 0.3 % lower (`docs/log.md`, 2026-11-29).
        """
        epoch = self.epoch_of(step)
        return derive_seed(self.seed, "shift", epoch) % stride if epoch else 0

    def windows_of(self, step: int) -> NDArray[np.int64]:
        """Return the indices of the windows of a step."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        first = step_in_epoch * self.windows_per_step
        last = min(first + self.windows_per_step, self.num_windows) - 1
        numbers = range(first // PERMUTE_AT_ONCE, last // PERMUTE_AT_ONCE + 1)
        blocks = [_permute_block(number, self.num_windows, self.seed, epoch) for number in numbers]
        joined = blocks[0] if len(blocks) == 1 else np.concatenate(blocks)
        begin = numbers[0] * PERMUTE_AT_ONCE
        return joined[first - begin : last + 1 - begin]

    def micro_batches(self, step: int, rank: int = 0, world_size: int = 1) -> list[NDArray[np.int64]]:
        """Return this process's micro-batches of a step: every `world_size`-th of all, from the `rank`-th on."""
        windows = self.windows_of(step)
        batches = [windows[at : at + self.batch_size] for at in range(0, len(windows), self.batch_size)]
        return batches[rank::world_size]


@lru_cache(maxsize=16)
def _permute_block(number: int, size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Permute the `number`-th run of an epoch's places; kept, as it serves many small steps."""
    first = number * PERMUTE_AT_ONCE
    places = np.arange(first, min(first + PERMUTE_AT_ONCE, size))
    block = permute(places, size, seed=derive_seed(seed, "epoch", epoch))
    block.flags.writeable = False  # every caller gets the same array
    return block


def permute(indices: NDArray[Any], size: int, *, seed: int) -> NDArray[np.int64]:
    """Map indices below `size` one-to-one onto indices below `size`, in an order that `seed` decides.

    A Feistel network (Luby and Rackoff 1988) is a permutation of the numbers of an even number of bits, whatever its
    round function; what falls outside `size` is mapped again until it falls inside (cycle walking: Black and
    Rogaway 2002). So any place of the shuffle can be asked for at once, without memory for the others.
    """
    half_bits = max(1, -(-(size - 1).bit_length() // 2))
    half = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    keys = [np.uint64(derive_seed(seed, "round", number)) for number in range(FEISTEL_ROUNDS)]

    def network(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> half, values & mask
        for key in keys:
            left, right = right, left ^ (mix(right ^ key) & mask)
        return (left << half) | right

    values = network(np.asarray(indices, dtype=np.uint64))
    outside = values >= size
    while outside.any():
        values[outside] = network(values[outside])
        outside = values >= size
    return values.astype(np.int64)
