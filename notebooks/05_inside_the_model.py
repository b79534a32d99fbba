# %% [markdown]
# # Inside the model
#
# **For children.** We train a little model, and then we open it while it thinks, like a clock with a glass back. We
# see which words look at which, how the thought grows from floor to floor, and what the model would have answered if we
# had stopped it half-way.
#
# **For scientists.** The project's model has *taps*: named points at which a real forward pass hands out its tensors
# (`sheepop/models/taps.py`, `sheepop/learn/trace.py`). There is no second implementation for explanation. With them we
# look at attention maps and the entropy of heads, take the residual stream apart into what each sub-layer wrote, and
# read it with the model's own head at every depth (the logit lens, nostalgebraist 2020).
#
# Each claim in the text is checked by an `assert` in the cell below it.

# %%
import math
import re

import torch
from matplotlib.figure import Figure

from sheepop.learn.lessons import held_out_loss, show, some_text, train_small_model
from sheepop.learn.trace import point_names, trace, trace_text
from sheepop.models.transformer import inference

name, text = some_text(500_000)
small = train_small_model(text, steps=200)
model, tokenizer = small.model, small.tokenizer
L, H = model.config.num_layers, model.config.num_heads
print(f"trained on {name}; loss on held-out text {held_out_loss(model, small.val_tokens):.2f} nats per token")
assert (L, H) == (4, 4)

# %% [markdown]
# ## The taps
#
# **For children.** Little windows in the walls of the model. When nobody looks through them, they are shut, and the
# model is as fast as without.
#
# **For scientists.** Each point is one line in the forward pass: `tap(name, tensor)` returns the tensor unchanged, and
# records it if a trace is listening. Kinds of points, with the shape of each, for a text of T tokens:

# %%
prompt = tokenizer.decode(small.val_tokens[200:224])
seen = trace_text(model, tokenizer, prompt)
T = len(seen.token_ids)
for point in seen:
    if not re.match(r"blocks\.[1-9]", point):  # the other blocks have the same points as the first
        print(f"{point:34} {tuple(seen[point].shape)}")
assert list(seen) == point_names(model)
points_of_block = [sum(point.startswith(f"blocks.{layer}.") for point in seen) for layer in range(L)]
assert len(set(points_of_block)) == 1

with inference(model):  # the same numbers as without anybody looking, but for the rounding of the faster kernels
    torch.testing.assert_close(model(seen.token_ids[None])[0], seen["logits"], rtol=1e-4, atol=1e-4)

# %% [markdown]
# ## Who looks at whom
#
# **For children.** A row for each word, a column for each word that it can look at. The darker the square, the longer
# the look. The upper right is white: nobody sees the future. Each row adds up to one whole look.
#
# **For scientists.** Softmax weights of the four heads of each block. An even head spreads 1/t over the t tokens that
# it sees; a vertical stripe is a token that collects attention, often the first, whose value can be near zero (a
# *sink*, Xiao et al. 2023); a diagonal looks at the same distance everywhere.

# %%
maps = [seen[f"blocks.{layer}.attention.weights"] for layer in range(L)]  # (H, T, T) each
for weights in maps:
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(H, T))
    assert torch.equal(weights, weights.tril())  # nothing above the diagonal

figure = Figure(figsize=(8, 8.4), layout="constrained")
for layer, row in enumerate(figure.subplots(L, H)):
    for head, axes in enumerate(row):
        axes.imshow(maps[layer][head], cmap="Blues", vmin=0, vmax=1)
        axes.set(xticks=[], yticks=[], title=f"block {layer}, head {head}")
show(figure, "attention_maps")

# %% [markdown]
# In numbers: how far back each head looks on average, and how long at the token just before.

# %%
places = torch.arange(T)
distance = (places[:, None] - places).clamp_min(0)  # how far column s lies before row t
for layer in range(L):
    far = (maps[layer] * distance).sum(-1).mean(-1)
    before = maps[layer].diagonal(offset=-1, dim1=-2, dim2=-1).mean(-1)
    print(
        f"block {layer}: "
        + "   ".join(f"{f:4.1f} back, {b:4.0%} at the one before" for f, b in zip(far, before, strict=True))
    )
    assert bool((far >= 0).all())
    assert bool((far <= (T - 1) / 2).all())  # who always looks at the first

