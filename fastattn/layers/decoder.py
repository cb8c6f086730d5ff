"""nn.TransformerDecoderLayer and nn.TransformerDecoder: the same parameters, signatures and masks, fused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import relu

from fastattn.layers.attention import MultiheadAttention, TorchLayer
from fastattn.layers.encoder import foreign_layers, with_batch, without_batch
from fastattn.layers.plain import is_observed
from fastattn.layers.sublayers import Pending, add_attention, add_feed_forward, normalized, settled
from fastattn.layers.visibility import Visibility, is_causal_mask

__all__ = ["TransformerDecoder", "TransformerDecoderLayer"]


class TransformerDecoderLayer(TorchLayer, nn.TransformerDecoderLayer):
    """`torch.nn.TransformerDecoderLayer`: same constructor, state_dict, call and results, training included.

    Example:
        >>> import torch, fastattn
        >>> layer = fastattn.layers.TransformerDecoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> layer(torch.randn(2, 5, 32), torch.randn(2, 7, 32)).shape
        torch.Size([2, 5, 32])
    """

    fastattn_original = nn.TransformerDecoderLayer

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
        self.multihead_attn.__class__ = MultiheadAttention

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn's.

        Raises:
            TypeError: a mask that is neither bool nor floating point.
            ValueError: shapes that do not fit, or is_causal without the mask it speaks of.
        """
        if self._has_own_blocks():
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        batch_first = self.self_attn.batch_first
        x, padding = with_batch(tgt, tgt_key_padding_mask, batch_first)
        keys, memory_padding = with_batch(memory, memory_key_padding_mask, batch_first)
        own = Visibility(padding, tgt_mask, tgt_is_causal)
        cross = Visibility(memory_padding, memory_mask, memory_is_causal)
        out = settled(*self.advance(x, None, keys, own, cross))
        return without_batch(out, tgt, batch_first)

    def advance(
        self, total: Tensor, pending: Pending, memory: Tensor, own: Visibility, cross: Visibility
    ) -> tuple[Tensor, Pending]:
        """The layer on a sum whose last part may still be pending, to one such."""
        if self.norm_first:
            x, total = normalized(self.norm1, total, pending)
            total, pending = add_attention(total, self.self_attn, x, x, own, self.dropout1)
            x, total = normalized(self.norm2, total, pending)
            total, pending = add_attention(total, self.multihead_attn, x, memory, cross, self.dropout2)
            x, total = normalized(self.norm3, total, pending)
            return self._add_feed_forward(total, x)
        total = settled(total, pending)
        total, pending = add_attention(total, self.self_attn, total, total, own, self.dropout1)
        total, _ = normalized(self.norm1, total, pending)
        total, pending = add_attention(total, self.multihead_attn, total, memory, cross, self.dropout2)
        total, _ = normalized(self.norm2, total, pending)
        total, pending = self._add_feed_forward(total, total)
        total, _ = normalized(self.norm3, total, pending)
        return total, None

    def _add_feed_forward(self, total: Tensor, x: Tensor) -> tuple[Tensor, Pending]:
        return add_feed_forward(
            total, x, self.linear1, self.activation, self.dropout, self.linear2, self.dropout3
        )

    def _has_own_blocks(self) -> bool:
        """Whether a subclass overrides the parts that torch.nn's forward calls and this one does not."""
        blocks = ("_sa_block", "_mha_block", "_ff_block")
        return any(
            getattr(type(self), each) is not getattr(nn.TransformerDecoderLayer, each) for each in blocks
        )


class TransformerDecoder(TorchLayer, nn.TransformerDecoder):
    """`torch.nn.TransformerDecoder`: same constructor, state_dict, call and results.

    Layers that are not exactly `TransformerDecoderLayer` are called as torch.nn's decoder calls them.

    Example:
        >>> import torch, fastattn
        >>> layer = fastattn.layers.TransformerDecoderLayer(d_model=32, nhead=4, batch_first=True)
        >>> decoder = fastattn.layers.TransformerDecoder(layer, num_layers=2)
        >>> causal = torch.nn.Transformer.generate_square_subsequent_mask(5)
        >>> decoder(torch.randn(2, 5, 32), torch.randn(2, 7, 32), tgt_mask=causal).shape
        torch.Size([2, 5, 32])
    """

    fastattn_original = nn.TransformerDecoder

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return foreign_layers(module, (nn.TransformerDecoderLayer, TransformerDecoderLayer))

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As torch.nn's.

        Raises:
            TypeError: a mask that is neither bool nor floating point.
            ValueError: shapes that do not fit, or is_causal without the mask it speaks of.
        """
        layers: list[Any] = list(self.layers)
        if not layers or not all(type(layer) is TransformerDecoderLayer for layer in layers):
            return super().forward(
                tgt,
                memory,
                tgt_mask,
                memory_mask,
                tgt_key_padding_mask,
                memory_key_padding_mask,
                tgt_is_causal,
                memory_is_causal,
            )
        batch_first: bool = layers[0].self_attn.batch_first
        x, padding = with_batch(tgt, tgt_key_padding_mask, batch_first)
        keys, memory_padding = with_batch(memory, memory_key_padding_mask, batch_first)
        causal = tgt_is_causal is not False and is_causal_mask(tgt_mask, x.shape[1 if batch_first else 0])
        hint = causal if tgt_is_causal is None else tgt_is_causal
        own = Visibility(padding, tgt_mask, hint, causal)
        cross = Visibility(memory_padding, memory_mask, memory_is_causal)
        total, pending = x, None
        for layer in layers:
            if is_observed(layer):
                total, pending = settled(total, pending), None
                total = layer(
                    total,
                    keys,
                    tgt_mask=tgt_mask,
                    memory_mask=memory_mask,
                    tgt_key_padding_mask=padding,
                    memory_key_padding_mask=memory_padding,
                    tgt_is_causal=hint,
                    memory_is_causal=memory_is_causal,
                )
            else:
                total, pending = layer.advance(total, pending, keys, own, cross)
        out = settled(total, pending) if self.norm is None else normalized(self.norm, total, pending)[0]
        return without_batch(out, tgt, batch_first)
