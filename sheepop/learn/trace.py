"""What really happens inside a model: the tensors at its named points, from one real forward pass.

There is no second model for explanation. The points are taps in the model's own code (`models/taps.py`); a trace runs
that code with somebody listening. Attention then goes by its written-out reference, since the fused kernels never hold
the scores and weights, which gives the same numbers within rounding.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from sheepop.data.tokenizer import Tokenizer
from sheepop.models.transformer import TransformerModel, inference
from sheepop.utils.errors import ConfigError, DataError, did_you_mean
from sheepop.utils.memory import available_bytes


@dataclass(frozen=True)
class Trace(Mapping[str, Tensor]):
    """The tensors of one forward pass over one text, by the names of their points; the batch of one is left out.

    Attributes:
        model: that was run.
        token_ids: (T,).
        tensors: by name, in the order in which the model made them, on the CPU.
    """

    model: TransformerModel
    token_ids: Tensor
    tensors: dict[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise unknown_point(name, self.tensors)
        return self.tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def trace(model: TransformerModel, token_ids: Sequence[int] | Tensor, points: Sequence[str] = ("*",)) -> Trace:
    """Run the model over a text and return the tensors at its named points.

    Args:
        model: of any family, quantized or not; it is left as it was.
        token_ids: (T,), at least one and at most `max_seq_len`.
        points: names or patterns such as `blocks.*.attention.weights`; only what they name is kept. A long text has
            large scores and weights, H·T² numbers each in every layer.

    Raises:
        ConfigError: no point has such a name; names the nearest.
        DataError: no tokens, more than the model sees or than memory holds, or ids outside of the vocabulary.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device=model.device)
    check_tokens(model, ids)
    if list(points) != ["*"]:
        names = point_names(model)
        for pattern in points:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise unknown_point(pattern, names)
    tensors: dict[str, Tensor] = {}

    def record(name: str, tensor: Tensor) -> None:
        if any(fnmatchcase(name, pattern) for pattern in points):
            # The table of positions and the mask are the same for all rows and have no batch.
            tensors[name] = (tensor[0] if tensor.dim() > 2 else tensor).detach().cpu()

    with inference(model):
        model(ids[None], record=record)
    return Trace(model, ids.cpu(), tensors)


def trace_text(model: TransformerModel, tokenizer: Tokenizer, text: str, points: Sequence[str] = ("*",)) -> Trace:
    """Trace a text as a prompt would be read: what begins a text, then its tokens; see `trace`.

    An empty text is the beginning alone, at which the model says how texts begin.
    """
    return trace(model, [*tokenizer.start_ids, *tokenizer.encode(text)] or [tokenizer.begin_of_text_id], points)


def point_names(model: TransformerModel) -> list[str]:
    """Return the names of the model's points, in the order in which it passes them."""
    names: list[str] = []
    with inference(model):
        model(torch.zeros((1, 1), dtype=torch.int64, device=model.device), record=lambda name, _: names.append(name))
    return names


def unknown_point(name: str, names: Iterable[str]) -> ConfigError:
    """Return the error for a name that this model has no point for, with the nearest or all kinds of names."""
    kinds = sorted({re.sub(r"^blocks\.\d+", "blocks.N", known) for known in names})
    hint = did_you_mean(name, names) or f" There are: {', '.join(kinds)}."
    return ConfigError(f"This model has no point '{name}' that could be looked at.{hint}")


def check_tokens(model: TransformerModel, token_ids: Tensor) -> None:
    """Check that the model can be traced over these tokens, (T,).

    Raises:
        DataError: it cannot; says why and what to do.
    """
    config, time = model.config, token_ids.numel()
    if token_ids.dim() != 1 or not time:
        raise DataError(f"A trace needs one text of at least one token, not the shape {tuple(token_ids.shape)}.")
    if time > config.max_seq_len:
        raise DataError(
            f"The text has {time} tokens, but the model sees at most {config.max_seq_len} (model.max_seq_len). "
            "Trace a shorter text, or its last part."
        )
    lowest, highest = int(token_ids.min()), int(token_ids.max())
    if lowest < 0 or highest >= config.vocab_size:
        stranger = lowest if lowest < 0 else highest
        raise DataError(
            f"The text has the token {stranger}, but the model knows the tokens 0 to {config.vocab_size - 1}: its "
            "tokenizer belongs to another model. Use the tokenizer.json that was saved with the checkpoint."
        )
    # Scores before and behind the mask, weights, and their copies on the way, in fp32.
    needed = 4 * 5 * config.num_heads * time**2 + 4 * 2 * config.num_layers * config.num_heads * time**2
    if needed > available_bytes(model.device):
        raise DataError(
            f"The scores and weights of {time} tokens in {config.num_layers} layers of {config.num_heads} heads take "
            f"{needed / 1e9:.1f} GB, more than there is. Trace a shorter text."
        )
