"""What `fastattn.export` returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastattn.verification import VerificationReport

__all__ = ["ExportResult", "verification_figures"]


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        folder: the output folder.
        files: paths of the files written, relative to the folder, in order.
        size_bytes: of the graphs and their weights.
        task: what a Hugging Face model's head is for, else None.
        precision, target: as exported.
        outputs: names of the outputs (of the graph that gives the answer).
        nodes: nodes of the graphs, subgraphs not counted.
        fusions: fused nodes by kind, of all graphs.
        verification: every comparison made; None where verify was False.
        loss: of precision (or from the `reference`): the cosine with its outputs and the gate; None where
            there is none.
        decisions: what was quantized, how and why, and what was left.
        layouts: whose loaders read the folder.
        speed: milliseconds a batch of the untouched model in PyTorch and of the export, and their ratio; None
            where verify was False.
    """

    folder: Path
    files: tuple[str, ...]
    size_bytes: int
    task: str | None
    precision: str
    target: str
    outputs: tuple[str, ...]
    nodes: int
    fusions: dict[str, int]
    verification: VerificationReport | None
    loss: dict[str, Any] | None = None
    decisions: tuple[dict[str, Any], ...] = ()
    layouts: tuple[str, ...] = ()
    speed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "size_bytes": self.size_bytes,
            "task": self.task,
            "precision": self.precision,
            "target": self.target,
            "outputs": list(self.outputs),
            "nodes": self.nodes,
            "fusions": dict(self.fusions),
            "decisions": list(self.decisions),
            "layouts": list(self.layouts),
            "verification": verification_figures(self.verification, self.loss),
            "speed": self.speed,
        }

    def table(self) -> str:
        """A summary: files, size, nodes, fusions, decisions, parity, speed."""
        from fastattn.report import format_table

        figures = verification_figures(self.verification, self.loss)
        if figures is None:
            parity = "not verified"
        elif "worst_error" in figures:
            parity = f"{figures['worst_error']:.1e} ({figures['worst_case']})"
        else:
            parity = "held to the cosine: the model rounds the inputs of its layers"
        rows = [
            ("folder", self.folder),
            ("files", ", ".join(self.files)),
            ("size", f"{self.size_bytes / 2**20:.1f} MiB"),
            ("task", self.task or "(a module's own)"),
            ("precision", f"{self.precision}, for {self.target}"),
            ("outputs", ", ".join(self.outputs[:4]) + (", ..." if len(self.outputs) > 4 else "")),
            ("nodes", self.nodes),
            *((f"fused {name}", count) for name, count in self.fusions.items() if count),
            *((decision["what"], decision["how"]) for decision in self.decisions),
            ("worst error, of the scale", parity),
        ]
        if self.loss is not None:
            loss = self.loss
            gate = "" if loss["gate"] is None else f"gate {loss['gate']}; "
            rows.append(("cosine, mean", f"{loss['cosine_mean']:.6f} ({gate}{loss['worst']})"))
        if self.speed is not None:
            speed = self.speed
            rows.append(
                ("speed", f"{speed['export_ms']:.3g} ms, {speed['ratio']:.2f}x PyTorch ({speed['workload']})")
            )
        return format_table(("export", ""), rows)


def verification_figures(
    report: VerificationReport | None, loss: dict[str, Any] | None
) -> dict[str, Any] | None:
    """As `fastattn.json` and `to_dict` tell them."""
    if report is None:
        # A model that rounds its layers' inputs is held to the loss alone.
        return None if loss is None else {"passed": True, "cases": [], "loss": loss}
    worst = report.worst
    return {
        "passed": report.passed,
        "cases": sorted({result.case for result in report.results}),
        "worst_case": f"{worst.output}, {worst.case}",
        "worst_error": worst.error,
        "tolerance": worst.tolerance,
        "loss": loss,
    }
