"""Attention over a decoder's cache: com.microsoft.GroupQueryAttention, which appends to the cache itself.

The past and the present of a layer may be one buffer there, longer than what it holds; how much that is the
attention mask's length says. Where its kernel cannot serve, past and new keys are joined and attended
plainly.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import evaluator
from onnxscript import opset20 as op

from fastattn.onnx.graph import CONTRIB_DOMAIN, emit, number, vector
from fastattn.onnx.rewriting import redirect
from fastattn.onnx.score_terms import Positions, position_bias
from fastattn.onnx.targets import current_target
from fastattn.ops.attention_terms import AttentionTerms

__all__ = ["Appended", "append", "appended", "attend_appended", "fusable", "lower_appends", "serves"]

# The operator that stands for `fastattn_graph::append` until `lower_appends`.
_APPEND = "Append"
_TRACE_DOMAIN = "fastattn.trace"

# Added to the score of a hidden key: finite, or a row that sees nothing would be NaN.
_HIDDEN = {ir.DataType.FLOAT: -3.0e38, ir.DataType.FLOAT16: -6.0e4}


@dataclass(frozen=True)
class Appended:
    """The arguments of a traced `append`, graph values: past and new [B, H, P | S, D], the attention mask
    [B, T], the tokens [B, S].
    """

    past: Any
    new: Any
    attention_mask: Any
    tokens: Any


def append(past: Any, new: Any, attention_mask: Any, tokens: Any) -> Any:
    """`fastattn_graph::append`: a node of no operator set, until it is known who reads it."""
    return emit(_APPEND, [past, new, attention_mask, tokens], _TRACE_DOMAIN)


def appended(value: Any) -> Appended | None:
    """The past and the new of keys or values that were appended; None of any others."""
    node = value.producer() if hasattr(value, "producer") else None
    return Appended(*node.inputs) if node is not None and node.op_type == _APPEND else None


def fusable(key_dim: int, value_dim: int) -> bool:
    """Whether GroupQueryAttention takes heads of these sizes."""
    return key_dim == value_dim and key_dim % 8 == 0


def serves(heads: tuple[int, int], dims: tuple[int, int], dtype: Any, terms: AttentionTerms) -> bool:
    """Whether the target's GroupQueryAttention computes this.

    Args:
        heads: of queries and of keys.
        dims: of a key and of a value.
        dtype: of query.
        terms: `query_start` is that of the last keys.
    """
    return (
        current_target().contrib
        and fusable(*dims)
        and dtype in _HIDDEN
        and terms.key_lengths is None
        and terms.query_starts is None
        and (terms.causal or terms.reach == (-1, -1))
        and not terms.return_lse
    )


def attend_appended(query: Any, key: Appended, value: Appended, terms: AttentionTerms) -> Any:
    """GroupQueryAttention over [B, Hq, S, D] and the cache; `lower_appends` makes its present the graph's.

    Padding is hidden by its attention bias, [B or 1, Hq or 1, S, T]: the kernel knows neither a mask nor that
    rows of a batch begin later. Its window is counted as transformers counts, the query's own key included.
    """
    dtype = query.dtype
    heads, key_heads = query.shape[1], key.new.shape[1]
    total = op.Cast(op.Shape(key.attention_mask, start=1, end=2), to=ir.DataType.INT32)
    last = op.Expand(op.Sub(total, _int32(1)), op.Shape(key.attention_mask, start=0, end=1))
    sinks: Any = terms.sinks
    inputs = [
        *(_length_major(x) for x in (query, key.new, value.new)),
        key.past,
        value.past,
        last,
        total,
        None,
        None,
        None,
        _attention_bias(key, terms, dtype),
        None if sinks is None else op.Cast(sinks, to=dtype),
    ]
    while inputs[-1] is None:
        inputs.pop()
    attributes: dict[str, Any] = dict(num_heads=heads, kv_num_heads=key_heads, scale=terms.scale)
    if terms.softcap > 0.0:
        attributes["softcap"] = terms.softcap
    if terms.window_left >= 0:
        attributes["local_window_size"] = terms.window_left + 1
    if not terms.causal:
        attributes["causal"] = 0
    node = ir.node("GroupQueryAttention", inputs, attributes=attributes, domain=CONTRIB_DOMAIN, num_outputs=3)
    # While torch.onnx translates, the default evaluator is its recorder.
    evaluator.default().nodes.append(node)
    out = op.Reshape(node.outputs[0], [0, 0, heads, query.shape[3]])
    return op.Transpose(out, perm=[0, 2, 1, 3])


def _attention_bias(key: Appended, terms: AttentionTerms, dtype: Any) -> Any | None:
    """Everything added to the scores, [B or 1, Hq or 1, S, T]; None where nothing is.

    Of the graph's inputs alone where it can be, so that all layers share one.
    """
    queries, keys = op.Shape(key.tokens, start=1, end=2), op.Shape(key.attention_mask, start=1, end=2)
    positions = Positions(queries, keys, replace(terms, query_starts=op.Sub(keys, queries)))
    added = position_bias(terms, positions, dtype)
    bias: Any = terms.bias
    if bias is not None:
        # -inf would make a NaN of a row that sees nothing.
        bias = op.Max(op.Cast(bias, to=dtype), number(_HIDDEN[dtype], dtype))
        added = bias if added is None else op.Add(added, bias)
    mask: Any = terms.mask
    if mask is not None:
        hidden = op.Where(mask, number(0.0, dtype), number(_HIDDEN[dtype], dtype))
        hidden = op.Unsqueeze(hidden, vector(1, 2)) if len(mask.shape) == 2 else hidden
        added = hidden if added is None else op.Max(op.Add(added, hidden), number(_HIDDEN[dtype], dtype))
    if added is None:
        return None
    return op.Expand(added, op.Concat(vector(1, 1), queries, keys, axis=0))


def _int32(value: int) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.INT32))


def _length_major(x: Any) -> Any:
    """[B, H, S, D] -> [B, S, H * D]; the shape is told, by which `decoder_rewrites` finds it made already."""
    batch, heads, length, width = x.shape
    rows = op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, heads * width])
    rows.shape, rows.type = ir.Shape([batch, length, heads * width]), ir.TensorType(x.dtype)
    return rows


def lower_appends(model: Any) -> int:
    """Give every layer's present to the graph: GroupQueryAttention's own, elsewhere past and new joined.

    Returns how many layers GroupQueryAttention serves.
    """
    served = 0
    for node in list(model.graph):
        if node.op_type != "GroupQueryAttention":
            continue
        served += 1
        for past, present in zip(node.inputs[3:5], node.outputs[1:3], strict=True):
            (old,) = [use.node for use in past.uses() if use.node.op_type == _APPEND]
            redirect(old, present)
    for node in list(model.graph):
        if node.op_type == _APPEND:
            _join(node)
    model.graph.opset_imports.pop(_TRACE_DOMAIN, None)
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    return served


def _join(node: Any) -> None:
    """Past and new as one tensor, in place of a traced `append`."""
    past, new = node.inputs[:2]
    joined = ir.node("Concat", [past, new], attributes={"axis": 2})
    node.graph.insert_before(node, joined)
    redirect(node, joined.outputs[0])
