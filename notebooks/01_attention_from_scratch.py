# %% [markdown]
# # Attention from scratch
#
# **For children.** Three words sit at a table: *the*, *cat*, *sat*. Each of them has a question ("who was it that
# sat?"), a name tag that says what it can answer ("I am an animal!"), and something to tell ("I have fur and four
# legs"). Everybody compares the own question with all name tags, listens most to whoever fits best, and
# goes home with a mixture of what was told. That is attention. Nothing else happens in this notebook.
#
# **For scientists.** Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1) is a differentiable look-up in a
# memory: $\mathrm{softmax}(QK^\top / \sqrt{C} + M)\,V$. We build it from loops over numbers that you can check in your
# head, then as two matrix products, and then show that it is what `sheepop.models.attention` computes, and what runs
# inside a whole model, number for number.
#
# Each claim in the text is checked by an `assert` in the cell below it: if a number were wrong, the notebook would
# stop.

# %%
import math

import torch
from matplotlib.figure import Figure

from sheepop.config import ModelConfig
from sheepop.learn.formula import relative_difference
from sheepop.learn.formulas import CHAPTERS
from sheepop.learn.lessons import show
from sheepop.learn.trace import trace
from sheepop.models.attention import attention, visible
from sheepop.models.optimized_attention import optimized_attention
from sheepop.models.transformer import TransformerModel

# %% [markdown]
# ## Questions, name tags, stories
#
# Each word gets three short lists of numbers: a **query** (its question), a **key** (its name tag) and a **value**
# (what it tells). In a real model they are learned; here we choose them, so that every number means something.
#
# The four numbers of queries and keys stand for *article, noun, verb, nothing yet*. "cat" asks for an article before it
# ("am I *a* cat or *the* cat?"), "sat" asks for a noun ("who?"), "the" asks for nothing. The four numbers of the values
# stand for *definite, furry, legs, action*.

# %%
words = ["the", "cat", "sat"]
query = torch.tensor([[0.0, 0, 0, 0], [2, 0, 0, 0], [0, 4, 0, 0]])  # (T, C): nothing, an article, a noun
key = torch.tensor([[2.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 2, 0]])  # (T, C): an article, a noun, a verb
value = torch.tensor([[1.0, 0, 0, 0], [0, 1, 4, 0], [0, 0, 0, 1]])  # (T, C): definite; furry on four legs; an action
T, C = query.shape
assert (T, C) == (3, 4)

# %% [markdown]
# ## How well do question and name tag fit?
#
# **For children.** Put the question and the name tag side by side, multiply the numbers that stand at the same place,
# and add up. Large numbers at the same places give a large sum: they fit. That sum is the *score*.
#
# The question of "sat" is `[0, 4, 0, 0]`, the name tag of "cat" is `[0, 2, 0, 0]`: 4 · 2 = 8. Divided by √4 = 2, the
# score is **4**. "cat" asks `[2, 0, 0, 0]`, and "the" is `[2, 0, 0, 0]`: 4, divided by 2, is **2**.

# %%
scores = torch.zeros(T, T)
for asking in range(T):
    for answering in range(T):
        for channel in range(C):
            scores[asking, answering] += query[asking, channel] * key[answering, channel]
        scores[asking, answering] /= math.sqrt(C)

print("      " + "".join(f"{word:>6}" for word in words))
for word, row in zip(words, scores.tolist(), strict=True):
    print(f"{word:>6}" + "".join(f"{score:6.1f}" for score in row))

assert scores[2, 1] == 4  # sat asks, cat answers
assert scores[1, 0] == 2  # cat asks, the answers
assert torch.equal(scores, query @ key.T / math.sqrt(C))  # three loops are one matrix product

# %% [markdown]
# ### Why divide by √C?
#
# **For children.** The longer the lists, the larger the sums become, only because more numbers are added. Whoever then
# has a slightly larger sum would get *all* of the attention, and nobody could learn to share.
#
# **For scientists.** If the components of q and k are independent with mean 0 and variance 1, then q·k has variance C:
# for C = 64 its standard deviation is **8**. A softmax over such scores is nearly one-hot, and its gradient nearly
# vanishes: with p one-hot, ∂p/∂z = diag(p) − ppᵀ = 0. The division brings the standard deviation back to **1**.

