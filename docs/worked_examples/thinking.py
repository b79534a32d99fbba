"""Examples of what a layer does: attention, feed-forward, norms, the stream."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sheepop.learn.formula import relative_difference
from sheepop.learn.formulas import FORMULAS
from worked_examples.run import TEXT, ExampleRun, table

LAYER = 0


def at(run: ExampleRun, point: str, layer: int = LAYER) -> Tensor:
    """Return the tensor at a point of a layer."""
    return run.trace[f"blocks.{layer}.{point}"]


def telling_head(run: ExampleRun) -> tuple[int, int]:
    """Return layer and number of a head that neither looks at one token alone nor at all of them alike."""
    largest = {
        (layer, head): float(row.max())
        for layer in range(run.config.model.num_layers)
        for head, row in enumerate(at(run, "attention.weights", layer)[:, -1])
    }
    return min(largest, key=lambda place: abs(largest[place] - 0.5))


def attention(run: ExampleRun) -> str:
    """Scores, masked scores and weights of one head, and what it reads."""
    layer, head = telling_head(run)
    scores, mask, weights = (at(run, f"attention.{name}", layer) for name in ("scores", "mask", "weights"))
    masked = scores[head].masked_fill(~mask, -math.inf)
    assert torch.allclose(masked.softmax(dim=-1), weights[head], atol=1e-6)
    sums = weights[head].sum(dim=-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-6)
    assert weights[head].triu(1).count_nonzero() == 0  # nobody looks ahead
    difference = relative_difference(*FORMULAS["attention_weights"].traced(run.trace, layer))
    assert difference < 1e-6
    parts = [
        f"Head {head} of layer {layer} reads “{TEXT}”. First the scores, a row for each place that asks:",
        square(run, scores[head]),
        "What lies ahead is covered:",
        square(run, masked),
        "And the softmax of each row, which adds up to 1:",
        square(run, weights[head], ("sum",), [(float(total),) for total in sums]),
        f"The formula in float64 gives the same weights, within {difference:.0e} of the largest.",
    ]
    return "\n\n".join(parts)


def square(
    run: ExampleRun, numbers: Tensor, more: tuple[str, ...] = (), columns: list[tuple[float, ...]] | None = None
) -> str:
    """Return a (T, T) tensor as a table, tokens at both sides."""
    ends = columns or [()] * len(numbers)
    rows = [
        (f"**{piece}** asks", *map(float, row), *end) for piece, row, end in zip(run.pieces, numbers, ends, strict=True)
    ]
    return table(("", *run.pieces, *more), rows)


def mixing(run: ExampleRun) -> str:
    """What one head takes from the values."""
    layer, head = telling_head(run)
    weights, value, mixed = (at(run, f"attention.{name}", layer) for name in ("weights", "value", "mixed"))
    group = head // (run.config.model.num_heads // run.config.model.num_kv_heads)
    shown = 4
    rows = [
        (piece, float(weight), *map(float, vector[:shown]))
        for piece, weight, vector in zip(run.pieces, weights[head, -1], value[group], strict=True)
    ]
    result = (weights[head, -1, :, None] * value[group]).sum(dim=0)
    assert torch.allclose(result, mixed[head, -1], atol=1e-5)
    rows.append(("**the mix**", float(weights[head, -1].sum()), *map(float, result[:shown])))
    header = ("token", f"weight that {run.pieces[-1]} gives it", *(f"value [{channel}]" for channel in range(shown)))
    return f"What this head writes at the last place: each value times its weight, added up.\n\n{table(header, rows)}"


def heads(run: ExampleRun) -> str:
    """Where each head looks from the last place."""
    rows = []
    for layer in range(run.config.model.num_layers):
        weights = run.trace[f"blocks.{layer}.attention.weights"]
        for head, row in enumerate(weights[:, -1]):
            assert math.isclose(float(row.sum()), 1.0, abs_tol=1e-5)
            rows.append((layer, head, head // (weights.shape[0] // run.config.model.num_kv_heads), *map(float, row)))
    return f"The weights of the last token, {run.pieces[-1]}, in every head:\n\n" + table(
        ("layer", "head", "reads key/value head", *run.pieces), rows
    )


def gelu(run: ExampleRun) -> str:
    """Inner units before and behind the activation."""
    before, after = at(run, "feed_forward.input")[-1], at(run, "feed_forward.activation")[-1]
    order = before.argsort()
    chosen = [int(order[round(share * (len(order) - 1))]) for share in (0, 0.25, 0.5, 0.75, 1)]
    rows = []
    for unit in chosen:
        x = float(before[unit])
        share = 0.5 * (1 + math.erf(x / math.sqrt(2)))
        assert math.isclose(x * share, float(after[unit]), abs_tol=1e-5)
        rows.append((unit, x, share, float(after[unit]), x / (1 + math.exp(-x))))
    header = ("inner unit", "x", "share that passes, Φ(x)", "GELU: x · Φ(x)", "SiLU would give")
    few = float((after > 0.1).float().mean())
    return (
        f"Five of the {len(before)} inner units at the last place, from the most negative to the largest. Of all, "
        f"{few:.0%} let more than 0.1 through:\n\n{table(header, rows)}"
    )


def layer_norm(run: ExampleRun) -> str:
    """Mean and variance before and behind a norm."""
    stream, normed = at(run, "input"), at(run, "attention_norm")
    norm = run.model.blocks[LAYER].attention_norm
    epsilon = run.config.model.layer_norm_eps
    rows = []
    for piece, before, after in zip(run.pieces, stream, normed, strict=True):
        mean, variance = float(before.mean()), float(before.var(unbiased=False))
        whitened = (before - mean) / math.sqrt(variance + epsilon)
        assert torch.allclose(whitened * norm.weight, after, atol=1e-4)
        assert math.isclose(float(whitened.mean()), 0.0, abs_tol=1e-4)
        rows.append((piece, mean, variance, abs(float(whitened.mean())), float(whitened.var(unbiased=False))))
    header = ("token", "mean before", "variance before", "mean after", "variance after")
    return (
        "The first norm of the first layer, before its learned scale. (Where the variance before is small, the ε under "
        f"the root keeps the variance after below 1.)\n\n{table(header, rows)}"
    )


def rms_norm(run: ExampleRun) -> str:
    """The same stream under RMSNorm."""
    stream = at(run, "input")
    norm = torch.nn.RMSNorm(stream.shape[-1], eps=run.config.model.layer_norm_eps)
    rows = []
    for piece, before in zip(run.pieces, stream, strict=True):
        after = norm(before).detach()
        root = math.sqrt(float(before.square().mean()) + run.config.model.layer_norm_eps)
        assert torch.allclose(before / root, after, atol=1e-5)
        rows.append((piece, *map(float, before[:3]), root, *map(float, after[:3])))
    header = ("token", "x[0]", "x[1]", "x[2]", "root mean square", "y[0]", "y[1]", "y[2]")
    return f"The same stream under RMSNorm with a scale of one; no mean is taken away:\n\n{table(header, rows)}"


def stream(run: ExampleRun) -> str:
    """What each sub-layer adds to the stream."""
    rows = []
    for layer in range(run.config.model.num_layers):
        seen = {
            name: run.trace[f"blocks.{layer}.{name}"]
            for name in ("input", "attention.output", "after_attention", "feed_forward.output", "output")
        }
        assert torch.allclose(seen["input"] + seen["attention.output"], seen["after_attention"], atol=1e-5)
        assert torch.allclose(seen["after_attention"] + seen["feed_forward.output"], seen["output"], atol=1e-5)
        rows.append((layer, *(float(tensor[-1].norm()) for tensor in seen.values())))
    header = ("layer", "comes in", "attention adds", "then it is", "feed-forward adds", "goes out")
    return (
        f"Lengths of the stream at the last place, {run.pieces[-1]}, through the layers. (Lengths do not add up, since "
        f"the arrows point in different directions; the vectors do, and that was checked.)\n\n{table(header, rows)}"
    )


def forward_pass(run: ExampleRun) -> str:
    """What the model says at each place."""
    logits = run.trace["logits"]
    assert torch.allclose(run.trace["final_norm"] @ run.model.head.weight.detach().T, logits, atol=1e-4)
    rows = []
    for place, (piece, row) in enumerate(zip(run.pieces, logits, strict=True)):
        shares = row.softmax(dim=-1)
        best = [int(token) for token in shares.topk(3).indices]
        guesses = ", ".join(f"{run.piece(token)} {float(shares[token]):.1%}" for token in best)
        actual = run.pieces[place + 1] if place + 1 < len(run.pieces) else "?"
        rows.append((piece, guesses, actual))
    return "What the whole pass comes to: at each place a guess about the next token.\n\n" + table(
        ("has read up to", "thinks that next comes", "what comes"), rows
    )


EXAMPLES: dict[str, tuple[str, Callable[[ExampleRun], str]]] = {
    "attention": (f"the scores of one head over “{TEXT}”, masked, and as weights that add up to 1", attention),
    "mixing": ("the values that the last token mixes, and the mix", mixing),
    "heads": ("where every head looks from the last token", heads),
    "gelu": ("five inner units before and behind GELU", gelu),
    "layer_norm": ("mean and variance of every token before and behind a norm", layer_norm),
    "rms_norm": ("the same tokens under RMSNorm", rms_norm),
    "stream": ("how long the stream is, and what each sub-layer adds to it", stream),
    "forward_pass": ("the model's three best guesses at each place", forward_pass),
}
