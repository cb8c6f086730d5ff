"""RMS normalization as a model's own norm class computes it, in one operation."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from fastattn import ops
from fastattn.layers.border import Border
from fastattn.layers.fused import FusedLayer
from fastattn.ops.norm_cpu import rms_norm_in_pytorch
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["FusedRMSNorm"]


class FusedRMSNorm(FusedLayer):
    """`x / rms(x) * (weight + norm_offset)`, statistics and product in float32, rounded once."""

    eps_name: ClassVar[str] = "variance_epsilon"
    norm_offset: ClassVar[float] = 0.0

    # Set on the instance that follows a stack of layers: the border to the last of them.
    fastattn_before: ClassVar[Border | None] = None

    @property
    def norm_eps(self) -> float:
        eps: float = getattr(self, self.eps_name)
        return eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.fastattn_before is not None:
            ahead = self.fastattn_before.take_norm(self, hidden_states)
            if ahead is not None:
                return ahead
        if runs_in_pytorch(hidden_states):
            # A layer's own tensors need none of the checks a caller's do, half of the time of one row.
            return rms_norm_in_pytorch(hidden_states, self.weight, self.norm_eps, self.norm_offset)
        return ops.rms_norm(hidden_states, self.weight, self.norm_eps, self.norm_offset)
