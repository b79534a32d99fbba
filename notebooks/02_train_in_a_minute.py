# %% [markdown]
# # Train a model in less than a minute
#
# **For children.** We are going to play a game with the computer: *guess the next letter*. It sees "To be or not to b"
# and has to say what comes. At first it guesses blindly. Each time it is wrong, some thousands of tiny screws inside
# it are turned a little, so that it would have been less wrong. After some hundred rounds it writes by itself, in
# something that looks like English from afar.
#
# **For scientists.** Maximum likelihood: the mean of −ln p(next token | context) is minimised by AdamW with warm-up and
# cosine decay, clipped gradients and a held-out split. The loop is written out with the functions that `sheepop train`
# itself uses; that command adds files, checkpoints, several processes and a resume that is exact.
#
# Each claim in the text is checked by an `assert` in the cell below it.

# %%
import math
import time
from itertools import pairwise

import numpy as np
import torch
from matplotlib.figure import Figure

from sheepop.config import ModelConfig, TrainingConfig
from sheepop.data.dataset import num_windows, read_windows
from sheepop.data.sampler import Sampler
from sheepop.data.tokenizer import Tokenizer
from sheepop.generation.completion import complete
from sheepop.generation.sampling import SamplingSettings
from sheepop.learn.lessons import held_out_loss, show, some_text
from sheepop.models.sizing import count_parameters
from sheepop.models.transformer import TransformerModel
from sheepop.training.loss import summed_cross_entropy
from sheepop.training.optimizer import make_optimizer
from sheepop.training.schedule import learning_rate_at

SEED, CONTEXT, BATCH, STEPS = 1, 64, 16, 300

# %% [markdown]
# ## 1. Text becomes numbers
#
# A model works on numbers, so each character gets one: a *token*. (`03_tokenizer.py` shows better ways to cut a text.)
# The last twentieth of the text is put aside. The model never trains on it, so that we can see whether it learned
# something about the language, or only learned by heart.

# %%
name, text = some_text(500_000)
print(f"{len(text):,} characters of {name}. Somewhere they read:\n\n{text[250_000:250_200].strip()}")

# %%
tokenizer = Tokenizer.train("char", [text], vocab_size=128)
phrase = text[:16]
print(f"{phrase!r} becomes {tokenizer.encode(phrase)}")
assert tokenizer.decode(tokenizer.encode(phrase)) == phrase

tokens = tokenizer.encode_array(text)
split = len(tokens) - len(tokens) // 20
train_tokens, val_tokens = tokens[:split], tokens[split:]
print(f"{len(train_tokens):,} tokens to learn from, {len(val_tokens):,} held out")
assert len(train_tokens) + len(val_tokens) == len(tokens)

# %% [markdown]
# ## 2. What the game looks like
#
# Inputs are windows of the text, targets are the same windows one token later. A window of 64 tokens is 64 rounds of
# the game at once: at each place the model sees what came before, and has to guess what comes.

# %%
inputs, targets = read_windows(train_tokens, np.array([0]), CONTEXT)  # (1, T) each
for place in range(3, 7):
    seen, wanted = tokenizer.decode(inputs[0, : place + 1]), tokenizer.decode(targets[0, place : place + 1])
    print(f"sees {seen!r:10} should say {wanted!r}")
assert inputs.shape == targets.shape == (1, 64)
assert np.array_equal(inputs[0, 1:], targets[0, :-1])

# %% [markdown]
# ## 3. How good are simple players?
#
# The **loss** is the surprise: −ln p, where p is the probability that the player gave to what really came. Saying 100
# % and being right costs 0; saying 1 % and being right costs 4.6. Three players to compare with, from counting alone:
#
# - one who knows nothing gives the same probability to all V tokens: ln V;
# - one who knows how frequent each letter is;
# - one who also knows which letter likes to follow which.
#
# Whoever knows more is surprised less, on text that none of them has seen.

# %%
V = tokenizer.vocab_size
blind = math.log(V)
counts = np.bincount(train_tokens, minlength=V) + 1.0  # one more of each, so that nothing is impossible
single = counts / counts.sum()
pairs = np.ones((V, V))
np.add.at(pairs, (train_tokens[:-1], train_tokens[1:]), 1)
follows = pairs / pairs.sum(axis=1, keepdims=True)
knows_letters = -np.log(single[val_tokens]).mean()
knows_pairs = -np.log(follows[val_tokens[:-1], val_tokens[1:]]).mean()
print(f"blind {blind:.2f}   knows letters {knows_letters:.2f}   knows pairs {knows_pairs:.2f} nats per token")
assert round(-math.log(0.01), 1) == 4.6
assert knows_pairs < knows_letters < blind

# %% [markdown]
# ## 4. A model
#
# A transformer with three blocks. Its weights are random, so at first it is the player who knows nothing: its loss is
# ln V within a few hundredths.

# %%
torch.manual_seed(SEED)
config = ModelConfig(
    vocab_size=V, d_model=96, num_layers=3, num_heads=4, max_seq_len=CONTEXT, dropout=0.0, norm="rmsnorm", qk_norm=True
)
model = TransformerModel(config)
training = TrainingConfig(learning_rate=6e-3, warmup_steps=20, beta2=0.99)
optimizer = make_optimizer(model, training)  # AdamW
sampler = Sampler(num_windows(len(train_tokens), CONTEXT, CONTEXT), BATCH, gradient_accumulation_steps=1, seed=SEED)

weights = sum(weight.numel() for weight in model.parameters())
at_first = held_out_loss(model, val_tokens)
print(f"{weights:,} weights; loss before training {at_first:.2f}, blind guessing {blind:.2f}")
assert weights == count_parameters(config).total
assert abs(at_first - blind) < 0.1

