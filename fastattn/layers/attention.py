"""nn.MultiheadAttention with the same parameters and signature, computed by the operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear

from fastattn import ops
from fastattn.layers.fused import FusedLayer
from fastattn.layers.plain import is_plain
from fastattn.layers.quantized_linear import QuantizedLinear
from fastattn.layers.visibility import Visibility
from fastattn.ops.attention_cpu import attend_sequences
from fastattn.ops.attention_reference import attention_weights
from fastattn.ops.attention_terms import AttentionTerms
from fastattn.ops.registration import runs_in_pytorch
from fastattn.ops.validation import autocast, is_traced, shapes_of
from fastattn.packing import Packing

__all__ = ["MultiheadAttention", "TorchLayer"]


class TorchLayer(FusedLayer):
    """Base of the layers that take the place of torch.nn's of the same name, swapped in or used directly.

    `fastattn.restore` gives such a layer torch.nn's class again. A subclass of one is left as it is: it has a
    forward of its own, or may have.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "fastattn_original" not in cls.__dict__:
            cls.fastattn_original = cls


class MultiheadAttention(TorchLayer, nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention`: same constructor, state_dict, call and results.

    One product computes query, key and value of self-attention; the scores are never stored unless the
    weights are asked for. A query that may attend nothing gets zeros, and zero weights, where torch.nn gives
    NaN.

    Example:
        >>> import torch, fastattn
        >>> attention = fastattn.layers.MultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 5, 32)
        >>> padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        >>> out, weights = attention(x, x, x, key_padding_mask=padding)
        >>> out.shape, weights.shape
        (torch.Size([2, 5, 32]), torch.Size([2, 5, 5]))
    """

    fastattn_original = nn.MultiheadAttention

    # `fastattn.quantize` puts a layer in the place of `in_proj_weight` and `in_proj_bias`, or one each in
    # that of the three weights.
    in_proj: nn.Module
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module

    @property
    def must_stay(self) -> bool:
        quantized = "in_proj" in self._modules or "q_proj" in self._modules
        pruned = self.num_heads * self.head_dim != self.embed_dim
        return quantized or pruned or isinstance(self.out_proj, QuantizedLinear)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch.nn's.

        Raises:
            TypeError: a mask that is neither bool nor floating point.
            ValueError: shapes that do not fit, or is_causal without the mask it speaks of.
        """
        if query.is_nested or key.is_nested or value.is_nested:
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        self._check(query, key, value, key_padding_mask)
        batched = query.dim() == 3
        if not batched:
            query, key, value = _each_once(query, key, value)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        visibility = Visibility(key_padding_mask, attn_mask, is_causal)
        batch_first = self.batch_first and batched
        weights = None
        if need_weights:
            joined, weights = self._weighed(query, key, value, visibility, batch_first)
            weights = weights.mean(dim=1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            joined = self.attended(query, key, value, visibility, batch_first)
        out = self.output(joined)
        return out if batched else out.squeeze(1), weights

    def attended(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, batch_first: bool
    ) -> Tensor:
        """Attention before the output projection, heads joined, in query's layout: [B, L, E] or [L, B, E].

        With a packing, query, key and value are one tensor [1, T, E].
        """
        if visibility.packing is not None:
            return self._attended_packed(query, visibility.packing, visibility.causal)
        q, k, v, extra = self._heads(query, key, value, batch_first)
        batch, heads, length, _ = q.shape
        mask, bias, causal = visibility.terms(batch, heads, length, k.shape[2] - extra, extra)
        out = ops.attention(
            q,
            k,
            v,
            mask=mask,
            bias=bias,
            causal=causal,
            # SDPA's is_causal, which torch.nn uses, aligns the first query with the first key.
            query_start=0 if causal else None,
            dropout_p=self._dropout_p,
        )
        assert isinstance(out, Tensor)
        return _join_heads(out, batch_first)

    def output(self, joined: Tensor) -> Tensor:
        """The output projection; read, as torch.nn does, and called only where it is no linear layer of
        floats.
        """
        projection = self.out_proj
        if isinstance(projection, nn.Linear) and not isinstance(projection, QuantizedLinear):
            return linear(joined, projection.weight, projection.bias)
        called: Tensor = projection(joined)
        return called

    @property
    def _dropout_p(self) -> float:
        return self.dropout if self.training else 0.0

    def _weighed(
        self, query: Tensor, key: Tensor, value: Tensor, visibility: Visibility, batch_first: bool
    ) -> tuple[Tensor, Tensor]:
        """As `attended`, with the weights [B, heads, L, S], in which dropout shows, as in torch.nn's."""
        q, k, v, extra = self._heads(query, key, value, batch_first)
        q, k, v = autocast(q, k, v)
        batch, heads, length, head_dim = q.shape
        mask, bias, _ = visibility.terms(batch, heads, length, k.shape[2] - extra, extra, read_mask=True)
        weights = attention_weights(q, k, AttentionTerms(mask=mask, bias=bias, scale=head_dim**-0.5))
        weights = dropout(weights, self._dropout_p) if self._dropout_p else weights
        return _join_heads(weights @ v, batch_first), weights

    def _attended_packed(self, x: Tensor, packing: Packing, causal: bool) -> Tensor:
        """[1, T, E] -> [1, T, E], every sequence for itself."""
        if self.in_proj_weight is None:
            projected = self._parts(x[0], 0, 3)
        else:
            projected = _projected(x[0], self.in_proj_weight, self.in_proj_bias, 3)
        q, k, v = (part.unflatten(1, (self.num_heads, self.head_dim)) for part in projected)
        k, v = packing.keys(k), packing.keys(v)
        if packing.bounds is not None and self._dropout_p == 0.0 and runs_in_pytorch(q):
            q, k, v = autocast(q, k, v)
            out = attend_sequences(q, k, v, *packing.bounds, self.head_dim**-0.5, causal)
        else:
            computed = ops.varlen_attention(
                q,
                k,
                v,
                packing.cu_seqlens_q,
                packing.cu_seqlens_k,
                packing.length,
                packing.length,
                causal=causal,
                dropout_p=self._dropout_p,
            )
            assert isinstance(computed, Tensor)
            out = computed
        return out.flatten(1).unsqueeze(0)

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, batch_first: bool
    ) -> tuple[Tensor, Tensor, Tensor, int]:
        """Query, key and value as [B, heads, length, head_dim], and how many keys were appended."""
        q, k, v = (self._split_heads(x, batch_first) for x in self._project(query, key, value))
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = self._appended(k, self.bias_k), self._appended(v, self.bias_v)
            extra += 1
        if self.add_zero_attn:
            zero = k.new_zeros(k.shape[0], self.num_heads, 1, self.head_dim)
            k, v = torch.cat([k, zero], dim=2), torch.cat([v, zero.to(v.dtype)], dim=2)
            extra += 1
        return q, k, v, extra

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        # A pruned layer's heads are together narrower than what goes in.
        weight, bias, size = self.in_proj_weight, self.in_proj_bias, self.num_heads * self.head_dim
        if "q_proj" in self._modules:
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if "in_proj" in self._modules:
            if query is key and key is value:
                return tuple(self._parts(query, 0, 3))
            if key is value:
                return *self._parts(query, 0, 1), *self._parts(key, 1, 2)
            return tuple(self._parts(x, index, 1)[0] for index, x in enumerate((query, key, value)))
        if weight is None:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            biases = (None, None, None) if bias is None else bias.chunk(3)
            inputs = (query, key, value)
            return tuple(linear(x, w, b) for x, w, b in zip(inputs, weights, biases, strict=True))
        if query is key and key is value:
            return tuple(_projected(query, weight, bias, 3))
        rest = None if bias is None else bias[size:]
        q = linear(query, weight[:size], None if bias is None else bias[:size])
        if key is value:
            return q, *_projected(key, weight[size:], rest, 2)
        biases = (None, None) if rest is None else rest.chunk(2)
        k, v = (linear(x, w, b) for x, w, b in zip((key, value), weight[size:].chunk(2), biases, strict=True))
        return q, k, v

    def _parts(self, x: Tensor, first: int, parts: int) -> list[Tensor]:
        """`parts` of the three projections of the layer `in_proj`, from `first` on."""
        joint, size = self.in_proj, self.num_heads * self.head_dim
        if parts == 3 or not is_plain(joint, QuantizedLinear):
            return list(joint(x).chunk(3, dim=-1)[first : first + parts])
        assert isinstance(joint, QuantizedLinear)
        rows = slice(first * size, (first + parts) * size)
        bias = None if joint.bias is None else joint.bias[rows]
        product = ops.quantized_linear(x, joint.packed_rows(rows), bias)
        return list(product.chunk(parts, dim=-1))

    def _split_heads(self, x: Tensor, batch_first: bool) -> Tensor:
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        return x.transpose(1, 2) if batch_first else x.permute(1, 2, 0, 3)

    def _appended(self, keys: Tensor, bias: Tensor) -> Tensor:
        row = bias.view(1, self.num_heads, 1, self.head_dim).expand(keys.shape[0], -1, -1, -1)
        return torch.cat([keys, row.to(keys.dtype)], dim=2)

    def _check(self, query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> None:
        dims = query.dim()
        if dims not in (2, 3) or key.dim() != dims or value.dim() != dims:
            raise ValueError(
                "query, key and value must be [length, features] or, batched, of three dimensions; got "
                + shapes_of(query, key, value)
            )
        sizes = (query.shape[-1], key.shape[-1], value.shape[-1])
        if sizes != (self.embed_dim, self.kdim, self.vdim):
            raise ValueError(
                f"query, key and value must have {self.embed_dim}, {self.kdim} and {self.vdim} features; got "
                + shapes_of(query, key, value)
            )
        batch_dim = 0 if self.batch_first else 1
        if key.shape[:-1] != value.shape[:-1] or (
            dims == 3 and query.shape[batch_dim] != key.shape[batch_dim]
        ):
            raise ValueError(
                "key and value must have one length, and all one batch size "
                f"({'batch first' if self.batch_first else 'length first'}); got "
                + shapes_of(query, key, value)
            )
        if padding is not None and padding.dim() != dims - 1:
            expected = "[batch, keys]" if dims == 3 else "[keys]"
            raise ValueError(f"key_padding_mask must be {expected}; got {list(padding.shape)}")


def _each_once(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Unbatched inputs as [length, 1, features]; one tensor stays one."""
    q = query.unsqueeze(1)
    k = q if key is query else key.unsqueeze(1)
    return q, k, k if value is key else value.unsqueeze(1)


def _projected(x: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> list[Tensor]:
    """`parts` projections of `x` whose weights follow one another in `weight`."""
    if is_traced(x) and not torch.compiler.is_dynamo_compiling():
        # One node for an exported graph, whose runtime has no use for the wider product; slices, because the
        # exporter folds those of a parameter and not its chunks.
        size = weight.shape[0] // parts
        rows = [slice(index * size, (index + 1) * size) for index in range(parts)]
        biases = [None if bias is None else bias[each] for each in rows]
        return ops.packed_linear(x, [weight[each] for each in rows], biases)
    return list(linear(x, weight, bias).chunk(parts, dim=-1))


def _join_heads(out: Tensor, batch_first: bool) -> Tensor:
    """[B, heads, L, D] -> [B, L, E] or [L, B, E]."""
    return (out.transpose(1, 2) if batch_first else out.permute(2, 0, 1, 3)).flatten(2)
