"""Padding-free execution of a part of a model: an encoder's stack of layers, or each of its layers."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastattn.layers import FusedLayer, modules_below
from fastattn.layers.border import Border, is_differentiable, may_hand_over
from fastattn.models.interface import is_recording_hook, recorded_outputs
from fastattn.ops.validation import is_traced
from fastattn.packing import Dense, Packing, PackingError, PackingThreshold, can_pack, is_right_padded

__all__ = ["PackedRegion"]


class PackedRegion(FusedLayer):
    """Runs the module it is mixed into on real tokens only, where the call allows it.

    Inside, hidden states are [1, T, N] and the mask's place is taken by the `Packing`, which reaches the
    attention function the way the mask does. Outside, nothing has changed but that padded positions are zero.
    Regions that follow one another hand the packed tensor on at their border.
    """

    # Whether the distance between two packed tokens must be their distance in the batch (relative positions,
    # a window). Then only padding on the right is left out.
    relative_positions: ClassVar[bool] = False

    # Whether a call's masks [B, S] all tell of the one padding the model was given, though they are tensors
    # of their own: in a graph they cannot be compared.
    one_padding: ClassVar[bool] = False

    # On every swapped instance, the caller's choice.
    fastattn_padding: str = "auto"

    # What `fastattn tune` measured, where `optimize` found it: padding="auto" then runs full batches padded.
    fastattn_threshold: PackingThreshold | None = None

    # Set on instances by `link_layers`.
    fastattn_packed_before: ClassVar[Border | None] = None
    fastattn_packed_after: ClassVar[Border | None] = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        before = self.fastattn_packed_before
        ahead = None if before is None else before.take(hidden_states)
        packing = self._packing(hidden_states, attention_mask, ahead, args, kwargs)
        if packing is None:
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        packed = None if ahead is None or ahead[1] is not packing else ahead[2]
        if packed is None or not is_differentiable(packed, hidden_states):
            packed = packing.pack(hidden_states)
        if isinstance(packing, Dense):
            outputs = super().forward(packed, attention_mask, *args, **kwargs)
        else:
            args, kwargs = self.packed_arguments(packing, args, kwargs)
            outputs = super().forward(packed, packing, *args, **kwargs)
        return self._unpacked(outputs, attention_mask, packing)

    def packed_arguments(
        self, packing: Packing, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The other arguments as the packed call takes them."""
        return args, kwargs

    def _unpacked(self, outputs: Any, mask: Tensor | None, packing: Packing | Dense) -> Any:
        """The outputs with the first hidden states among them padded again."""
        if isinstance(outputs, Tensor):
            packed = outputs
        else:
            packed = outputs[0] if isinstance(outputs, tuple) else outputs.last_hidden_state
        padded = packing.unpack(packed)
        after = self.fastattn_packed_after
        if after is not None and may_hand_over(self):
            after.put(padded, (mask, packing, packed))
        if isinstance(outputs, Tensor):
            return padded
        if isinstance(outputs, tuple):
            return (padded, *outputs[1:])
        outputs.last_hidden_state = padded
        return outputs

    def _packing(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        ahead: tuple[Tensor, Packing | Dense, Tensor] | None,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Packing | Dense | None:
        if mask is None or self.fastattn_padding == "padded":
            return None
        reason = self.cannot_pack(hidden_states, mask, args, kwargs)
        packing: Packing | Dense | None = None
        if (
            reason is None
            and ahead is not None
            and (ahead[0] is mask or self._tells_the_same(ahead[0], mask))
        ):
            return ahead[1]
        if reason is None and self.relative_positions and is_traced(mask):
            packing = Packing.up_to_the_last_token(mask)
        elif reason is None and self._runs_dense(mask):
            packing = Dense(mask)
        elif reason is None:
            packing = Packing.from_mask(mask)
            if packing is not None and self.relative_positions and not is_right_padded(mask):
                packing, reason = None, "its padding is not on the right alone, and positions are relative"
        if reason is not None and self.fastattn_padding == "packed":
            raise PackingError(f'padding="packed" cannot be kept in this call: {reason}; use padding="auto"')
        return packing

    def _runs_dense(self, mask: Tensor) -> bool:
        threshold = self.fastattn_threshold
        return self.fastattn_padding == "auto" and threshold is not None and threshold.is_dense(mask)

    def _tells_the_same(self, first: Tensor, second: Tensor) -> bool:
        if first.shape != second.shape:
            return False
        return self.one_padding if is_traced(second) else torch.equal(first, second)

    def cannot_pack(
        self, hidden_states: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        """Why this call must run padded; None where it may be packed."""
        if mask.dim() != 2 or mask.shape != hidden_states.shape[:2]:
            return f"its attention mask is {list(mask.shape)}, not [batch, length]"
        if any(
            kwargs.get(name) is not None
            for name in ("encoder_hidden_states", "encoder_attention_mask", "past_key_values")
        ):
            return "it uses a cache or cross-attention"
        if not can_pack(mask):
            return "a compiled graph cannot hold a number of tokens that depends on the mask"
        if any(argument is not None for argument in args):
            return "it is given arguments by position"
        if recorded_outputs():
            return "hidden states or attentions are recorded"
        if getattr(getattr(self, "config", None), "chunk_size_feed_forward", 0):
            return "chunk_size_feed_forward divides the padded length"
        return _observer(self)


def _observer(region: nn.Module) -> str | None:
    """Which hook below `region` would see packed tensors."""
    if nn_module._has_any_global_hook():
        return "global module hooks would see packed tensors"
    for child in modules_below(region):
        hooks = (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
        if "forward" in child.__dict__ or not all(map(is_recording_hook, hooks)):
            return f"a hook on a {type(child).__name__} would see packed tensors"
        if child._backward_hooks or child._backward_pre_hooks:
            return f"a backward hook on a {type(child).__name__} would see packed tensors"
    return None
