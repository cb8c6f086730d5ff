"""How much each layer's outputs lose when it is quantized, measured on what it is really given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.compress.calibration import Calibration
from fastattn.ops import PackedWeight, quantized_linear

__all__ = ["output_error", "ranked"]


def output_error(linear: nn.Module | Tensor, packed: PackedWeight, rows: Tensor | None = None) -> float:
    """The relative error `||Y - Y_q|| / ||Y||` of a layer's outputs, without its bias.

    Args:
        linear: an `nn.Linear`, transformers' `Conv1D`, or a weight [N, K].
        packed: its weight quantized.
        rows: [R, K], inputs of the layer (`Calibration.record_inputs`, kind "rows"). Without any, the
            weight's own relative error `||W - W_q|| / ||W||`, which is that of inputs that favour no
            direction and are not rounded.

    Returns:
        0.0 where there is nothing to lose; NaN or inf where the quantized outputs are not finite.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> from fastattn.ops import quantize_absmax
        >>> weight, rows = torch.eye(3), torch.tensor([[1.0, 2.0, 3.0]])
        >>> output_error(weight, quantize_absmax(weight, "int8-weight"), rows)
        0.0
    """
    weight = linear if isinstance(linear, Tensor) else _weight(linear)
    if weight.shape != (packed.out_features, packed.in_features):
        raise ValueError(
            f"output_error: the layer's weight is {list(weight.shape)}, the quantized one "
            f"[{packed.out_features}, {packed.in_features}]"
        )
    exact = weight.detach().float()
    with torch.no_grad():
        if rows is None:
            quantized = packed.dequantize()
        else:
            rows = rows.to(exact.device, torch.float32)
            exact, quantized = rows @ exact.T, quantized_linear(rows, packed)
        norm, lost = float(exact.norm()), float((quantized - exact).norm())
    return lost / norm if norm > 0 else (0.0 if lost == 0 else float("inf"))


def ranked(
    model: nn.Module,
    names: Sequence[str],
    quantize: Callable[[Tensor], PackedWeight],
    calibration: Calibration | None = None,
) -> list[tuple[str, float]]:
    """The layers with the error each makes on its own, the most sensitive first.

    Args:
        model: nothing in it changes.
        names: `nn.Linear` and `Conv1D` layers, as `named_modules` gives them.
        quantize: weight [N, K] -> the quantized one, `quantize_hqq` say.
        calibration: gives the layers' inputs; without it, and for a layer none of its batches reaches, the
            error is the weight's.

    Raises:
        ValueError: a name that is no module.

    Example:
        >>> import torch
        >>> from fastattn.compress.quantization.hqq import quantize_hqq
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
        >>> _ = model[0].weight.data.fill_(0.5)  # nothing to round
        >>> [name for name, _ in ranked(model, ["0", "1"], quantize_hqq)]
        ['1', '0']
    """
    modules = dict(model.named_modules())
    if unknown := [name for name in names if name not in modules]:
        raise ValueError(f"no module of {type(model).__name__} is named {', '.join(map(repr, unknown))}")
    rows: dict[str, Tensor] = {} if calibration is None else calibration.record_inputs(model, names, "rows")
    errors = [
        (name, output_error(modules[name], quantize(_weight(modules[name]).detach()), rows.get(name)))
        for name in names
    ]
    # NaN first: no order places it.
    return sorted(errors, key=lambda entry: (entry[1] == entry[1], -entry[1]))


def _weight(linear: nn.Module) -> Tensor:
    weight: Any = linear.weight
    # transformers' Conv1D keeps it as [K, N].
    stored: Tensor = weight.T if type(linear).__name__ == "Conv1D" else weight
    return stored
