"""ONNX subgraphs of attention over sequences packed end to end, [tokens, heads, head_dim]."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.dense_attention import MASKED_SCORE, plain_attention
from fastattn.onnx.graph import CONTRIB_DOMAIN, Subgraph, emit, number, vector
from fastattn.onnx.score_terms import Positions, position_bias
from fastattn.onnx.standard_attention import standard_attention
from fastattn.onnx.targets import current_target
from fastattn.ops.attention_terms import AttentionTerms

__all__ = ["ONE_SEQUENCE", "attend_by_key_lengths", "attend_each_sequence", "attend_padded"]

# Name of the subgraph that attends without the loop: fusions are counted in the loop's.
ONE_SEQUENCE = "one_sequence"


def attend_each_sequence(
    query: Any,
    key: Any,
    value: Any,
    bounds_q: Any,
    bounds_k: Any,
    terms: AttentionTerms,
    default_start: bool,
) -> Any:
    """The target's fused operator once a sequence, in a Loop: nothing is padded, nothing masked for it.

    On BERT-base, 8 sequences of up to 128 tokens at 47% fill, a layer's attention takes 2.4 ms this way, 10.5
    ms padded with Gather or ScatterND under a key mask, and 4.0 ms padded into GroupQueryAttention with
    lengths; at 100% fill it is level with the best of them. An iteration costs about 20 us.
    With ai.onnx's Attention in the loop all of the model takes the same processor time, 0.88 s; where it gets
    padded sequences and a mask, 1.06 s; at batch 1 0.33 s and 0.34 s.

    Where the keys are rows selected from a wider table (the real tokens among the computed ones), the loop
    selects them itself: the table is never copied.

    Args:
        query: [Tq, Hq, D].
        key, value: [Tk, Hkv, D], [Tk, Hkv, Dv].
        bounds_q, bounds_k: int32 or int64 [B + 1].
        terms: the other arguments, `within_fused_operator` and with Hkv == Hq, or, where the target has no
            contrib operators, `within_standard_operator`.
        default_start: each sequence's query_start is its keys less its queries, whatever `terms` say.

    Returns:
        [Tq, Hq, Dv]; zeros where a sequence has no keys.
    """
    heads, key_heads, head_dim = query.shape[1], key.shape[1], value.shape[2]
    dtype = query.dtype
    (key, key_rows), (value, _) = _selected_rows(key), _selected_rows(value)
    query, key, value = (_as_batch(x) for x in (query, key, value))
    bounds_q, bounds_k = (op.Cast(bounds, to=ir.DataType.INT64) for bounds in (bounds_q, bounds_k))

    def attend(parts: tuple[Any, Any, Any], queries: Any, keys: Any, sequence: Any) -> Any:
        """Attention of one sequence; `queries` and `keys` are how many it has, [1]."""
        starts = terms.query_starts
        if terms.depends_on_position and default_start:
            starts = op.Sub(keys, queries)
        elif starts is not None:
            starts = op.Gather(starts, sequence)
        located = replace(terms, query_starts=starts)
        positions = Positions(queries, keys, located)
        if not current_target().contrib:
            return standard_attention(
                *parts, located, heads=(heads, key_heads), dtype=dtype, positions=positions, length_major=True
            )
        inputs = [*parts, None, None, position_bias(located, positions, dtype)]
        return emit("MultiHeadAttention", inputs, CONTRIB_DOMAIN, num_heads=heads, scale=terms.scale)

    def at_once() -> Any:
        parts = (query, *(x if key_rows is None else op.Gather(x, key_rows, axis=1) for x in (key, value)))
        queries, keys = (op.Shape(parts[i], start=1, end=2) for i in (0, 1))
        return attend(parts, queries, keys, vector(0))

    def one_by_one() -> Any:
        return _loop_over_sequences(
            query, key, value, key_rows, bounds_q, bounds_k, dtype, heads * head_dim, attend
        )

    # One sequence, as a request of its own is, needs no loop, whose slices and joins copy (4% of BERT-base at
    # 128 tokens in int8).
    nothing = number(0, ir.DataType.INT64)
    rows = (query, key if key_rows is None else key_rows)
    occupied = op.And(*(op.Greater(op.Size(x), nothing) for x in rows))
    alone = op.And(op.Equal(op.Size(bounds_q), number(2, ir.DataType.INT64)), occupied)
    branches = {}
    for name, graph_name, emitting in (
        ("then_branch", ONE_SEQUENCE, at_once),
        ("else_branch", "each_sequence", one_by_one),
    ):
        branch = Subgraph(graph_name)
        branches[name] = branch.graph([(branch.record(emitting), ir.TensorType(dtype))])
    return op.Reshape(emit("If", [alone], **branches), [-1, heads, head_dim])


def _loop_over_sequences(
    query: Any,
    key: Any,
    value: Any,
    key_rows: Any | None,
    bounds_q: Any,
    bounds_k: Any,
    dtype: Any,
    width: int,
    attend: Callable[..., Any],
) -> Any:
    """`attend` on the rows of each sequence, joined: [1, Tq, width]; query, key, value are [1, T, H * D]."""
    floats = ir.TensorType(dtype)
    sequences = ir.SequenceType(floats)
    # As columns, so that taking one gives the [1] that Slice wants.
    starts_q, ends_q = _starts_and_ends(bounds_q)
    starts_k, ends_k = _starts_and_ends(bounds_k)
    occupied = op.And(op.Less(starts_q, ends_q), op.Less(starts_k, ends_k))
    axis_1, columns, one = vector(1), vector(width), vector(1)
    count = op.Squeeze(op.Shape(starts_q, start=0, end=1), [0])
    # Begun with no rows, so that a batch of no sequences has something to join.
    nothing = op.ConstantOfShape([1, 0, width], value=ir.tensor([0.0], dtype=dtype))

    index = ir.Value(name="sequence", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    keep_going = ir.Value(name="keep_going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    outputs = ir.Value(name="outputs", type=sequences)
    body = Subgraph("sequence", [index, keep_going, outputs])
    start_q, end_q, start_k, end_k = (
        body.add("Gather", [bounds, index]) for bounds in (starts_q, ends_q, starts_k, ends_k)
    )
    attending = Subgraph("attend")
    query_part = attending.add("Slice", [query, start_q, end_q, axis_1])
    if key_rows is None:
        key_part, value_part = (attending.add("Slice", [x, start_k, end_k, axis_1]) for x in (key, value))
    else:
        rows = attending.add("Slice", [key_rows, start_k, end_k])
        key_part, value_part = (attending.add("Gather", [x, rows], axis=1) for x in (key, value))
    queries, keys = attending.add("Sub", [end_q, start_q]), attending.add("Sub", [end_k, start_k])
    parts = (query_part, key_part, value_part)
    attended = attending.record(lambda: attend(parts, queries, keys, index))
    skip = Subgraph("nothing_to_attend")
    shape = skip.add("Concat", [one, skip.add("Sub", [end_q, start_q]), columns], axis=0)
    zeros = skip.add("ConstantOfShape", [shape], value=ir.tensor([0.0], dtype=dtype))
    out = body.add(
        "If",
        [body.add("Gather", [occupied, index])],
        then_branch=attending.graph([(attended, floats)]),
        else_branch=skip.graph([(zeros, floats)]),
    )
    results = [
        (body.add("Identity", [keep_going]), keep_going.type),
        (body.add("SequenceInsert", [outputs, out]), sequences),
    ]
    loop = emit("Loop", [count, None, op.SequenceConstruct(nothing)], body=body.graph(results))
    return op.ConcatFromSequence(loop, axis=1)


def attend_by_key_lengths(
    query: Any,
    key: Any,
    value: Any,
    bounds_q: Any,
    bounds_k: Any,
    terms: AttentionTerms,
    default_start: bool,
) -> Any:
    """One MultiHeadAttention over sequences padded for it alone, told how many keys each has.

    For a GPU, where a loop would stall at each sequence; the graph waits for the host once, however many its
    layers (they share the places of the rows). ONNX Runtime's PackedMultiHeadAttention, which would need no
    padding, takes no keys but the queries' own, and a padded first token that a head reads is a query and no
    key.

    Takes what `attend_each_sequence` takes, `within_fused_operator` and with as many key as query heads.

    Returns:
        [Tq, H, Dv]; zeros where a sequence has no keys.
    """
    heads, head_dim = query.shape[1], value.shape[2]
    dtype = query.dtype
    (key, key_rows), (value, _) = _selected_rows(key), _selected_rows(value)
    bounds_q, bounds_k = (op.Cast(bounds, to=ir.DataType.INT64) for bounds in (bounds_q, bounds_k))
    (starts_q, lengths_q), (starts_k, lengths_k) = (
        _starts_and_lengths(bounds_q),
        _starts_and_lengths(bounds_k),
    )
    slots_q, real = _slots(starts_q, lengths_q)
    slots_k, _ = _slots(starts_k, lengths_k, key_rows)
    padded = [_flat(_padded(x, slots)) for x, slots in ((query, slots_q), (key, slots_k), (value, slots_k))]
    if default_start and terms.depends_on_position:
        terms = replace(terms, query_starts=op.Sub(lengths_k, lengths_q))
    queries, keys = (op.Shape(slots, start=1, end=2) for slots in (slots_q, slots_k))
    bias = position_bias(terms, Positions(queries, keys, terms), dtype)
    counts = op.Cast(lengths_k, to=ir.DataType.INT32)
    counts.shape, counts.type = ir.Shape([None]), ir.TensorType(ir.DataType.INT32)
    out = emit(
        "MultiHeadAttention",
        [*padded, None, counts, bias],
        CONTRIB_DOMAIN,
        num_heads=heads,
        scale=terms.scale,
        mask_filter_value=MASKED_SCORE,
    )
    # Where nothing may be attended the operator averages all values.
    occupied = op.Unsqueeze(op.Greater(lengths_k, vector(0)), vector(1, 2))
    out = op.Where(occupied, out, number(0.0, dtype))
    return _joined(op.Reshape(out, vector(-1, heads, head_dim)), real)


def _flat(x: Any) -> Any:
    """[B, S, H, D] -> [B, S, H * D]."""
    return op.Reshape(x, vector(0, 0, -1))


def _selected_rows(x: Any) -> tuple[Any, Any | None]:
    """The table `x` was selected from by index_select, and the selecting index; else `x` itself and None."""
    node = x.producer()
    if node is None or node.op_type != "Gather" or node.attributes.get_int("axis", 0) != 0:
        return x, None
    table, index = node.inputs
    # As many dimensions after as before: the index is a vector.
    return (table, index) if table.shape is not None and len(table.shape) == len(x.shape) else (x, None)


def _as_batch(x: Any) -> Any:
    """[T, H, D] -> [1, T, H * D]."""
    return op.Reshape(x, [1, -1, x.shape[1] * x.shape[2]])


def _starts_and_ends(bounds: Any) -> tuple[Any, Any]:
    column = op.Unsqueeze(bounds, [1])
    return op.Slice(column, [0], [-1], [0]), op.Slice(column, [1], [2**62], [0])


def attend_padded(
    query: Any,
    key: Any,
    value: Any,
    bounds_q: Any,
    bounds_k: Any,
    terms: AttentionTerms,
    default_start: bool,
) -> tuple[Any, Any | None]:
    """The plain formula on padded sequences; right for every argument of `fastattn::varlen_attention`.

    Args:
        terms: the other arguments, tensors as graph values.
        default_start: each sequence's query_start is its keys less its queries, whatever `terms` say.

    Returns:
        [Tq, Hq, Dv] and float32 lse [Hq, Tq], None where not asked for.
    """
    bounds_q, bounds_k = (op.Cast(bounds, to=ir.DataType.INT64) for bounds in (bounds_q, bounds_k))
    (starts_q, lengths_q), (starts_k, lengths_k) = (
        _starts_and_lengths(bounds_q),
        _starts_and_lengths(bounds_k),
    )
    slots_q, real = _slots(starts_q, lengths_q)
    slots_k, _ = _slots(starts_k, lengths_k)
    padded_query, padded_key, padded_value = (
        _padded(x, slots) for x, slots in ((query, slots_q), (key, slots_k), (value, slots_k))
    )
    terms = replace(terms, key_lengths=lengths_k)
    if default_start and terms.depends_on_position:
        terms = replace(terms, query_starts=op.Sub(lengths_k, lengths_q))
    out, lse = plain_attention(
        op.Transpose(padded_query, perm=[0, 2, 1, 3]),
        op.Transpose(padded_key, perm=[0, 2, 1, 3]),
        op.Transpose(padded_value, perm=[0, 2, 1, 3]),
        terms,
        heads=(query.shape[1], key.shape[1]),
        dtype=query.dtype,
    )
    heads, head_dim = query.shape[1], value.shape[2]
    packed = _joined(op.Reshape(op.Transpose(out, perm=[0, 2, 1, 3]), [-1, heads, head_dim]), real)
    if lse is None:
        return packed, None
    lse_rows = op.Reshape(op.Transpose(lse, perm=[0, 2, 1]), [-1, heads])
    return packed, op.Transpose(_joined(lse_rows, real), perm=[1, 0])


def _starts_and_lengths(bounds: Any) -> tuple[Any, Any]:
    starts = op.Slice(bounds, [0], [-1], [0])
    return starts, op.Sub(op.Slice(bounds, [1], [2**62], [0]), starts)


def _slots(starts: Any, lengths: Any, rows: Any | None = None) -> tuple[Any, Any]:
    """What stands where once the sequences are padded: int64 [B, longest], the row of a token (`rows` says
    which, where it is not the next) counted from 1, 0 past a sequence's end; and bool [B, longest], what is a
    token.

    Made of the bounds alone, so that all layers share it.
    """
    # At least 1: ONNX Runtime cannot reduce over no keys.
    longest = op.ReduceMax(op.Concat(lengths, vector(1), axis=0), keepdims=0)
    numbers = op.Range(0, longest, 1)
    real = op.Less(numbers, op.Unsqueeze(lengths, [1]))
    slots = op.Where(real, op.Add(op.Add(op.Unsqueeze(starts, [1]), numbers), vector(1)), vector(0))
    if rows is not None:
        slots = op.Gather(op.Concat(vector(0), op.Add(rows, vector(1)), axis=0), slots, axis=0)
    return slots, real


def _padded(x: Any, slots: Any) -> Any:
    """[T, H, D] -> [B, longest, H, D]: the rows that `_slots` names, 0 being one of zeros."""
    zeros = op.ConstantOfShape([1, x.shape[1], x.shape[2]], value=ir.tensor([0.0], dtype=x.dtype))
    return op.Gather(op.Concat(zeros, x, axis=0), slots, axis=0)


def _joined(rows: Any, real: Any) -> Any:
    """[B * longest, ...] -> [T, ...]: the rows that `real` [B, longest] marks.

    The places are found once for all layers: finding them makes a GPU wait.
    """
    places = op.Squeeze(op.NonZero(op.Reshape(real, [-1])), vector(0))
    return op.Gather(rows, places, axis=0)
