"""Examples of how a model writes, and what it costs."""

import math
from collections.abc import Callable

import torch

from sheepop.generation.engine import generate_cached
from sheepop.generation.generate import generate_naive
from sheepop.generation.sampling import SamplingSettings, distribution
from sheepop.models.kv_cache import KVCache
from sheepop.models.sizing import count_parameters, forward_flops_per_token, kv_cache_bytes, weight_bytes
from worked_examples.run import TEXT, ExampleRun, table

SHOWN = 6
NOTHING = torch.empty(0, dtype=torch.int64)


def shares(run: ExampleRun, settings: SamplingSettings) -> torch.Tensor:
    """Return the probabilities (V,) of the token behind the text, as sampling draws with."""
    found = distribution(run.trace["logits"][-1], settings, NOTHING)
    assert math.isclose(float(found.sum()), 1.0, abs_tol=1e-5)
    return found


def compare(run: ExampleRun, columns: dict[str, SamplingSettings]) -> str:
    """Return a table of the likeliest next tokens under several settings."""
    plain = shares(run, SamplingSettings())
    best = plain.topk(SHOWN).indices.tolist()
    found = {name: shares(run, settings) for name, settings in columns.items()}
    rows = [
        (run.piece(token), f"{float(plain[token]):.1%}", *(f"{float(each[token]):.1%}" for each in found.values()))
        for token in best
    ]
    rest = [1 - float(each[best].sum()) for each in (plain, *found.values())]
    rows.append(("all others", *(f"{max(0.0, share):.1%}" for share in rest)))
    kept = [str(int((each > 0).sum())) for each in (plain, *found.values())]
    rows.append(("tokens that can be drawn", *kept))
    return table(("next token", "as the model believes", *columns), rows)


def temperature(run: ExampleRun) -> str:
    """The next token's distribution under three temperatures."""
    cold, hot = shares(run, SamplingSettings(temperature=0.5)), shares(run, SamplingSettings(temperature=1.5))
    assert cold.max() > shares(run, SamplingSettings()).max() > hot.max()
    columns = {f"temperature {t:g}": SamplingSettings(temperature=t) for t in (0.5, 1.5)}
    return f"What may follow “{TEXT}”:\n\n{compare(run, columns)}"


def filters(run: ExampleRun) -> str:
    """The same under top-k and top-p."""
    top_k, top_p = SamplingSettings(top_k=3), SamplingSettings(top_p=0.5)
    assert int((shares(run, top_k) > 0).sum()) == 3
    plain = shares(run, SamplingSettings()).sort(descending=True).values.cumsum(dim=0)
    assert int((shares(run, top_p) > 0).sum()) == int((plain < 0.5).sum()) + 1
    columns = {"top-k 3": top_k, "top-p 0.5": top_p}
    return f"What may follow “{TEXT}”; what is left after cutting is scaled up to 100 %:\n\n{compare(run, columns)}"


def generation(run: ExampleRun) -> str:
    """Some tokens, one after the other, the likeliest each time."""
    prompt = run.trace.token_ids.tolist()
    greedy = SamplingSettings(temperature=0)
    [naive] = generate_naive(run.model, prompt, greedy, max_new_tokens=5, seed=0)
    [cached] = generate_cached(run.model, prompt, greedy, max_new_tokens=5, seed=0)
    assert naive.token_ids == cached.token_ids
    rows = []
    with torch.inference_mode():
        for count, token in enumerate(naive.token_ids):
            ids = [*prompt, *naive.token_ids[:count]]
            probability = run.model(torch.tensor([ids]))[0, -1].softmax(dim=-1)
            assert int(probability.argmax()) == token
            rows.append(
                (" ".join(run.piece(each) for each in ids), run.piece(token), f"{float(probability[token]):.1%}")
            )
    written = run.tokenizer.decode(naive.token_ids).replace("\n", " ⏎ ")
    return (
        f"At temperature 0 the model goes on “{TEXT}” with “{written}”, one token a row; with the cache and without it "
        f"writes the same:\n\n{table(('has read', 'takes', 'its probability'), rows)}"
    )


def parameters(run: ExampleRun) -> str:
    """The parameters of the model by part."""
    counts = count_parameters(run.config.model)
    assert counts.total == sum(parameter.numel() for parameter in run.model.parameters())
    parts = {name: getattr(counts, name) for name in ("embedding", "attention", "feed_forward", "norms")}
    rows = [(name.replace("_", "-"), f"{count:,}", f"{count / counts.total:.0%}") for name, count in parts.items()]
    assert sum(parts.values()) == counts.total  # the head is the embedding
    rows.append(("**together**", f"{counts.total:,}", "100%"))
    return (
        f"The model behind these pages, width {run.config.model.d_model}, {run.config.model.num_layers} layers, "
        f"{run.config.model.vocab_size:,} entries; in fp32 it takes {weight_bytes(run.config.model) / 1024:,.0f} "
        f"KiB:\n\n{table(('part', 'parameters', 'share'), rows)}"
    )


def kv_cache(run: ExampleRun) -> str:
    """Bytes of the cache at several lengths."""
    model = run.config.model
    rows = []
    for length in (1, 16, model.max_seq_len):
        cache = KVCache(model, batch_size=1, capacity=length)
        held = sum(tensor.nbytes for tensor in (*cache.keys, *cache.values))
        needed = kv_cache_bytes(model, batch_size=1, length=length)
        assert held == needed
        rows.append((length, f"{needed:,}", f"{kv_cache_bytes(model, batch_size=16, length=length):,}"))
    return (
        f"2 · {model.num_layers} layers · {model.num_kv_heads} key/value heads · {model.head_dim} numbers · 4 bytes "
        f"for each token of this model; the second column was compared with what the cache really holds:\n\n"
        f"{table(('tokens', 'bytes, one text', 'bytes, 16 texts'), rows)}"
    )


def flops(run: ExampleRun) -> str:
    """Operations of one token by context."""
    model = run.config.model
    rows = [(context, f"{forward_flops_per_token(model, context):,.0f}") for context in (1, 16, model.max_seq_len)]
    assert forward_flops_per_token(model, 64) > forward_flops_per_token(model, 1)
    return "One token's forward pass, in the mean over a text of that length:\n\n" + table(
        ("tokens of context", "operations"), rows
    )


EXAMPLES: dict[str, tuple[str, Callable[[ExampleRun], str]]] = {
    "temperature": (f"what may follow “{TEXT}” at three temperatures", temperature),
    "filters": (f"what may follow “{TEXT}” after top-k and after top-p", filters),
    "generation": ("five tokens, written one after the other", generation),
    "parameters": ("the parameters of the model by part", parameters),
    "kv_cache": ("the bytes of the cache at several lengths", kv_cache),
    "flops": ("the operations of one token at several lengths", flops),
}
