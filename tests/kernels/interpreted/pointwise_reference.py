"""The norm and pointwise kernels' formulas in plain PyTorch, written apart from the library, and layouts to
run them on.

Run in float64 they are the truth, in a lower dtype what PyTorch itself would get.
"""

from __future__ import annotations

import torch

# How a tensor may lie in memory; `arrange` makes each.
LAYOUTS = ("contiguous", "rows apart", "dimensions swapped", "every other", "one row for all")


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` in another layout; of the same values but for "one row for all"."""
    if layout == "rows apart":
        return torch.cat([x, torch.full_like(x, float("nan"))], -1)[..., : x.shape[-1]]
    if layout == "dimensions swapped" and x.dim() > 2:
        return x.transpose(0, -2).contiguous().transpose(0, -2)
    if layout == "every other":
        return torch.stack([x, torch.full_like(x, float("nan"))], -1)[..., 0]
    if layout == "one row for all" and x.dim() > 1:
        return x[..., :1, :].expand(x.shape)
    return x


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    centered = x - x.mean(-1, keepdim=True)
    result = centered / ((centered * centered).mean(-1, keepdim=True) + eps).sqrt()
    result = result if weight is None else result * weight
    return result if bias is None else result + bias


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, offset: float) -> torch.Tensor:
    result = x / ((x * x).mean(-1, keepdim=True) + eps).sqrt()
    return result if weight is None else result * (weight + offset)


def softmax(x: torch.Tensor, mask: torch.Tensor | None, scale: float, causal: bool) -> torch.Tensor:
    """Of the elements each row keeps: zeros where it keeps none but -inf."""
    keep = torch.ones(x.shape, dtype=torch.bool) if mask is None else mask.broadcast_to(x.shape).clone()
    if causal:
        keep = keep.tril(x.shape[-1] - x.shape[-2])
    scores = torch.where(keep, x * scale, float("-inf"))
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest.masked_fill(largest == float("-inf"), 0.0)).exp()
    return weights / weights.sum(-1, keepdim=True).masked_fill(largest == float("-inf"), 1.0)


def gated_activation(gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "silu":
        return gate * torch.sigmoid(gate) * up
    return torch.nn.functional.gelu(gate, approximate="tanh" if kind == "gelu_tanh" else "none") * up


def rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """`x` [B, H, S, D], pair by pair; cos, sin [S, R] or [B, S, R]."""
    cos, sin = (t if t.dim() == 3 else t[None] for t in (cos, sin))
    width = cos.shape[-1]
    out = x.clone()
    for pair in range(width // 2):
        i, j = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + width // 2)
        a, b = x[..., i], x[..., j]
        out[..., i] = a * cos[:, None, :, i] - b * sin[:, None, :, i]
        out[..., j] = b * cos[:, None, :, j] + a * sin[:, None, :, j]
    return out
