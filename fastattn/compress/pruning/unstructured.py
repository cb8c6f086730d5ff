"""Zeros anywhere in a linear layer's weight: fewer numbers to store compressed, no faster by themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.pruning.report import PruneReport
from fastattn.compress.pruning.weights import left_alone, linear_weights, scores

__all__ = ["prune_unstructured"]

_NO_SPEED = (
    "the zeros are stored and multiplied like any other number: no memory and no time is gained here; a "
    "compressed file of the model is smaller"
)
TRAINING = "train it inside fastattn.compress.pruning.weights.held_zeros(model), or the zeros are lost"


def prune_unstructured(
    model: nn.Module,
    sparsity: float,
    importance: str = "magnitude",
    calibration: Any = None,
    exclude: Sequence[str] = (),
) -> PruneReport:
    """Set the least important weights of every linear layer to zero, in place.

    Every layer loses `floor(sparsity * weights)`; with "wanda", every output of it that share of its own
    weights, as that method compares them. Parameters stay the same objects. Output heads, and layers tied to
    embeddings, are left alone.

    Args:
        model: any module; not quantized.
        sparsity: the share of zeros, in [0, 1).
        importance: "magnitude", "taylor" or "wanda"; see `fastattn.compress.pruning.weights.scores`.
        calibration: batches for "taylor" and "wanda"; see `Calibration.of`.
        exclude: names of modules to leave alone, with wildcards.

    Returns:
        A report whose parts have the number of weights that are left, of the kind "weights".

    Raises:
        ValueError: a sparsity outside [0, 1), an unknown importance, no calibration where it is needed, a
            quantized model, or a name in `exclude` that is none of the model. Nothing is changed then.

    Example:
        >>> layer = nn.Sequential(nn.Linear(4, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
        >>> layer[0].weight.data = torch.tensor([[1.0, -4.0, 2.0, -3.0]])
        >>> report = prune_unstructured(layer, 0.5)
        >>> layer[0].weight.data
        tensor([[ 0., -4.,  0., -3.]])
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity!r}; it must be a ratio in [0, 1)")
    weights = linear_weights(model, importance, calibration, exclude)
    batches = None if calibration is None else Calibration.of(calibration, model)
    total = sum(parameter.numel() for parameter in model.parameters())
    report = PruneReport(parts=left_alone(weights), parameters_before=total, parameters_after=total)
    for weight, importances in scores(model, weights, importance, batches):
        rows = importances if importance == "wanda" else importances.reshape(1, -1)
        lost = _least(rows, int(sparsity * rows.shape[1])).reshape(importances.shape)
        weight.values.masked_fill_(lost, 0.0)
        kept = int(weight.values.count_nonzero())
        report.parts.append(weight.part(kept))
        report.parameters_after -= weight.parameter.numel() - kept
    report.notes += [f"parameters after are those that are not zero; {_NO_SPEED}", TRAINING]
    return report


def _least(scores: Tensor, count: int) -> Tensor:
    """bool [R, C]: the `count` smallest of every row, the first ones where some are equal."""
    lost = torch.zeros_like(scores, dtype=torch.bool)
    order = scores.argsort(dim=1, stable=True)[:, :count]
    return lost.scatter_(1, order, True)
