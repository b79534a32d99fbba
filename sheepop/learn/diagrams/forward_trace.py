"""What really happens in a forward pass: every operation on a tensor, the calls that it is inside of, what flows where.

The model runs once, on PyTorch's `meta` device, where tensors have shapes but no numbers, so that a model of any size
takes no memory. A `TorchFunctionMode` sees each operation, and the Python frames above it say on whose behalf.
"""

import dataclasses
import functools
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sheepop.config import ModelConfig
from sheepop.learn.diagrams.wording import first_sentence
from sheepop.models.transformer import TransformerModel

LEAST_NAMED = 3  # sizes below it, as that of a pair, are too common to have letters


@dataclass(frozen=True)
class Call:
    """A call of a function of the project, or of a module's `forward`.

    Attributes:
        number: which call it is; no two share one.
        owner: the module's class, or the function's name.
        module: the path of the module that it is a method of, `""` for the model itself; None for a plain function.
        text: the first sentence of its documentation.
    """

    number: int
    owner: str
    module: str | None
    text: str


@dataclass(frozen=True)
class Value:
    """A tensor at the entrance or exit of an operation; `names` are those of the variables that hold it, by call."""

    number: int
    shape: tuple[int, ...]
    names: dict[int, str] = field(default_factory=dict)
    parameter: str | None = None


@dataclass(frozen=True)
class Operation:
    """One operation: its name, the calls around it from the outermost, the tensors and plain numbers in and out."""

    name: str
    calls: tuple[Call, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    numbers: tuple[float, ...]


@dataclass(frozen=True)
class ForwardTrace:
    """What one forward pass did.

    Attributes:
        operations: in order.
        results: the number of the tensor that each module returned, by its path.
        letters: of sizes.
    """

    model: TransformerModel
    operations: list[Operation]
    results: dict[str, int]
    letters: dict[int, str]

    def shape_text(self, shape: tuple[int, ...]) -> str:
        """Return a shape in letters, as `(B, T, D)`; sizes that have none, or would share one, as numbers."""
        return f"({', '.join(self.letters.get(size, str(size)) for size in shape)})"


def trace_forward(config: ModelConfig) -> ForwardTrace:
    """Build the model that the settings describe and run it once, as it runs while it learns."""
    named = named_sizes(config)
    taken = {size for _, size in named}
    time = min(next(size for size in itertools.count(5) if size not in taken), config.max_seq_len)
    batch = next(size for size in itertools.count(5) if size not in {*taken, time})
    with torch.device("meta"):
        model = TransformerModel(config, initialize=False)
        token_ids = torch.zeros((batch, time), dtype=torch.int64)
    results: dict[str, int] = {}

    def note_result(path: str, _module: nn.Module, _inputs: Any, result: Tensor) -> None:
        results[path] = id(result)

    for path, module in model.named_modules():
        module.register_forward_hook(functools.partial(note_result, path))
    recorder = _Recorder(model)
    with torch.no_grad(), recorder:
        model(token_ids)
    return ForwardTrace(model, recorder.operations, results, letters_of([("B", batch), ("T", time), *named]))


def named_sizes(config: ModelConfig) -> list[tuple[str, int]]:
    """Return the letters of a model's sizes, with the sizes."""
    heads, groups = config.num_heads, config.num_kv_heads
    named = [("V", config.vocab_size), ("D", config.d_model), ("F", config.d_ff), ("H", heads), ("C", config.head_dim)]
    named.append(("C/2", config.head_dim // 2))
    if groups == heads:
        named += [("3H", 3 * heads), ("2H", 2 * heads), ("3H·C", 3 * heads * config.head_dim)]
    else:
        together = heads + 2 * groups
        named += [("K", groups), ("H+2K", together), ("H+K", heads + groups), ("(H+2K)·C", together * config.head_dim)]
    if heads * config.head_dim != config.d_model:
        named.append(("H·C", heads * config.head_dim))
    if config.is_gated:
        named.append(("2F", 2 * config.d_ff))
    return named


def letters_of(named: list[tuple[str, int]]) -> dict[int, str]:
    """Return the letter of each size; one that two letters share has none."""
    sizes = [size for _, size in named]
    return {size: letter for letter, size in named if sizes.count(size) == 1 and size >= LEAST_NAMED}


class _Recorder(TorchFunctionMode):
    """Writes down each operation while it is active."""

    def __init__(self, model: TransformerModel) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self._modules = {id(module): path for path, module in model.named_modules()}
        self._parameters: dict[int, str] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            known = self._parameters.get(id(parameter))
            self._parameters[id(parameter)] = f"{known} = {name}" if known else name
        self._buffers = {id(buffer): name for name, buffer in model.named_buffers()}
        self._calls: dict[int, Call] = {}
        self._kept: list[Any] = []  # frames and tensors, so that none gets the address of another

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = list(_tensors(result))
        if outputs:
            frames = list(self._frames(sys._getframe(1)))
            given = (*args, *kwargs.values())
            self._kept += [*frames, *outputs, *_tensors(given)]
            self.operations.append(
                Operation(
                    name=getattr(func, "__name__", str(func)).strip("_"),
                    calls=tuple(self._call(frame) for frame in frames),
                    inputs=tuple(self._value(tensor, frames) for tensor in _tensors(given)),
                    outputs=tuple(self._value(tensor, []) for tensor in outputs),
                    numbers=tuple(float(number) for number in given if type(number) in (int, float)),
                )
            )
        return result

    def _frames(self, frame: FrameType | None) -> Iterator[FrameType]:
        """Yield the frames that are calls, the outermost first."""
        inside: list[FrameType] = []
        while frame is not None:
            owner = frame.f_locals.get("self")
            is_module = id(owner) in self._modules
            is_project = str(frame.f_globals.get("__name__")).startswith("sheepop.models")
            is_named = not frame.f_code.co_name.startswith("<")  # unlike a lambda
            if is_named and (is_project or (is_module and frame.f_code.co_name == "forward")):
                inside.append(frame)
            frame = frame.f_back
        yield from reversed(inside)

    def _call(self, frame: FrameType) -> Call:
        if id(frame) not in self._calls:
            owner = frame.f_locals.get("self")
            name = frame.f_code.co_name
            path = self._modules.get(id(owner))
            function = frame.f_globals.get(name) if path is None else type(owner)
            self._calls[id(frame)] = Call(
                number=len(self._calls),
                owner=name if path is None else type(owner).__name__,
                module=path,
                text=first_sentence(inspect.getdoc(function) or ""),
            )
        return self._calls[id(frame)]

    def _value(self, tensor: Tensor, frames: list[FrameType]) -> Value:
        names: dict[int, str] = {}
        for frame in frames:
            for name, value in frame.f_locals.items():
                fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
                held = [entry.name for entry in fields if getattr(value, entry.name) is tensor]
                if value is tensor or held:
                    names.setdefault(self._call(frame).number, held[0] if held else name)
        parameter = self._parameters.get(id(tensor))
        if parameter is None and id(tensor) in self._buffers:
            names = {self._call(frame).number: self._buffers[id(tensor)] for frame in frames}
        return Value(id(tensor), tuple(tensor.shape), names, parameter)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)


def module_kind(module: nn.Module) -> str:
    """Return a module's class, with its sizes where it has a matrix."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2:
        wide, narrow = weight.shape
        numbers = f"{wide} × {narrow}" if isinstance(module, nn.Embedding) else f"{narrow} → {wide}"
        return f"{type(module).__name__} {numbers}"
    return type(module).__name__
