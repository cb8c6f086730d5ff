"""The kernels' formulas in plain PyTorch, written apart from the library.

Run in float64 they are the truth, in a lower dtype what PyTorch itself would get.
"""

from __future__ import annotations

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


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_lengths: torch.Tensor | None = None,
    causal: bool = False,
    query_start: int = 0,
    query_starts: torch.Tensor | None = None,
    scale: float = 1.0,
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
    if causal:
        starts = torch.full((batch,), query_start) if query_starts is None else query_starts
        last = torch.arange(queries)[None, :] + starts[:, None]
        visible &= (column <= last[..., None])[:, None]
    key = key.repeat_interleave(heads // key.shape[1], 1)
    value = value.repeat_interleave(heads // value.shape[1], 1)
    scores = query.to(dtype) @ key.to(dtype).transpose(-1, -2) * scale
    if bias is not None:
        scores = scores + bias.to(dtype)
    scores = scores.masked_fill(~visible, float("-inf"))
    something = (scores > float("-inf")).any(-1)
    weights = torch.softmax(scores.masked_fill(~something[..., None], 0.0), -1) * something[..., None]
    if keep is not None:
        weights = weights * keep * (1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0)
    lse = torch.logsumexp(scores, -1) if keys else scores.new_full(scores.shape[:3], float("-inf"))
    return weights @ value.to(dtype), lse


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
