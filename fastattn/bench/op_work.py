"""FLOP and bytes of one operation, from its arguments: PyTorch's formulas and those it lacks.

Arithmetic is that of matrix products and convolutions alone, two FLOP a multiplication and addition; an
operation without one (a norm, an activation) is bound by memory on every machine and counts 0. Attention
counts the pairs of query and key that its arguments let see each other: causality, a window and the real
lengths of a packed batch are left out of the count, while the values of a mask are not looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.flop_counter import flop_registry

__all__ = ["bytes_of", "flop_of", "is_free", "named_arguments", "tensors_in"]

Named = Mapping[str, Any]


def named_arguments(
    operation: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The call's arguments by their names in the operation's schema, defaults included."""
    named: dict[str, Any] = {}
    for index, argument in enumerate(operation._schema.arguments):
        if index < len(args):
            named[argument.name] = args[index]
        elif argument.name in kwargs:
            named[argument.name] = kwargs[argument.name]
        elif argument.has_default_value():
            named[argument.name] = argument.default_value
    return named


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors among arguments or results, lists opened."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)


def flop_of(operation: OpOverload, named: Named, output: Any) -> float:
    """Floating-point operations of one call; 0 where no formula is known."""
    ours = _FLOP.get(operation._schema.name)
    if ours is not None:
        return float(ours(named, output))
    formula = flop_registry.get(operation.overloadpacket)
    if formula is None:
        return 0.0
    keywords = {each.name for each in operation._schema.arguments if each.kwarg_only}
    positional = [value for name, value in named.items() if name not in keywords]
    return float(
        formula(*positional, out_val=output, **{name: named[name] for name in keywords & named.keys()})
    )


def bytes_of(operation: OpOverload, named: Named, output: Any) -> float:
    """Bytes of one call: every input read once, every output written once; what is expanded counts once."""
    name = operation._schema.name
    inputs = {id(tensor): tensor for value in named.values() for tensor in tensors_in(value)}
    written = sum(_size(tensor) for tensor in tensors_in(output))
    if name in _READS_ROWS:
        # A table is read where it is looked up: as much as comes out.
        first = next(iter(inputs.values()))
        return 2 * written + sum(_size(tensor) for tensor in inputs.values() if tensor is not first)
    if name in _WRITES_ROWS:
        given = sum(_size(tensor) for tensor in inputs.values() if tensor is not named["self"])
        return given + sum(_size(tensor) for tensor in tensors_in(named.get(_WRITES_ROWS[name])))
    if name in _OVERWRITES:
        inputs.pop(id(named["self"]), None)
    if name == "fastattn::decode_attention":
        # Of a cache, the keys and values that a sequence has.
        return written + _size(named["query"]) + _cache_bytes(named)
    return sum(_size(tensor) for tensor in inputs.values()) + written


def is_free(operation: OpOverload, named: Named, output: Any) -> bool:
    """Whether a call only looks at memory another way, or takes some without touching it."""
    if operation.is_view or operation._schema.name in _FREE:
        return True
    if operation._schema.is_mutable:
        return False
    # What comes out is what went in, as of `_unsafe_view`.
    results = list(tensors_in(output))
    given = {_storage(tensor) for value in named.values() for tensor in tensors_in(value)}
    return bool(results) and all(_storage(tensor) in given for tensor in results if tensor.numel())


_FREE = {"aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::detach_"} | {
    "aten::new_empty_strided", "aten::_has_compatible_shallow_copy_type", "aten::lift_fresh", "prim::device"
}  # fmt: skip
_READS_ROWS = {"aten::embedding", "aten::index_select", "aten::gather", "aten::index"}
# What is written into rows of the first tensor.
_WRITES_ROWS = {
    "aten::index_copy_": "source",
    "aten::index_put_": "values",
    "aten::_index_put_impl_": "values",
    "aten::scatter_": "src",
    "aten::index_add_": "source",
}
_OVERWRITES = {"aten::copy_", "aten::fill_", "aten::zero_"}


def _storage(tensor: Tensor) -> int:
    plain = tensor.layout == torch.strided and not tensor.is_nested
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)


def _size(tensor: Tensor) -> int:
    """Bytes of the values a tensor has, each once."""
    if tensor.layout != torch.strided or tensor.is_nested:
        return tensor.numel() * tensor.element_size()
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return math.prod(sizes) * tensor.element_size()


def _pairs(queries: int, keys: int, start: int, left: int, right: int) -> int:
    """Pairs of a query and a key it may see: query i is at position p = i + start and sees keys from p -
    left to p + right; -1 is no bound.
    """
    position = np.arange(queries, dtype=np.int64) + start
    first = np.maximum(0, position - left) if left >= 0 else np.zeros_like(position)
    last = np.minimum(keys - 1, position + right) if right >= 0 else np.full_like(position, keys - 1)
    return int(np.maximum(0, last - first + 1).sum())