# %% [markdown]
# ## 5. Which way to turn a screw
#
# **For children.** For every one of its weights the model works out: if I turned this one up a tiny bit, would I be
# more surprised or less? Then it turns all of them a little towards "less".
#
# **For scientists.** Backpropagation gives ∂loss/∂weight for all weights at the price of about two forward passes. We
# need not believe it: nudging one weight up and down and watching the loss gives the same number (a central
# difference), here in double precision to four digits.

# %%
probe = TransformerModel(config).double()
inputs, targets = (torch.from_numpy(part) for part in read_windows(train_tokens, np.arange(2) * CONTEXT, CONTEXT))
screw = probe.blocks[1].feed_forward.input.weight
(summed_cross_entropy(probe(inputs), targets) / targets.numel()).backward()


def loss_with(nudge):
    """Return the loss with one weight changed by a nudge, and put the weight back."""
    with torch.no_grad():
        screw[5, 7] += nudge
        # In fp64 all the way: the project sums losses in fp32, which is too coarse for such small differences.
        loss = -probe(inputs).log_softmax(dim=-1).gather(-1, targets[..., None]).mean()
        screw[5, 7] -= nudge
    return loss.item()


measured = (loss_with(1e-4) - loss_with(-1e-4)) / 2e-4
print(f"backpropagation says {screw.grad[5, 7]:.9f}, nudging says {measured:.9f}")
assert math.isclose(screw.grad[5, 7], measured, rel_tol=1e-4)

# %% [markdown]
# ## 6. Training
#
# All of it. Take some windows, guess, compare, work out the gradient, turn the screws, again. The learning rate says
# how far to turn: it warms up for 20 steps, then comes down along half a cosine, because coarse turns help at first
# and fine ones at the end.


# %%
def write(prompt, tokens=60, temperature=0.8):
    """Return what the model writes after a prompt."""
    settings = SamplingSettings(temperature=temperature)
    return complete(model, tokenizer, prompt, settings, max_new_tokens=tokens, seed=SEED).completions[0].text


prompt = text[split : split + 12]  # the beginning of what is held out
losses, rates, checks, began = [], [], {0: at_first}, time.perf_counter()
print(f"step   0: loss {at_first:.2f}  {prompt + write(prompt)!r}")
for step in range(STEPS):
    windows = read_windows(train_tokens, sampler.windows_of(step) * CONTEXT, CONTEXT)
    inputs, targets = (torch.from_numpy(part) for part in windows)  # (B, T) each
    logits = model(inputs)  # (B, T, V): a score for each token of the vocabulary at each place
    loss = summed_cross_entropy(logits, targets) / (targets >= 0).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # no single batch may turn the screws too far
    for group in optimizer.param_groups:
        group["lr"] = learning_rate_at(step, STEPS, training)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    rates.append(optimizer.param_groups[0]["lr"])
    if (step + 1) % 100 == 0:
        checks[step + 1] = held_out_loss(model, val_tokens)
        print(f"step {step + 1:3}: loss {checks[step + 1]:.2f}  {prompt + write(prompt)!r}")
seconds = time.perf_counter() - began
print(f"{STEPS * BATCH * CONTEXT:,} tokens in {seconds:.0f} seconds")

assert max(rates) == rates[19] == training.learning_rate  # the end of the warm-up
assert all(later <= earlier for earlier, later in pairwise(rates[19:]))

# %% [markdown]
# ## 7. What came of it
#
# On text that it has never seen, the model is less surprised than the player who knows letter pairs. It must have
# found more than pairs: it looks further back than one letter. What it trained on and what was held out differ by less
# than a third of what it has learned: it saw each window at most once, so it had nothing to learn by heart.
#
# `perplexity` = e^loss is the same in other words: among how many equally likely tokens it hesitates.

# %%
at_last = checks[STEPS]
print(f"blind {blind:.2f} → letters {knows_letters:.2f} → pairs {knows_pairs:.2f} → the model {at_last:.2f}")
print(f"On what it trained on it is {np.mean(losses[-30:]):.2f} at the end.")
print(f"It hesitates among {math.exp(at_last):.1f} tokens instead of {V}.")
assert at_last < knows_pairs
assert sampler.num_windows >= STEPS * BATCH  # each window at most once
assert abs(np.mean(losses[-30:]) - at_last) < (blind - at_last) / 3
assert len(set(write(prompt))) > 5  # it does not repeat one letter

# %%
figure = Figure(figsize=(7.5, 3.6), layout="constrained")
axes = figure.subplots()
axes.plot(losses, color="#2166c4", linewidth=0.8, label="on the batch that it trains on")
axes.plot(list(checks), list(checks.values()), "o", color="#d1570a", label="on held-out text")
for height, player in ((blind, "knows nothing"), (knows_letters, "knows letters"), (knows_pairs, "knows pairs")):
    axes.axhline(height, color="#6e7781", linewidth=0.8, linestyle="--")
    axes.annotate(player, (STEPS, height), ha="right", va="bottom", color="#6e7781")
axes.set(xlabel="step", ylabel="loss in nats per token", title="The surprise falls")
axes.legend()
show(figure, "loss")

# %% [markdown]
# ## 8. It writes
#
# The model gives a probability to every token; one is drawn, appended, and the longer text goes in again.
# (`04_sampling.py` is about the drawing.) The same seed gives the same text.

# %%
print(write(prompt, 300))
assert write(prompt, 30) == write(prompt, 30)

# %% [markdown]
# ## With one command
#
# The same on your own text, with a tokenizer and sizes that are chosen for it and for your machine, validated, saved,
# and ready to be resumed, exported or asked:
#
#     sheepop train --data my_text.txt --output runs/mine --minutes 1
