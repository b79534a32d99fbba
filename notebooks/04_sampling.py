# %% [markdown]
# # From probabilities to a word
#
# **For children.** After "Once upon a" the model does not say *one* word. It fills a big bag with slips of paper: very
# many say "time", some say "day", one says "cucumber". Then somebody draws a slip. In this notebook we change the bag
# before the draw: we can make the frequent slips more frequent, throw out the silly ones, or take out words that were
# just said.
#
# **For scientists.** The model's output is a distribution p(next token | context) from a softmax over logits. Sampling
# draws from a truncated and reshaped version of it: temperature, top-k (Fan et al. 2018), top-p (Holtzman et al.
# 2020), min-p (Nguyen et al. 2024), repetition penalty (Keskar et al. 2019). Here they are on the distribution of a
# real, if small, model that is trained in the first cell.
#
# Each claim in the text is checked by an `assert` in the cell below it.

# %%
import math

import torch
from matplotlib.figure import Figure

from sheepop.generation.completion import complete
from sheepop.generation.sampling import (
    SamplingSettings,
    distribution,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    sample_token,
)
from sheepop.learn.lessons import held_out_loss, show, some_text, train_small_model
from sheepop.learn.trace import trace_text

name, text = some_text(500_000)
small = train_small_model(text, steps=150)
model, tokenizer = small.model, small.tokenizer
print(f"trained on {name}; loss on held-out text {held_out_loss(model, small.val_tokens):.2f} nats per token")

# %% [markdown]
# ## The bag
#
# The model gives a *logit*, a score, to each of the 512 tokens of its vocabulary. The softmax makes probabilities of
# them: all above 0, and together 1. We look at what it believes after a piece of text that it has never seen.

# %%
prompt = tokenizer.decode(small.val_tokens[:20])
logits = trace_text(model, tokenizer, prompt, ["logits"])["logits"][-1]  # (V,)
said = torch.tensor(tokenizer.encode(prompt))
probabilities = logits.softmax(dim=-1)


def shown(token_id):
    """Return a token as it can be read."""
    return repr(tokenizer.token_text(int(token_id)))


print(f"After {prompt!r}:")
for probability, token_id in zip(*probabilities.topk(8), strict=True):
    print(f"  {shown(token_id):12} {probability:6.1%}  logit {logits[token_id]:5.2f}")
assert len(logits) == 512
assert bool((probabilities > 0).all())
assert math.isclose(probabilities.sum(), 1, rel_tol=1e-5)

# %% [markdown]
# ## Temperature
#
# **For children.** Cold water stands still, hot water dances. At a low temperature the model nearly always says the
# likeliest word; at a high one anything can happen.
#
# **For scientists.** Logits are divided by T: p ∝ exp(z/T). The entropy rises with T, strictly where the logits are
# not all equal (its derivative is the variance of the logits under p, over T³). T → 0 is the argmax, T → ∞ uniform: ln
# 512 = 6.24 nats. The order of the tokens never changes.

# %%
temperatures = [0.25, 0.5, 0.8, 1.0, 1.5, 3.0]
at_temperature = {t: distribution(logits, SamplingSettings(temperature=t), said) for t in temperatures}
entropies = [-(p * p.clamp_min(1e-30).log()).sum().item() for p in at_temperature.values()]
for t, entropy in zip(temperatures, entropies, strict=True):
    print(f"T = {t:4}: entropy {entropy:.2f} nats, the likeliest token has {at_temperature[t].max():.1%}")
assert entropies == sorted(entropies)
assert entropies[-1] < math.log(512)
assert round(math.log(512), 2) == 6.24
assert len({int(p.argmax()) for p in at_temperature.values()}) == 1
torch.testing.assert_close(at_temperature[1.0], probabilities)
torch.testing.assert_close(at_temperature[0.5], probabilities**2 / (probabilities**2).sum())  # T = 1/2 squares them