def _sdpa(backward: bool) -> Callable[[Named, Any], float]:
    """PyTorch's fused attention, [B, H, S, D]: two products forward, of head_dim and of the values' head_dim;
    backward five. Its `is_causal` aligns the first query with the first key.
    """

    def flop(named: Named, output: Any) -> float:
        query, key, value = named["query"], named["key"], named["value"]
        batch, heads, queries, head_dim = query.shape
        pairs = _pairs(queries, key.shape[2], 0, -1, 0 if named["is_causal"] else -1)
        products = 3 * head_dim + 2 * value.shape[3] if backward else head_dim + value.shape[3]
        return 2.0 * batch * heads * pairs * products

    return flop


def _bounds(named: Named) -> tuple[int, int]:
    """The window of fastattn's attention with causality in it, (left, right)."""
    left, right = int(named["window_left"]), int(named["window_right"])
    return left, 0 if named["causal"] else right


def _attention(named: Named, output: Any) -> float:
    query, key, value = named["query"], named["key"], named["value"]
    batch, heads, queries, head_dim = query.shape
    lengths = _integers(named["key_lengths"], batch, key.shape[2])
    starts = _integers(named["query_starts"], batch, int(named["query_start"]))
    pairs = sum(
        _pairs(queries, keys, start, *_bounds(named)) for keys, start in zip(lengths, starts, strict=True)
    )
    return 2.0 * heads * pairs * (head_dim + value.shape[3])


def _varlen_attention(named: Named, output: Any) -> float:
    query, value = named["query"], named["value"]
    queries, keys = (named[name].diff().tolist() for name in ("cu_seqlens_q", "cu_seqlens_k"))
    starts = _integers(named["query_starts"], len(queries), int(named["query_start"]))
    if named["default_start"]:
        starts = [its_keys - its_queries for its_queries, its_keys in zip(queries, keys, strict=True)]
    pairs = sum(_pairs(*lengths, *_bounds(named)) for lengths in zip(queries, keys, starts, strict=True))
    return 2.0 * query.shape[1] * pairs * (query.shape[2] + value.shape[2])


def _decode_attention(named: Named, output: Any) -> float:
    _, heads, queries, head_dim = named["query"].shape
    left, lengths = int(named["window_left"]), named["cache_lengths"].tolist()
    pairs = sum(_pairs(queries, keys, keys - queries, left, 0) for keys in lengths)
    return 2.0 * heads * pairs * (head_dim + named["value_cache"].shape[-1])


def _cache_bytes(named: Named) -> float:
    queries, left = named["query"].shape[2], int(named["window_left"])
    lengths = named["cache_lengths"].tolist()
    keys = sum(length if left < 0 else min(length, left + queries) for length in lengths)
    caches = (named["key_cache"], named["value_cache"])
    # [B, Hkv, S, D], or pages [blocks, block_size, Hkv, D].
    heads = caches[0].shape[1 if named["block_table"] is None else 2]
    return float(sum(keys * heads * cache.shape[-1] * cache.element_size() for cache in caches))


def _integers(values: Tensor | None, count: int, default: int) -> list[int]:
    return [default] * count if values is None else [int(value) for value in values.tolist()]


def _linear(argument: str) -> Callable[[Named, Any], float]:
    """A product whose left operand [..., K] has this name: two FLOP for each output and each of K."""
    return lambda named, output: 2.0 * output.numel() * named[argument].shape[-1]


def _packed_linear(named: Named, output: list[Tensor]) -> float:
    return 2.0 * named["x"].shape[-1] * sum(part.numel() for part in output)


def _encoder_layer(named: Named, output: Any) -> float:
    """torch.nn's whole encoder layer as one operation, [B, S, E], nested where the batch is padded."""
    src, names = named["src"], ("qkv_weight", "proj_weight", "ffn_weight_1", "ffn_weight_2")
    lengths = [sequence.shape[0] for sequence in src.unbind()]
    weights = sum(named[name].numel() for name in names)
    pairs = sum(length**2 for length in lengths)
    return 2.0 * weights * sum(lengths) + 4.0 * pairs * named["embed_dim"]


_FLOP: dict[str, Callable[[Named, Any], float]] = {
    "fastattn::attention": _attention,
    "fastattn::varlen_attention": _varlen_attention,
    "fastattn::decode_attention": _decode_attention,
    "fastattn::packed_linear": _packed_linear,
    "fastattn::quantized_linear": _linear("x"),
    "mkldnn::_linear_pointwise": _linear("X"),
    "mkl::_mkl_linear": _linear("X"),
    "aten::mkldnn_linear": _linear("self"),
    "aten::_addmm_activation": _linear("mat1"),
    "aten::_int_mm": _linear("self"),
    "aten::_weight_int8pack_mm": _linear("self"),
    "aten::mv": _linear("self"),
    "aten::addmv": _linear("mat"),
    "aten::dot": _linear("self"),
    "aten::_transformer_encoder_layer_fwd": _encoder_layer,
}
for _name in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
    _FLOP[f"aten::_scaled_dot_product_{_name}"] = _sdpa(backward=False)
    _FLOP[f"aten::_scaled_dot_product_{_name}_backward"] = _sdpa(backward=True)
