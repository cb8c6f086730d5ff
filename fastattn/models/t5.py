"""The T5 family: relative positions, RMS norms, attention whose scores are not scaled; with ReLU (T5) or a
gated GELU (v1.1).

Residual connections and norms are inside a layer's parts, so the parts are the residual layers and borders
run through them. The bias of relative positions is made by the first layer and handed on by the stack to the
others: a tensor in PyTorch, where making it once is cheapest, and the `RelativeBias` it comes from where
kernels run, which compute it as they go. Cross-attention has none, where the original adds zeros.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad, rms_norm
from transformers import AttentionInterface
from transformers.cache_utils import EncoderDecoderCache
from transformers.models.t5 import modeling_t5

from fastattn.layers import (
    FusedLayer,
    FusedRMSNorm,
    PlainStream,
    ResidualLayer,
    ResidualStream,
    gated,
    is_plain,
    project,
)
from fastattn.layers.gated import gate_kind
from fastattn.models.family import Family, Site
from fastattn.models.interface import NAME, attention_forward
from fastattn.models.packed import PackedRegion
from fastattn.ops import RelativeBias
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.relative_bias import bucket_of_distance
from fastattn.ops.validation import is_traced
from fastattn.packing import Packing, can_pack

__all__ = ["FAMILY"]

_HALF = (torch.float16, torch.bfloat16)


def _as_normalized(normalized: Tensor, norm: nn.Module) -> Tensor:
    """In the dtype that T5's norm returns: its weight's in half precision, else at least float32.

    T5 keeps part of its MLPs in float32, so that the residual stream of a half-precision model is float32.
    """
    dtype = norm.weight.dtype
    assert isinstance(dtype, torch.dtype)
    if dtype == normalized.dtype:
        return normalized
    if dtype not in _HALF:
        dtype = torch.promote_types(normalized.dtype, torch.float32)
    return normalized.to(dtype)


class T5LayerNorm(FusedRMSNorm, modeling_t5.T5LayerNorm):
    fastattn_original = modeling_t5.T5LayerNorm

    def forward(self, hidden_states: Tensor) -> Tensor:
        weight = self._parameters["weight"]
        assert weight is not None
        if hidden_states.dtype == weight.dtype:
            if runs_in_pytorch(hidden_states):
                # Nothing is handed over here, and in a step of decoding every call shows.
                normalized = rms_norm(hidden_states, weight.shape, weight, self.variance_epsilon)
                return normalized.to(weight.dtype)
            return super().forward(hidden_states)
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        return _as_normalized(super().forward(hidden_states.to(dtype)), self)


class T5DenseGatedActDense(FusedLayer, modeling_t5.T5DenseGatedActDense):
    fastattn_original = modeling_t5.T5DenseGatedActDense

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        if gate_kind(module.act) is None:
            return f"its activation is {getattr(module.act, '__name__', type(module.act).__name__)}"
        return None

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = project(hidden_states, [self.wi_0, self.wi_1])
        product = self.dropout(gated(gate, up, self.act))
        weight = self.wo.weight
        # The last layer may be kept in float32, or be quantized (its bytes int8) and take any dtype.
        if isinstance(weight, Tensor) and weight.dtype not in (product.dtype, torch.int8):
            product = product.to(weight.dtype)
        return project(product, [self.wo])[0]


class T5Attention(FusedLayer, modeling_t5.T5Attention):
    fastattn_original = modeling_t5.T5Attention

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | Packing | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | RelativeBias | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | RelativeBias | None, Tensor | None]:
        crosses = key_value_states is not None
        past: int | Tensor = 0
        cache, reuses = past_key_values, False
        if past_key_values is not None:
            if not crosses:
                past = past_key_values.get_seq_length(self.layer_idx)
                # A static cache counts in place.
                past = past.clone() if isinstance(past, Tensor) else past
            if isinstance(past_key_values, EncoderDecoderCache):
                cache = getattr(past_key_values, f"{'cross' if crosses else 'self'}_attention_cache")
                reuses = crosses and past_key_values.is_updated.get(self.layer_idx)
        if reuses:
            query = self.q(hidden_states)
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            if key_value_states is None:
                query, key, value = project(hidden_states, [self.q, self.k, self.v])
            else:
                query = self.q(hidden_states)
                key, value = project(key_value_states, [self.k, self.v])
            key, value = self._heads(key), self._heads(value)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if crosses and cache is not past_key_values:
                    past_key_values.is_updated[self.layer_idx] = True
        query = self._heads(query)
        if position_bias is None and self.has_relative_attention_bias:
            position_bias = self._position_bias(query, key, mask, past)
        if isinstance(position_bias, RelativeBias) and not isinstance(mask, Packing):
            kwargs["query_start"] = past.expand(len(query)) if isinstance(past, Tensor) else past
        elif getattr(position_bias, "fastattn_hides_future", False):
            kwargs["is_causal"] = False
        out, weights = attention_forward(
            self,
            query,
            key,
            value,
            mask,
            dropout=self.dropout if self.training else 0.0,
            scaling=self.scaling,
            position_bias=position_bias,
            **kwargs,
        )
        return self.o(out.flatten(2)), position_bias, weights

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.key_value_proj_dim).transpose(1, 2)

    def relative_bias(self) -> RelativeBias | None:
        """What the bias of relative positions is made from; None where its embedding must be called."""
        embedding = self.relative_attention_bias
        furthest = self.relative_attention_max_distance
        one_way = self.relative_attention_num_buckets // (1 if self.is_decoder else 2)
        if not (is_plain(embedding, nn.Embedding) and 1 <= one_way // 2 < furthest):
            return None
        return RelativeBias(embedding.weight, "t5-causal" if self.is_decoder else "t5", furthest)

    def _position_bias(
        self, query: Tensor, key: Tensor, mask: Tensor | Packing | None, past: int | Tensor
    ) -> Tensor | RelativeBias:
        """The bias that this layer and those after it add."""
        relative = self.relative_bias()
        # A row of nothing but padding is packed as one query without keys, the bias of no part of a tensor.
        without_keys = isinstance(mask, Packing) and mask.key_rows is not None
        if relative is not None and (
            without_keys or (_runs_kernels(query) and _takes_relative_bias(self.config))
        ):
            return relative
        length, keys = query.shape[2], key.shape[2]
        if isinstance(mask, Packing):
            length = keys = mask.length
        if relative is None or is_traced(query) or length == 0:
            bias: Tensor = self.compute_bias(length, keys, device=query.device, past_seen_tokens=past)
            return bias
        dense = _dense(relative, length, keys, int(past), self.is_causal)
        if self.is_causal:
            # Where this is lost, as on a copy of the tensor, causality is only computed again.
            dense.fastattn_hides_future = True  # type: ignore[attr-defined]
        return dense


def _dense(relative: RelativeBias, length: int, keys: int, start: int, causal: bool) -> Tensor:
    """The bias of `length` queries from position `start` on, -inf for keys after the query where `causal`:
    [1, Hq, length, keys].

    Looked up once a distance, not once a query and key: each row is the one below it, moved on by one.
    """
    furthest = relative.max_distance
    buckets = _buckets(relative.kind, relative.table.shape[0], furthest, relative.table.device)
    last = start + length - 1
    if last <= furthest and keys - 1 - start <= furthest:
        buckets = buckets[furthest - last : furthest - start + keys]
    else:
        buckets = buckets[
            torch.arange(-last, keys - start, device=buckets.device).clamp_(-furthest, furthest) + furthest
        ]
    by_distance = embedding(buckets, relative.table).t()[None]
    future = keys - 1 - start
    if causal and future > 0:
        by_distance = pad(by_distance[..., :-future], (0, future), value=float("-inf"))
    if length == 1:
        return by_distance[:, :, None].contiguous()
    return by_distance.unfold(2, keys, 1).flip(2)


@lru_cache(maxsize=16)
def _buckets(kind: str, count: int, furthest: int, device: torch.device) -> Tensor:
    """The bucket of each distance from -furthest to furthest."""
    with torch.inference_mode(False):
        return torch.tensor(bucket_of_distance(kind, count, furthest), device=device)


def _runs_kernels(x: Tensor) -> bool:
    """On a GPU, and in an exported graph, which makes the bias of the table once for all layers."""
    return (x.device.type != "cpu" or can_pack(x)) if is_traced(x) else not runs_in_pytorch(x)


def _takes_relative_bias(config: Any) -> bool:
    """Whether the attention function is ours, under whichever name."""
    name = config._attn_implementation
    return name == NAME or AttentionInterface().get(name) is attention_forward


class _Part(ResidualLayer):
    """What the three parts of a layer share: a norm before and dropout after.

    In PyTorch an addition and the norm after it are two calls either way: the original's forward runs there,
    on the swapped norm and attention.
    """

    entry_norm_name = "layer_norm"

    def _enter(self, hidden_states: Tensor) -> tuple[ResidualStream | PlainStream, Tensor]:
        stream = self.residual_stream(hidden_states)
        norm = self._modules["layer_norm"]
        assert norm is not None
        return stream, _as_normalized(stream.norm(norm), norm)

    def _leave(self, stream: ResidualStream | PlainStream, x: Tensor) -> Tensor:
        dropout = self._modules["dropout"]
        assert dropout is not None
        if (
            isinstance(dropout, nn.Dropout)
            and is_plain(dropout, nn.Dropout)
            and dropout.training == self.training
        ):
            stream.add(x, dropout.p)
        else:
            stream.add(dropout(x))
        # In float16 the block clamps each part's sum, so the next norm cannot be computed with it.
        return stream.value if x.dtype == torch.float16 else stream.leave()


class _AttentionPart(_Part):
    attention_name: ClassVar[str]

    def _attend(
        self, hidden_states: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | RelativeBias | None, Tensor | None]:
        stream, normalized = self._enter(hidden_states)
        attention = self._modules[self.attention_name]
        assert attention is not None
        attended, position_bias, weights = attention(normalized, mask=attention_mask, **kwargs)
        return self._leave(stream, attended), position_bias, weights


class T5LayerSelfAttention(_AttentionPart, modeling_t5.T5LayerSelfAttention):
    fastattn_original = modeling_t5.T5LayerSelfAttention
    attention_name = "SelfAttention"

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | Packing | None = None,
        position_bias: Tensor | RelativeBias | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | RelativeBias | None, Tensor | None]:
        run = super().forward if runs_in_pytorch(hidden_states) else self._attend
        return run(
            hidden_states,
            attention_mask,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )


class T5LayerCrossAttention(_AttentionPart, modeling_t5.T5LayerCrossAttention):
    fastattn_original = modeling_t5.T5LayerCrossAttention
    attention_name = "EncDecAttention"

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | RelativeBias | None, Tensor | None]:
        run = super().forward if runs_in_pytorch(hidden_states) else self._attend
        return run(
            hidden_states,
            attention_mask=attention_mask,
            key_value_states=key_value_states,
            position_bias=position_bias,
            past_key_values=past_key_values,
            **kwargs,
        )


class T5LayerFF(_Part, modeling_t5.T5LayerFF):
    fastattn_original = modeling_t5.T5LayerFF

    def forward(self, hidden_states: Tensor) -> Tensor:
        if runs_in_pytorch(hidden_states):
            return super().forward(hidden_states)
        stream, normalized = self._enter(hidden_states)
        return self._leave(stream, self.DenseReluDense(normalized))


class T5Block(PackedRegion, modeling_t5.T5Block):
    fastattn_original = modeling_t5.T5Block
    relative_positions = True

    @classmethod
    def cannot_replace(cls, module: nn.Module) -> str | None:
        return "a decoder's layers are not packed" if module.is_decoder else None

    def cannot_pack(
        self, hidden_states: Tensor, mask: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> str | None:
        # The stack gives the bias of the layers before by position, and what only decoders have.
        position_bias = args[0] if args else kwargs.get("position_bias")
        attention = self.layer[0].SelfAttention
        if type(attention) is not T5Attention:
            return "its attention is not swapped"
        dense = isinstance(position_bias, Tensor)
        if position_bias is None and attention.has_relative_attention_bias:
            dense = attention.relative_bias() is None
        if dense and not runs_in_pytorch(hidden_states):
            return "the bias of its relative positions is a tensor, which only PyTorch adds to packed tokens"
        if isinstance(position_bias, Tensor) and position_bias.shape[-2:] != (mask.shape[1], mask.shape[1]):
            return f"its position_bias is {list(position_bias.shape)}"
        if dense and mask.dim() == 2 and not bool(mask[:, 0].all()):
            return "a row is padding alone, and the bias of its relative positions is a tensor"
        return super().cannot_pack(hidden_states, mask, args[1:], kwargs)


FAMILY = Family(
    name="t5",
    attention="relative positions shared by all layers, unscaled scores, cross-attention",
    sites=(
        Site("norm", T5LayerNorm),
        Site("attention", T5Attention),
        Site("activation", T5DenseGatedActDense),
        Site("residual_norm", T5LayerSelfAttention),
        Site("residual_norm", T5LayerCrossAttention),
        Site("residual_norm", T5LayerFF),
        Site("encoder", T5Block),
    ),
    limits=(
        "the MLPs of T5 v1.0 (ReLU, no bias) are left as they are: there is nothing to fuse",
        "only padding on the right is left out of the encoder's computation: positions are relative",
    ),
)