# %%
random = torch.Generator().manual_seed(0)
many_queries, many_keys = (torch.randn(20_000, 64, generator=random) for _ in range(2))
products = (many_queries * many_keys).sum(dim=1)
print(f"standard deviation of q·k: {products.std():.2f}; divided by √64: {products.div(8).std():.2f}")
assert abs(products.std() - 8) < 0.2
assert abs(products.div(math.sqrt(64)).std() - 1) < 0.025

ten_products = products[:10_000].view(1000, 10)  # a thousand places, each with ten keys
largest_raw = ten_products.softmax(dim=1).amax(dim=1).mean()
largest_scaled = ten_products.div(8).softmax(dim=1).amax(dim=1).mean()
print(f"The largest of ten weights is {largest_raw:.0%} on average without the division, {largest_scaled:.0%} with it.")
assert largest_raw > 0.8
assert largest_scaled < 0.4

# %% [markdown]
# ## No peeking
#
# **For children.** While you read a story aloud you cannot look at the words on the next page. A hand covers them: the
# *mask*. "the" sees only itself, "cat" sees "the" and itself, "sat" sees all three.
#
# **For scientists.** Scores of what comes later become −∞, whose exponential is exactly 0. So the output at place t
# does not depend on anything behind t, and a single pass over a text trains all its places at once. The mask is a
# lower triangle: of 9 pairs, **6** are left.

# %%
mask = torch.ones(T, T, dtype=torch.bool).tril()  # True where a word may look
assert mask.sum() == 6
assert torch.equal(mask, visible(T, T, device=torch.device("cpu")))  # the project's own
masked = scores.masked_fill(~mask, -math.inf)
print(masked)

# %% [markdown]
# ## Cutting the cake
#
# **For children.** Each word has one whole cake of attention to give away. It cuts the pieces by the scores: a big
# piece for a good fit, crumbs for the rest. "sat" gives **96 %** of its cake to "cat". "cat" gives **88 %** to "the".
# And "the", who sees nobody else, keeps **100 %**.
#
# **For scientists.** The softmax, $A_{t,s} = e^{E_{t,s}} / \sum_r e^{E_{t,r}}$. For "sat" it is
# $e^4 / (e^0 + e^4 + e^0) = 54.6 / 56.6$. Adding the same number to a row of scores changes nothing, which is how it is
# computed without overflow.

# %%
weights = masked.exp() / masked.exp().sum(dim=1, keepdim=True)
print("      " + "".join(f"{word:>7}" for word in words))
for word, row in zip(words, weights.tolist(), strict=True):
    print(f"{word:>6}" + "".join(f"{weight:7.1%}" for weight in row))

assert f"{weights[2, 1]:.0%}" == "96%"
assert f"{weights[1, 0]:.0%}" == "88%"
assert weights[0].tolist() == [1, 0, 0]
torch.testing.assert_close(weights.sum(dim=1), torch.ones(T))  # the whole cake, no more and no less
torch.testing.assert_close(weights, masked.softmax(dim=1))
torch.testing.assert_close(weights, (masked + 1000).softmax(dim=1))  # exp(1000) alone would be infinite

# %% [markdown]
# ## Going home with a mixture
#
# **For children.** "sat" listened to "cat" nearly all the time, so it goes home knowing: whoever sat here has fur, and
# nearly four legs (**3.86** of them; attention is never quite certain). Before, "sat" knew nothing about legs!
#
# **For scientists.** The output is a convex combination of the values: it stays inside their convex hull. Here is the
# whole of attention, in one line.

# %%
output = (query @ key.T / math.sqrt(C)).masked_fill(~mask, -math.inf).softmax(dim=1) @ value
print("         definite  furry   legs  action")
for word, row in zip(words, output.tolist(), strict=True):
    print(f"{word:>6}" + "".join(f"{number:8.2f}" for number in row))

assert round(output[2, 2].item(), 2) == 3.86
assert bool((output >= value.amin(dim=0)).all())
assert bool((output <= value.amax(dim=0)).all())

# %% [markdown]
# Two things follow that are easy to get wrong.
#
# **The past does not change.** Whatever the third word is, what the first two went home with stays the same. That is
# why a model can keep the keys and values of old words (the key/value cache) and never compute them again.
#
# **Attention knows no order.** If "the" and "cat" change places, "sat" goes home with the same mixture. A model has to
# be told the places of words by other means (`sheepop/models/positions.py`).


