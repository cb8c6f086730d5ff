"""`logits_to_keep` in a graph: of how many of the last positions the logits are computed."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import opset20 as op
from torch import Tensor

from fastattn.onnx.graph import vector

__all__ = ["LOGITS_TO_KEEP", "give_default", "keep_last_positions", "last_positions"]

# An input of the graph that has a value already: a loader that knows nothing of it need not give it.
LOGITS_TO_KEEP = "logits_to_keep"

_END = 2**62


@torch.library.custom_op("fastattn_onnx::last_positions", mutates_args=())
def keep_last_positions(x: Tensor, count: Tensor) -> Tensor:
    """The last positions of every row, or all of them.

    Args:
        x: [B, S, N].
        count: int64 [1]: how many; 0 keeps all, as does more than there are.

    Returns:
        [B, count or S, N].
    """
    return x[:, -min(int(count), x.shape[1]) :].clone()


@keep_last_positions.register_fake
def _(x: Tensor, count: Tensor) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return x.new_empty(x.shape[0], kept, x.shape[2])


def last_positions(x: Any, count: Any) -> Any:
    """The ONNX face of `keep_last_positions`: less 0 from the front is everything."""
    return op.Slice(x, op.Neg(count), vector(_END), vector(1))


def give_default(model: Any) -> None:
    """Let the graph's input `logits_to_keep` be 0 where it is not given."""
    (value,) = (each for each in model.graph.inputs if each.name == LOGITS_TO_KEEP)
    value.const_value = ir.tensor([0], dtype=ir.DataType.INT64, name=LOGITS_TO_KEEP)
    model.graph.register_initializer(value)
