"""The weights of a model's linear layers, and how much each does: what patterns of zeros are chosen by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastattn.compress.calibration import Calibration
from fastattn.compress.pruning.importance import IMPORTANCES, evaluated, loss_of, requiring_grad
from fastattn.compress.pruning.report import PrunedPart
from fastattn.compress.quantization.targets import check_exclude, find_targets

__all__ = ["LinearWeight", "held_zeros", "left_alone", "linear_weights", "scores"]


@dataclass(frozen=True)
class LinearWeight:
    """A linear layer's weight.

    Attributes:
        name: the layer's in the model; of a `nn.MultiheadAttention`'s joint projection, the attention's.
        owner: the module that holds the parameter.
        tensor: the parameter's name in it.
        transposed: whether it is [K, N], transformers' Conv1D's.
        reason: why it is left alone; empty where it is not.
    """

    name: str
    owner: nn.Module
    tensor: str
    transposed: bool = False
    reason: str = ""

    @property
    def parameter(self) -> nn.Parameter:
        parameter = self.owner._parameters[self.tensor]
        assert parameter is not None
        return parameter

    @property
    def values(self) -> Tensor:
        """[N, K], outputs by inputs: a view of the parameter, without gradient."""
        values = self.parameter.detach()
        return values.t() if self.transposed else values

    def part(self, kept: int) -> PrunedPart:
        """Its line of the report."""
        return PrunedPart(self.name, "weights", self.parameter.numel(), kept, self.reason)


def linear_weights(
    model: nn.Module, importance: str, calibration: object, exclude: Sequence[str]
) -> list[LinearWeight]:
    """The weights of all linear layers, those that stay as they are with the reason: output heads, what is
    tied to embeddings, what `exclude` names.

    Raises:
        ValueError: an unknown importance, no calibration where it needs some, a pattern of `exclude` that
            matches nothing, quantized layers, or no linear layer at all.
    """
    if importance not in IMPORTANCES:
        raise ValueError(f"importance is {importance!r}; it must be one of {IMPORTANCES}")
    if importance != "magnitude" and calibration is None:
        raise ValueError(f"importance={importance!r} needs calibration: batches the model is run on")
    names = [name for name, _ in model.named_modules()]
    check_exclude(names, exclude)
    found = {target.name: target for target in find_targets(model, exclude)}
    quantized = [name for name, target in found.items() if target.reason == "quantized already"]
    if quantized:
        raise ValueError(
            f"{quantized[0]!r} and {len(quantized) - 1} more layers are quantized: prune first, then quantize"
        )
    weights = []
    for name, module in model.named_modules():
        if name in found:
            target = found[name]
            weights.append(LinearWeight(name, module, "weight", target.kind == "conv1d", target.reason))
        elif isinstance(module, nn.MultiheadAttention):
            excluded = any(f"{name}.out_proj" == other and found[other].reason for other in found)
            reason = "its output projection is left alone" if excluded else ""
            joint = ["in_proj_weight"] if module.in_proj_weight is not None else []
            apart = [f"{each}_proj_weight" for each in "qkv"]
            weights += [LinearWeight(name, module, tensor, reason=reason) for tensor in joint or apart]
    if not any(not weight.reason for weight in weights):
        raise ValueError(f"{type(model).__name__} has no linear layer whose weights may go")
    return weights


def left_alone(weights: Sequence[LinearWeight]) -> list[PrunedPart]:
    """The report's lines of the weights that stay as they are."""
    return [weight.part(weight.parameter.numel()) for weight in weights if weight.reason]


def scores(
    model: nn.Module, weights: Sequence[LinearWeight], importance: str, calibration: Calibration | None
) -> Iterator[tuple[LinearWeight, Tensor]]:
    """The importance [N, K] of every weight that may go, float32, a layer at a time.

    - "magnitude": |w|.
    - "wanda": |w| * ||x|| with the norm of the input it multiplies (Sun et al. 2023).
    - "taylor": |w * d loss / dw|, averaged over the batches (Molchanov et al. 2019, "Importance Estimation
      for Neural Network Pruning").
    """
    chosen = [weight for weight in weights if not weight.reason]
    if importance == "magnitude":
        for weight in chosen:
            yield weight, weight.values.float().abs()
        return
    assert calibration is not None
    if importance == "taylor":
        gradients = _gradients(model, [weight.parameter for weight in chosen], calibration)
        for weight, gradient in zip(chosen, gradients, strict=True):
            by_output = gradient.t() if weight.transposed else gradient
            yield weight, (weight.values.float() * by_output).abs()
        return
    names = list(dict.fromkeys(weight.name for weight in chosen))
    norms: dict[str, Tensor] = {}
    for records in calibration.record_in_groups(model, names, "hessian"):
        norms |= {name: moments.diagonal().clamp_min(0.0).sqrt() for name, moments in records.items()}
    for weight in chosen:
        magnitude = weight.values.float().abs()
        # A layer that no batch reaches keeps its largest weights.
        yield weight, magnitude * norms[weight.name] if weight.name in norms else magnitude


def _gradients(model: nn.Module, parameters: list[nn.Parameter], calibration: Calibration) -> list[Tensor]:
    """The mean over batches of |d loss / d parameter|, float32."""
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in parameters]
    generator = torch.Generator().manual_seed(0)
    with evaluated(model), requiring_grad(parameters), torch.enable_grad():
        for batch in calibration:
            loss = loss_of(model, batch, calibration, generator)
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total += gradient.abs().float() / len(calibration)
    return totals


@contextmanager
def held_zeros(model: nn.Module) -> Iterator[None]:
    """While it lasts, zero weights of linear layers get no gradient, so that training keeps them zero.

    Any optimizer that leaves a weight of zero with a gradient of zero alone will do: all of torch.optim, with
    or without weight decay, when it is made anew. Layers without zeros, and those of zeros alone (adapters
    before training), are left out.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0]])
        >>> with held_zeros(layer):
        ...     layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight.grad
        tensor([[0., 1.]])
    """
    handles = []
    for module in model.modules():
        for parameter in module._parameters.values():
            linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            held = linear or isinstance(module, nn.MultiheadAttention)
            if not held or parameter is None or parameter.dim() != 2:
                continue
            if parameter.requires_grad and 0 < int(parameter.count_nonzero()) < parameter.numel():
                zero = parameter.detach() == 0
                handles.append(parameter.register_hook(lambda grad, zero=zero: grad.masked_fill(zero, 0.0)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