step, t = 1e-3, 1.5  # the derivative of the entropy, measured and by the formula
hotter, colder = ((logits.double() / (t + sign * step)).softmax(-1) for sign in (1, -1))
measured = (-(hotter * hotter.log()).sum() + (colder * colder.log()).sum()) / (2 * step)
p = (logits.double() / t).softmax(-1)
variance = (p * logits.double() ** 2).sum() - (p * logits.double()).sum() ** 2
assert math.isclose(measured, variance / t**3, rel_tol=1e-4)

# %%
figure = Figure(figsize=(8, 3.2), layout="constrained")
order = probabilities.argsort(descending=True)[:15]
for axes, t in zip(figure.subplots(1, 3, sharey=True), (0.5, 1.0, 1.5), strict=True):
    axes.bar(range(15), at_temperature[t][order], color="#2166c4")
    axes.set(title=f"temperature {t}", xticks=range(15))
    axes.set_xticklabels([shown(token_id) for token_id in order], rotation=90, fontsize=7)
figure.axes[0].set_ylabel("probability")
show(figure, "temperature")

# %% [markdown]
# ## Throwing slips away: top-k, top-p, min-p
#
# **For children.** Hundreds of silly words have a tiny chance each, but together they are drawn quite often! So we
# throw them out before the draw. *top-k* keeps the k likeliest. *top-p* keeps the likeliest until they make up a
# share, say nine tenths, of all slips. *min-p* keeps whatever is at least, say, a tenth as likely as the best.
#
# **For scientists.** top-k keeps a fixed number, however sure the model is. top-p keeps the smallest set whose mass
# reaches p: few tokens where the model is sure, many where it is not. min-p's threshold is relative to the most likely
# token, so it follows the model's sureness too. What is left is normalised again, so ratios between survivors do not
# change.

# %%
kept_k, kept_p, kept_m = keep_top_k(logits, 5), keep_top_p(logits, 0.9), keep_min_p(logits, 0.1)
for label, kept in (("top-k 5", kept_k), ("top-p 0.9", kept_p), ("min-p 0.1", kept_m)):
    alive = kept.isfinite()
    print(f"{label:10} keeps {int(alive.sum()):3} tokens with {probabilities[alive].sum():.1%} of the probability")

assert kept_k.isfinite().sum() == 5
nucleus = probabilities[kept_p.isfinite()]
assert nucleus.sum() >= 0.9 - 1e-5
assert nucleus.sum() - nucleus.min() < 0.9  # without its least likely token it would fall short: it is the smallest
assert torch.equal(kept_m.isfinite(), probabilities >= 0.1 * probabilities.max())
best, second = probabilities.topk(2).indices
before, after = probabilities[best] / probabilities[second], kept_p.softmax(-1)[best] / kept_p.softmax(-1)[second]
assert math.isclose(before, after, rel_tol=1e-4)

# %% [markdown]
# How many tokens they keep depends on how sure the model is. Over all places of a held-out text, top-k keeps 5
# everywhere, top-p sometimes fewer than twenty and sometimes more than fifty: it keeps more where the entropy is
# higher.

# %%
places = trace_text(model, tokenizer, tokenizer.decode(small.val_tokens[:60]), ["logits"])["logits"]  # (T, V)
sure = -(places.softmax(-1) * places.log_softmax(-1)).sum(-1)  # (T,) entropy
counts = {
    "top-k 5": keep_top_k(places, 5).isfinite().sum(-1),
    "top-p 0.9": keep_top_p(places, 0.9).isfinite().sum(-1),
    "min-p 0.1": keep_min_p(places, 0.1).isfinite().sum(-1),
}
for label, count in counts.items():
    print(f"{label:10} keeps {int(count.min()):3} to {int(count.max()):3} tokens")
assert bool((counts["top-k 5"] == 5).all())
assert counts["top-p 0.9"].min() < 20
assert counts["top-p 0.9"].max() > 50
assert torch.corrcoef(torch.stack((sure, counts["top-p 0.9"].float())))[0, 1] > 0.7

figure = Figure(figsize=(7.5, 3.2), layout="constrained")
axes = figure.subplots()
for (label, count), colour in zip(counts.items(), ("#6e7781", "#2166c4", "#d1570a"), strict=True):
    axes.plot(sure, count, "o", markersize=4, color=colour, label=label)
