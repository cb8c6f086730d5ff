"""One linear layer after another, each quantized, judged by its error and replaced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from fastattn.compress.quantization.originals import Originals
from fastattn.compress.quantization.report import QuantizedLayerReport
from fastattn.compress.quantization.sensitivity import output_error
from fastattn.compress.quantization.settings import QuantizationSettings
from fastattn.compress.quantization.speed import REPORT_ROWS, Stopwatch
from fastattn.compress.quantization.targets import Target, is_read_in_parts
from fastattn.layers import QuantizedLinear
from fastattn.ops import PackedWeight, prepare, quantize_absmax

__all__ = ["LayerQuantizer", "kept", "packed_by"]


def packed_by(
    settings: QuantizationSettings, weight: Tensor, hessian: Tensor | None = None
) -> tuple[PackedWeight, str]:
    """`weight` [N, K] quantized, and the method that did it: the setting's, but where "gptq" has no Hessian
    (a layer no batch reaches) the one of "auto" without calibration.
    """
    group_size = settings.group_size if settings.scheme == "int4-weight" else None
    method = settings.rounding
    if method == "gptq" and hessian is None:
        method = "hqq" if settings.scheme == "int4-weight" else "absmax"
    if method == "gptq":
        from fastattn.compress.quantization.gptq import quantize_gptq

        assert hessian is not None
        return quantize_gptq(weight, hessian, settings.scheme, group_size), method
    if method == "hqq":
        from fastattn.compress.quantization.hqq import quantize_hqq

        return quantize_hqq(weight, settings.group_size), method
    return quantize_absmax(weight, settings.scheme, group_size), method


def kept(target: Target, reason: str, error: float | None = None) -> QuantizedLayerReport:
    """The entry of a layer that stays."""
    held = target.weight.numel() * target.weight.element_size()
    shape = (target.weight.shape[0], target.weight.shape[1]) if target.weight.dim() == 2 else (0, 0)
    return QuantizedLayerReport(
        target.name, target.kind, "kept", reason, "", shape, error, bytes_before=held, bytes_after=held
    )


@dataclass
class LayerQuantizer:
    """Quantizes and replaces the layers it is given.

    Attributes:
        settings: how.
        originals: where every change is written down.
        input_scales: SmoothQuant's, of the layers whose input no norm could take them for, by name.
    """

    settings: QuantizationSettings
    originals: Originals
    input_scales: Mapping[str, Tensor] = field(default_factory=dict)
    _stopwatch: Stopwatch = field(default_factory=Stopwatch)
    # Of weights that several layers hold: id of the parameter -> it, so that the id stays its own, what it
    # is quantized to, and by which method.
    _shared: dict[int, tuple[nn.Parameter, PackedWeight, str]] = field(default_factory=dict)

    def __call__(
        self, target: Target, hessian: Tensor | None = None, rows: Tensor | None = None, shared: bool = False
    ) -> QuantizedLayerReport:
        """Replace one layer, or keep it where its error is above the limit.

        Args:
            target: without a reason to be kept.
            hessian: [K, K] for "gptq".
            rows: [R, K] of its inputs, to judge its outputs by.
            shared: whether other layers hold the same weight.
        """
        weight = target.weight.detach()
        if not bool(weight.isfinite().all()):
            return kept(target, "its weight has values that are not finite")
        packed, method = self._packed(target, hessian, shared)
        error = output_error(target.layer, packed, rows)
        if not error <= self.settings.limit:
            return kept(target, f"its error is above {100 * self.settings.limit:g}%", error)
        # With `faster_at` the caller's own number of rows has been timed.
        timed = self.settings.faster_at is not None
        times = {} if timed else self._stopwatch.times(weight, target.bias, packed)
        self._replace(target, packed)
        fp32_ms, quantized_ms = times.get(REPORT_ROWS, (None, None))
        return QuantizedLayerReport(
            target.name,
            target.kind,
            "quantized",
            scheme=f"{packed.scheme}, {method}",
            shape=(weight.shape[0], weight.shape[1]),
            error=error,
            bytes_before=weight.numel() * weight.element_size(),
            bytes_after=packed.nbytes,
            fp32_ms=fp32_ms,
            quantized_ms=quantized_ms,
            rows=REPORT_ROWS if times else None,
            ms_by_rows=times,
        )

    def _packed(self, target: Target, hessian: Tensor | None, shared: bool) -> tuple[PackedWeight, str]:
        parameter = target.layer.weight
        assert isinstance(parameter, nn.Parameter)
        if id(parameter) in self._shared:
            _, packed, method = self._shared[id(parameter)]
            return packed, method
        weight = target.weight.detach()
        scales = self.input_scales.get(target.name)
        if scales is not None:
            # x is divided by them, so the weight that is quantized is multiplied.
            weight = weight * scales
            hessian = None if hessian is None else hessian / scales / scales[:, None]
        packed, method = packed_by(self.settings, weight, hessian)
        if scales is not None:
            packed = replace(packed, input_scales=scales.float())
        if not is_read_in_parts(target):
            packed = prepare(packed)
        if shared:
            self._shared[id(parameter)] = (parameter, packed, method)
        return packed, method

    def _replace(self, target: Target, packed: PackedWeight) -> None:
        layer = QuantizedLinear.from_packed(packed, target.bias).train(target.layer.training)
        self.originals.replace(target.places, layer)
