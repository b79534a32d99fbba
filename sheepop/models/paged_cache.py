"""Keys and values of many texts of any lengths, in pages that are taken as a text grows and shared where texts agree.

The layout is that of virtual memory (Kwon et al. 2023, PagedAttention): a text's tokens lie in pages of a fixed size,
wherever one was free. A full page is known by a digest of all tokens up to its end, so that a text that begins like
an earlier one takes over its pages instead of computing them again.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.models.sizing import CONVOLUTIONS, kv_cache_bytes
from sheepop.utils.errors import ConfigError
from sheepop.utils.memory import available_bytes, check_available, zeros_on_demand

DIGEST_BYTES = 16  # long enough that two different beginnings never meet, by chance or by intent
SHARE_OF_MEMORY = 0.5  # of what is available, at the most


@dataclass(eq=False)
class CachedSequence:
    """One text in a `PagedCache`.

    Attributes:
        pages: numbers of its pages in order; token t lies in `pages[t // page_size]`, at place t % page_size.
        token_ids: the tokens whose keys and values are stored.
        digests: of each of its full pages, the digest of all tokens up to the page's end.
        dropped: which of its pages were given back because no later token sees them (a model with a sliding window);
            their numbers in `pages` mean nothing any more.
    """

    pages: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    dropped: range = range(0)

    @property
    def length(self) -> int:
        """How many tokens are stored."""
        return len(self.token_ids)


class PagedCache:
    """Pages of keys and values, for each layer tensors (num_pages, K, page_size, C).

    A page belongs to as many sequences as refer to it. One that nobody refers to any more keeps its content, to be
    found again, until its place is needed; the one that was used longest ago goes first.

    What is stored depends on the weights: the cache of a model whose weights change must be made anew.

    Raises:
        ConfigError: an option is out of range, or the pages do not fit into the memory that is free.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_pages: int,
        page_size: int = 16,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        for name, value in (("num_pages", num_pages), ("page_size", page_size)):
            if value < 1:
                raise ConfigError(f"The option '{name}' is {value}, but must be at least 1.")
        self.num_layers, self.dtype = config.num_layers, dtype
        self.num_pages, self.page_size = num_pages, page_size
        self.num_heads, self.device = config.num_kv_heads, torch.device(device)
        check_available(
            num_pages * self.page_bytes(config, page_size, dtype),
            self.device,
            f"The keys and values of {num_pages * page_size} tokens take",
            "Ask for less at a time, or free memory.",
        )
        self.num_recent = config.ngram_order - 1  # tokens before a new one that the embedding reads
        # What short convolutions read, as keys of so many heads of the stream's width.
        self.inputs = [
            zeros_on_demand((num_pages, CONVOLUTIONS, page_size, config.d_model), device=self.device, dtype=dtype)
            for _ in range(config.num_layers if config.conv_width > 1 else 0)
        ]
        # What the copy head finds the tokens of a page by, and the tokens.
        make = zeros_on_demand if config.copy_width else torch.zeros  # the former cannot be empty
        self.copy_keys = make((num_pages, page_size, config.copy_width), device=self.device, dtype=dtype)
        self.token_ids = make((num_pages, page_size if config.copy_width else 0), device=self.device, dtype=torch.int64)
        # A window keeps what short convolutions read in sight, too; a copy head sees all of the text.
        window = 0 if config.copy_width else config.sliding_window
        self.window = window and max(window, config.conv_width)
        self.sink_pages = self.pages_for(config.attention_sinks) if window else 0
        self._references = [0] * num_pages
        self._empty = list(range(num_pages))
        self._idle: OrderedDict[int, None] = OrderedDict()  # with content and without references, oldest first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self.allocate((num_pages, config.num_kv_heads, page_size, config.head_dim))

    def allocate(self, shape: tuple[int, int, int, int]) -> None:
        """Make the tensors of all layers, (num_pages, K, page_size, C)."""
        # Zeros, because attention multiplies also what it hides, by 0, and memory may hold what is not a number.
        self.keys, self.values = (
            [zeros_on_demand(shape, device=self.device, dtype=self.dtype) for _ in range(self.num_layers)]
            for _ in range(2)
        )

    @classmethod
    def page_bytes(cls, config: ModelConfig, page_size: int, dtype: torch.dtype) -> int:
        """Return the bytes of one page in all layers."""
        return kv_cache_bytes(config, batch_size=1, length=page_size, bytes_per_number=dtype.itemsize)

    @property
    def num_free(self) -> int:
        """How many pages can be taken, those with content that nobody refers to included."""
        return len(self._empty) + len(self._idle)

    def pages_for(self, length: int) -> int:
        """Return how many pages `length` tokens take."""
        return -(-length // self.page_size)

    def next_digest(self, sequence: CachedSequence, token_ids: Sequence[int]) -> bytes | None:
        """Return the digest of the next page of a sequence that goes on as `token_ids`, the whole text.

        None unless the stored tokens fill their pages and there are enough to fill another one and leave a token over,
        which has to be computed for the logits after it.
        """
        begin, end = sequence.length, sequence.length + self.page_size
        if begin % self.page_size or end >= len(token_ids):
            return None
        return _digest(sequence.digests, token_ids[begin:end])

    def adopt(self, sequence: CachedSequence, token_ids: Sequence[int]) -> int:
        """Let a sequence that goes on as `token_ids`, the whole text, refer to pages that hold what comes next.

        Returns:
            How many tokens need not be computed.
        """
        before = sequence.length
        while (digest := self.next_digest(sequence, token_ids)) is not None:
            page = self._page_of.get(digest)
            # Beyond its tokens the sequence has a page already: it is going to fill that one.
            if page is None or len(sequence.pages) > len(sequence.digests):
                break
            self._idle.pop(page, None)
            self._references[page] += 1
            sequence.pages.append(page)
            sequence.digests.append(digest)
            sequence.token_ids += token_ids[sequence.length : sequence.length + self.page_size]
        self._drop_unseen(sequence)
        return sequence.length - before

    def reserve(self, sequence: CachedSequence, count: int) -> bool:
        """Give a sequence the pages for `count` more tokens; if there are not enough, change nothing, return False."""
        missing = self.pages_for(sequence.length + count) - len(sequence.pages)
        if missing > self.num_free:
            return False
        for _ in range(missing):
            page = self._empty.pop() if self._empty else self._evict()
            self._references[page] = 1
            sequence.pages.append(page)
        return True

    def advance(self, sequence: CachedSequence, token_ids: Sequence[int]) -> None:
        """Count tokens whose keys and values every layer has stored; pages that they fill can be found from now on."""
        sequence.token_ids += token_ids
        while (len(sequence.digests) + 1) * self.page_size <= sequence.length:
            number = len(sequence.digests)
            begin = number * self.page_size
            digest = _digest(sequence.digests, sequence.token_ids[begin : begin + self.page_size])
            sequence.digests.append(digest)
            if digest not in self._page_of:  # else another text has just computed the same
                page = sequence.pages[number]
                self._page_of[digest], self._digest_of[page] = page, digest
        self._drop_unseen(sequence)

    def first_in_window(self, length: int) -> int:
        """Return the first token that the one behind `length` tokens sees, sinks aside."""
        return max(0, length + 1 - self.window) if self.window else 0

    def release(self, sequence: CachedSequence) -> None:
        """Take all pages from a sequence, which is empty afterwards."""
        # The end of a text first, to be the first that makes room: fewer texts begin with all of it.
        for number in reversed(range(len(sequence.pages))):
            if number not in sequence.dropped:
                self._give_back(sequence.pages[number])
        sequence.pages, sequence.token_ids, sequence.digests, sequence.dropped = [], [], [], range(0)

    def forget(self) -> None:
        """Let no page be found again that is there now; sequences keep theirs."""
        self._empty += self._idle
        self._idle.clear()
        self._page_of.clear()
        self._digest_of.clear()

    def store(self, layer: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Store keys and values (N, C) of single heads at `places` (N,): (page·K + head)·page_size + place."""
        for pages, new in ((self.keys[layer], key), (self.values[layer], value)):
            pages.view(-1, pages.shape[-1]).index_copy_(0, places, new)

    def load(self, layer: int, blocks: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values (N, page_size, C) of single heads of pages; `blocks` (N,) are page·K + head."""
        keys, values = (pages[layer].flatten(0, 1).index_select(0, blocks) for pages in (self.keys, self.values))
        return keys, values

    def _drop_unseen(self, sequence: CachedSequence) -> None:
        """Give back the pages whose tokens are all out of sight for what is still to come."""
        begin = max(self.sink_pages, sequence.dropped.stop)
        end = self.first_in_window(sequence.length) // self.page_size
        for page in sequence.pages[begin:end]:
            self._give_back(page)
        if begin < end:
            sequence.dropped = range(self.sink_pages, end)

    def _give_back(self, page: int) -> None:
        self._references[page] -= 1
        if self._references[page]:
            return
        if page in self._digest_of:
            self._idle[page] = None
        else:
            self._empty.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._digest_of.pop(page)]
        return page


def pages_in_memory(page_bytes: int, device: torch.device) -> int:
    """Return how many pages half of the memory holds that this process may still take."""
    return int(SHARE_OF_MEMORY * available_bytes(device)) // page_bytes


def _digest(before: Sequence[bytes], token_ids: Sequence[int]) -> bytes:
    """Return the digest of a page's tokens and of all pages before it, whose digests are `before`."""
    content = (before[-1] if before else b"") + array("q", token_ids).tobytes()
    return hashlib.blake2b(content, digest_size=DIGEST_BYTES).digest()
