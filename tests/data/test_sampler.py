import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sheepop.data.sampler import Sampler, permute
from sheepop.utils.seeds import derive_seed

samplers = st.builds(
    Sampler,
    num_windows=st.integers(1, 200),
    batch_size=st.integers(1, 7),
    gradient_accumulation_steps=st.integers(1, 5),
    seed=st.integers(0, 2**63 - 1),
)


@settings(deadline=None)
@given(samplers, st.integers(0, 3))
def test_an_epoch_visits_each_window_once(sampler: Sampler, epoch: int) -> None:
    first = epoch * sampler.steps_per_epoch
    steps = range(first, first + sampler.steps_per_epoch)
    windows = [window for step in steps for window in sampler.windows_of(step).tolist()]
    assert sorted(windows) == list(range(sampler.num_windows))
    assert {sampler.epoch_of(step) for step in steps} == {epoch}


@settings(deadline=None)
@given(samplers, st.integers(0, 500), st.integers(1, 6))
def test_processes_share_the_micro_batches_of_one(sampler: Sampler, step: int, world_size: int) -> None:
    alone = sampler.micro_batches(step)
    shares = [sampler.micro_batches(step, rank=rank, world_size=world_size) for rank in range(world_size)]
    together = [shares[index % world_size][index // world_size] for index in range(len(alone))]
    assert sum(map(len, shares)) == len(alone)
    for mine, theirs in zip(alone, together, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert np.concatenate(alone).tolist() == sampler.windows_of(step).tolist()
    assert all(0 < len(batch) <= sampler.batch_size for batch in alone)
    assert len(alone) <= sampler.gradient_accumulation_steps


def test_a_step_depends_on_nothing_but_seed_and_step() -> None:
    sampler = Sampler(101, 4, 3, seed=5)
    in_order = [sampler.windows_of(step).tolist() for step in range(40)]
    again = Sampler(101, 4, 3, seed=5)
    assert [again.windows_of(step).tolist() for step in reversed(range(40))] == in_order[::-1]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    whole = [Sampler(1000, 1000, 1, seed=seed).windows_of(step) for seed in (1, 2) for step in (0, 1)]
    for number, order in enumerate(whole):
        assert (order == np.arange(1000)).sum() < 20
        for other in whole[:number]:
            assert (order == other).sum() < 20


def test_each_epoch_but_the_first_moves_its_windows_by_a_part_of_the_stride() -> None:
    sampler = Sampler(10, 5, 1, seed=5)
    shifts = [sampler.shift_of(step, 64) for step in range(80)]
    assert shifts[::2] == shifts[1::2]  # two steps an epoch
    assert shifts[0] == 0
    assert all(0 <= shift < 64 for shift in shifts)
    assert len(set(shifts)) > 20
    assert shifts != [Sampler(10, 5, 1, seed=6).shift_of(step, 64) for step in range(80)]


def test_the_order_looks_shuffled() -> None:
    """Each of a few windows lands in each fourth of the epoch about equally often."""
    quarters = np.zeros((4, 4))
    rounds = 800
    for seed in range(rounds):
        places = np.argsort(Sampler(64, 64, 1, seed=seed).windows_of(0))
        for window in range(4):
            quarters[window, places[window] // 16] += 1
    # Five standard deviations of a binomial with p = 1/4.
    assert np.abs(quarters - rounds / 4).max() < 5 * np.sqrt(rounds * 3 / 16)


@pytest.mark.parametrize("step", [0, 10**9])
def test_a_huge_corpus_needs_no_memory(step: int) -> None:
    sampler = Sampler(10**12, 16, 2, seed=3)
    windows = sampler.windows_of(step)
    assert len(set(windows.tolist())) == 32
    assert windows.min() >= 0
    assert windows.max() < 10**12


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(0, 2**62))
def test_permute_is_a_permutation_whatever_is_asked_at_once(size: int, seed: int) -> None:
    whole = permute(np.arange(size), size, seed=seed)
    assert np.array_equal(np.sort(whole), np.arange(size))
    some = np.random.default_rng(seed).integers(0, size, 5)
    assert permute(some, size, seed=seed).tolist() == whole[some].tolist()


@settings(deadline=None)
@given(st.integers(1, 30_000), st.integers(1, 9000), st.integers(0, 50))
def test_the_kept_blocks_change_no_order(num_windows: int, batch_size: int, step: int) -> None:
    sampler = Sampler(num_windows, batch_size, 1, seed=8)
    epoch, place = divmod(step, sampler.steps_per_epoch)
    places = np.arange(place * batch_size, min((place + 1) * batch_size, num_windows))
    wanted = permute(places, num_windows, seed=derive_seed(8, "epoch", epoch))
    assert sampler.windows_of(step).tolist() == wanted.tolist()


def test_what_a_caller_does_with_a_step_leaves_others_alone() -> None:
    sampler = Sampler(50, 10, 1, seed=8)
    with pytest.raises(ValueError, match="read-only"):
        sampler.windows_of(0)[:] = 0
