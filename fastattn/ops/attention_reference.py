"""Attention in plain PyTorch: differentiable, exact in float64. What every other face of the operation is
tested against.

Formula: softmax(scale * Q K^T + bias) V over the keys a query may see (Vaswani et al., 2017), with zeros for
a query that sees none.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastattn.ops.dropout import keep_mask

__all__ = [
    "attention_reference",
    "attention_weights",
    "query_tiles",
    "varlen_attention_reference",
    "visible_keys",
]

# Scores of at most this many bytes exist at a time; above it the queries are taken in tiles.
TILE_BYTES = 256 * 2**20


def query_tiles(query: Tensor, key: Tensor) -> list[tuple[int, int]]:
    """Ranges of queries whose float32 scores [B, Hq, rows, Sk] stay within TILE_BYTES each."""
    batch, heads, length, _ = query.shape
    row_bytes = max(1, batch * heads * key.shape[2] * 4)
    rows = max(1, min(length, TILE_BYTES // row_bytes))
    return [(start, min(start + rows, length)) for start in range(0, length, rows)]


def visible_keys(
    rows: tuple[int, int],
    keys: int,
    device: torch.device,
    mask: Tensor | None,
    key_lengths: Tensor | None,
    causal: bool,
    query_start: int,
    query_starts: Tensor | None,
) -> Tensor | None:
    """The keys that queries `rows` may attend: bool broadcastable to [B, Hq, rows, Sk]; None when all."""
    visible = None
    if mask is not None:
        if mask.dim() == 2:
            visible = mask[:, None, None, :]
        else:
            visible = mask if mask.shape[2] == 1 else mask[:, :, rows[0] : rows[1]]
    column = torch.arange(keys, device=device)
    if key_lengths is not None:
        present = (column < key_lengths[:, None])[:, None, None, :]
        visible = present if visible is None else visible & present
    if causal:
        row = torch.arange(*rows, device=device)
        starts = query_start if query_starts is None else query_starts[:, None, None, None]
        before = column <= row[None, None, :, None] + starts
        visible = before if visible is None else visible & before
    return visible


def _scores(query: Tensor, key: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    if group > 1:
        key = key.repeat_interleave(group, dim=1)
    return (query @ key.transpose(-1, -2)) * scale


def _tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    visible: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities and logsumexp of one tile of queries, in the computing dtype."""
    if key.shape[2] == 0:
        lse = query.new_full(query.shape[:3], float("-inf"))
        return query.new_zeros(*query.shape[:3], value.shape[3]), query.new_zeros(*query.shape[:3], 0), lse
    scores = _scores(query, key, scale)
    if bias is not None:
        scores = scores + bias
    if visible is not None:
        scores = scores.masked_fill(~visible, float("-inf"))
    # A row that sees nothing has the maximum -inf and the sum 0: both are replaced before they can make a
    # NaN.
    maximum = scores.detach().amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == float("-inf"), 0.0)
    exponentials = torch.exp(scores - maximum)
    total = exponentials.sum(dim=-1, keepdim=True)
    total = total.masked_fill(total == 0.0, 1.0)
    probabilities = exponentials / total
    empty = (exponentials.detach() == 0.0).all(dim=-1)
    lse = (torch.log(total) + maximum)[..., 0].masked_fill(empty, float("-inf"))
    dropped = probabilities
    if keep is not None:
        dropped = probabilities * keep / (1.0 - dropout_p) if dropout_p < 1.0 else probabilities * 0.0
    group = query.shape[1] // value.shape[1]
    return dropped @ (value.repeat_interleave(group, dim=1) if group > 1 else value), probabilities, lse


def attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    key_lengths: Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`fastattn::attention` on the same arguments; computes in float32, or float64 where an input is float64.

    Returns:
        out [B, Hq, Sq, Dv] in query's dtype, and lse [B, Hq, Sq] in the computing dtype (empty unless asked
        for).
    """
    computing = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k, v = query.to(computing), key.to(computing), value.to(computing)
    if key_lengths is not None:
        # Keys past the length are not there: whatever the cache holds in those rows must not reach the
        # result.
        absent = torch.arange(key.shape[2], device=key.device) >= key_lengths[:, None]
        k = k.masked_fill(absent[:, None, :, None], 0.0)
        v = v.masked_fill(absent[:, None, :, None], 0.0)
    tiles = query_tiles(query, key)
    outputs, normalizers = [], []
    for rows in tiles:
        visible = visible_keys(
            rows, key.shape[2], key.device, mask, key_lengths, causal, query_start, query_starts
        )
        tile_bias = bias if bias is None or bias.shape[2] == 1 else bias[:, :, rows[0] : rows[1]]
        keep = None
        if dropout_p > 0.0 and seed is not None:
            keep = keep_mask(seed, _row_index(query, rows), key.shape[2], dropout_p)
        compute = partial(_tile, scale=scale, dropout_p=dropout_p)
        arguments = (
            q[:, :, rows[0] : rows[1]],
            k,
            v,
            None if tile_bias is None else tile_bias.to(computing),
            visible,
            keep,
        )
        if len(tiles) > 1 and torch.is_grad_enabled():
            output, _, lse = checkpoint(compute, *arguments, use_reentrant=False)
        else:
            output, _, lse = compute(*arguments)
        outputs.append(output)
        normalizers.append(lse)
    if not tiles:
        return query.new_empty(*query.shape[:3], value.shape[3]), q.new_empty(
            query.shape[:3] if return_lse else 0
        )
    out = torch.cat(outputs, dim=2).to(query.dtype)
    return out, torch.cat(normalizers, dim=2) if return_lse else q.new_empty(0)


def _row_index(query: Tensor, rows: tuple[int, int]) -> Tensor:
    """int64 [B, Hq, rows]: the flat index of each query row, which dropout is keyed by."""
    batch, heads, length, _ = query.shape
    flat = torch.arange(batch * heads, device=query.device).view(batch, heads, 1) * length
    return flat + torch.arange(*rows, device=query.device)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    query_start: int,
    scale: float,
) -> Tensor:
    """The probabilities [B, Hq, Sq, Sk] themselves, for those who ask to see them; in query's dtype."""
    rows = (0, query.shape[2])
    visible = visible_keys(rows, key.shape[2], key.device, mask, None, causal, query_start, None)
    computing = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, k = query.to(computing), key.to(computing)
    probabilities: Tensor
    _, probabilities, _ = _tile(
        q, k, k, None if bias is None else bias.to(computing), visible, None, scale, 0.0
    )
    return probabilities.to(query.dtype)


def varlen_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    causal: bool = False,
    query_start: int = 0,
    query_starts: Tensor | None = None,
    default_start: bool = True,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    return_lse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`fastattn::varlen_attention` on the same arguments: every sequence through the dense formula.

    Returns:
        out [Tq, Hq, Dv] in query's dtype, and lse [Hq, Tq] in the computing dtype (empty unless asked for).
    """
    computing = torch.float64 if query.dtype == torch.float64 else torch.float32
    heads = query.shape[1]
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    outputs, normalizers = [], []
    for sequence, (q0, q1) in enumerate(pairwise(starts_q)):
        k0, k1 = starts_k[sequence], starts_k[sequence + 1]
        start = k1 - k0 - (q1 - q0) if default_start else query_start
        if query_starts is not None:
            start = int(query_starts[sequence])
        q = query[q0:q1].transpose(0, 1)[None].to(computing)
        k = key[k0:k1].transpose(0, 1)[None].to(computing)
        v = value[k0:k1].transpose(0, 1)[None].to(computing)
        visible = visible_keys((0, q1 - q0), k1 - k0, key.device, None, None, causal, start, None)
        keep = None
        if dropout_p > 0.0 and seed is not None:
            row = torch.arange(heads, device=query.device)[:, None] * query.shape[0]
            keep = keep_mask(seed, row + torch.arange(q0, q1, device=query.device), k1 - k0, dropout_p)[None]
        compute = partial(_tile, scale=scale, dropout_p=dropout_p)
        if torch.is_grad_enabled():
            output, _, lse = checkpoint(compute, q, k, v, None, visible, keep, use_reentrant=False)
        else:
            output, _, lse = compute(q, k, v, None, visible, keep)
        outputs.append(output[0].transpose(0, 1))
        normalizers.append(lse[0])
    if not outputs:
        return query.new_zeros(query.shape[0], heads, value.shape[2]), query.new_empty(0, dtype=computing)
    out = torch.cat(outputs).to(query.dtype)
    return out, torch.cat(normalizers, dim=1) if return_lse else out.new_empty(0, dtype=computing)
