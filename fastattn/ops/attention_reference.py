"""Attention in plain PyTorch: differentiable, exact in float64. What every other face of the operation is
tested against.

Formula: softmax(softcap * tanh(scale * Q K^T / softcap) + bias) V over the keys a query may see (Vaswani et
al., 2017; soft-capping as in Gemma 2, 2024), with zeros for a query that sees none.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.ops.attention_terms import AttentionTerms, sequence_terms
from fastattn.ops.dropout import keep_mask

__all__ = [
    "attend_tile",
    "attention_reference",
    "attention_weights",
    "computing_dtype",
    "query_tiles",
    "varlen_attention_reference",
]

# Scores of at most this many bytes exist at a time; above it the queries are taken in tiles.
TILE_BYTES = 256 * 2**20


def computing_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def query_tiles(query: Tensor, keys: int) -> list[tuple[int, int]]:
    """Ranges of queries whose float32 scores [B, Hq, rows, keys] stay within TILE_BYTES each."""
    batch, heads, length, _ = query.shape
    row_bytes = max(1, batch * heads * keys * 4)
    rows = max(1, min(length, TILE_BYTES // row_bytes))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def attend_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    terms: AttentionTerms,
    first_rows: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The formula on one tile, queries `rows` and keys `columns`, which the tensors hold already, in their
    dtype.

    Args:
        query: [B, Hq, rows, D]; key [B, Hkv, columns, D]; value [B, Hkv, columns, Dv].
        first_rows: int64 [B, Hq], the number of each head's query 0 among all rows, which keys dropout; None
            drops nothing.

    Returns:
        Output [B, Hq, rows, Dv], probabilities [B, Hq, rows, columns] and logsumexp [B, Hq, rows].
    """
    if torch.is_autocast_enabled(query.device.type):
        # Autocast would take the products to half precision; query, key and value have been through it.
        with torch.autocast(query.device.type, enabled=False):
            return attend_tile(query, key, value, rows, columns, terms, first_rows)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2)) * terms.scale
    if terms.softcap > 0.0:
        scores = terms.softcap * torch.tanh(scores / terms.softcap)
    added = terms.added(rows, columns, query.device, query.dtype)
    if added is not None:
        scores = scores + added
    visible = terms.visible(rows, columns, query.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    logits = scores
    if terms.sinks is not None:
        sink = terms.sinks.to(query.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        logits = torch.cat([scores, sink], dim=-1)
    if logits.shape[-1] == 0:
        lse = query.new_full(query.shape[:3], float("-inf"))
        return query.new_zeros(*query.shape[:3], value.shape[3]), scores, lse
    # A row without a logit has the maximum -inf and the sum 0: both are replaced before they can make a NaN.
    maximum = logits.detach().amax(dim=-1, keepdim=True)
    empty = maximum == float("-inf")
    maximum = maximum.masked_fill(empty, 0.0)
    exponentials = torch.exp(logits - maximum)
    total = exponentials.sum(dim=-1, keepdim=True).masked_fill(empty, 1.0)
    lse = (torch.log(total) + maximum).masked_fill(empty, float("-inf"))[..., 0]
    probabilities = exponentials[..., : key.shape[2]] / total
    dropped = probabilities
    if first_rows is not None and terms.dropout_p > 0.0 and terms.seed is not None:
        flat = first_rows[..., None] + torch.arange(*rows, device=query.device)
        keep = keep_mask(terms.seed, flat, columns[1], terms.dropout_p)[..., columns[0] :]
        dropped = (
            probabilities * keep / (1.0 - terms.dropout_p) if terms.dropout_p < 1.0 else probabilities * 0.0
        )
    return dropped @ value, probabilities, lse


def _without_absent_keys(x: Tensor, key_lengths: Tensor | None) -> Tensor:
    """`x` [B, H, Sk, D] with zeros for the keys past the length, so that nothing a cache holds there, NaN
    included, reaches a result or a gradient.
    """
    if key_lengths is None:
        return x
    absent = torch.arange(x.shape[2], device=x.device) >= key_lengths[:, None]
    return x.masked_fill(absent[:, None, :, None], 0.0)


def attention_reference(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> tuple[Tensor, Tensor]:
    """`fastattn::attention` on the same arguments; computes in float32, or float64 where query is float64.

    Returns:
        out [B, Hq, Sq, Dv] in query's dtype, and lse [B, Hq, Sq] in the computing dtype (empty unless asked
        for).
    """
    batch, heads, length, _ = query.shape
    first_rows = torch.arange(batch * heads, device=query.device).view(batch, heads) * length
    dtype = computing_dtype(query)
    k, v = (_without_absent_keys(x.to(dtype), terms.key_lengths) for x in (key, value))
    recompute = len(query_tiles(query, key.shape[2])) > 1
    out, lse = _in_tiles(query.to(dtype), k, v, terms, first_rows, recompute)
    return out.to(query.dtype), lse if terms.return_lse else lse.new_empty(0)


def _in_tiles(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms, first_rows: Tensor, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Output and logsumexp; under autograd, `recompute` keeps none of what is as large as the scores."""
    keys = key.shape[2]
    outputs, normalizers = [], []
    for rows in query_tiles(query, keys):
        attend = partial(attend_tile, rows=rows, columns=(0, keys), terms=terms, first_rows=first_rows)
        tile = query[:, :, rows[0] : rows[1]], key, value
        if recompute and torch.is_grad_enabled():
            output, _, lse = checkpoint(attend, *tile, use_reentrant=False)
        else:
            output, _, lse = attend(*tile)
        outputs.append(output)
        normalizers.append(lse)
    if not outputs:
        return query.new_empty(*query.shape[:3], value.shape[3]), query.new_empty(query.shape[:3])
    return torch.cat(outputs, dim=2), torch.cat(normalizers, dim=2)


def attention_weights(query: Tensor, key: Tensor, terms: AttentionTerms) -> Tensor:
    """The probabilities [B, Hq, Sq, Sk] themselves, for those who ask to see them; in query's dtype."""
    rows, columns, dtype = (0, query.shape[2]), (0, key.shape[2]), computing_dtype(query)
    q, k = query.to(dtype), _without_absent_keys(key.to(dtype), terms.key_lengths)
    _, probabilities, _ = attend_tile(q, k, k, rows, columns, terms)
    return probabilities.to(query.dtype)


def varlen_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    default_start: bool,
    terms: AttentionTerms,
) -> tuple[Tensor, Tensor]:
    """`fastattn::varlen_attention` on the same arguments: every sequence through the dense formula.

    Returns:
        out [Tq, Hq, Dv] in query's dtype, and lse [Hq, Tq] in the computing dtype (empty unless asked for).
    """
    dtype, heads = computing_dtype(query), query.shape[1]
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    q, k, v = (x.to(dtype).transpose(0, 1)[None] for x in (query, key, value))
    first_rows = torch.arange(heads, device=query.device)[None] * query.shape[0]
    outputs = [query.new_zeros(0, heads, value.shape[2], dtype=dtype)]
    normalizers = [query.new_zeros(heads, 0, dtype=dtype)]
    for each, (q0, q1), (k0, k1) in zip(
        sequence_terms(terms, bounds_q, bounds_k, default_start),
        pairwise(bounds_q),
        pairwise(bounds_k),
        strict=True,
    ):
        out, lse = _in_tiles(
            q[:, :, q0:q1], k[:, :, k0:k1], v[:, :, k0:k1], each, first_rows + q0, recompute=True
        )
        outputs.append(out[0].transpose(0, 1))
        normalizers.append(lse[0])
    lse = torch.cat(normalizers, dim=1)
    return torch.cat(outputs).to(query.dtype), lse if terms.return_lse else lse.new_empty(0)
