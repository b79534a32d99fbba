"""Examples of how text becomes numbers: tokens, windows, embeddings, positions."""

import math
from collections.abc import Callable

import torch

from sheepop.data.dataset import read_windows
from sheepop.data.tokenizer import Tokenizer
from sheepop.models.positions import rotary_table, sinusoidal_table
from worked_examples.run import TEXT, ExampleRun, table


def tokens(run: ExampleRun) -> str:
    """The same text under three tokenizers."""
    own = run.tokenizer.encode(TEXT)
    assert run.tokenizer.decode(own) == TEXT
    letters = Tokenizer.train("char", [TEXT], vocab_size=100)
    assert len(letters.encode(TEXT)) == len(TEXT)
    rows = [
        (f"byte-level BPE of {run.tokenizer.vocab_size:,} entries", *shown(run.tokenizer, own)),
        ("characters", *shown(letters, letters.encode(TEXT))),
    ]
    return (
        f"The text “{TEXT}”, by the BPE tokenizer that was trained on {run.learned_from}, and by a character tokenizer:"
        f"\n\n{table(('tokenizer', 'pieces', 'numbers', 'how many'), rows)}"
    )


def shown(tokenizer: Tokenizer, token_ids: list[int]) -> tuple[str, str, int]:
    """Return pieces, numbers and count for the table of `tokens`."""
    pieces = [f"`{tokenizer.token_text(token_id).replace(' ', '␣')}`" for token_id in token_ids]
    return " ".join(pieces), ", ".join(map(str, token_ids)), len(token_ids)


def windows(run: ExampleRun) -> str:
    """A window of text: what the model reads and what it has to say."""
    inputs, targets = read_windows(run.held_out.numpy(), torch.tensor([120]).numpy(), 6)
    assert inputs[0, 1:].tolist() == targets[0, :-1].tolist()
    rows = [
        ("reads", *(run.piece(int(token)) for token in inputs[0])),
        ("has to say", *(run.piece(int(token)) for token in targets[0])),
    ]
    return "Six places of a window; each target is the next place's input:\n\n" + table(
        ("", *(f"place {place}" for place in range(6))), rows
    )


def embedding(run: ExampleRun) -> str:
    """The rows that are looked up for a text."""
    found = run.trace["token_embedding"]
    weight = run.model.token_embedding.weight
    rows = []
    for piece, token_id, vector in zip(run.pieces, run.trace.token_ids, found, strict=True):
        assert torch.equal(weight[token_id], vector)  # a look-up is a copy
        rows.append((piece, int(token_id), *map(float, vector[:5]), "…", float(vector.norm())))
    header = ("token", "number = row", *(f"[{column}]" for column in range(5)), "", "length")
    return (
        f"The table has {weight.shape[0]:,} rows of {weight.shape[1]} numbers. “{TEXT}” takes these rows, of which the "
        f"first five numbers are shown; the same token would take the same row again:\n\n{table(header, rows)}"
    )


def sinusoidal(run: ExampleRun) -> str:
    """The first waves of the sinusoidal table."""
    width = run.config.model.d_model
    waves = sinusoidal_table(12, width)
    chosen = (0, 1, 16, 17, width - 2, width - 1)
    rows = [(place, *(float(waves[place, column]) for column in chosen)) for place in (0, 1, 2, 3, 11)]
    for place, *numbers in rows:
        for column, number in zip(chosen, numbers, strict=True):
            angle = place / 10000 ** ((column - column % 2) / width)
            assert math.isclose(number, math.cos(angle) if column % 2 else math.sin(angle), abs_tol=1e-6)
    header = ("place", *(f"{'cos' if column % 2 else 'sin'} [{column}]" for column in chosen))
    return (
        f"Some columns of the table for width {width}. The first pair turns by a whole radian a place, the last hardly "
        f"at all, like the second and the hour hand of a clock:\n\n{table(header, rows)}"
    )


def rotary(run: ExampleRun) -> str:
    """One pair of a query, turned at each place."""
    before = run.trace["blocks.0.attention.before_rotary"]  # (T, H+K, C)
    after = run.trace["blocks.0.attention.query"]  # (H, T, C)
    angles = rotary_table(run.config.model, len(run.pieces))  # (T, C/2, 2)
    pair = 1
    rows = []
    for place, piece in enumerate(run.pieces):
        first, second = map(float, before[place, 0, 2 * pair : 2 * pair + 2])
        turned = tuple(map(float, after[0, place, 2 * pair : 2 * pair + 2]))
        cosine, sine = map(float, angles[place, pair])
        assert math.isclose(first * cosine - second * sine, turned[0], abs_tol=1e-5)
        assert math.isclose(first * sine + second * cosine, turned[1], abs_tol=1e-5)
        assert math.isclose(math.hypot(first, second), math.hypot(*turned), rel_tol=1e-4)
        angle = math.degrees(place * run.config.model.rope_theta ** (-2 * pair / run.config.model.head_dim))
        pairs = [f"({a:.3f}, {b:.3f})".replace("-", "−") for a, b in ((first, second), turned)]
        rows.append((place, piece, pairs[0], f"{angle:.1f}°", pairs[1], math.hypot(*turned)))
    header = ("place", "token", "pair before", "turned by", "pair after", "its length, before and after")
    return f"Pair {pair} of the first head's query in the first layer:\n\n{table(header, rows)}"


EXAMPLES: dict[str, tuple[str, Callable[[ExampleRun], str]]] = {
    "tokens": ("one text cut by two tokenizers", tokens),
    "windows": ("a window of text, what the model reads and what it has to say", windows),
    "embedding": (f"the rows that “{TEXT}” looks up", embedding),
    "sinusoidal": ("some columns of the sinusoidal table", sinusoidal),
    "rotary": (f"one pair of a query of “{TEXT}”, turned at each place", rotary),
}
