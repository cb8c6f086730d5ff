"""Rule 3 of the design: error at most twice PyTorch's own in the same dtype, plus 2 eps of the reference's
largest value.
"""

from __future__ import annotations

import torch
from torch import Tensor


def assert_close(found: Tensor, own: Tensor, exact: Tensor, context: object = "") -> None:
    """`found` against the float64 `exact`, with the error of PyTorch's `own` result as the yardstick."""
    assert found.shape == exact.shape, f"shape {found.shape}, expected {exact.shape}; {context}"
    assert torch.isfinite(found).all(), f"not finite; {context}"
    if exact.numel() == 0:
        return
    allowed = 2 * (own.double() - exact).abs().max() + 2 * torch.finfo(found.dtype).eps * exact.abs().max()
    error = (found.double() - exact).abs().max()
    assert error <= allowed, (
        f"error {error:.3e}, allowed {allowed:.3e}; shape {tuple(found.shape)}; {context}"
    )
