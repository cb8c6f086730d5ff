"""MPNet: BERT's layers with one relative position bias for all of them, computed by the encoder.

Its attention asks no interface: it is given the bias and an additive mask of four dimensions, from which the
encoder reads the padding again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mpnet import modeling_mpnet

from fastattn import ops
from fastattn.layers import FusedActivation, FusedLayer, FusedResidualNorm, add_norm, is_plain, project
from fastattn.models.family import Family, Site
from fastattn.models.interface import attention_forward
from fastattn.models.packed import PackedRegion
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.validation import is_traced
from fastattn.packing import Packing, can_pack

__all__ = ["FAMILY"]

# What MPNetEncoder.compute_position_bias computes with, whatever the configuration says.
_BUCKETS, _MAX_DISTANCE = 32, 128


def _residual_norm(norm: nn.Module, x: Tensor, dropout: nn.Module, residual: Tensor) -> Tensor:
    """`norm(dropout(x) + residual)`."""
    if not is_plain(dropout, nn.Dropout):
        return add_norm(norm, dropout(x), residual)[0]
    dropout_p: float = dropout.p if dropout.training else 0.0  # type: ignore[assignment]
    return add_norm(norm, x, residual, dropout_p)[0]


class MPNetSelfAttention(FusedLayer, modeling_mpnet.MPNetSelfAttention):
    fastattn_original = modeling_mpnet.MPNetSelfAttention
    projection_names = ("q", "k", "v")

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | ops.RelativeBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        shape = (*hidden_states.shape[:2], -1, self.attention_head_size)
        query, key, value = (
            x.view(shape).transpose(1, 2)
            for x in project(hidden_states, [getattr(self, name) for name in self.projection_names])
        )
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.dropout.p if self.training else 0.0,
            is_causal=False,
            position_bias=position_bias,
            output_attentions=output_attentions,
        )
        (projected,) = project(out.flatten(2), [self.o])
        return (projected, weights) if output_attentions and weights is not None else (projected,)


class MPNetAttention(FusedLayer, modeling_mpnet.MPNetAttention):
    fastattn_original = modeling_mpnet.MPNetAttention

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | ops.RelativeBias | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ...]:
        attended, *weights = self.attn(
            hidden_states, attention_mask, position_bias, output_attentions=output_attentions
        )
        return (_residual_norm(self.LayerNorm, attended, self.dropout, hidden_states), *weights)


class MPNetIntermediate(FusedActivation, modeling_mpnet.MPNetIntermediate):
    fastattn_original = modeling_mpnet.MPNetIntermediate


class MPNetOutput(FusedResidualNorm, modeling_mpnet.MPNetOutput):
    fastattn_original = modeling_mpnet.MPNetOutput


class _Stack(FusedLayer):
    """The loop over the layers, with the mask and the bias our attention takes."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        position_bias = self._position_bias(hidden_states, attention_mask)
        all_hidden_states, all_attentions = [], []
        for layer in self.layer:
            all_hidden_states.append(hidden_states)
            hidden_states, *weights = layer(
                hidden_states, attention_mask, position_bias, output_attentions=output_attentions, **kwargs
            )
            all_attentions += weights
        outputs = BaseModelOutput(
            last_hidden_state=hidden_states,
            hidden_states=(*all_hidden_states, hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
        )
        return outputs if return_dict else outputs.to_tuple()

    def _position_bias(
        self, hidden_states: Tensor, mask: Tensor | Packing | None
    ) -> Tensor | ops.RelativeBias:
        """Dense, once for all layers, where PyTorch computes attention; else the table it is read from."""
        table = self._table()
        uneven = isinstance(mask, Packing) and (mask.key_rows is not None or mask.bounds is None)
        if table is not None and (uneven or not runs_in_pytorch(hidden_states)):
            return ops.RelativeBias(table, "mpnet", _MAX_DISTANCE)
        length = mask.length if isinstance(mask, Packing) else hidden_states.shape[1]
        dense: Tensor = self.compute_position_bias(hidden_states.new_empty(1, length, 0))
        return dense

    def _table(self) -> Tensor | None:
        """The weight the bias is looked up in, where it may be read."""
        embedding = self.relative_attention_bias
        if not is_plain(embedding, nn.Embedding) or embedding.num_embeddings < _BUCKETS:
            return None
        weight: Tensor = embedding.weight
        return weight if embedding.num_embeddings == _BUCKETS else weight[:_BUCKETS]


class MPNetEncoder(PackedRegion, _Stack, modeling_mpnet.MPNetEncoder):
    fastattn_original = modeling_mpnet.MPNetEncoder
    relative_positions = True

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        return_dict: bool = False,
        **kwargs: Any,
    ) -> Any:
        options = dict(
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
            **kwargs,
        )
        if any(type(layer.attention.attn) is not MPNetSelfAttention for layer in self.layer):
            return modeling_mpnet.MPNetEncoder.forward(self, hidden_states, attention_mask, **options)
        padding = None if attention_mask is None else padding_of(attention_mask)
        return super().forward(hidden_states, attention_mask if padding is None else padding, **options)

    def cannot_pack(
        self, hidden_states: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        if kwargs["output_attentions"] or kwargs["output_hidden_states"]:
            return "hidden states or attentions are recorded"
        if self._table() is None:
            return "its position bias is not a plain embedding of 32 buckets"
        return super().cannot_pack(hidden_states, mask, args, kwargs)


def padding_of(mask: Tensor) -> Tensor | None:
    """The padding mask, bool [B, S] with True = real, that an additive mask [B, 1, S, S] was made of; None
    where it hides anything else, or cannot be read. In an export's trace nothing can be read, and it is one
    of padding: the graph has no other input.
    """
    if not can_pack(mask) or mask.dim() != 4 or mask.shape[1] != 1 or not mask.is_floating_point():
        return None
    first = mask[:, :, :1]
    if is_traced(mask):
        return first[:, 0, 0] == 0
    hidden = first <= torch.finfo(mask.dtype).min
    exact = bool(((first == 0) | hidden).all()) and bool((mask == first).all())
    return ~hidden[:, 0, 0] if exact else None


FAMILY = Family(
    name="mpnet",
    attention="relative bias, shared by all layers",
    sites=(
        Site("attention", MPNetSelfAttention),
        Site("residual_norm", MPNetAttention),
        Site("activation", MPNetIntermediate),
        Site("residual_norm", MPNetOutput),
        Site("encoder", MPNetEncoder),
    ),
    limits=("padding that is not on the right alone is computed, as its bias counts distances",),
)
