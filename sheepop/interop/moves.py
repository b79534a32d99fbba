"""Weights under other names and in other layouts: what becomes of each of ours, and the way back.

A stock class of another library is described by a list of moves, one for each of our weights. The same list serves both
directions, so that importing is the inverse of exporting.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from sheepop.config import ModelConfig
from sheepop.models.pretrained import stored_weights
from sheepop.models.transformer import TransformerModel
from sheepop.utils.errors import CheckpointError

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Move:
    """One weight of ours and the one or several that it is elsewhere.

    Attributes:
        ours: its name in our files.
        theirs: the names elsewhere.
        out: from ours to theirs, in the order of the names.
        back: the inverse.
    """

    ours: str
    theirs: tuple[str, ...]
    out: Callable[[Tensor], tuple[Tensor, ...]]
    back: Callable[[tuple[Tensor, ...]], Tensor]


def same(ours: str, theirs: str) -> Move:
    """Return the move of a weight that only has another name."""
    return Move(ours, (theirs,), lambda tensor: (tensor,), lambda tensors: tensors[0])


def transposed(ours: str, theirs: str) -> Move:
    """Return the move of a matrix that is kept the other way round (GPT-2's `Conv1D`); a bias stays as it is."""
    return Move(ours, (theirs,), lambda tensor: (tensor.t(),), lambda tensors: tensors[0].t())


def parted(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...]) -> Move:
    """Return the move of a matrix or bias whose rows are several weights elsewhere, of so many rows each."""
    return Move(ours, theirs, lambda tensor: torch.split(tensor, list(sizes)), torch.cat)


def linear(move: Callable[..., Move], ours: str, theirs: str | tuple[str, ...], *arguments: object) -> Iterator[Move]:
    """Yield a move for the matrix and one for the bias of a linear layer or norm."""
    for kind in ("weight", "bias"):
        names = f"{theirs}.{kind}" if isinstance(theirs, str) else tuple(f"{name}.{kind}" for name in theirs)
        yield move(f"{ours}.{kind}", names, *arguments)


def reordered(move: Move, config: ModelConfig, num_heads: int) -> Move:
    """Return a move of which the first `num_heads` heads of our rows have their turned numbers in the order of halves.

    Our rotary positions turn neighbours, (2i, 2i + 1); `transformers` turns i and i + R/2 (`positions.py`).
    """
    width, turned = config.head_dim, config.turned_dim if config.positions == "rotary" else 0
    order = torch.cat((torch.arange(0, turned, 2), torch.arange(1, turned, 2), torch.arange(turned, width)))
    rows = num_heads * width

    def in_order(tensor: Tensor, order: Tensor) -> Tensor:
        heads = tensor[:rows].view(num_heads, width, *tensor.shape[1:])[:, order].flatten(0, 1)
        return torch.cat((heads, tensor[rows:]))

    return Move(
        move.ours,
        move.theirs,
        lambda tensor: move.out(in_order(tensor, order)),
        lambda tensors: in_order(move.back(tensors), order.argsort()),
    )


def interleaved(ours: str, theirs: str, config: ModelConfig) -> Move:
    """Return the move of queries, keys and values of all heads to those of each head together (GPT-NeoX)."""
    heads, width = config.num_heads, config.head_dim
    return Move(
        ours,
        (theirs,),
        lambda tensor: (tensor.view(3, heads, width, *tensor.shape[1:]).transpose(0, 1).flatten(0, 2),),
        lambda tensors: tensors[0].view(heads, 3, width, *tensors[0].shape[1:]).transpose(0, 1).flatten(0, 2),
    )


def shapes_of(config: ModelConfig) -> dict[str, torch.Size]:
    """Return the shape of each stored weight of a model, without making it."""
    with torch.device("meta"):
        model = TransformerModel(config, initialize=False)
    return {name: tensor.shape for name, tensor in stored_weights(model).items()}


def weights_for(moves: list[Move], weights: Weights, config: ModelConfig) -> dict[str, Tensor]:
    """Return our weights as theirs: a tied head only once, and a bias that we lack and they need as zero."""
    shapes = shapes_of(config.model_copy(update={"bias": True}))
    moved: dict[str, Tensor] = {}
    for move in moves:
        if move.ours not in shapes:
            continue
        tensor = weights.get(move.ours)
        if tensor is None:
            assert move.ours.endswith(".bias"), move.ours
            tensor = torch.zeros(shapes[move.ours])
        moved |= dict(zip(move.theirs, move.out(tensor), strict=True))
    return {name: tensor.contiguous() for name, tensor in moved.items()}


def weights_from(moves: list[Move], weights: Weights, config: ModelConfig, source: str) -> dict[str, Tensor]:
    """Return their weights as ours, in fp32; biases that they lack and we have are zero.

    Raises:
        CheckpointError: a weight is missing or has another shape; it is named.
    """
    shapes = shapes_of(config)
    by_name = {move.ours: move for move in moves}
    moved: dict[str, Tensor] = {}
    for ours, shape in shapes.items():
        move = by_name.get(ours)
        found = () if move is None else tuple(weights[name] for name in move.theirs if name in weights)
        if not found and ours.endswith(".bias"):
            moved[ours] = torch.zeros(shape)
            continue
        if move is None or len(found) < len(move.theirs):
            missing = [name for name in (move.theirs if move else (ours,)) if name not in weights]
            raise CheckpointError(f"{source} lacks the weight {', '.join(missing)}, so it is not a whole model.")
        try:
            tensor = move.back(tuple(part.float() for part in found))
        except (RuntimeError, IndexError):
            tensor = torch.empty(0)
        if tensor.shape != shape:
            sizes = ", ".join(f"{name} {tuple(part.shape)}" for name, part in zip(move.theirs, found, strict=True))
            raise CheckpointError(
                f"{source} does not fit its own settings: {sizes} cannot become a weight of shape {tuple(shape)}."
            )
        moved[ours] = tensor.contiguous()
    return moved
