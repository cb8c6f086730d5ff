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
    "dropout_rows",
    "query_tiles",
    "varlen_attention_reference",
    "without_absent_keys",
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
    added: Tensor | None,
    visible: Tensor | None,
    keep: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities and logsumexp of one tile of queries; everything in the computing dtype.

    Args:
        query: [B, Hq, rows, D]; key [B, Hkv, Sk, D]; value [B, Hkv, Sk, Dv].
        added: broadcastable to [B, Hq, rows, Sk], added to the scaled and soft-capped scores.
        visible: bool, likewise, False = not there.
        keep: bool [B, Hq, rows, Sk], the weights that dropout spares.
        sinks: [Hq].
    """
    if torch.is_autocast_enabled(query.device.type):
        # Autocast would take the products to half precision; query, key and value have been through it.
        with torch.autocast(query.device.type, enabled=False):
            return attend_tile(query, key, value, added, visible, keep, sinks, scale, softcap, dropout_p)
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(-1, -2)) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if added is not None:
        scores = scores + added
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    logits = scores
    if sinks is not None:
        sink = sinks[:, None, None].expand(*scores.shape[:3], 1)
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
    if keep is not None:
        dropped = probabilities * keep / (1.0 - dropout_p) if dropout_p < 1.0 else probabilities * 0.0
    return dropped @ value, probabilities, lse


def without_absent_keys(x: Tensor, key_lengths: Tensor | None) -> Tensor:
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
    dtype, keys = computing_dtype(query), key.shape[2]
    q = query.to(dtype)
    k, v = (without_absent_keys(x.to(dtype), terms.key_lengths) for x in (key, value))
    sinks = None if terms.sinks is None else terms.sinks.to(dtype)
    compute = partial(
        attend_tile, sinks=sinks, scale=terms.scale, softcap=terms.softcap, dropout_p=terms.dropout_p
    )
    tiles = query_tiles(query, keys)
    outputs, normalizers = [], []
    for rows in tiles:
        arguments = (
            q[:, :, rows[0] : rows[1]],
            k,
            v,
            terms.added(rows, (0, keys), key.device, dtype),
            terms.visible(rows, (0, keys), key.device),
            _keep(terms, dropout_rows(query, rows), keys),
        )
        if len(tiles) > 1 and torch.is_grad_enabled():
            output, _, lse = checkpoint(compute, *arguments, use_reentrant=False)
        else:
            output, _, lse = compute(*arguments)
        outputs.append(output)
        normalizers.append(lse)
    if not tiles:
        return query.new_empty(*query.shape[:3], value.shape[3]), q.new_empty(
            query.shape[:3] if terms.return_lse else 0
        )
    out = torch.cat(outputs, dim=2).to(query.dtype)
    return out, torch.cat(normalizers, dim=2) if terms.return_lse else q.new_empty(0)


def _keep(terms: AttentionTerms, rows: Tensor, keys: int) -> Tensor | None:
    if terms.dropout_p == 0.0 or terms.seed is None:
        return None
    return keep_mask(terms.seed, rows, keys, terms.dropout_p)


def dropout_rows(query: Tensor, rows: tuple[int, int]) -> Tensor:
    """int64 [B, Hq, rows]: the flat index of each query row, which dropout is keyed by."""
    batch, heads, length, _ = query.shape
    flat = torch.arange(batch * heads, device=query.device).view(batch, heads, 1) * length
    return flat + torch.arange(*rows, device=query.device)


def attention_weights(query: Tensor, key: Tensor, terms: AttentionTerms) -> Tensor:
    """The probabilities [B, Hq, Sq, Sk] themselves, for those who ask to see them; in query's dtype."""
    rows, columns, dtype = (0, query.shape[2]), (0, key.shape[2]), computing_dtype(query)
    q, k = query.to(dtype), without_absent_keys(key.to(dtype), terms.key_lengths)
    _, probabilities, _ = attend_tile(
        q,
        k,
        k,
        terms.added(rows, columns, key.device, dtype),
        terms.visible(rows, columns, key.device),
        None,
        None if terms.sinks is None else terms.sinks.to(dtype),
        terms.scale,
        terms.softcap,
        0.0,
    )
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
    sinks = None if terms.sinks is None else terms.sinks.to(dtype)
    compute = partial(
        attend_tile, sinks=sinks, scale=terms.scale, softcap=terms.softcap, dropout_p=terms.dropout_p
    )
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs, normalizers = [], []
    for terms_, (q0, q1), (k0, k1) in zip(
        sequence_terms(terms, bounds_q, bounds_k, default_start),
        pairwise(bounds_q),
        pairwise(bounds_k),
        strict=True,
    ):
        rows, columns = (0, q1 - q0), (0, k1 - k0)
        flat = torch.arange(heads, device=query.device)[:, None] * query.shape[0]
        arguments = (
            query[q0:q1].transpose(0, 1)[None].to(dtype),
            key[k0:k1].transpose(0, 1)[None].to(dtype),
            value[k0:k1].transpose(0, 1)[None].to(dtype),
            terms_.added(rows, columns, key.device, dtype),
            terms_.visible(rows, columns, key.device),
            _keep(terms, (flat + torch.arange(q0, q1, device=query.device))[None], k1 - k0),
        )
        if torch.is_grad_enabled():
            output, _, lse = checkpoint(compute, *arguments, use_reentrant=False)
        else:
            output, _, lse = compute(*arguments)
        outputs.append(output[0].transpose(0, 1))
        normalizers.append(lse[0])
    if not outputs:
        lse_shape = (heads, query.shape[0]) if terms.return_lse else (0,)
        return query.new_zeros(query.shape[0], heads, value.shape[2]), query.new_empty(lse_shape, dtype=dtype)
    out = torch.cat(outputs).to(query.dtype)
    return out, torch.cat(normalizers, dim=1) if terms.return_lse else out.new_empty(0, dtype=dtype)
