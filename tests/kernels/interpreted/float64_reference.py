"""The kernels' formulas in plain PyTorch, written apart from the library.

Run in float64 they are the truth, in a lower dtype what PyTorch itself would get.
"""

from __future__ import annotations

import math

import numpy as np
import torch


def keep_mask(seed: int, rows: torch.Tensor, columns: int, probability: float) -> torch.Tensor:
    """bool [*rows, columns], True = keep: counter-based dropout (lowbias32 of seed, row and column)."""

    def mix(x: np.ndarray) -> np.ndarray:
        x = x ^ (x >> np.uint32(16))
        x = x * np.uint32(0x7FEB352D)
        x = x ^ (x >> np.uint32(15))
        x = x * np.uint32(0x846CA68B)
        return x ^ (x >> np.uint32(16))

    def words(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        unsigned = x.astype(np.int64).view(np.uint64)
        return (unsigned & np.uint64(0xFFFFFFFF)).astype(np.uint32), (unsigned >> np.uint64(32)).astype(
            np.uint32
        )

    seed_low, seed_high = words(np.array([seed]))
    row_low, row_high = words(np.atleast_1d(rows.numpy()))
    key = mix(mix(seed_low ^ row_low) + seed_high + row_high)
    bits = mix(key[..., None] ^ np.arange(columns, dtype=np.uint32))
    return torch.from_numpy(bits >= np.uint32(min(int(probability * 2**32), 2**32 - 1)))


def relative_buckets(distance: torch.Tensor, kind: str, num_buckets: int, max_distance: int) -> torch.Tensor:
    """Row of the table for each distance (key position less query position), as transformers computes it."""
    first, steps = torch.zeros_like(distance), (-distance).clamp(min=0)
    if kind != "t5-causal":
        num_buckets //= 2
        first, steps = (distance > 0) * num_buckets, distance.abs()
    exact = num_buckets // 2
    growth = torch.log(steps.float() / exact) / math.log(max_distance / exact) * (num_buckets - exact)
    far = (exact + growth.nan_to_num(0.0, 0.0, 0.0).long()).clamp(max=num_buckets - 1)
    return first + torch.where(steps < exact, steps, far)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    rel_table: torch.Tensor | None = None,
    rel_kind: str = "t5",
    rel_max_distance: int = 128,
    alibi_slopes: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: torch.Tensor | None = None,
    window_left: int = -1,
    window_right: int = -1,
    scale: float = 1.0,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    keep: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, Hq, Sq, Dv] and lse [B, Hq, Sq], computed in `dtype` from all scores [B, Hq, Sq, Sk]."""
    batch, heads, queries, _ = query.shape
    keys = key.shape[2]
    visible = torch.ones(batch, heads, queries, keys, dtype=torch.bool)
    column = torch.arange(keys)
    if mask is not None:
        visible &= mask[:, None, None, :] if mask.dim() == 2 else mask
    if key_lengths is not None:
        there = column < key_lengths[:, None]
        visible &= there[:, None, None, :]
        key = torch.where(there[:, None, :, None], key, 0)
        value = torch.where(there[:, None, :, None], value, 0)
    starts = torch.full((batch,), query_start) if query_starts is None else query_starts.long()
    # Key position less query position, [B, 1, Sq, Sk].
    distance = (column - (torch.arange(queries)[None, :] + starts[:, None])[..., None])[:, None]
    if causal:
        visible &= distance <= 0
    if window_left >= 0:
        visible &= distance >= -window_left
    if window_right >= 0:
        visible &= distance <= window_right
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if softcap > 0.0:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.to(dtype)
    if rel_table is not None:
        buckets = relative_buckets(distance[:, 0], rel_kind, rel_table.shape[0], rel_max_distance)
        scores = scores + rel_table.to(dtype)[buckets].permute(0, 3, 1, 2)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.abs().to(dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    # A sink is one more key of no value; where there is none its logit is -inf.
    sink = torch.full((heads,), float("-inf")) if sinks is None else sinks
    sink = sink.to(dtype)[:, None, None].expand(batch, heads, queries, 1)
    logits = torch.cat([scores, sink], -1)
    something = (logits > float("-inf")).any(-1, keepdim=True)
    weights = torch.softmax(logits.masked_fill(~something, 0.0), -1)[..., :keys] * something
    if keep is not None:
        weights = weights * keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    return weights @ value.to(dtype), torch.logsumexp(logits, -1)


def assert_as_exact_as_pytorch(
    actual: torch.Tensor, exact: torch.Tensor, pytorch: torch.Tensor, what: str = ""
) -> None:
    """The library's rule: at most twice PyTorch's own largest error, plus 2 eps of the largest true value."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    if not actual.numel():
        return
    finite = exact.isfinite()
    torch.testing.assert_close(
        actual.double()[~finite], exact[~finite], equal_nan=True, msg=lambda m: f"{what}: {m}"
    )
    if not finite.any():
        return
    error = (actual.double() - exact)[finite].abs().max().item()
    # Where PyTorch's own dtype overflows it sets no bar.
    own = (pytorch.double() - exact)[finite].nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    allowed = 2 * own + 2 * torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.3g}, PyTorch's {own:.3g}, allowed {allowed:.3g}"
