import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sheepop.config import ModelConfig
from sheepop.models.int8_cache import Int8PagedCache
from sheepop.models.paged_cache import CachedSequence, PagedCache, pages_in_memory
from sheepop.models.sizing import kv_cache_bytes
from sheepop.utils.errors import ConfigError
from sheepop.utils.memory import resident_bytes

CONFIG = ModelConfig(vocab_size=5, d_model=12, num_layers=2, num_heads=6, num_kv_heads=3, max_seq_len=40)


def stored(cache: PagedCache, token_ids: list[int]) -> CachedSequence:
    """A sequence of which everything is stored that could not be found."""
    sequence = CachedSequence()
    cache.adopt(sequence, token_ids)
    rest = token_ids[sequence.length :]
    assert cache.reserve(sequence, len(rest))
    cache.advance(sequence, rest)
    return sequence


def test_the_layout_is_the_one_that_other_code_reads() -> None:
    cache = PagedCache(CONFIG, 7, 5)
    assert len(cache.keys) == len(cache.values) == 2
    for pages in cache.keys + cache.values:
        assert pages.shape == (7, 3, 5, 2)
        assert pages.is_contiguous()
        assert pages.dtype == torch.float32
    sequence = stored(cache, [1, 2, 3, 4, 0, 1, 2])
    assert len(sequence.pages) == 2
    assert sequence.length == 7


@pytest.mark.parametrize("kind", [PagedCache, Int8PagedCache])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pages_take_memory_only_where_they_are_used(kind: type[PagedCache], dtype: torch.dtype) -> None:
    before = resident_bytes()
    cache = kind(CONFIG, 2**17, 16, dtype=dtype)
    assert kind.page_bytes(CONFIG, 16, dtype) * 2**17 > 2**26
    assert resident_bytes() - before < 2**25
    assert cache.keys[0].dtype == (torch.int8 if kind is Int8PagedCache else dtype)
    assert not cache.keys[1][-9:].any()


