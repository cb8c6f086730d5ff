"""SmoothQuant: outlying inputs made smaller and their columns of the weight larger, before both are rounded.

Scales are powers of two, and shift exponents alone: nothing but the rounding that follows changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastattn.compress.calibration import Calibration

__all__ = ["Smoothing", "smooth"]


@dataclass
class Smoothing:
    """What `smooth` did and what is left to do.

    Attributes:
        input_scales: layer -> float32 [K] its input is to be divided by, and its weight's columns multiplied:
            neither is done yet (`PackedWeight.input_scales`). A layer for which all are 1 has none.
        folded: norm -> the layers that read it: its weight is divided, and theirs are multiplied, in place.
        scaled: every parameter so changed, and the factor it was multiplied by.
    """

    input_scales: dict[str, Tensor] = field(default_factory=dict)
    folded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    scaled: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)

    def undo(self) -> None:
        """Give every scaled parameter its numbers back, to the last bit."""
        with torch.no_grad():
            for parameter, factor in self.scaled:
                parameter.div_(factor.to(parameter.device, parameter.dtype))
        self.scaled.clear()
        self.folded.clear()


def smooth(
    model: nn.Module,
    names: Sequence[str],
    absmax: Mapping[str, Tensor],
    alpha: float = 0.5,
    calibration: Calibration | None = None,
) -> Smoothing:
    """Scales s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), rounded to powers of two, for the inputs X and
    weights W of linear layers: (X / s)(W s)^T is X W^T (Xiao et al., "SmoothQuant", 2022).

    Where one norm feeds some of the layers and nothing else, it takes the division: its weight and bias
    change in place, and so do the layers' weights. Elsewhere (a norm that a residual connection reads, too)
    the layer has to divide its input itself.

    Args:
        model: its outputs stay what they are.
        names: `nn.Linear` and transformers' `Conv1D` layers, as `named_modules` gives them.
        absmax: layer -> [K], the largest magnitudes of its inputs (`Calibration.record_inputs`); a layer
            without is left alone.
        alpha: 0 leaves the inputs and evens out the weights, 1 the reverse.
        calibration: its first batch shows what reads each norm; without it every layer divides for itself.

    Raises:
        ValueError: an alpha outside [0, 1].

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
        >>> x = torch.tensor([[1.0, -2.0, 3.0, 50.0]])
        >>> calibration = Calibration.of(x, model)
        >>> smoothing = smooth(model, ["1"], calibration.record_inputs(model, ["1"]), 0.5, calibration)
        >>> smoothing.folded
        {'0': ('1',)}
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"smooth is {alpha}; SmoothQuant's alpha must lie in [0, 1]")
    modules = dict(model.named_modules())
    names = [name for name in names if name in absmax]
    smoothing = Smoothing()
    readers = {} if calibration is None else _readers(model, names, calibration)
    shared = _shared_parameters(model)
    for norm_name, layers in readers.items():
        scales = _scales([modules[name] for name in layers], absmax[layers[0]], alpha)
        changes = [(parameter, 1 / scales) for parameter in modules[norm_name].parameters()]
        for name in layers:
            weight: Any = modules[name].weight
            changes.append((weight, scales[:, None] if _is_conv1d(modules[name]) else scales))
        if any(id(parameter) in shared for parameter, _ in changes):
            continue
        if _scale_exactly(modules[norm_name], scales, changes):
            smoothing.folded[norm_name] = layers
            smoothing.scaled.extend(changes)
    done = {name for layers in smoothing.folded.values() for name in layers}
    for name in names:
        if name not in done:
            scales = _scales([modules[name]], absmax[name], alpha)
            # Inputs and weights as even as this leaves need no division at run time.
            if not bool((scales == 1).all()):
                smoothing.input_scales[name] = scales
    return smoothing


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D"


def _scales(layers: Sequence[Any], absmax: Tensor, alpha: float) -> Tensor:
    """[K], of layers with one input; 1 where the inputs or the weights are zero."""
    columns = [
        layer.weight.detach().float().abs().amax(dim=1 if _is_conv1d(layer) else 0) for layer in layers
    ]
    weights = torch.stack(columns).amax(dim=0)
    inputs = absmax.to(weights.device, torch.float32)
    known = (inputs > 0) & (weights > 0)
    exponents = torch.where(known, alpha * inputs.log2() - (1 - alpha) * weights.log2(), 0.0)
    # A factor common to all columns changes nothing in what is rounded: half precision keeps its range.
    mean = exponents.sum() / known.sum().clamp(min=1)
    return torch.where(known, exponents - mean, 0.0).round_().clamp_(-24, 24).exp2_()


