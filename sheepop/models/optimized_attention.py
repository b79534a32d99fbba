"""The attention of `attention.py` by the fastest kernels there are: same signature, same result within rounding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from sheepop.models.attention import visible
from sheepop.models.block_attention import block_attention, learns_in_blocks
from sheepop.models.kernel_attention import kernel_attention, learns_by_kernels


def optimized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 0,
    sinks: int = 0,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    by_kernels: bool = False,
) -> Tensor:
    """Return what `attention` returns, without a (T, S) matrix in memory where the kernel allows it.

    The plain causal case names itself (`is_causal`) instead of passing a mask, which keeps the flash kernels
    in use, and a single query needs no mask at all: it sees every key, or those that window and sinks leave.

    Args:
        by_kernels: learn on a CPU by kernels that numba compiles, for which documents are without gaps.
    """
    if by_kernels and mask is None and learns_by_kernels(query, key):
        return kernel_attention(
            query, key, value, window=window, sinks=sinks, document_ids=document_ids, dropout=dropout
        )
    if mask is None and learns_in_blocks(query, key, drops=dropout > 0):
        return block_attention(
            query, key, value, window=window, sinks=sinks, document_ids=document_ids, dropout=dropout
        )
    query_time, key_time = query.shape[2], key.shape[2]
    is_hiding = 0 < window < key_time - sinks
    if mask is None and is_hiding and query_time == 1 and (document_ids is None or not sinks):
        # The only query sees the last keys alone, and sinks: slicing is cheaper than masking.
        if sinks:
            key, value = (torch.cat((part[:, :, :sinks], part[:, :, -window:]), dim=2) for part in (key, value))
        else:
            key, value = key[:, :, -window:], value[:, :, -window:]
        document_ids = None if document_ids is None else document_ids[:, -window:]
        key_time, window, sinks, is_hiding = sinks + window, 0, 0, False
    needs_mask = document_ids is not None or is_hiding or query_time not in (1, key_time)
    if mask is None and needs_mask:
        mask = visible(query_time, key_time, window=window, sinks=sinks, document_ids=document_ids, device=query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query_time > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
