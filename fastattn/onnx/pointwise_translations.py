"""ONNX faces of activations, softmax and rotary embedding."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import opset20 as op

from fastattn.onnx.dense_attention import MASKED_SCORE
from fastattn.onnx.graph import CONTRIB_DOMAIN, FUSED_DTYPES, cast, computing_dtype, emit, number, vector
from fastattn.onnx.targets import current_target

__all__ = ["bias_gelu", "gated_activation", "gelu", "rotary", "softmax"]


def bias_gelu(x: Any, bias: Any, approximate: str) -> Any:
    """`fastattn::bias_gelu`.

    After a matrix product the bias moves into it (see `rewrites`): Gemm then Gelu takes half the time of
    MatMul then BiasGelu. On a GPU it stays with the GELU, see `Target.bias_gelu`.
    """
    if current_target().bias_gelu and x.dtype in FUSED_DTYPES:
        return emit("FastGelu" if approximate == "tanh" else "BiasGelu", [x, bias], CONTRIB_DOMAIN)
    return gelu(op.Add(x, bias), x.dtype, approximate)


def gated_activation(gate: Any, up: Any, kind: str) -> Any:
    """`fastattn::gated_activation`. ONNX Runtime joins x * sigmoid(x) to one pass when it loads the model."""
    if kind == "silu":
        return op.Mul(op.Mul(gate, op.Sigmoid(gate)), up)
    return op.Mul(gelu(gate, gate.dtype, "tanh" if kind == "gelu_tanh" else "none"), up)


def gelu(x: Any, dtype: Any, approximate: str) -> Any:
    """The tanh form is the contrib FastGelu where there is one: never slower than Gelu's own."""
    if approximate == "tanh" and dtype in FUSED_DTYPES and current_target().contrib:
        return emit("FastGelu", [x], CONTRIB_DOMAIN)
    return op.Gelu(x, approximate=approximate)


def softmax(x: Any, mask: Any | None, scale: float, causal: bool) -> Any:
    """`fastattn::softmax`: hidden scores are finite, so that an empty row is no NaN, and is then cleared."""
    computing = computing_dtype(x.dtype)
    scores = cast(x, x.dtype, computing)
    if scale != 1.0:
        scores = op.Mul(scores, number(scale, computing))
    floor = number(MASKED_SCORE, computing)
    # What is hidden may be NaN, so it is replaced; what is seen may be -inf.
    visible = _not_after(x) if causal else None
    if mask is not None:
        visible = mask if visible is None else op.And(visible, mask)
    if visible is not None:
        scores = op.Where(visible, scores, floor)
    scores = op.Max(scores, floor)
    nothing = op.Equal(op.ReduceMax(scores, [-1], keepdims=1), floor)
    weights = op.Where(nothing, number(0.0, computing), op.Softmax(scores, axis=-1))
    return cast(weights, computing, x.dtype)


def _not_after(x: Any) -> Any:
    """bool [M, N] of the last two dimensions: column at most row + N - M."""
    rows, columns = (op.Squeeze(op.Shape(x, start=i, end=i + 1 or None), [0]) for i in (-2, -1))
    last = op.Add(op.Range(0, rows, 1), op.Sub(columns, rows))
    return op.LessOrEqual(op.Range(0, columns, 1), op.Unsqueeze(last, vector(1)))


def rotary(query: Any, key: Any, cos: Any, sin: Any, interleaved: bool) -> tuple[Any, Any]:
    """`fastattn::rotary` as RotaryEmbedding, the contrib one where the target has it (as fast as ai.onnx's):
    a fifth of the time of slices and products.

    The operator takes each angle once, [positions, R / 2], and looks them up by position; ai.onnx's takes
    those of each token as well, [B, S, R / 2].
    """
    width, dtype = cos.shape[-1], query.dtype
    once = ([0], [width], [-1], [2]) if interleaved else ([0], [width // 2], [-1], [1])
    halves = [op.Slice(cast(x, x.dtype, ir.DataType.FLOAT), *map(_vector, once)) for x in (cos, sin)]
    if not current_target().contrib:
        batch = op.Concat(op.Shape(query, start=0, end=1), vector(1, 1), axis=0)
        each = [op.Expand(half, batch) for half in halves]
        turned = [
            emit(
                "RotaryEmbedding",
                [cast(x, dtype, ir.DataType.FLOAT), *each],
                interleaved=int(interleaved),
                rotary_embedding_dim=width if width < x.shape[3] else 0,
            )
            for x in (query, key)
        ]
        return cast(turned[0], ir.DataType.FLOAT, dtype), cast(turned[1], ir.DataType.FLOAT, dtype)
    caches = [op.Reshape(half, vector(-1, width // 2)) for half in halves]
    # One number is where all sequences begin; else each token of each sequence has its own row.
    shared = len(cos.shape) == 2 or cos.shape[0] == 1
    positions = vector(0) if shared else _rows_of(cos)
    rotated = [
        emit(
            "RotaryEmbedding",
            [cast(x, dtype, ir.DataType.FLOAT), positions, *caches],
            CONTRIB_DOMAIN,
            interleaved=int(interleaved),
            num_heads=x.shape[1],
            rotary_embedding_dim=width if width < x.shape[3] else 0,
        )
        for x in (query, key)
    ]
    return cast(rotated[0], ir.DataType.FLOAT, dtype), cast(rotated[1], ir.DataType.FLOAT, dtype)


def _vector(elements: list[int]) -> Any:
    return vector(*elements)


def _rows_of(angles: Any) -> Any:
    """int64 [B, S]: the numbers of the rows of [B, S, R] when they are laid end to end."""
    shape = op.Shape(angles, start=0, end=2)
    return op.Reshape(op.Range(0, op.ReduceProd(shape, keepdims=0), 1), shape)
