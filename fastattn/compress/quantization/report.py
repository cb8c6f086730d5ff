"""What `fastattn.quantize` did, layer by layer: error, size and speed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fastattn.report import format_table

__all__ = ["QuantizationReport", "QuantizedLayerReport"]


@dataclass(frozen=True)
class QuantizedLayerReport:
    """One linear layer.

    Attributes:
        name: as `model.named_modules()` gives it; `in_proj` below an attention layer stands for its
            `in_proj_weight`.
        kind: "linear" or "conv1d".
        status: "quantized" or "kept".
        reason: why it is kept.
        scheme: the scheme and how it was rounded ("int4-weight, hqq"); empty where kept.
        shape: (N, K), outputs and inputs.
        error: `||y - y_q|| / ||y||` of its outputs on the calibration, without one of its weight; None where
            nothing was tried.
        bytes_before, bytes_after: of its weight and what belongs to it, the bias left out. A weight that
            another layer of the list holds too counts there.
        fp32_ms, quantized_ms: milliseconds of one product at `rows` rows, measured once a shape on this
            machine; None where nothing was measured.
        rows: rows of that product.
        ms_by_rows: the same of every measured number of rows: (fp32, quantized).
    """

    name: str
    kind: str
    status: str
    reason: str = ""
    scheme: str = ""
    shape: tuple[int, int] = (0, 0)
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    fp32_ms: float | None = None
    quantized_ms: float | None = None
    rows: int | None = None
    ms_by_rows: Mapping[int, tuple[float, float]] = field(default_factory=dict)

    @property
    def slower_at_rows(self) -> tuple[int, ...]:
        """Where quantizing does not pay."""
        return tuple(rows for rows, (before, after) in self.ms_by_rows.items() if after > before)


@dataclass
class QuantizationReport:
    """What `fastattn.quantize` did: `layers` has one entry a linear layer, `notes` what holds for the whole
    model.
    """

    layers: list[QuantizedLayerReport] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def quantized(self) -> int:
        """How many layers are quantized."""
        return sum(layer.status == "quantized" for layer in self.layers)

    @property
    def bytes_before(self) -> int:
        """Bytes of all linear weights before, the kept ones included."""
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        """Bytes of the same layers now."""
        return sum(layer.bytes_after for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        layers = [
            asdict(layer) | {"shape": list(layer.shape), "slower_at_rows": list(layer.slower_at_rows)}
            for layer in self.layers
        ]
        return {
            "layers": layers,
            "notes": list(self.notes),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
        }

    def table(self) -> str:
        """Every layer, the sum, the speed by shape and rows, then the notes."""
        rows: list[Sequence[object]] = []
        for layer in self.layers:
            times = (
                ("", "") if layer.fp32_ms is None else (f"{layer.fp32_ms:.3f}", f"{layer.quantized_ms:.3f}")
            )
            rows.append(
                (
                    layer.name,
                    layer.scheme or "kept",
                    f"{layer.shape[0]} x {layer.shape[1]}",
                    "" if layer.error is None else f"{100 * layer.error:.2f}%",
                    f"{layer.bytes_before / 1e6:.3f}",
                    f"{layer.bytes_after / 1e6:.3f}",
                    *times,
                    layer.reason,
                )
            )
        measured = sorted({layer.rows for layer in self.layers if layer.rows is not None})
        at = f" at {measured[0]} rows" if len(measured) == 1 else ""
        heads = ("layer", "scheme", "N x K", "error", "MB before", "MB after")
        parts = [format_table((*heads, f"fp32 ms{at}", "quantized ms", "kept because"), rows)]
        share = 100 * self.bytes_after / self.bytes_before if self.bytes_before else 100.0
        parts.append(
            f"{self.quantized} of {len(self.layers)} linear layers quantized: "
            f"{self.bytes_before / 1e6:.1f} MB -> {self.bytes_after / 1e6:.1f} MB ({share:.1f}%)"
        )
        if speeds := self._speeds():
            columns = ("N x K", "rows", "fp32 ms", "quantized ms", "recommended")
            parts.append(format_table(columns, speeds))
        parts.extend(f"note: {note}" for note in self.notes)
        return "\n\n".join(parts)

    def _speeds(self) -> list[Sequence[object]]:
        """A row a shape and number of rows that was measured."""
        measured = {layer.shape: layer.ms_by_rows for layer in self.layers if layer.ms_by_rows}
        return [
            (
                f"{shape[0]} x {shape[1]}",
                rows,
                f"{before:.3f}",
                f"{after:.3f}",
                "no" if after > before else "yes",
            )
            for shape, times in sorted(measured.items())
            for rows, (before, after) in times.items()
        ]
