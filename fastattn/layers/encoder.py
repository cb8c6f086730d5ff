"""nn.TransformerEncoderLayer and nn.TransformerEncoder: the same parameters, signatures and masks, fused and,
where there is padding, on real tokens only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import relu
from torch.nn.modules import module as nn_module

from fastattn.layers.attention import MultiheadAttention, TorchLayer
from fastattn.layers.plain import is_observed, is_plain, modules_below
from fastattn.layers.sublayers import (
    Pending,
    add_attention,
    add_feed_forward,
    is_direct,
    normalized,
    settled,
)
from fastattn.layers.visibility import Visibility, is_causal_mask, padding_of
from fastattn.packing import Dense, Packing, PackingError, PackingThreshold, can_pack

__all__ = ["TransformerEncoder", "TransformerEncoderLayer", "is_token_wise"]


class TransformerEncoderLayer(TorchLayer, nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer`: same constructor, state_dict, call and results, training included.

    Example:
        >>> import torch, fastattn
        >>> layer = fastattn.layers.TransformerEncoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> layer(torch.randn(2, 5, 32)).shape
        torch.Size([2, 5, 32])
    """

    fastattn_original = nn.TransformerEncoderLayer

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
        self.self_attn.__class__ = MultiheadAttention

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn's.

        Raises:
            TypeError: a mask that is neither bool nor floating point.
            ValueError: shapes that do not fit, or is_causal without the mask it speaks of.
        """
        if src.is_nested or self._has_own_blocks():
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)
        batched, padding = with_batch(src, src_key_padding_mask, self.self_attn.batch_first)
        visibility = Visibility(padding, src_mask, is_causal)
        out = settled(*self.advance(batched, None, visibility))
        return without_batch(out, src, self.self_attn.batch_first)

    def advance(self, total: Tensor, pending: Pending, visibility: Visibility) -> tuple[Tensor, Pending]:
        """The layer on a sum whose last part may still be pending, to one such."""
        if self.norm_first:
            x, total = normalized(self.norm1, total, pending)
            total, pending = add_attention(total, self.self_attn, x, x, visibility, self.dropout1)
            x, total = normalized(self.norm2, total, pending)
            return self._add_feed_forward(total, x)
        total = settled(total, pending)
        total, pending = add_attention(total, self.self_attn, total, total, visibility, self.dropout1)
        total, _ = normalized(self.norm1, total, pending)
        total, pending = self._add_feed_forward(total, total)
        total, _ = normalized(self.norm2, total, pending)
        return total, None

    def _add_feed_forward(self, total: Tensor, x: Tensor) -> tuple[Tensor, Pending]:
        return add_feed_forward(
            total, x, self.linear1, self.activation, self.dropout, self.linear2, self.dropout2
        )

    def _has_own_blocks(self) -> bool:
        """Whether a subclass overrides the parts that torch.nn's forward calls and this one does not."""
        original = nn.TransformerEncoderLayer
        kind = type(self)
        return kind._sa_block is not original._sa_block or kind._ff_block is not original._ff_block

    def cannot_pack(self) -> str | None:
        """Why the layer needs its batch padded; None where every part of it treats tokens one by one."""
        attention: Any = self.self_attn
        if not is_direct(attention) or _projects_apart(attention):
            return f"a layer's attention is a {type(attention).__name__} that is called with padded tensors"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "a layer's attention adds keys to every sequence"
        for norm in (self.norm1, self.norm2):
            if not is_token_wise(norm):
                return f"a layer's norm is a {type(norm).__name__}, which may look beyond a token"
        return None


