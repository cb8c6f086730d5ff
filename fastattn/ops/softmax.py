"""Masked softmax over the last dimension: contract, reference and registration."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.backend import backend_for
from fastattn.ops.registration import register, runs_in_pytorch
from fastattn.ops.validation import FLOAT_DTYPES, check_device, shape_of

__all__ = ["softmax"]


def softmax(x: Tensor, mask: Tensor | None = None, scale: float = 1.0, causal: bool = False) -> Tensor:
    """Softmax of `scale * x` over the last dimension, of what mask and causality leave of each row.

    The attention weights of Vaswani et al., "Attention Is All You Need" (2017), equation 1; computed in
    float32, rounded once, also under autocast.

    Args:
        x: [..., N], with `causal` [..., M, N]; float16, bfloat16, float32 or float64.
        mask: bool, True = keep, broadcastable to x. Whatever x holds where it is False, NaN included, is not
            read.
        scale: multiplies x.
        causal: row i keeps columns up to i + N - M, as if the M rows were the last of N (bottom-right).

    Returns:
        x's shape and dtype. A row with nothing left, or with nothing but -inf, is zeros.

    Raises:
        TypeError: x is not floating point, or the mask not bool.
        ValueError: shapes or devices that do not fit.

    Example:
        >>> import torch, fastattn
        >>> fastattn.ops.softmax(torch.zeros(2, 2), causal=True)
        tensor([[1.0000, 0.0000],
                [0.5000, 0.5000]])
    """
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"softmax: x is {x.dtype}; accepted are {FLOAT_DTYPES}")
    least = 2 if causal else 1
    if x.dim() < least:
        raise ValueError(
            f"softmax: x must be {'[..., M, N] to be causal' if causal else '[..., N]'}; got {shape_of(x)}"
        )
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"softmax: mask is {mask.dtype}; accepted is torch.bool, True = keep")
        check_device("softmax", "x", x, "mask", mask)
        if not _broadcasts(mask, x):
            raise ValueError(f"softmax: mask must broadcast to x {shape_of(x)}; got {shape_of(mask)}")
    compute = _in_pytorch if runs_in_pytorch(x) else _softmax
    result: Tensor = compute(x, mask, scale, causal)
    return result


def _broadcasts(mask: Tensor, x: Tensor) -> bool:
    if mask.dim() > x.dim():
        return False
    return all(
        given in (1, wanted)
        for given, wanted in zip(mask.shape[::-1], x.shape[::-1], strict=False)  # from the last dimension
    )


def softmax_reference(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """`fastattn::softmax` in plain PyTorch; computes in float32, or float64 where x is float64."""
    computing = torch.float64 if x.dtype == torch.float64 else torch.float32
    scores = x.to(computing) * scale
    hidden = _hidden(x, mask, causal)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    # Filled before and after, so that neither the softmax nor its gradient is NaN.
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    return weights.to(x.dtype)


def _hidden(x: Tensor, mask: Tensor | None, causal: bool) -> Tensor | None:
    """bool, True = not part of its row, broadcastable to x; None where everything is."""
    hidden = None if mask is None else ~mask
    if causal:
        rows, columns = x.shape[-2:]
        last = torch.arange(rows, device=x.device)[:, None] + (columns - rows)
        future = torch.arange(columns, device=x.device) > last
        hidden = future if hidden is None else hidden | future
    return hidden


def _forward(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    if backend_for(x.device) == "triton" and x.dtype != torch.float64:
        from fastattn_kernels.softmax import softmax_forward

        kernel_result: Tensor = softmax_forward(x, mask, scale, causal)
        return kernel_result
    return _in_pytorch(x, mask, scale, causal).contiguous()


def _in_pytorch(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    # Half precision would round scale * x; a gradient needs what the calls below overwrite.
    half = x.dtype in (torch.float16, torch.bfloat16)
    if (half and scale != 1.0) or (x.requires_grad and torch.is_grad_enabled()) or not x.numel():
        return softmax_reference(x, mask, scale, causal)
    scores = x if scale == 1.0 else x * scale
    hidden = _hidden(x, mask, causal)
    if hidden is not None:
        fill = scores.masked_fill if scores is x else scores.masked_fill_
        scores = fill(hidden, float("-inf"))
    weights = torch.softmax(scores, -1).to(x.dtype)
    return weights.masked_fill_(scores.amax(-1, keepdim=True) == float("-inf"), 0.0)


def _fake(x: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    return x.new_empty(x.shape)


_softmax = register(
    "softmax",
    "Tensor x, Tensor? mask, float scale, bool causal",
    "Tensor",
    forward=_forward,
    fake=_fake,
    reference=softmax_reference,
)
