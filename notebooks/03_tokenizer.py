# %% [markdown]
# # How a text is cut into tokens
#
# **For children.** A computer cannot read letters, it needs numbers. So we cut the text into building blocks and give
# each kind of block a number. Small blocks (single letters) can build everything, but you need very many. Big blocks
# (whole words) are quick, but the box can never hold all words of the world. The trick is to have both: small blocks
# for rare things, big ones for what you build all the time.
#
# **For scientists.** Three tokenizers over one interface: characters, words, and byte-level byte-pair encoding
# (Sennrich et al. 2016; over bytes: Radford et al. 2019, section 2.2). The choice decides the length of sequences, the
# size of the embedding, and in which unit the loss is measured; so compare models in *bits per byte*, never in loss
# per token.
#
# Each claim in the text is checked by an `assert` in the cell below it.

# %%
from collections import Counter
from itertools import pairwise

import numpy as np
from matplotlib.figure import Figure
from tokenizers.pre_tokenizers import ByteLevel

from sheepop.data.tokenizer import StreamDecoder, Tokenizer, bytes_per_token
from sheepop.learn.lessons import show, some_text

name, text = some_text(600_000)
train_text, other_text = text[:500_000], text[500_000:]
print(f"{len(train_text):,} characters of {name} to make tokenizers from, {len(other_text):,} to try them on")

# %% [markdown]
# ## Three ways to cut
#
# **Characters**: one block for each character that occurs. **Words**: one for each of the most frequent words, the
# space before a word included. **BPE**: 256 blocks for the 256 possible bytes, then the most useful pairs joined,
# again and again.


# %%
def blocks(tokenizer, phrase):
    """Return the pieces that a phrase is cut into."""
    return [tokenizer.token_text(token_id) for token_id in tokenizer.encode(phrase)]


char = Tokenizer.train("char", [train_text], vocab_size=200)
word = Tokenizer.train("word", [train_text], vocab_size=1000)
bpe = Tokenizer.train("bpe", [train_text], vocab_size=1000)
phrase = "What is the meaning of it?"
for tokenizer in (char, word, bpe):
    print(f"{tokenizer.kind:5} {len(blocks(tokenizer, phrase)):3} tokens: {' | '.join(blocks(tokenizer, phrase))}")

assert len(char.encode(phrase)) == len(phrase) == 26
assert len(word.encode(phrase)) <= len(bpe.encode(phrase)) < len(char.encode(phrase))

# %% [markdown]
# **What is lost.** Characters and BPE give every text back exactly, because a character that they do not know is
# spelled in bytes. The word tokenizer has nothing for a word outside of its thousand: it writes one mark, and the word
# is gone.

# %%
rare = "The zyzzyva hums: 羊🐑"
for tokenizer in (char, bpe):
    assert tokenizer.decode(tokenizer.encode(rare)) == rare
print(f"words give back {word.decode(word.encode(rare))!r}")
assert word.decode(word.encode(rare)) != rare
assert "�" in word.decode(word.encode(rare))

# %% [markdown]
# ## How BPE finds its pieces
#
# **For children.** Look for the two neighbours that stand side by side most often, glue them together, and count
# again. In the line below *s* and *h* meet **six** times, more often than any other two. So *sh* becomes a block. Then
# *sh* and *e* meet **five** times, and so on. After four rounds *sheep* is one block.

# %%
tale = "sheep she sheep shed sheep ship"


def join(pieces, pair):
    """Return the pieces with each occurrence of a pair of neighbours made one."""
    joined, at = [], 0
    while at < len(pieces):
        if tuple(pieces[at : at + 2]) == pair:
            joined.append(pieces[at] + pieces[at + 1])
            at += 2
        else:
            joined.append(pieces[at])
            at += 1
    return joined


cut = [list(part) for part in tale.split()]
counts_of_rounds = []
for number in range(1, 5):
    neighbours = Counter(pair for pieces in cut for pair in pairwise(pieces))
    pair, count = neighbours.most_common(1)[0]
    counts_of_rounds.append(count)
    cut = [join(pieces, pair) for pieces in cut]
    print(
        f"round {number}: {pair[0]} + {pair[1]}, seen {count} times → {'  '.join('|'.join(pieces) for pieces in cut)}"
    )

assert counts_of_rounds[:2] == [6, 5]
assert cut[0] == ["sheep"]