def _shared_parameters(model: nn.Module) -> set[int]:
    """ids of parameters that several modules have."""
    seen: set[int] = set()
    shared: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                (shared if id(parameter) in seen else seen).add(id(parameter))
    return shared


def _scale_exactly(norm: Any, scales: Tensor, changes: list[tuple[nn.Parameter, Tensor]]) -> bool:
    """Multiply every parameter by its factor, if that can be undone to the last bit and divides what `norm`
    gives; else change nothing.
    """
    with torch.no_grad():
        before = [parameter.clone() for parameter, _ in changes]
        factors = [factor.to(parameter.dtype) for parameter, factor in changes]
        if not all(
            torch.equal(parameter * factor / factor, parameter)
            for (parameter, _), factor in zip(changes, factors, strict=True)
        ):
            return False
        probe = torch.randn(4, len(scales), generator=torch.Generator().manual_seed(0)).to(before[0])
        expected = norm(probe)
        for (parameter, _), factor in zip(changes, factors, strict=True):
            parameter.mul_(factor)
        # Not where a norm multiplies by 1 + weight (Gemma's), say.
        if torch.equal(norm(probe) * scales.to(expected.dtype), expected):
            return True
        for (parameter, _), numbers in zip(changes, before, strict=True):
            parameter.copy_(numbers)
        return False


def _readers(model: nn.Module, names: Sequence[str], calibration: Calibration) -> dict[str, tuple[str, ...]]:
    """Norm -> the layers of `names` that read its output, where nothing else does."""
    modules = dict(model.named_modules())
    norms = {name: module for name, module in modules.items() if _may_be_norm(module)}
    first = Calibration(calibration.batches[:1])
    with _Watch(model, norms, {name: modules[name] for name in names}) as watch:
        first.run(model)
    return {
        norm: tuple(name for name in names if name in layers)
        for norm, layers in watch.readers.items()
        if layers and None not in layers and all(watch.sources[name] == {norm} for name in layers)
    }


def _may_be_norm(module: nn.Module) -> bool:
    """Whether all it has is a weight [K], and perhaps a bias."""
    parameters = {name: each for name, each in module._parameters.items() if each is not None}
    return (
        not module._modules
        and not module._buffers
        and "weight" in parameters
        and set(parameters) <= {"weight", "bias"}
        and all(each.dim() == 1 for each in parameters.values())
    )


class _Watch(TorchDispatchMode):
    """Sees every operation that reads the output of a norm, and in which layer it happens.

    `readers`: norm -> names of layers; None stands for anything else. `sources`: layer -> the norms whose
    output it is called with; None stands for any other input.
    """

    def __init__(
        self, model: nn.Module, norms: Mapping[str, nn.Module], layers: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.readers: dict[str, set[str | None]] = {}
        self.sources: dict[str | None, set[str | None]] = {}
        self._model, self._norms, self._layers = model, norms, layers
        self._inside: list[str] = []
        # Storage -> norm; the tensors are held, so that no other takes their place in memory.
        self._outputs: dict[int, str] = {}
        self._held: list[Tensor] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Watch:
        for name, norm in self._norms.items():
            self._handles.append(norm.register_forward_hook(self._output_hook(name)))
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_pre_hook(self._enter_hook(name)))
            self._handles.append(layer.register_forward_hook(self._leave))
        self._handles.append(self._model.register_forward_hook(self._see_results))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._held.clear()

    def _output_hook(self, name: str) -> Callable[..., None]:
        def keep(_: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                self._outputs[_storage(output)] = name
                self._held.append(output)
                self.readers.setdefault(name, set())

        return keep

    def _enter_hook(self, name: str) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any) -> None:
            self._inside.append(name)
            # A layer of two inputs (cross-attention's joint projection) cannot be scaled for one of them.
            self.sources.setdefault(name, set()).update(self._norms_of(args) or {None})

        return enter

    def _leave(self, *_: Any) -> None:
        self._inside.pop()

    def _see_results(self, _: nn.Module, args: Any, results: Any) -> None:
        """What the model gives back is read by its caller."""
        for norm in self._norms_of(results):
            self.readers[norm].add(None)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = self._norms_of((args, kwargs))
        result = func(*args, **(kwargs or {}))
        if given and (func._schema.is_mutable or not given <= self._norms_of(result)):
            for norm in given:
                self.readers[norm].add(self._inside[-1] if self._inside else None)
        return result

    def _norms_of(self, values: Any) -> set[str]:
        """Whose outputs, or views of them, are among `values`."""
        storages = (_storage(value) for value in tree_leaves(values) if isinstance(value, Tensor))
        return {self._outputs[storage] for storage in storages if storage in self._outputs}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