def test_a_beginning_that_was_stored_is_found_in_whole_pages_and_one_token_is_left_to_compute() -> None:
    cache = PagedCache(CONFIG, 20, 3)
    first = stored(cache, [0, 1, 2, 3, 4, 0, 1])
    for text, found in [
        ([0, 1, 2, 3, 4, 0, 1, 2, 3, 4], 6),
        ([0, 1, 2, 3, 4, 0, 1], 6),
        ([0, 1, 2, 3, 4, 0], 3),  # all of it is there, but the logits after its last token are not
        ([0, 1, 2, 3], 3),
        ([0, 1, 2], 0),
        ([0, 1, 4, 3, 4, 0, 1], 0),  # the second page is the same, what is before it is not
        ([3, 4, 0, 1], 0),
    ]:
        sequence = CachedSequence()
        assert cache.adopt(sequence, text) == found == sequence.length
        assert sequence.pages == first.pages[: found // 3]
        assert sequence.token_ids == text[:found]


def test_pages_outlive_their_text_until_their_place_is_needed() -> None:
    cache = PagedCache(CONFIG, 4, 2)
    early, late = stored(cache, [0, 1, 2]), stored(cache, [3, 4, 0])
    cache.release(early)
    cache.release(late)
    assert cache.num_free == 4
    other = CachedSequence()
    assert cache.reserve(other, 6)  # takes the two empty pages, then the one that was used longest ago
    assert cache.adopt(CachedSequence(), [0, 1, 2]) == 0
    assert cache.adopt(CachedSequence(), [3, 4, 0]) == 2


def test_the_end_of_a_text_is_forgotten_before_its_beginning() -> None:
    cache = PagedCache(CONFIG, 3, 1)
    cache.release(stored(cache, [0, 1, 2]))
    assert cache.reserve(CachedSequence(), 1)
    assert cache.adopt(CachedSequence(), [0, 1, 2, 3]) == 2


def test_too_little_room_changes_nothing() -> None:
    cache = PagedCache(CONFIG, 3, 2)
    sequence = stored(cache, [1, 2, 3])
    before = list(sequence.pages)
    assert not cache.reserve(sequence, 4)
    assert (sequence.pages, cache.num_free) == (before, 1)
    assert cache.reserve(sequence, 3)


def test_a_text_that_has_a_page_to_fill_does_not_take_over_another() -> None:
    cache = PagedCache(CONFIG, 6, 2)
    sequence = stored(cache, [1, 2])
    assert cache.reserve(sequence, 2)
    stored(cache, [1, 2, 3, 4, 0])
    assert cache.adopt(sequence, [1, 2, 3, 4, 0]) == 0


@pytest.mark.parametrize(("pages", "size", "name"), [(0, 4, "num_pages"), (3, 0, "page_size")])
def test_sizes_that_cannot_be_are_refused(pages: int, size: int, name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        PagedCache(CONFIG, pages, size)


def test_as_many_pages_as_half_of_the_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sheepop.models.paged_cache.available_bytes", lambda device: 1_000_000)
    page_bytes = PagedCache.page_bytes(CONFIG, 5, torch.float32)
    assert page_bytes == kv_cache_bytes(CONFIG, batch_size=1, length=5)
    assert pages_in_memory(page_bytes, torch.device("cpu")) == 500_000 // page_bytes


def test_pages_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = PagedCache.page_bytes(CONFIG, 5, torch.float32)
    monkeypatch.setattr("sheepop.utils.memory.available_bytes", lambda device: 7 * page_bytes)
    assert PagedCache(CONFIG, 7, 5).num_free == 7
    with pytest.raises(ConfigError, match=r"40 tokens take .* of memory, but .* are free"):
        PagedCache(CONFIG, 8, 5)
    Int8PagedCache(CONFIG, 8, 5)


@pytest.mark.parametrize(("sinks", "sink_pages"), [(0, 0), (1, 1), (2, 1), (3, 2)])
def test_with_a_sliding_window_pages_out_of_sight_are_given_back(sinks: int, sink_pages: int) -> None:
    cache = PagedCache(CONFIG.model_copy(update={"sliding_window": 4, "attention_sinks": sinks}), 9, 2)
    sequence = CachedSequence()
    for length in range(1, 40):
        assert cache.reserve(sequence, 1)
        cache.advance(sequence, [length % 5])
        # The next token sees the last three, in at most two pages, and has its own place.
        assert cache.num_free >= 9 - 3 - sink_pages
    cache.release(sequence)
    assert cache.num_free == 9


class AnyUse(RuleBasedStateMachine):
    """Texts come, grow and go; what a page is said to hold is always what was stored in it."""

    window = 0
    sinks = 0

    def __init__(self) -> None:
        super().__init__()
        sight = {"sliding_window": self.window, "attention_sinks": self.sinks}
        self.cache = PagedCache(CONFIG.model_copy(update=sight), 9, 2)
        self.content: dict[int, tuple[int, ...]] = {}  # page → the tokens up to its end that were written there
        self.sequences: list[CachedSequence] = []

    @rule(text=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def comes(self, text: list[int]) -> None:
        sequence = CachedSequence()
        self.cache.adopt(sequence, text)
        rest = text[sequence.length :]
        if self.cache.reserve(sequence, len(rest)):
            self.cache.advance(sequence, rest)
            self.note(sequence)
            self.sequences.append(sequence)
        else:
            self.cache.release(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token_id=st.integers(0, 1))
    def grows(self, data: st.DataObject, token_id: int) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        if self.cache.reserve(sequence, 1):
            self.cache.advance(sequence, [token_id])
            self.note(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def goes(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.sequences))
        self.sequences.remove(sequence)
        self.cache.release(sequence)

    def note(self, sequence: CachedSequence) -> None:
        for number, page in held(sequence):
            tokens = tuple(sequence.token_ids[: 2 * number + 2])
            before = self.content.get(page)
            owners = [other for other in self.sequences if (number, page) in held(other) and other is not sequence]
            assert not owners or before == tokens, "a page that others refer to was written"
            self.content[page] = tokens

    @invariant()
    def every_page_holds_what_its_text_says(self) -> None:
        for sequence in self.sequences:
            for number, page in held(sequence):
                assert self.content[page] == tuple(sequence.token_ids[: 2 * number + 2])
            unseen = max(0, sequence.length + 1 - self.window) // 2 if self.window else 0
            kept = [number for number in range(len(sequence.pages)) if number >= unseen or 2 * number < self.sinks]
            assert [number for number, _ in held(sequence)] == kept

    @invariant()
    def no_page_is_lost(self) -> None:
        used = {page for sequence in self.sequences for _, page in held(sequence)}
        assert self.cache.num_free == 9 - len(used)


class AnyUseWithAWindow(AnyUse):
    """The same, where a token sees three tokens back, so that pages before are given back."""

    window = 3


class AnyUseWithSinks(AnyUseWithAWindow):
    """The same, where the first three tokens, in two pages, stay in sight."""

    sinks = 3


def held(sequence: CachedSequence) -> list[tuple[int, int]]:
    """The places and numbers of the pages that a sequence refers to."""
    return [each for each in enumerate(sequence.pages) if each[0] not in sequence.dropped]


TestAnyUse, TestAnyUseWithAWindow = AnyUse.TestCase, AnyUseWithAWindow.TestCase
TestAnyUseWithSinks = AnyUseWithSinks.TestCase
for machine in (TestAnyUse, TestAnyUseWithAWindow, TestAnyUseWithSinks):
    machine.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


@given(text=st.lists(st.integers(0, 4), min_size=1, max_size=30), page_size=st.integers(1, 7))
def test_what_is_found_is_the_longest_beginning_of_whole_pages(text: list[int], page_size: int) -> None:
    cache = PagedCache(CONFIG, 40, page_size)
    stored(cache, text)
    assert cache.adopt(CachedSequence(), text) == (len(text) - 1) // page_size * page_size
