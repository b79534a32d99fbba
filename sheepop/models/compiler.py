"""How PyTorch's compiler is asked to compile a block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def compile_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
    """Compile a graph as `torch.compile` does by default, but for two things: a backend for it.

    Dropout draws the numbers that it draws without a compiler. And on a CPU the backward pass makes what matrix
    products read, outputs of norms and activations, again from their inputs, which are kept in any case: by itself the
    compiler keeps both, as such a tensor has to be written to memory again.
    """
    from torch._functorch import config  # with the compiler, whose import takes as long as the rest of starting
    from torch._inductor.compile_fx import compile_fx

    on_cpu = all(tensor.device.type == "cpu" for tensor in inputs if isinstance(tensor, Tensor))
    with config.patch(ban_recompute_materialized_backward=not on_cpu):
        return compile_fx(graph, inputs, config_patches={"fallback_random": True})  # type: ignore[return-value]
