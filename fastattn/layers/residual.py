"""The residual stream of a layer: every addition waits for the norm that follows and is one operation with
it.

A decoder layer ends with an addition and the next begins with a norm. The layer then also computes the next
one's norm, hands it over at the border between them, and returns the true sum as the original does.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from torch.nn.functional import dropout

from fastattn import ops
from fastattn.layers.border import Border, may_hand_over
from fastattn.layers.fused import FusedLayer
from fastattn.layers.plain import is_observed, is_plain
from fastattn.layers.rms_norm import FusedRMSNorm
from fastattn.ops.registration import runs_in_pytorch

__all__ = ["PlainStream", "ResidualLayer", "ResidualStream", "add_norm"]


def add_norm(norm: nn.Module, x: Tensor, residual: Tensor, dropout_p: float = 0.0) -> tuple[Tensor, Tensor]:
    """`norm(residual + dropout(x))` and that sum, in one operation where the norm is a plain one."""
    if not runs_in_pytorch(x):
        if isinstance(norm, FusedRMSNorm) and not is_observed(norm):
            return ops.add_rms_norm(x, residual, norm.weight, norm.norm_eps, dropout_p, norm.norm_offset)
        if (
            isinstance(norm, nn.LayerNorm)
            and is_plain(norm, nn.LayerNorm)
            and len(norm.normalized_shape) == 1
        ):
            return ops.add_layer_norm(x, residual, norm.weight, norm.bias, norm.eps, dropout_p)
    total = residual + (dropout(x, dropout_p) if dropout_p else x)
    return norm(total), total


class ResidualStream:
    """The sum a layer adds to. `value` is the sum so far; what `add` brings joins it in the next `norm`."""

    def __init__(self, layer: ResidualLayer, hidden_states: Tensor) -> None:
        self._layer = layer
        self._sum = hidden_states
        self._added: Tensor | None = None
        self._dropout_p = 0.0
        # The first norm of this layer, if the layer before has computed it.
        self._normalized: Tensor | None = None
        if layer.fastattn_before is not None:
            self._normalized = layer.fastattn_before.take_norm(layer.entry_norm, hidden_states)

    def add(self, x: Tensor, dropout_p: float = 0.0) -> None:
        """Add `dropout(x)`; `dropout_p` counts in training only."""
        self._settle()
        self._added, self._dropout_p = x, dropout_p if self._layer.training else 0.0

    def norm(self, norm: nn.Module) -> Tensor:
        """The norm of the sum, which goes on unnormalized: pre-norm layers."""
        if self._added is not None:
            normalized, self._sum = add_norm(norm, self._added, self._sum, self._dropout_p)
            self._added = None
            return normalized
        ahead, self._normalized = self._normalized, None
        if ahead is not None and norm is self._layer.entry_norm:
            return ahead
        result: Tensor = norm(self._sum)
        return result

    def normalize(self, norm: nn.Module) -> Tensor:
        """The norm of the sum, with which the stream goes on: post-norm layers."""
        self._sum = self.norm(norm)
        return self._sum

    @property
    def value(self) -> Tensor:
        """The sum of everything added."""
        self._settle()
        return self._sum

    def leave(self) -> Tensor:
        """The sum, the layer's output; the norm the next layer begins with is computed with it."""
        after, norm = self._layer.fastattn_after, self._layer.fastattn_next_norm
        if self._added is None or after is None or norm is None or not may_hand_over(self._layer):
            return self.value
        if is_observed(norm):
            return self.value
        normalized, self._sum = add_norm(norm, self._added, self._sum, self._dropout_p)
        self._added = None
        after.put(self._sum, (norm, normalized))
        return self._sum

    def _settle(self) -> None:
        if self._added is not None:
            x, self._added = self._added, None
            self._sum = self._sum + (dropout(x, self._dropout_p) if self._dropout_p else x)


class PlainStream:
    """The same, one operation at a time."""

    __slots__ = ("_training", "value")

    def __init__(self, layer: ResidualLayer, hidden_states: Tensor) -> None:
        self._training = layer.training
        self.value = hidden_states

    def add(self, x: Tensor, dropout_p: float = 0.0) -> None:
        self.value = self.value + (dropout(x, dropout_p) if dropout_p and self._training else x)

    def norm(self, norm: nn.Module) -> Tensor:
        result: Tensor = norm(self.value)
        return result

    def normalize(self, norm: nn.Module) -> Tensor:
        self.value = norm(self.value)
        return self.value

    def leave(self) -> Tensor:
        return self.value


class ResidualLayer(FusedLayer):
    """Mixed into layers whose forward is written with a residual stream.

    `entry_norm_name` is the submodule the layer begins with, None where it begins with no norm (post-norm
    layers).
    """

    entry_norm_name: ClassVar[str | None] = None

    # Set on instances by `link_layers`: the borders to the layers before and after, and the norm the one
    # after begins with, held in a tuple so that it is not registered here as a submodule.
    fastattn_before: ClassVar[Border | None] = None
    fastattn_after: ClassVar[Border | None] = None
    fastattn_next: ClassVar[tuple[nn.Module] | None] = None

    @property
    def entry_norm(self) -> nn.Module | None:
        return None if self.entry_norm_name is None else self._modules[self.entry_norm_name]

    @property
    def fastattn_next_norm(self) -> nn.Module | None:
        return None if self.fastattn_next is None else self.fastattn_next[0]

    def gains_nothing(self, hidden_states: Tensor) -> bool:
        """Whether the original's forward is as good: where PyTorch computes, and one token's time is counted
        in calls.
        """
        return runs_in_pytorch(hidden_states)

    def residual_stream(self, hidden_states: Tensor) -> ResidualStream | PlainStream:
        # Where PyTorch computes, an addition and a norm are two calls whoever makes them; a border would only
        # cost: a tenth of a small decoder's time a token.
        kind = PlainStream if runs_in_pytorch(hidden_states) else ResidualStream
        return kind(self, hidden_states)
