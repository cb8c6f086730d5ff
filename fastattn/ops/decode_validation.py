"""Checks of a decode cache: shapes, dtypes and scales always; lengths and pages where they can be read."""

from __future__ import annotations

import torch
from torch import Tensor

from fastattn.ops.attention_validation import INTEGERS
from fastattn.ops.decode_cache import DecodeCache
from fastattn.ops.validation import check_device, check_same, may_read, shape_of

__all__ = ["QUANTIZED", "check_cache", "check_cache_values"]

OP = "decode_attention"
MAX_QUERIES = 16
QUANTIZED = (torch.int8, torch.float8_e4m3fn)


def check_cache(query: Tensor, cache: DecodeCache) -> None:
    """Raise unless the cache's tensors fit query [B, Hq, Sq, D] and each other."""
    key, value, table = cache.key_cache, cache.value_cache, cache.block_table
    paged = table is not None
    layout = "[blocks, block_size, heads, head_dim]" if paged else "[batch, heads, length, head_dim]"
    if not query.dim() == key.dim() == value.dim() == 4:
        raise ValueError(
            f"{OP}: query must be [batch, heads, length, head_dim], key_cache and value_cache {layout}; "
            + _given(query, cache)
        )
    check_same(OP, "query", query, "query", query)
    if not 1 <= query.shape[2] <= MAX_QUERIES:
        raise ValueError(
            f"{OP}: query holds {query.shape[2]} new tokens; it takes 1 to {MAX_QUERIES} "
            f"(more go to fastattn.ops.attention); {_given(query, cache)}"
        )
    if key.dtype != query.dtype and key.dtype not in QUANTIZED:
        raise TypeError(
            f"{OP}: key_cache is {key.dtype}; accepted are query's {query.dtype}, int8 and float8_e4m3fn"
        )
    if value.dtype != key.dtype:
        raise TypeError(f"{OP}: value_cache is {value.dtype} but key_cache is {key.dtype}; they must agree")
    for name, x in (("key_cache", key), ("value_cache", value)):
        check_device(OP, "query", query, name, x)
    if key.shape[:3] != value.shape[:3] or key.shape[3] != query.shape[3]:
        raise ValueError(
            f"{OP}: key_cache and value_cache must agree in all but the last size, key_cache and query in "
            f"the last; {_given(query, cache)}"
        )
    heads = key.shape[2 if paged else 1]
    if heads == 0 or query.shape[1] % heads != 0:
        raise ValueError(
            f"{OP}: {query.shape[1]} query heads are not a multiple of the {heads} heads of key_cache, "
            f"{layout}; {_given(query, cache)}"
        )
    if not paged and key.shape[0] != query.shape[0]:
        raise ValueError(
            f"{OP}: key_cache must hold the {query.shape[0]} sequences of query; {_given(query, cache)}"
        )
    if table is not None:
        _check_table(query, table, key.shape[1])
    _check_scales(query, cache, heads)


def _given(query: Tensor, cache: DecodeCache) -> str:
    return (
        f"got query {shape_of(query)}, key_cache {shape_of(cache.key_cache)}, "
        f"value_cache {shape_of(cache.value_cache)}"
    )


def _check_table(query: Tensor, table: Tensor, block_size: int) -> None:
    check_device(OP, "query", query, "block_table", table)
    if table.dtype not in INTEGERS or table.dim() != 2 or table.shape[0] != query.shape[0]:
        raise ValueError(
            f"{OP}: block_table must be an int32 or int64 tensor [batch, pages] = [{query.shape[0]}, pages]; "
            f"got {table.dtype} {shape_of(table)}"
        )
    if block_size == 0:
        raise ValueError(f"{OP}: key_cache has pages of 0 keys; block_size must be at least 1")


def _check_scales(query: Tensor, cache: DecodeCache, heads: int) -> None:
    dtype = cache.key_cache.dtype
    for name, scale in (("key_scale", cache.key_scale), ("value_scale", cache.value_scale)):
        if dtype not in QUANTIZED:
            if scale is not None:
                raise ValueError(
                    f"{OP}: {name} goes with an int8 or float8_e4m3fn cache; key_cache is {dtype}"
                )
            continue
        if scale is None:
            raise ValueError(f"{OP}: a cache of {dtype} needs {name}, float32 [{heads}]; got None")
        check_device(OP, "query", query, name, scale)
        if scale.dtype != torch.float32 or scale.shape != (heads,):
            raise ValueError(
                f"{OP}: {name} must be float32 [cache heads] = [{heads}]; got {scale.dtype} {shape_of(scale)}"
            )


def check_cache_values(cache: DecodeCache, queries: int, window_left: int) -> None:
    """Raise where a length does not fit the cache, or a page that a visible key uses does not exist. Does
    nothing where reading values would stall the device or break a graph.
    """
    if not may_read(cache.cache_lengths):
        return
    lengths = cache.cache_lengths.tolist()
    wrong = [length for length in lengths if not 0 <= length <= cache.capacity]
    if wrong:
        what = "length" if cache.block_table is None else "pages x block_size"
        raise ValueError(
            f"{OP}: cache_lengths holds {wrong[0]}; the cache takes 0 to {cache.capacity} keys, its {what}"
        )
    if cache.block_table is None:
        return
    blocks, block_size = cache.key_cache.shape[:2]
    table = cache.block_table
    ends = [-(-length // block_size) for length in lengths]
    begins = [0] * len(lengths)
    if window_left >= 0:
        begins = [max(0, length - queries - window_left) // block_size for length in lengths]
    index = torch.arange(table.shape[1])
    used = (index >= torch.tensor(begins)[:, None]) & (index < torch.tensor(ends)[:, None])
    bad = used.to(table.device) & ((table < 0) | (table >= blocks))
    if bad.any():
        sequence, page = bad.nonzero()[0].tolist()
        raise ValueError(
            f"{OP}: block_table[{sequence}, {page}] is {int(table[sequence, page])}, a page that "
            f"{lengths[sequence]} keys use; key_cache has pages 0 to {blocks - 1}"
        )
