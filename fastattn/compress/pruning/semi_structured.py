"""Two zeros in every four weights: the pattern NVIDIA's GPUs since Ampere multiply without the zeros."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastattn.compress.calibration import Calibration
from fastattn.compress.pruning.report import PruneReport
from fastattn.compress.pruning.unstructured import TRAINING
from fastattn.compress.pruning.weights import LinearWeight, left_alone, linear_weights, scores

__all__ = ["SemiStructuredLinear", "prune_2_4", "use_sparse_kernels"]

# What PyTorch's semi-structured tensors take (cuSPARSELt's limits are 16 by 16, CUTLASS's these).
_DTYPES = (torch.float16, torch.bfloat16)
_ROWS, _COLUMNS = 32, 64


def prune_2_4(
    model: nn.Module, importance: str = "magnitude", calibration: Any = None, exclude: Sequence[str] = ()
) -> PruneReport:
    """Set the two least important of every four neighbouring weights of an output to zero, in place.

    (A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.) On a GPU that has the instructions,
    in float16 or bfloat16, the linear layers then multiply by PyTorch's semi-structured tensors when no
    gradient is wanted: `use_sparse_kernels`. Elsewhere the zeros are multiplied like any other number.

    Args:
        model, importance, calibration, exclude: as of `prune_unstructured`.

    Raises:
        ValueError: as `prune_unstructured`; and layers whose inputs are no multiple of four, or which the
            GPU's kernels cannot take: name them in `exclude`. Nothing is changed then.

    Example:
        >>> layers = nn.Sequential(nn.Linear(4, 1, bias=False), nn.ReLU(), nn.Linear(4, 1))
        >>> layers[0].weight.data = torch.tensor([[1.0, -4.0, 2.0, -3.0]])
        >>> report = prune_2_4(layers)
        >>> layers[0].weight.data
        tensor([[ 0., -4.,  0., -3.]])
    """
    weights = linear_weights(model, importance, calibration, exclude)
    _check_shapes([weight for weight in weights if not weight.reason])
    batches = None if calibration is None else Calibration.of(calibration, model)
    total = sum(parameter.numel() for parameter in model.parameters())
    report = PruneReport(parts=left_alone(weights), parameters_before=total, parameters_after=total)
    for weight, importances in scores(model, weights, importance, batches):
        fours = importances.reshape(-1, 4)
        lost = torch.zeros_like(fours, dtype=torch.bool)
        lost.scatter_(1, fours.argsort(dim=1, stable=True)[:, :2], True)
        weight.values.masked_fill_(lost.reshape(importances.shape), 0.0)
        kept = int(weight.values.count_nonzero())
        report.parts.append(weight.part(kept))
        report.parameters_after -= weight.parameter.numel() - kept
    report.notes.append("parameters after are those that are not zero")
    chosen = [weight for weight in weights if not weight.reason]
    report.notes += [use_sparse_kernels(model, [weight.name for weight in chosen]), TRAINING]
    return report


def use_sparse_kernels(model: nn.Module, names: Sequence[str] | None = None) -> str:
    """Let linear layers whose weights have the pattern multiply without the zeros, where the device can.

    For a model that was just moved to a GPU or loaded there; `prune_2_4` calls it. Layers keep their weights,
    names and `state_dict`, and hold a packed copy beside them.

    Args:
        names: of the layers; all linear ones if None.

    Returns:
        What was done, and what was not and why, as a sentence.
    """
    devices = {parameter.device.type for parameter in model.parameters()}
    if devices != {"cuda"} or torch.version.hip is not None:
        where = " and ".join(sorted(devices))
        return f"on {where} the zeros are multiplied like any other number: no speed is gained"
    if torch.cuda.get_device_capability() < (8, 0):
        return "this GPU has no instructions for 2:4 (it takes compute capability 8.0): no speed is gained"
    changed, left = 0, []
    for name, module in model.named_modules():
        if (names is not None and name not in names) or not isinstance(module, nn.Linear):
            continue
        if type(module) is nn.Linear and module.weight.dtype in _DTYPES and _has_pattern(module.weight):
            module.__class__ = SemiStructuredLinear
            changed += 1
        elif type(module) is not SemiStructuredLinear:
            left.append(name)
    said = f"{changed} layers multiply by PyTorch's semi-structured tensors when no gradient is wanted"
    if left or not changed:
        said += (
            f"; {len(left)} do not, which are not nn.Linear itself, not float16 or bfloat16, or without the "
            "pattern"
        )
    return said


class SemiStructuredLinear(nn.Linear):
    """`nn.Linear` of a weight with two zeros in every four, packed for the GPU where no gradient is wanted.

    The weight stays the parameter it was: it trains, saves and loads like any other. The packed copy is made
    at first use, and anew when the weight has changed; a weight that lost the pattern is multiplied whole,
    with a warning.
    """

    _packed: tuple[Any, Tensor | None] | None = None

    def forward(self, input: Tensor) -> Tensor:
        """[..., K] -> [..., N], as `nn.Linear`."""
        wants_gradient = torch.is_grad_enabled() and (input.requires_grad or self.weight.requires_grad)
        if wants_gradient or torch.compiler.is_compiling() or not input.is_cuda:
            return super().forward(input)
        packed = self._current()
        weight = self.weight if packed is None or input.dtype != packed.dtype else packed
        return linear(input, weight, self.bias)

    def _current(self) -> Tensor | None:
        weight = self.weight
        key = (weight.data_ptr(), weight._version, weight.dtype)
        held = self._packed
        if held is None or held[0] != key:
            packed = None
            if weight.dtype in _DTYPES and _has_pattern(weight):
                packed = torch.sparse.to_sparse_semi_structured(weight.detach())
            else:
                warnings.warn(
                    f"a weight {list(weight.shape)} of {weight.dtype} has no two zeros in every four any "
                    "more: it is multiplied whole",
                    RuntimeWarning,
                    stacklevel=3,
                )
            held = (key, packed)
            self.__dict__["_packed"] = held
        return held[1]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_packed"}


def _has_pattern(weight: Tensor) -> bool:
    """Whether no four neighbouring weights of an output have more than two that are not zero."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.detach().reshape(-1, 4).count_nonzero(dim=1) <= 2).all())


def _check_shapes(weights: Sequence[LinearWeight]) -> None:
    wrong = [weight for weight in weights if weight.values.shape[1] % 4]
    if wrong:
        raise ValueError(
            f"2:4 needs inputs that are a multiple of four; {_listed(wrong)} are not: exclude them"
        )
    # Only nn.Linear itself is multiplied by a packed weight.
    wrong = [
        weight
        for weight in weights
        if type(weight.owner) is nn.Linear and weight.parameter.is_cuda and weight.parameter.dtype in _DTYPES
        if weight.values.shape[0] % _ROWS or weight.values.shape[1] % _COLUMNS
    ]
    if wrong:
        raise ValueError(
            f"PyTorch's semi-structured tensors take outputs in multiples of {_ROWS} and inputs in multiples "
            f"of {_COLUMNS}; {_listed(wrong)} are not: exclude them"
        )


def _listed(weights: Sequence[LinearWeight]) -> str:
    return ", ".join(f"{weight.name!r} {list(weight.values.shape)}" for weight in weights)
