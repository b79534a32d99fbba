"""The sums over what may be copied on a CPU by compiled kernels (`copy_kernels.py`), with a backward pass of its own.

Shape letters: B batch, T time, S of it that fills the last square, W width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheepop.models.positions import document_starts
from sheepop.utils.threads import on_all_threads

SIDE = 64  # of a square of the kernels
WIDTHS = 16  # the width is a multiple of it
TYPES = (torch.float32, torch.bfloat16)


def suits_kernels(time: int, width: int) -> bool:
    """Say whether there are kernels for queries of such a width, and texts of so many tokens fill their squares."""
    return time >= SIDE and width > 0 and width % WIDTHS == 0


def learns_by_kernels(query: Tensor) -> bool:
    """Say whether these are queries (B, T, W) to learn from by kernels."""
    return query.device.type == "cpu" and query.dtype in TYPES and suits_kernels(*query.shape[1:])


class KernelCopySums(torch.autograd.Function):
    """`copy_sums`; all sums are in fp32, and documents are each in one piece."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, offered: Tensor, targets: Tensor, document_ids: Tensor | None
    ) -> Tensor:
        """Map (B, T, W) twice and (B, T) ids to (2, B, T); `offered` is the token that followed each place."""
        from sheepop.models.copy_kernels import PARTS, find_sums  # numba, which takes half a second to load

        (B, T, _), missing = query.shape, -query.shape[1] % SIDE
        starts = torch.zeros(B, T, dtype=torch.int64) if document_ids is None else document_starts(document_ids)
        pads = (0, 0, 0, missing)
        given = [
            *(F.pad(rows.detach().float(), pads) if missing else rows.detach().float() for rows in (query, key)),
            *(F.pad(ids.int(), (0, missing)) for ids in (offered, targets)),
            starts,
        ]
        given = [tensor.contiguous() for tensor in given]
        totals, most = torch.empty(2, B, T + missing), torch.empty(B, T + missing)
        arrays = [tensor.numpy() for tensor in (*given, totals, most)]
        on_all_threads(lambda part: find_sums(*arrays, part.start, part.stop), rows=B * PARTS)
        sums = torch.where(totals > 0, totals.log() + most, torch.where(totals.isnan(), totals, -torch.inf))
        ctx.save_for_backward(*given, most, sums)
        ctx.time, ctx.dtypes = T, (query.dtype, key.dtype)
        return sums[:, :, :T].clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query and key for that of the sums, (2, B, T)."""
        from sheepop.models.copy_kernels import PARTS, find_gradients

        *given, most, sums = ctx.saved_tensors
        shares = F.pad(gradient, (0, sums.shape[2] - ctx.time)) * torch.exp(most - sums)
        shares = torch.where(sums == -torch.inf, 0.0, shares)
        query_gradient, key_gradients = torch.zeros_like(given[0]), torch.zeros(PARTS, *given[1].shape)
        arrays = [tensor.numpy() for tensor in (*given, most, shares, query_gradient, key_gradients)]
        on_all_threads(lambda part: find_gradients(*arrays, part.start, part.stop), rows=len(most) * PARTS)
        of_query, of_key = (
            rows[:, : ctx.time].to(dtype)
            for rows, dtype in zip((query_gradient, key_gradients.sum(0)), ctx.dtypes, strict=True)
        )
        return of_query, of_key, None, None, None
