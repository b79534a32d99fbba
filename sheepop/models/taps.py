"""Named points inside the model, at which whoever asks sees the tensors of a real forward pass (`learn/trace.py`).

A tap hands a tensor through unchanged. Where nobody records it is a function that does nothing else, which is how it
costs next to nothing.
"""

from collections.abc import Callable

from torch import Tensor

Record = Callable[[str, Tensor], None]
Tap = Callable[[str, Tensor], Tensor]


def untapped(_name: str, tensor: Tensor) -> Tensor:
    """Hand the tensor through; nobody looks."""
    return tensor


def tap_into(record: Record | None, place: str) -> Tap:
    """Return the tap of one part of the model: its points are told as `place` and their own name behind it."""
    if record is None:
        return untapped

    def tap(name: str, tensor: Tensor) -> Tensor:
        record(place + name, tensor)
        return tensor

    return tap