# %% [markdown]
# **For scientists.** That is the whole algorithm: greedy compression by the most frequent pair, inside words only. The
# same loop on a real text, over the bytes of each different word times how often it occurs, finds the merges of the
# project's tokenizer one for one. Where two pairs are equally frequent, the one with the lower numbers goes first.

# %%
frequencies = Counter(piece for piece, _ in ByteLevel(add_prefix_space=False).pre_tokenize_str(train_text))
words = [([*piece], count) for piece, count in frequencies.items()]
number_of = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()), start=1)}
merges = []
for _ in range(25):
    pairs = Counter()
    for pieces, count in words:
        for pair in pairwise(pieces):
            pairs[pair] += count
    best = min(pairs, key=lambda pair: (-pairs[pair], number_of[pair[0]], number_of[pair[1]]))
    number_of.setdefault("".join(best), len(number_of) + 1)
    joined = "".join(best)
    words = [(join(pieces, best) if joined in "".join(pieces) else pieces, count) for pieces, count in words]
    merges.append(best)

print("  ".join("+".join(pair).replace("Ġ", "␣").replace("Ċ", "⏎") for pair in merges))
learned = [
    bpe.token_text(token_id) for token_id in range(257, 257 + len(merges))
]  # 0 is the end of text, then 256 bytes
as_text = [("".join(pair)).replace("Ġ", " ").replace("Ċ", "\n") for pair in merges]
assert as_text == learned

# %% [markdown]
# ## Bytes per token
#
# **For children.** The more blocks we allow in the box, the bigger they get, and the fewer we need for a story.
#
# **For scientists.** Compression on held-out text grows with the vocabulary, ever more slowly: each doubling costs as
# many embedding rows as all before, and buys less. With 257 entries there are no merges, and a token is one byte.

# %%
sizes = [257, 512, 1024, 2048, 4096]
made = {size: Tokenizer.train("bpe", [train_text], vocab_size=size) for size in sizes}
per_token = [bytes_per_token(made[size], [other_text]) for size in sizes]
for size, value in zip(sizes, per_token, strict=True):
    print(f"{size:5} entries: {value:.2f} bytes per token")
gains = np.diff(per_token)
assert per_token[0] == 1
assert bool((gains > 0).all())
assert gains[-1] < gains[0]  # from 2048 to 4096 against from 257 to 512

# %% [markdown]
# A few tokens do most of the work: the hundred most frequent of 4,096 cover more than a third of the text, and most
# are rare (Zipf's law). A rare token is seen seldom in training, so its embedding is learned badly; that is one reason
# not to choose a vocabulary that is too large for the text.

# %%
usage = np.sort(np.bincount(made[4096].encode_array(train_text), minlength=4096))[::-1]
covered = usage[:100].sum() / usage.sum()
print(f"the 100 most frequent of 4,096 tokens cover {covered:.0%} of the text")
assert covered > 1 / 3
assert np.median(usage) < usage.mean() / 2

figure = Figure(figsize=(8, 3.2), layout="constrained")
left, right = figure.subplots(1, 2)
left.semilogx(sizes, per_token, "o-", color="#2166c4")
left.set(title="Larger boxes, larger blocks", xlabel="entries of the vocabulary", ylabel="bytes per token")
left.set_xticks(sizes, map(str, sizes))
left.minorticks_off()
right.loglog(np.arange(1, 4097), usage, color="#d1570a")
right.set(title="Few tokens do most of the work", xlabel="rank of the token", ylabel="how often it is used")
show(figure, "tokenizers")

# %% [markdown]
# ## Other languages
#
# **For children.** Our blocks were made from English. For another language the box has hardly any big blocks that fit,
# and it has to be built from tiny ones. It works, but it takes longer.
#
# **For scientists.** Everything is bytes of UTF-8, so nothing is ever unknown; but a Latin letter is 1 byte, a Greek
# or Cyrillic one 2, a Chinese character 3, and a sheep 4. With few merges to help, one character of the other scripts
# costs as many tokens as it has bytes, or nearly. Who pays by the token pays more for the same sentence, and the
# context of the model holds less of it.