# %% [markdown]
# ## How decided is a head?
#
# **For children.** Some heads stare at one word, others look around. Entropy measures it: 0 for a stare, large for
# looking around.
#
# **For scientists.** The entropy of a row of weights lies between 0 and ln t, where t is the number of tokens that the
# place sees. Divided by ln t it is between 0 and 1 and compares between places. Learning makes heads differ: in the
# model as it was drawn at random, all of them are nearly even, above 0.9.


# %%
def decidedness(weights):
    """Return the mean entropy of each head as a share of the largest possible, (H,)."""
    entropy = -(weights * weights.clamp_min(1e-30).log()).sum(-1)[:, 1:]  # the first token has no choice
    return (entropy / torch.arange(2, weights.shape[-1] + 1).log()).mean(-1)


torch.manual_seed(0)
untrained = type(model)(model.config)
blank = trace(untrained, seen.token_ids, ["blocks.*.attention.weights"])
learned = torch.stack([decidedness(weights) for weights in maps])  # (L, H)
random = torch.stack([decidedness(weights) for weights in blank.values()])
print("trained:\n", learned.numpy().round(2), "\nat random:\n", random.numpy().round(2))
assert bool(((learned >= 0) & (learned <= 1 + 1e-5)).all())
assert random.min() > 0.9
assert learned.mean() < random.mean()
assert learned.max() - learned.min() > random.max() - random.min()  # the heads have become different from one another

# %% [markdown]
# ## The stream
#
# **For children.** A paper is passed from floor to floor. On each floor everybody may *add* a note, but nobody may rub
# anything out. At the end the answer is read from the paper. The notes are many, so the paper gets fuller and fuller.
#
# **For scientists.** A pre-norm transformer is a sum: the residual stream is the embedding plus what each of the 2L
# sub-layers wrote. So it can be taken apart exactly. Its norm after the last block is larger than that of the
# embedding; the final norm brings it to the length √D, and then scales each channel, before the head reads it.

# %%
written = {"embedding": seen["embedding"]}
for layer in range(L):
    written[f"attention {layer}"] = seen[f"blocks.{layer}.attention.output"]
    written[f"feed-forward {layer}"] = seen[f"blocks.{layer}.feed_forward.output"]
stream = sum(written.values())
assert len(written) == 1 + 2 * L
torch.testing.assert_close(stream, seen[f"blocks.{L - 1}.output"], rtol=1e-4, atol=1e-4)

norms = [seen["embedding"], *(seen[f"blocks.{layer}.output"] for layer in range(L))]
norms = torch.stack([state.norm(dim=-1).mean() for state in norms])  # (L + 1,)
parts = {part: tensor.norm(dim=-1).mean().item() for part, tensor in written.items()}
print("length of the stream after each block:", [round(value, 1) for value in norms.tolist()])
print("length of what was written:", {part: round(value, 1) for part, value in parts.items()})
assert norms[-1] > norms[0]
# The length of a sum is at most the sum of the lengths: notes may point the same way, or against each other.
assert norms[-1] <= sum(parts.values())

normalised = torch.nn.functional.layer_norm(stream, stream.shape[-1:])
torch.testing.assert_close(normalised.norm(dim=-1), torch.full((T,), math.sqrt(96)), rtol=1e-3, atol=0)
torch.testing.assert_close(normalised * model.final_norm.weight.detach(), seen["final_norm"], rtol=1e-3, atol=1e-3)