axes.set(xlabel="entropy in nats: how unsure the model is", ylabel="tokens kept", yscale="log")
axes.legend()
show(figure, "kept")

# %% [markdown]
# ## Not again!
#
# **For children.** A child that says "and then … and then … and then" is told: you have said that already. The
# *repetition penalty* makes words that were just said less likely.
#
# **For scientists.** Positive logits of tokens that occurred are divided by the penalty, negative ones multiplied, once
# however often they occurred. Each of them falls (a logit of exactly 0 would stay), all others keep theirs, so their
# probabilities rise. It is a crude tool: logits have no natural zero, and words that must repeat suffer too.

# %%
penalised = distribution(logits, SamplingSettings(repetition_penalty=1.5), said)
repeated = torch.zeros(512, dtype=torch.bool)
repeated[said] = True
print(f"said before: {probabilities[repeated].sum():.1%} without, {penalised[repeated].sum():.1%} with the penalty")
assert penalised[repeated].sum() < probabilities[repeated].sum()
assert bool((penalised[~repeated] > probabilities[~repeated]).all())

# %% [markdown]
# ## The draw, and the seed
#
# A *seed* is where the sequence of random numbers begins. The same seed gives the same draws, so the same text, on the
# same machine; another seed gives another. Four thousand draws come out as the probabilities say, up to the luck of
# the draw: each count within five of its standard deviations.

# %%
settings = SamplingSettings(temperature=0.8, top_k=20)
expected = distribution(logits, settings, said)
generator = torch.Generator().manual_seed(7)
draws = torch.tensor([sample_token(logits, settings, generator, said.tolist()) for _ in range(4000)])
observed = draws.bincount(minlength=512)
deviation = (4000 * expected * (1 - expected)).sqrt()
print(f"expected {[round(4000 * p) for p in expected.topk(5).values.tolist()]}")
print(f"observed {observed[expected.topk(5).indices].tolist()}")
assert bool(((observed - 4000 * expected).abs() <= 5 * deviation + 1).all())
assert observed[expected == 0].sum() == 0  # what was thrown out is never drawn


def write(settings, *, seed=1, tokens=40, num_samples=1):
    """Return what the model writes after the prompt."""
    done = complete(model, tokenizer, prompt, settings, max_new_tokens=tokens, seed=seed, num_samples=num_samples)
    return [completion.text for completion in done.completions]


assert write(settings) == write(settings)
assert write(settings) != write(settings, seed=2)
assert write(settings, num_samples=3)[:1] == write(settings)  # more samples do not change the first

# %% [markdown]
# ## What it does to a text
#
# At temperature 0 there is no draw: always the likeliest token. A small model soon goes in circles. The opposite end
# is gibberish. In between is where one wants to be. We count how many of the groups of three tokens in a text are
# different.


# %%
def variety(text):
    """Return the share of different ones among a text's groups of three tokens."""
    ids = tokenizer.encode(text)
    groups = list(zip(ids, ids[1:], ids[2:], strict=False))
    return len(set(groups)) / len(groups)


kinds = {
    "temperature 0": SamplingSettings(temperature=0),
    "temperature 0.7, top-p 0.95": SamplingSettings(temperature=0.7, top_p=0.95),
    "temperature 1": SamplingSettings(),
    "temperature 3": SamplingSettings(temperature=3),
}
varieties = []
for label, kind in kinds.items():
    written = write(kind, tokens=150)[0]
    varieties.append(variety(written))
    print(f"--- {label}: {varieties[-1]:.0%} of its groups of three are different\n{written[:160]!r}")
assert varieties[0] < 0.7 < varieties[2]
assert varieties[0] < varieties[1]

# %% [markdown]
# ## On the command line
#
#     sheepop generate --checkpoint runs/mine --prompt "Once" --temperature 0.7 --top-p 0.95 --seed 7
#
# Begin with a temperature of 0.7 to 1 and a top-p of 0.9 to 0.95, then trust your eyes: which setting is best depends
# on the model, and on what you want from it.
