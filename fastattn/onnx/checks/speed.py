"""A first impression of an export's speed, for its summary: the benchmark suite is what to trust."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastattn.onnx.checks.whole_forward import WholeForward

__all__ = ["measure_speed"]


def measure_speed(run: WholeForward, reference: nn.Module, budget_s: float = 2.0) -> dict[str, Any] | None:
    """Median milliseconds of one padded batch in PyTorch and in the export, interleaved, and their ratio;
    None where either fails.
    """
    from fastattn.bench.timing import Contender, measure

    batch = run.typical()
    mask = batch.get("attention_mask")
    size = next(iter(batch.values())).shape
    workload = " x ".join(map(str, size if mask is None else mask.shape))
    if mask is not None:
        workload += f", {mask.double().mean():.0%} fill"
    rows = measure(
        [
            Contender("PyTorch", lambda: run.expected(reference, batch)),
            Contender("export", lambda: run.found(batch)),
        ],
        check=None,
        budget_s=budget_s,
        min_rounds=5,
        resources=False,
    )
    if not all(row.wall_ms for row in rows):
        return None
    pytorch, export = (row.median_ms for row in rows)
    assert pytorch is not None and export is not None
    return {"workload": workload, "pytorch_ms": pytorch, "export_ms": export, "ratio": pytorch / export}