class TransformerEncoder(TorchLayer, nn.TransformerEncoder):
    """`torch.nn.TransformerEncoder`: same constructor, state_dict, call and results at real positions.

    Given `src_key_padding_mask`, every layer runs on real tokens only, in training and evaluation, with
    either residual order and memory layout, and with the causal mask; the output has src's shape, zeros where
    there is padding (the first position of a sequence is always computed). With `enable_nested_tensor=False`,
    with another mask, under `torch.compile`, and where a hook on an inner module would see packed tensors,
    the batch runs padded, as torch.nn's does. Layers that are not exactly `TransformerEncoderLayer` run as
    torch.nn's encoder runs them.

    Example:
        >>> import torch, fastattn
        >>> layer = fastattn.layers.TransformerEncoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> encoder = fastattn.layers.TransformerEncoder(layer, num_layers=2)
        >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> out = encoder(torch.randn(2, 5, 32), src_key_padding_mask=padding)
        >>> out.shape, out[1, 3:].abs().max().item()
        (torch.Size([2, 5, 32]), 0.0)
    """

    fastattn_original = nn.TransformerEncoder

    # "auto", "packed" or "padded"; `fastattn.optimize` sets it on the instance.
    fastattn_padding: str = "auto"

    # What `fastattn tune` measured, where `optimize` found it: "auto" then runs full batches padded.
    fastattn_threshold: PackingThreshold | None = None

    def __init__(
        self,
        encoder_layer: nn.TransformerEncoderLayer,
        num_layers: int,
        norm: nn.Module | None = None,
        enable_nested_tensor: bool = True,
        mask_check: bool = True,
    ) -> None:
        with warnings.catch_warnings():
            # That torch.nn's fast path does not serve such a layer: this one does.
            warnings.filterwarnings("ignore", message="enable_nested_tensor is True", category=UserWarning)
            super().__init__(encoder_layer, num_layers, norm, enable_nested_tensor, mask_check)

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        served = (nn.TransformerEncoderLayer, TransformerEncoderLayer)
        return foreign_layers(module, served)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As torch.nn's, with zeros at padded positions where it ran without padding.

        Raises:
            TypeError: a mask that is neither bool nor floating point.
            ValueError: shapes that do not fit, or is_causal without the mask it speaks of.
            fastattn.packing.PackingError: `padding="packed"` was asked for and cannot be kept in this call.
        """
        layers: list[Any] = list(self.layers)
        if src.is_nested or not layers or not all(type(layer) is TransformerEncoderLayer for layer in layers):
            self._refuse_padding("its layers are not all TransformerEncoderLayer", src_key_padding_mask)
            return super().forward(src, mask, src_key_padding_mask, is_causal)
        batch_first: bool = layers[0].self_attn.batch_first
        x, padding = with_batch(src, src_key_padding_mask, batch_first)
        batch_dim = 0 if batch_first else 1
        causal = is_causal is not False and is_causal_mask(mask, x.shape[1 - batch_dim])
        hint = causal if is_causal is None else is_causal
        visibility = Visibility(padding, mask, hint, causal)
        packing = self._packing(x, visibility, batch_first)
        if isinstance(packing, Packing):
            out = self._packed(x if batch_first else x.transpose(0, 1), packing, causal)
            out = out if batch_first else out.transpose(0, 1).contiguous()
            return without_batch(out, src, batch_first)
        total, pending = x, None
        for layer in layers:
            if is_observed(layer):
                total, pending = settled(total, pending), None
                total = layer(total, src_mask=mask, is_causal=hint, src_key_padding_mask=padding)
            else:
                total, pending = layer.advance(total, pending, visibility)
        out = settled(total, pending) if self.norm is None else normalized(self.norm, total, pending)[0]
        if packing is not None:
            zeroed = packing.unpack(out if batch_first else out.transpose(0, 1))
            out = zeroed if batch_first else zeroed.transpose(0, 1).contiguous()
        return without_batch(out, src, batch_first)

    def _packed(self, x: Tensor, packing: Packing, causal: bool) -> Tensor:
        """[B, S, N] -> [B, S, N] by way of [1, T, N]."""
        visibility = Visibility(packing=packing, causal=causal)
        total, pending = packing.pack(x), None
        for layer in self.layers:
            total, pending = layer.advance(total, pending, visibility)
        if self.norm is None:
            return packing.unpack(settled(total, pending))
        if is_token_wise(self.norm):
            return packing.unpack(normalized(self.norm, total, pending)[0])
        normed: Tensor = self.norm(packing.unpack(settled(total, pending)))
        return normed

    def _packing(self, x: Tensor, visibility: Visibility, batch_first: bool) -> Packing | Dense | None:
        padding = visibility.key_padding_mask
        if padding is None or self.fastattn_padding == "padded":
            return None
        if self.fastattn_padding == "auto" and not self.enable_nested_tensor:
            return None
        shape = x.shape[:2] if batch_first else (x.shape[1], x.shape[0])
        if padding.shape != shape:
            raise ValueError(
                f"src_key_padding_mask must be [batch, length] = {list(shape)}; got {list(padding.shape)}"
            )
        reason = self._cannot_pack(visibility)
        hidden = padding_of(padding) if reason is None else None
        if reason is None and hidden is None:
            reason = "src_key_padding_mask is a float mask that adds to scores"
        if reason is not None:
            self._refuse_padding(reason, padding)
            return None
        assert hidden is not None
        return Dense(~hidden) if self._runs_dense(~hidden) else Packing.from_mask(~hidden)

    def _runs_dense(self, mask: Tensor) -> bool:
        """Whether `mask`, bool [B, S] with True = real, is full enough; a norm that looks beyond a token is
        given zeros for the padding, as after a packed batch.
        """
        threshold = self.fastattn_threshold
        if self.fastattn_padding != "auto" or threshold is None or not threshold.is_dense(mask):
            return False
        return self.norm is None or is_token_wise(self.norm)

    def _cannot_pack(self, visibility: Visibility) -> str | None:
        """Why this call must run padded; None where it may be packed."""
        if visibility.attn_mask is not None and not visibility.causal:
            return "it has a mask that is not known to be the causal one"
        if not can_pack(visibility.key_padding_mask) or torch.jit.is_tracing():  # type: ignore[arg-type]
            return "a traced graph cannot hold a number of tokens that depends on the mask"
        if nn_module._has_any_global_hook():
            return "global module hooks would see packed tensors"
        for module in modules_below(self.layers):
            if is_observed(module):
                return f"a hook or replaced forward on a {type(module).__name__} would see packed tensors"
        for layer in self.layers:
            reason = layer.cannot_pack()
            if reason is not None:
                return str(reason)
        return None

    def _refuse_padding(self, reason: str, padding: Tensor | None) -> None:
        if self.fastattn_padding == "packed" and padding is not None:
            raise PackingError(f'padding="packed" cannot be kept in this call: {reason}; use padding="auto"')


def _projects_apart(attention: Any) -> bool:
    """Whether query, key and value may have widths of their own, and so a weight or layer each."""
    return attention.q_proj_weight is not None or "q_proj" in attention._modules


def is_token_wise(norm: nn.Module) -> bool:
    """Whether a norm treats each token by itself, and nobody watches it."""
    return is_plain(norm, nn.LayerNorm) or is_plain(norm, nn.RMSNorm)


def foreign_layers(stack: nn.Module, served: tuple[type, ...]) -> str | None:
    """Why a stack of layers is left alone; None where each of them is one of `served` exactly."""
    layers: Any = stack.layers
    for layer in layers:
        if type(layer) not in served:
            return f"its layers are {type(layer).__qualname__}, which it can only call as torch.nn does"
    return None


def with_batch(src: Tensor, padding: Tensor | None, batch_first: bool) -> tuple[Tensor, Tensor | None]:
    """The input and its padding mask with a batch dimension, added where `src` is [S, N]."""
    if src.dim() == 3:
        return src, padding
    if src.dim() != 2:
        raise ValueError(
            f"the input must be [length, features] or, batched, of three dimensions; got {list(src.shape)}"
        )
    if padding is not None and padding.dim() == 1:
        padding = padding.unsqueeze(0)
    return src.unsqueeze(0 if batch_first else 1), padding


def without_batch(out: Tensor, src: Tensor, batch_first: bool) -> Tensor:
    return out if src.dim() == 3 else out.squeeze(0 if batch_first else 1)