figure = Figure(figsize=(8, 3.2), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(range(L + 1), norms, "o-", color="#2166c4")
left.set(title="The stream grows", xlabel="after block", ylabel="mean length", xticks=range(L + 1))
left.set_xticklabels(["embedding", *range(L)])
right.barh(list(parts), list(parts.values()), color="#d1570a")
right.invert_yaxis()
right.set(title="What each part wrote", xlabel="mean length")
show(figure, "stream")

# %% [markdown]
# ## Stopped half-way: the logit lens
#
# **For children.** We take the paper away on each floor and ask: what would you answer *now*? On the ground floor it
# knows the last word alone. Upstairs it knows best.
#
# **For scientists.** The final norm and the head are applied to the stream after each block. After the last block that
# *is* the model. Earlier it is a projection through a basis that later blocks expect to change, so read it with care
# (Belrose et al. 2023 train a map for each layer). On held-out text the loss at the end is below that at every depth
# before it.


# %%
def lens(state):
    """Return the logits that the head would give for a state of the stream, (T, V)."""
    with inference(model):
        return model.logits(model.final_norm(state))


torch.testing.assert_close(lens(seen[f"blocks.{L - 1}.output"]), seen["logits"], rtol=1e-4, atol=1e-4)
alone = trace(model, seen.token_ids[-1:], ["embedding"])["embedding"]
assert torch.equal(alone[0], seen["embedding"][-1])  # the ground floor knows nothing of what came before

depths = ["embedding", *(f"blocks.{layer}.output" for layer in range(L))]
losses = torch.zeros(L + 1)
windows = small.val_tokens[: 20 * 65].astype(int).reshape(20, 65)
for window in torch.from_numpy(windows):
    states = list(trace(model, window[:-1], depths).values())  # L + 1 of (T, D)
    losses += torch.stack([torch.nn.functional.cross_entropy(lens(state), window[1:]) for state in states]) / 20
print("loss if stopped after each block:", [round(value, 2) for value in losses.tolist()])
assert len(states) == L + 1
assert bool((losses[-1] < losses[:-1]).all())

# %% [markdown]
# And the answers themselves, at the last place of the prompt.

# %%
print(f"after {prompt!r}:")
for depth in range(L + 1):
    state = seen["embedding"] if depth == 0 else seen[f"blocks.{depth - 1}.output"]
    chances, guesses = lens(state)[-1].softmax(-1).topk(4)
    answers = "  ".join(
        f"{tokenizer.token_text(int(token_id))!r} {chance:.0%}"
        for chance, token_id in zip(chances, guesses, strict=True)
    )
    print(f"  {'embedding' if depth == 0 else f'block {depth - 1}':10} {answers}")
assert int(guesses[0]) == int(seen["logits"][-1].argmax())  # the last line is what the model says

# %% [markdown]
# ## Who is to blame?
#
# **For scientists.** Because the stream is a sum and the head is linear, the logit of a token is a sum as well, once
# the final norm's scale is held fixed: each sub-layer has a share in it that can be read off (direct logit
# attribution, Elhage et al. 2021). Here for the likeliest token, against the mean over all tokens. The shares add up
# to the whole.
#
# **For children.** We can ask of each note on the paper: how much did *you* help this answer to win?

# %%
answer = int(seen["logits"][-1].argmax())
scale = (seen[f"blocks.{L - 1}.output"][-1].var(correction=0) + model.config.layer_norm_eps).sqrt()
direction = (model.head.weight[answer] - model.head.weight.mean(dim=0)).detach() * model.final_norm.weight.detach()
shares = {part: float((tensor[-1] - tensor[-1].mean()) @ direction / scale) for part, tensor in written.items()}
for part, share in shares.items():
    print(f"{part:15} {share:+6.2f}")
whole = float(seen["logits"][-1, answer] - seen["logits"][-1].mean())
print(
    f"{'together':15} {sum(shares.values()):+6.2f}: {tokenizer.token_text(answer)!r} stands {whole:.2f} above the mean"
)
assert math.isclose(sum(shares.values()), whole, rel_tol=1e-3, abs_tol=1e-3)

figure = Figure(figsize=(7.5, 3.4), layout="constrained")
left, right = figure.subplots(1, 2)
left.plot(range(L + 1), losses, "o-", color="#2166c4")
left.set(title="Stopped half-way", xlabel="after block", ylabel="loss in nats per token", xticks=range(L + 1))
left.set_xticklabels(["embedding", *range(L)])
right.barh(list(shares), list(shares.values()), color="#d1570a")
right.invert_yaxis()
right.set(title=f"Who made {tokenizer.token_text(answer)!r} win", xlabel="logit above the mean")
show(figure, "lens")

# %% [markdown]
# ## Your own model
#
# A checkpoint of yours opens in the same way:
#
#     from pathlib import Path
#     from sheepop.generation.terminal import load_model_and_tokenizer
#     model, tokenizer = load_model_and_tokenizer(Path("runs/mine/checkpoint_step_150"), "cpu")
#     seen = trace_text(model, tokenizer, "To be", ["blocks.*.attention.weights"])
