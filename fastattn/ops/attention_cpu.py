"""Attention by PyTorch's fused CPU kernels, arranged so that their semantics are ours.

Windows, ALiBi and relative bias become additive masks of one tile of queries and the keys that tile can see;
a sink becomes one more key. Where the kernels cannot serve (soft-capping, dropout, logsumexp), the formula
computes the same tiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastattn.ops.attention_reference import (
    attend_tile,
    attention_reference,
    computing_dtype,
    query_tiles,
    varlen_attention_reference,
)
from fastattn.ops.attention_softcap import can_soften_in_place, softcapped_tile
from fastattn.ops.attention_terms import AttentionTerms, sequence_terms

__all__ = [
    "attend_at_once",
    "attend_packed",
    "attend_runs",
    "attend_sequences",
    "attention_torch",
    "varlen_attention_torch",
]

# A window is attended in tiles of at least this many queries: fewer would cost more in calls than the keys
# they leave out.
MIN_WINDOW_ROWS = 256


def attention_torch(
    query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms
) -> tuple[Tensor, Tensor | None]:
    """`fastattn::attention` in PyTorch; shapes as in `fastattn.ops.attention`."""
    if terms.dropout_p > 0.0 or terms.return_lse:
        out, lse = attention_reference(query, key, value, terms)
        return out, lse.to(torch.float32) if terms.return_lse else None
    query, key, value = map(_last_dim_contiguous, (query, key, value))
    if terms.key_lengths is None:
        return _attend(query, key, value, terms), None
    # Slicing, not masking: whatever a cache holds past the length (NaN too) never enters a product.
    lengths = terms.key_lengths.clamp(0, key.shape[2]).tolist()
    parts = [(slice(None), lengths[0])] if len(set(lengths)) == 1 else list(_one_by_one(lengths))
    outs = [
        _attend(query[batch], key[batch, :, :length], value[batch, :, :length], _narrow(terms, batch, length))
        for batch, length in parts
    ]
    return torch.cat(outs) if outs else _zeros(query, key, value), None


def _last_dim_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _one_by_one(lengths: list[int]) -> list[tuple[slice, int]]:
    return [(slice(index, index + 1), length) for index, length in enumerate(lengths)]


def _narrow(terms: AttentionTerms, batch: slice, length: int) -> AttentionTerms:
    """The terms of the sequences `batch` and their first `length` keys."""

    def narrow(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        x = x if x.shape[0] == 1 else x[batch]
        return x if x.shape[-1] == 1 else x[..., :length]

    starts = terms.query_starts
    return replace(
        terms,
        mask=narrow(terms.mask),
        bias=narrow(terms.bias),
        key_lengths=None,
        query_starts=None if starts is None else starts[batch],
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, terms: AttentionTerms) -> Tensor:
    """Attention of [B, H, S, D] over keys that all exist: without key_lengths, dropout and logsumexp."""
    length, keys = query.shape[2], key.shape[2]
    if query.numel() == 0 or keys == 0:
        # The CPU kernel divides by the number of queries: an empty call ends the process.
        return _zeros(query, key, value)
    first, last = _starts(terms)
    left, right = terms.reach
    # A bound that no query reaches is none.
    if right >= 0 and first + right >= keys - 1:
        right = -1
    if left >= 0 and last + length - 1 - left <= 0:
        left = -1
    if terms.mask is None and terms.sinks is None and terms.softcap == 0.0 and not _is_added(terms):
        if (left, right) == (-1, -1):
            return _fused(query, key, value, None, False, terms.scale)
        if (left, right) == (-1, 0) and first == last == 0 and length == keys:
            return _fused(query, key, value, None, True, terms.scale)
    terms = replace(terms, causal=False, window_left=left, window_right=right)
    # The masks and weights of all tiles together may pass the byte limit, which autograd would keep.
    recompute = torch.is_grad_enabled() and len(query_tiles(query, keys)) > 1
    outs = []
    for rows in _tiles(query, keys, left, right):
        low = 0 if left < 0 else min(max(0, rows[0] + first - left), keys)
        high = keys if right < 0 else min(max(low, rows[1] + last + right), keys)
        attend = partial(_attend_tile, rows=rows, columns=(low, high), terms=terms)
        tile = query[:, :, rows[0] : rows[1]], key[:, :, low:high], value[:, :, low:high]
        outs.append(checkpoint(attend, *tile, use_reentrant=False) if recompute else attend(*tile))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)


def _zeros(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """What queries get that attend nothing; with a gradient, zero, wherever the tensors have one."""
    zeros = query.new_zeros(*query.shape[:3], value.shape[3])
    return zeros + (query[:0].sum() + key[:0].sum() + value[:0].sum())


def _starts(terms: AttentionTerms) -> tuple[int, int]:
    """The smallest and the largest query_start of the batch."""
    if terms.query_starts is None or not terms.depends_on_position:
        return terms.query_start, terms.query_start
    starts = terms.query_starts.tolist()
    return min(starts), max(starts)


def _is_added(terms: AttentionTerms) -> bool:
    return not (terms.bias is None and terms.rel_table is None and terms.alibi_slopes is None)


def _tiles(query: Tensor, keys: int, left: int, right: int) -> list[tuple[int, int]]:
    """Tiles of queries within the byte limit; under a window about as long as it, so that a tile sees at most
    about twice the keys each of its queries does.
    """
    if left < 0 or right < 0:
        return query_tiles(query, keys)
    rows = max(MIN_WINDOW_ROWS, left + right + 1)
    within = query_tiles(query, min(keys, rows + left + right))
    rows = min(rows, within[0][1])
    length = query.shape[2]
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def _attend_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows: tuple[int, int],
    columns: tuple[int, int],
    terms: AttentionTerms,
) -> Tensor:
    """Attention of queries `rows` over keys `columns`, which the tensors already hold."""
    if key.shape[2] == 0:
        return _zeros(query, key, value)
    if terms.softcap > 0.0:
        dtype = computing_dtype(query)
        tile = query.to(dtype), key.to(dtype), value.to(dtype)
        if can_soften_in_place(query, key, value, terms):
            return softcapped_tile(*tile, rows, columns, terms).to(query.dtype)
        out, _, _ = attend_tile(*tile, rows, columns, terms)
        return out.to(query.dtype)
    visible = terms.visible(rows, columns, key.device)
    # The CPU kernels take a float32 mask beside half-precision queries; a GPU's want the queries' dtype.
    dtype = computing_dtype(query) if query.device.type == "cpu" else query.dtype
    added = terms.added(rows, columns, key.device, dtype)
    if terms.sinks is not None:
        # One more key, zero, whose score is the sink and whose value is zero.
        sinks = terms.sinks.to(dtype)[None, :, None, None]
        key, value = pad(key, (0, 0, 0, 1)), pad(value, (0, 0, 0, 1))
        if added is None:
            added = sinks.new_zeros(1, 1, 1, 1)
        if visible is not None:
            added = added.masked_fill(~visible, float("-inf"))
        added = added.expand(*added.shape[:3], key.shape[2] - 1)
        shape = torch.broadcast_shapes(added.shape[:3], sinks.shape[:3])
        added = torch.cat([added.expand(*shape, -1), sinks.expand(*shape, 1)], dim=-1)
    elif added is not None and visible is not None:
        added = added.masked_fill(~visible, float("-inf"))
    return _fused(query, key, value, visible if added is None else added, False, terms.scale)


def _fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """SDPA on [B, H, S, D]; `mask` bool or additive, `causal` aligned top-left."""
    if torch.is_autocast_enabled(query.device.type):
        # Autocast would take the mask to half precision; query, key and value have been through it.
        with torch.autocast(query.device.type, enabled=False):
            return _fused(query, key, value, mask, causal, scale)
    head_dim, value_dim = query.shape[3], value.shape[3]
    # The fused kernels want value heads of query's size: zeros make up the difference.
    if value_dim < head_dim:
        value = pad(value, (0, head_dim - value_dim))
    elif value_dim > head_dim:
        query, key = pad(query, (0, value_dim - head_dim)), pad(key, (0, value_dim - head_dim))
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        # torch.jit.trace makes tensors of sizes.
        enable_gqa=bool(query.shape[1] != key.shape[1]),
    )
    return out if value_dim >= head_dim else out[..., :value_dim]


def attend_at_once(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> Tensor:
    """One fused call on [B, H, S, D] and next to nothing around it, which in decoding would cost as much as
    the call: nothing is empty, autocast is off, key and value heads are of one size.

    `mask`: bool, or additive in query's dtype: 4-D, broadcastable. `causal`: as many queries as keys.
    """
    batch, heads, length, head_dim = query.shape
    key_heads = key.shape[1]
    if heads == key_heads:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=causal, scale=scale)
    if length == 1 and (mask is None or mask.shape[1] == 1):
        # The queries of one token that share keys, as queries of one head: the keys are read once.
        query = query.reshape(batch, key_heads, heads // key_heads, head_dim)
        out = scaled_dot_product_attention(query, key, value, mask, scale=scale)
        return out.reshape(batch, heads, 1, head_dim)
    return scaled_dot_product_attention(
        query, key, value, mask, is_causal=causal, scale=scale, enable_gqa=True
    )


def attend_runs(
    query: Tensor, key: Tensor, value: Tensor, runs: tuple[tuple[int, int, int], ...], scale: float
) -> Tensor:
    """Each sequence attending all of itself, of [T, H, D]: one call for those of one length in a row, (first
    token, number, length) each, and next to nothing around it.
    """
    outs = []
    for start, count, length in runs:
        q, k, v = (
            x[start : start + count * length].view(count, length, *x.shape[1:]).transpose(1, 2)
            for x in (query, key, value)
        )
        out = attend_at_once(q, k, v, None, False, scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def varlen_attention_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    default_start: bool,
    terms: AttentionTerms,
) -> tuple[Tensor, Tensor | None]:
    """`fastattn::varlen_attention` in PyTorch: one fused call a sequence, nothing padded."""
    if terms.dropout_p > 0.0 or terms.return_lse:
        out, lse = varlen_attention_reference(
            query, key, value, cu_seqlens_q, cu_seqlens_k, default_start, terms
        )
        return out, lse.to(torch.float32) if terms.return_lse else None
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    each = sequence_terms(terms, bounds_q, bounds_k, default_start)
    return _attend_each(query, key, value, bounds_q, bounds_k, each), None


def attend_sequences(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    scale: float,
    causal: bool = False,
    starts: list[int] | None = None,
) -> Tensor:
    """Packed attention [T, H, D] with the bounds of the sequences as plain numbers: one fused call a
    sequence.

    `starts`: the position of each sequence's query 0 among its keys where `causal`; default the last keys'.
    """
    terms = AttentionTerms(scale=scale, causal=causal)
    if starts is None:
        each = sequence_terms(terms, bounds_q, bounds_k, default_start=True)
    else:
        each = [replace(terms, query_start=start) for start in starts]
    return _attend_each(query, key, value, bounds_q, bounds_k, each)


def attend_packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    terms: AttentionTerms,
) -> Tensor:
    """`attend_sequences` with whatever else shapes the scores.

    `terms.bias` is that of the padded batch, [1 or B, Hq or 1, >= Sq, >= Sk]: each sequence has its first
    rows and columns. Each sequence's last query is aligned with its last key.
    """
    lengths_q = [end - start for start, end in pairwise(bounds_q)]
    lengths_k = [end - start for start, end in pairwise(bounds_k)]
    longest = max(lengths_k, default=0)
    left, right = terms.window_left, terms.window_right
    # A window that no sequence exceeds is none; without it all sequences share one set of terms.
    if max(left, right) >= 0:
        terms = replace(
            terms,
            window_left=-1 if left >= longest - 1 else left,
            window_right=-1 if right >= max(longest, max(lengths_q, default=0)) - 1 else right,
        )
    bias = terms.bias
    if terms.rel_table is not None and lengths_q == lengths_k:
        # Looked up once for the longest sequence, not once a sequence.
        dtype = computing_dtype(query)
        bias = terms.added((0, longest), (0, longest), query.device, dtype)
        terms = replace(terms, bias=bias, rel_table=None)
    each = sequence_terms(terms, bounds_q, bounds_k, default_start=True)
    if bias is not None:
        parts = bias if bias.shape[0] > 1 else bias.expand(len(each), -1, -1, -1)
        shared: dict[tuple[int, int], AttentionTerms] = {}
        for index, (rows, columns) in enumerate(zip(lengths_q, lengths_k, strict=True)):
            if bias.shape[0] > 1 or (rows, columns) not in shared:
                part = parts[index][None, :, :rows, :columns]
                shared[rows, columns] = replace(each[index], bias=part)
            each[index] = shared[rows, columns]
    return _attend_each(query, key, value, bounds_q, bounds_k, each)


def _attend_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    each: list[AttentionTerms],
) -> Tensor:
    """Sequences that follow one another with the same lengths and terms are one call: of short ones, as
    sentences are, a call costs more than its attention.
    """
    q, k, v = map(_last_dim_contiguous, (query, key, value))
    outs = []
    for first, count in _runs(bounds_q, bounds_k, each):
        queries = _batched(q, bounds_q, first, count)
        keys, values = (_batched(x, bounds_k, first, count) for x in (k, v))
        out = _attend(queries, keys, values, each[first])
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if outs else query.new_zeros(0, query.shape[1], value.shape[2])


def _batched(x: Tensor, bounds: list[int], first: int, count: int) -> Tensor:
    """`count` sequences of one length, of [T, H, D]: [count, H, length, D]."""
    length = bounds[first + 1] - bounds[first]
    rows = x[bounds[first] : bounds[first + count]]
    return rows.view(count, length, *rows.shape[1:]).transpose(1, 2)


def _runs(bounds_q: list[int], bounds_k: list[int], each: list[AttentionTerms]) -> Iterator[tuple[int, int]]:
    """The first sequence and the number of those in a row that may be one call."""
    first = 0
    for index in range(1, len(each) + 1):
        if index == len(each) or not (
            each[index] is each[first]
            and bounds_q[index + 1] - bounds_q[index] == bounds_q[first + 1] - bounds_q[first]
            and bounds_k[index + 1] - bounds_k[index] == bounds_k[first + 1] - bounds_k[first]
        ):
            yield first, index - first
            first = index
