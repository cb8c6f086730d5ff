"""Attention of a packed batch, whose mask is its `Packing`."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fastattn import ops
from fastattn.ops.attention_cpu import attend_packed, attend_runs
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.relative_bias import RelativeBias, relative_terms
from fastattn.ops.validation import autocast
from fastattn.packing import Packing

__all__ = ["packed_attention"]


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packing: Packing,
    *,
    scale: float,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    position_bias: Tensor | RelativeBias | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention within each sequence of a packed batch.

    Args:
        query: [1, Hq, Tq, D]; key, value: [1, Hkv, Tq, D], of all computed tokens.
        position_bias: a RelativeBias; or [1 or B, Hq or 1, S, S], that of the padded batch, whose padding
            must be on the right: on a CPU only, where each sequence's part is read in place.

    Returns:
        [1, Tq, Hq, D].

    Raises:
        ValueError: a bias of the padded batch where the bounds of the sequences are not known as numbers.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    k, v = packing.keys(k), packing.keys(v)
    if packing.hidden is not None:
        q, k = _with_hidden_keys(q, k, packing.hidden)
    relative = position_bias if isinstance(position_bias, RelativeBias) else None
    dense = position_bias if isinstance(position_bias, Tensor) else None
    bounds = packing.bounds if runs_in_pytorch(query) else None
    if dense is not None:
        if bounds is None:
            raise ValueError(
                f"a packed batch takes no position_bias {list(dense.shape)} on {query.device} or in a graph; "
                "give a fastattn.ops.RelativeBias, or run padded"
            )
        if packing.key_rows is not None:
            raise ValueError("a position_bias of the padded batch needs its padding on the right")
        if packing.order is not None and dense.shape[0] > 1:
            dense = dense[packing.order]
    if bounds is not None and dropout_p == 0.0:
        runs = packing.runs
        unbounded = window is None or (runs and min(window) >= max(length for *_, length in runs) - 1)
        shaped = causal or softcap or sinks is not None or position_bias is not None or not unbounded
        if (
            runs
            and not shaped
            and q.shape[2] == v.shape[2]
            and q.stride(2) == k.stride(2) == v.stride(2) == 1
            and not torch.is_autocast_enabled(query.device.type)
        ):
            return attend_runs(q, k, v, runs, scale).unsqueeze(0)
        left, right = window or (-1, -1)
        terms = AttentionTerms(
            bias=dense,
            causal=causal,
            window_left=left,
            window_right=right,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            **relative_terms(relative),
        )
        q, k, v = autocast(q, k, v)
        return attend_packed(q, k, v, *bounds, terms).unsqueeze(0)
    if dense is not None and bounds is not None:
        outs = [
            ops.attention(
                query[:, :, start:end],
                key[:, :, start:end],
                value[:, :, start:end],
                bias=dense[index if dense.shape[0] > 1 else 0, :, : end - start, : end - start][None],
                causal=causal,
                window=window,
                scale=scale,
                softcap=softcap,
                sinks=sinks,
                dropout_p=dropout_p,
            )
            for index, (start, end) in enumerate(pairwise(bounds[0]))
        ]
        return torch.cat(outs, dim=2).transpose(1, 2)  # type: ignore[arg-type]
    out = ops.varlen_attention(
        q,
        k,
        v,
        packing.cu_seqlens_q,
        packing.cu_seqlens_k,
        packing.length,
        packing.length,
        relative_bias=relative,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
        dropout_p=dropout_p,
    )
    assert isinstance(out, Tensor)
    return out.unsqueeze(0)


# Far below every score, and what is left of it after scaling.
_HIDDEN = -1e9


def _with_hidden_keys(query: Tensor, key: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key [T, H, D] with one dimension more, whose product hides keys: a packed batch has no mask.

    `hidden`: bool [T].
    """
    added = torch.where(hidden, _HIDDEN, 0.0).to(key.dtype)[:, None, None].expand(*key.shape[:2], 1)
    return torch.cat((query, query.new_ones(*query.shape[:2], 1)), -1), torch.cat((key, added), -1)