# %%
def attend(query, key, value):
    """Return what each word goes home with, (T, C)."""
    seen = torch.ones(len(query), len(key), dtype=torch.bool).tril()
    return (query @ key.T / math.sqrt(query.shape[1])).masked_fill(~seen, -math.inf).softmax(dim=1) @ value


other_query, other_key, other_value = query.clone(), key.clone(), value.clone()
for tensor in (other_query, other_key, other_value):
    tensor[2] = torch.tensor([7.0, -3, 5, 1])  # another third word
assert torch.equal(attend(other_query, other_key, other_value)[:2], output[:2])
assert not torch.equal(attend(other_query, other_key, other_value)[2], output[2])

swapped = [1, 0, 2]
torch.testing.assert_close(attend(query, key[swapped], value[swapped])[2], output[2])

# %% [markdown]
# ## The same in the project
#
# `sheepop.models.attention.attention` is what you have just written, for many texts and several *heads* at once. A
# head is one such conversation; several go on at the same table, each with questions of its own. Groups of heads may
# share name tags and stories (grouped-query attention, Ainslie et al. 2023). There is also a fast version on fused
# kernels, which never holds the whole table of weights. All three agree.

# %%
ours = output
reference = attention(query[None, None], key[None, None], value[None, None])[0, 0]  # one text, one head
fast = optimized_attention(query[None, None], key[None, None], value[None, None])[0, 0]
torch.testing.assert_close(ours, reference)
torch.testing.assert_close(ours, fast)

queries = torch.randn(2, 6, 5, 8, generator=random)  # (B, H, T, C): 2 texts, 6 heads, 5 words
keys, values = (torch.randn(2, 3, 5, 8, generator=random) for _ in range(2))  # (B, K, T, C): 3 heads, for two each
together = attention(queries, keys, values)
for text in range(2):
    for head in range(6):
        alone = attend(queries[text, head], keys[text, head // 2], values[text, head // 2])
        torch.testing.assert_close(together[text, head], alone)
print("12 conversations, one by one as above and all at once in the project: the same numbers")

# %% [markdown]
# ## The same inside a model
#
# Last, a whole model with two blocks of four heads. A *trace* runs it and hands out the tensors at its named points.
# The model has learned nothing yet, but its arithmetic is that of any other. From the queries, keys and values that it
# made, our own function gives the mixtures that it made, for each head of each block.

# %%
torch.manual_seed(0)
model = TransformerModel(
    ModelConfig(vocab_size=50, d_model=32, num_layers=2, num_heads=4, max_seq_len=16, init_std=0.3)
)
seen = trace(model, [3, 14, 15, 9, 26, 5, 35])
for layer in range(2):
    at = f"blocks.{layer}.attention."
    for head in range(4):
        mine = attend(seen[at + "query"][head], seen[at + "key"][head], seen[at + "value"][head])
        torch.testing.assert_close(mine, seen[at + "mixed"][head])
print("8 heads of a model: the same numbers")

# %% [markdown]
# The documentation's formulas are checked in the same way: each of them is an equation that is printed *and* evaluated
# on the tensors of a run. This is the chapter on attention, evaluated on the trace from above.

# %%
for formula in CHAPTERS["attention"]:
    if formula.is_traced and formula.missing(model.config) is None:
        difference = max(relative_difference(*formula.traced(seen, layer)) for layer in range(2))
        print(f"{formula.title:32} differs from the model's own numbers by {difference:.0e} of their size")
        assert difference < 1e-5

# %%
figure = Figure(figsize=(7.5, 3), layout="constrained")
for axes, shares, names, title in zip(
    figure.subplots(1, 2),
    (weights, seen["blocks.0.attention.weights"][0]),
    (words, [f"token {number}" for number in seen.token_ids.tolist()]),
    ("our three words", "an untrained model, head 0"),
    strict=True,
):
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(title=title, xlabel="looks at", ylabel="word", xticks=range(len(names)), yticks=range(len(names)))
    axes.set_xticklabels(names, rotation=45, ha="right")
    axes.set_yticklabels(names)
figure.colorbar(image, ax=figure.axes, label="share of attention")
show(figure, "attention")

# %% [markdown]
# ## What to remember
#
# 1. Scores: how well questions and name tags fit, `query @ key.T / √C`.
# 2. A mask hides the future; a softmax turns scores into shares that add up to 1.
# 3. The output is a mixture of values by these shares.
#
# That is all of attention. What makes it clever is that the numbers in queries, keys and values are *learned*: the next
# notebook, `02_train_in_a_minute.py`, does that.