# %%
sentences = {
    "English": "The sheep are on the green hill.",
    "German": "Die Schafe sind auf dem grünen Hügel.",
    "Greek": "Τα πρόβατα είναι στον πράσινο λόφο.",
    "Russian": "Овцы на зелёном холме.",
    "Chinese": "羊在绿色的山上。",
    "a sheep": "🐑",
}
tokens_per_character = {}
for language, sentence in sentences.items():
    tokens = bpe.encode(sentence)
    tokens_per_character[language] = len(tokens) / len(sentence)
    in_bytes = len(sentence.encode("utf-8"))
    print(
        f"{language:8} {len(sentence):3} characters, {in_bytes:3} bytes, {len(tokens):3} tokens: "
        f"{tokens_per_character[language]:.2f} tokens per character"
    )
    assert bpe.decode(tokens) == sentence
    assert len(tokens) <= in_bytes
assert [len(sign.encode("utf-8")) for sign in "eλж羊🐑"] == [1, 2, 2, 3, 4]
assert tokens_per_character["English"] < tokens_per_character["German"] < tokens_per_character["Greek"]
assert tokens_per_character["Greek"] < tokens_per_character["Chinese"] < tokens_per_character["a sheep"] + 1e-9

# %% [markdown]
# ## Surprises
#
# **1. The space belongs to the word.** " the" and "the" are two different tokens, and "The" and "THE" something else
# again. To the model they are different symbols; that they are related is something it has to learn.

# %%
spellings = [" the", "the", "The", "THE"]
print([blocks(bpe, spelling) for spelling in spellings])
assert len({tuple(bpe.encode(spelling)) for spelling in spellings}) == 4
assert len(bpe.encode(" the")) == 1

# %% [markdown]
# **2. Two halves are not the whole.** The tokens of two pieces, one behind the other, need not be the tokens of both
# together. So a prompt that ends in the middle of a word, or with a space, may be cut in a way that the model has
# never seen in training. End your prompts with a whole word and without a space behind it.

# %%
print(blocks(bpe, "of th"), "+", blocks(bpe, "e king"), "≠", blocks(bpe, "of the king"))
assert bpe.encode("of th") + bpe.encode("e king") != bpe.encode("of the king")
assert bpe.encode("of ") + bpe.encode("the") != bpe.encode("of the")

# %% [markdown]
# **3. Half a character.** Tokens are bytes, so one token may end in the middle of a sheep. Whoever prints a text while
# it is being written has to wait for the rest; `StreamDecoder` does. Without it there is a � in between.

# %%
ids = bpe.encode("a 🐑!")
print([bpe.decode([token_id]) for token_id in ids])
assert "�" in bpe.decode(ids[:3])
decoder = StreamDecoder(bpe)
streamed = [decoder.push(token_id) for token_id in ids]
print(streamed)
assert "�" not in "".join(streamed)
assert "".join(streamed) == "a 🐑!"

# %% [markdown]
# **4. What looks the same may not be.** "é" can be one character, or an "e" and an accent that is put on top of it.
# They look alike on paper, and have different tokens. Preparing a corpus can bring them to one form (`sheepop
# prepare`).

# %%
one, two = "caf\u00e9", "cafe\u0301"
print(one, bpe.encode(one), two, bpe.encode(two))
assert one != two
assert bpe.encode(one) != bpe.encode(two)

# %% [markdown]
# **5. A special token cannot be typed.** `<|endoftext|>` separates documents. If a text spells its name, it becomes
# ordinary letters, or anybody could end a document from inside.

# %%
print(blocks(bpe, "<|endoftext|>"))
assert bpe.end_of_text_id not in bpe.encode("<|endoftext|>")
assert bpe.decode(bpe.encode("<|endoftext|>")) == "<|endoftext|>"
assert bpe.decode([bpe.end_of_text_id]) == ""

# %% [markdown]
# ## Why bits per byte
#
# A tokenizer with larger pieces makes each guess harder and the guesses fewer. A loss of 2 nats per token is excellent
# at 4 bytes per token and poor at 1. Divided by the bytes, and by ln 2 to have bits, both are in the same unit:
# **0.72** and **2.89** bits per byte.

# %%
bits = [2 / (per_byte * np.log(2)) for per_byte in (4, 1)]
print(f"{bits[0]:.2f} and {bits[1]:.2f} bits per byte")
assert [round(value, 2) for value in bits] == [0.72, 2.89]

# %% [markdown]
# ## On your own text
#
#     sheepop inspect my_text.txt
#     sheepop prepare my_text.txt --output data/mine --tokenizer bpe --vocab-size 4096
#
# The first shows what several tokenizers would make of it.
