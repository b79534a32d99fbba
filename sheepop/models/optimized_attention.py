"""The attention of `attention.py` by the fastest kernels there are: same signature, same result within rounding."""

from torch import Tensor
from torch.nn import functional as F

from sheepop.models.attention import visible
from sheepop.models.block_attention import block_attention, learns_in_blocks


def optimized_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window: int = 0,
    document_ids: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return what `attention` returns, without a (T, S) matrix in memory where the kernel allows it.

    The plain causal case names itself (`is_causal`) instead of passing a mask, which keeps the flash kernels
    in use, and a single query without a window sees every key, so it needs no mask at all.
    """
    if mask is None and learns_in_blocks(query, key):
        return block_attention(query, key, value, window=window, document_ids=document_ids, dropout=dropout)
    query_time, key_time = query.shape[2], key.shape[2]
    if mask is None and 0 < window < key_time and query_time == 1:
        # The only query sees the last keys alone: slicing is cheaper than masking.
        key, value = key[:, :, -window:], value[:, :, -window:]
        document_ids = None if document_ids is None else document_ids[:, -window:]
        key_time, window = window, 0
    needs_mask = document_ids is not None or 0 < window < key_time or query_time not in (1, key_time)
    if mask is None and needs_mask:
        mask = visible(query_time, key_time, window=window, document_ids=document_ids, device=query.device)
    return F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query_time > 1,
        enable_gqa=query.shape[1] != key.shape[1],
    )
