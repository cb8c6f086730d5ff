"""How alike two answers are where a lower precision made one of them, and how alike each precision must be.

Exports and benchmarks are held to the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["FEW_GATES", "JUDGED_ROWS", "ROW_GATES", "few_columns", "gate", "likeness"]

# Mean cosine between the rows of an output and the reference's (a token's hidden state, a token's logits)
# that a precision must keep, on the worst batch. The batches are random tokens, which spread activations
# wider than texts do: MiniLM in int8 keeps 0.975 on them and 0.991 on sentences. Something broken is far
# below: of MiniLM fine-tuned on SST-2, with one of its linear layers multiplied by 2 or by 0, 31 of 36 and 36
# of 36 are below 0.95.
ROW_GATES = {"fp16": 0.9999, "int8": 0.95, "int8-weight": 0.99, "int4-weight": 0.9}

# An output of fewer columns is compared as one vector over all its rows. A row of few numbers has no cosine
# of its own: two logits of opposite sign have 1 or -1 and nothing between, and a sentence the model is
# undecided about turns from one to the other by the rounding that moves any logit a little. SST-2's MiniLM,
# with 87.3% right in float32 and in int8 alike, has 0.51 as the mean of the rows of one batch in int8.
_FEW_COLUMNS = 32

# What that vector must keep, which averages over more and is held to more. Measured on that MiniLM and on one
# pruned to twice the speed, on `adversarial_batches` (37 rows of two logits; eight draws of them):
#
#                                               int8            int8-weight     int4-weight
#     right, in PyTorch, the lowest of 8        0.995, 0.998    0.9996, 0.999   0.965, 0.933
#     right, in ONNX Runtime                    0.992, 0.996    0.9995, 0.999   0.985, 0.959
#     a layer times 2: below the gate           16, 20 of 37
#     a layer times 0: below the gate           33, 33 of 37 (median 0.935, 0.901)
#     labels exchanged; rows exchanged          -0.97, -0.98; 0.27, 0.07
#     all logits times 2                        0.80, 0.80
#
# One of 37 layers that is wrong by less moves labels no further than right rounding does (the best of them
# has 0.997): labels alone cannot tell.
FEW_GATES = {"fp16": 0.9999, "int8": 0.98, "int8-weight": 0.995, "int4-weight": 0.9}

# Rows of few columns that make a sure figure. Right int8 models of the above are below 0.95 on one row in
# ten, on 2 rows as low as -0.1, on 4 at 0.955, on 16 at 0.994.
JUDGED_ROWS = 32


def few_columns(output: Tensor) -> bool:
    """Whether an output [..., columns] is compared as one vector, not row by row."""
    return output.dim() < 2 or output.shape[-1] < _FEW_COLUMNS


def gate(precision: str, output: Tensor) -> float | None:
    """The mean `likeness` that `precision` must keep of such an output; None for fp32, held to parity."""
    return (FEW_GATES if few_columns(output) else ROW_GATES).get(precision)


def likeness(found: Tensor, expected: Tensor) -> Tensor:
    """Cosines of rows, or of few columns one figure for all rows.

    That one is 2 f·e / (f·f + e·e): the cosine where both are as long, less where one is longer, so that
    logits of the wrong scale show. Two vectors of zeros are alike.

    Args:
        found, expected: floating point, of one shape [..., columns], where positions are real.

    Returns:
        float64 [rows], or [1]; at most 1 but for rounding, NaN where a number is not finite.
    """
    found, expected = found.detach().double(), expected.detach().double()
    if not few_columns(expected):
        return torch.nn.functional.cosine_similarity(found.flatten(0, -2), expected.flatten(0, -2), dim=-1)
    if not expected.numel():
        return expected.new_empty(0)
    lengths = found.square().sum() + expected.square().sum()
    return torch.where(lengths == 0, 1.0, 2 * (found * expected).sum() / lengths).reshape(1)
