"""`fastattn.export`: a model's fused, padding-free ONNX graph in a folder, verified before it gets there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastattn
from fastattn.onnx.requirements import require
from fastattn.onnx.runtime import MANIFEST, MODEL_FILE, OnnxModel

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fastattn.onnx.source import Source
    from fastattn.verification import VerificationReport

__all__ = ["ExportResult", "export"]

PRECISIONS = ("fp32",)
TARGETS = ("cpu",)
LAYOUTS = ("auto",)

# A protobuf file ends at 2 GiB; above this the weights go beside the graph.
EXTERNAL_DATA_BYTES = 2**31 - 2**24
EXTERNAL_DATA_FILE = f"{MODEL_FILE}.data"


@dataclass(frozen=True)
class ExportResult:
    """What `export` wrote.

    Attributes:
        folder: the output folder.
        files: names of the files written, in order.
        size_bytes: of the model and its external data.
        task: what a Hugging Face model's head is for, else None.
        outputs: names of the outputs.
        nodes: nodes of the graph, subgraphs not counted.
        fusions: fused nodes by kind.
        verification: every comparison made; None where verify was False.
    """

    folder: Path
    files: tuple[str, ...]
    size_bytes: int
    task: str | None
    outputs: tuple[str, ...]
    nodes: int
    fusions: dict[str, int]
    verification: VerificationReport | None

    def to_dict(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "files": list(self.files),
            "size_bytes": self.size_bytes,
            "task": self.task,
            "outputs": list(self.outputs),
            "nodes": self.nodes,
            "fusions": dict(self.fusions),
            "verification": _verification_figures(self.verification),
        }

    def table(self) -> str:
        """A summary: files, size, nodes, fusions, parity."""
        from fastattn.report import format_table

        figures = _verification_figures(self.verification)
        parity = (
            "not verified" if figures is None else f"{figures['worst_error']:.1e} ({figures['worst_case']})"
        )
        rows = [
            ("folder", self.folder),
            ("files", ", ".join(self.files)),
            ("size", f"{self.size_bytes / 2**20:.1f} MiB"),
            ("task", self.task or "(a module's own)"),
            ("outputs", ", ".join(self.outputs)),
            ("nodes", self.nodes),
            *((f"fused {name}", count) for name, count in self.fusions.items()),
            ("worst error, of the scale", parity),
        ]
        return format_table(("export", ""), rows)


def export(
    model: Any,
    output_dir: str | os.PathLike[str],
    precision: str = "fp32",
    target: str = "cpu",
    task: str | None = None,
    tokenizer: Any = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    layouts: str = "auto",
    verify: bool = True,
) -> ExportResult:
    """Export a Hugging Face BERT with any head, or a module of your own, to ONNX: fused, padding-free,
    dynamic batch and sequence.

    The model is not touched: a swapped one is exported as it is (with `padding="padded"` the graph pads), one
    that is not is swapped on a copy that shares its parameters. Either is exported in eval mode.

    Args:
        model: BertModel or a Bert head, or, with example_inputs, any module that torch.export can trace, one
            written by hand from torch.nn's or fastattn.layers' classes for example; weights of other devices
            and dtypes are copied to the CPU and float32.
        output_dir: gets model.onnx (with model.onnx.data above 2 GiB), config.json, fastattn.json, and the
            tokenizer's files. Files of these names already there are replaced, once everything is written.
        precision: "fp32".
        target: "cpu": ONNX Runtime's CPU operators, opset 20 with com.microsoft 1.
        task: found from the model's class; a task given must be that one.
        tokenizer: saved beside the model.
        example_inputs: the batch to trace with: input_ids, attention_mask and token_type_ids of one shape;
            for a module of your own its forward's arguments by name, float32, int64, int32 or bool, in a
            batch of at least two sequences whose length is another number.
        layouts: "auto".
        verify: compare the written file, in ONNX Runtime, with the unswapped model in PyTorch.

    Returns:
        The result: files, fusion counts, verification figures.

    Raises:
        TypeError, ValueError: an argument that cannot be exported; nothing is written.
        ImportError: onnx, onnxscript or (to verify) onnxruntime is missing.
        OSError: the folder cannot be written.
        fastattn.VerificationError: an output is too far off; nothing is written.

    Example:
        >>> import fastattn, tempfile, transformers
        >>> config = transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fastattn.export(transformers.BertModel(config), folder, verify=False).fusions["attention"]
        1
    """
    for name, value, accepted in (
        ("precision", precision, PRECISIONS),
        ("target", target, TARGETS),
        ("layouts", layouts, LAYOUTS),
    ):
        if value not in accepted:
            raise ValueError(f"{name} is {value!r}; this version exports {', '.join(map(repr, accepted))}")
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; it must have save_pretrained")
    require("onnx", "onnxscript", *(["onnxruntime"] if verify else []))
    from fastattn.onnx.convert import convert
    from fastattn.onnx.source import is_custom, prepare

    folder = Path(output_dir)
    if example_inputs is not None and is_custom(model):
        return _export_module(model, folder, precision, target, task, tokenizer, example_inputs, verify)
    require("transformers")
    with _staging(folder) as staging:
        source = prepare(model, task, example_inputs)
        converted, fusions = convert(
            source.fused, source.inputs, source.dimensions, source.longest, source.outputs
        )
        _write_model(converted, staging, {"precision": precision, "target": target, "task": source.task})
        _write_config(source, type(model).__name__, staging)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        manifest = _manifest(source, type(model).__name__, precision, target, fusions)
        _write_json(staging / MANIFEST, manifest)
        report = None
        if verify:
            from fastattn.onnx.check import check_export

            report = check_export(OnnxModel(staging), source.reference, source.dimensions, source.longest)
            _write_json(staging / MANIFEST, {**manifest, "verification": _verification_figures(report)})
        files, size = _files_of(staging)
        _move(staging, folder)
    nodes = len(converted.graph)
    return ExportResult(folder, files, size, source.task, source.outputs, nodes, fusions, report)


def _files_of(staging: Path) -> tuple[tuple[str, ...], int]:
    """Names of the files, in order, and the bytes of the model and its external data."""
    files = tuple(sorted(entry.name for entry in staging.iterdir()))
    return files, sum((staging / name).stat().st_size for name in files if name.startswith(MODEL_FILE))


def _versions(*packages: str) -> dict[str, str]:
    return {"fastattn": fastattn.__version__, **{name: version(name) for name in packages}}


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A temporary folder on the output's file system, gone at the end whatever happens.

    Made before any work starts, so that a place that cannot be written is found at once: in the folder if it
    exists (it may be a mount of its own), else in the nearest folder above it that does.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} exists and is not a folder")
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    try:
        staging = Path(tempfile.mkdtemp(prefix=".fastattn-export-", dir=place))
    except OSError as error:
        raise type(error)(f"{folder} cannot be written: {error.strerror}") from error
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _move(staging: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (staging / EXTERNAL_DATA_FILE).exists():
        (folder / EXTERNAL_DATA_FILE).unlink(missing_ok=True)
    # The manifest last: a folder without it is not taken for an export.
    (folder / MANIFEST).unlink(missing_ok=True)
    for entry in sorted(staging.iterdir(), key=lambda entry: entry.name == MANIFEST):
        os.replace(entry, folder / entry.name)


def _export_module(
    model: nn.Module,
    folder: Path,
    precision: str,
    target: str,
    task: str | None,
    tokenizer: Any,
    example_inputs: Mapping[str, Tensor],
    verify: bool,
) -> ExportResult:
    """`export` of a module that is no Hugging Face model."""
    from fastattn.onnx.convert import OPSET
    from fastattn.onnx.module import DTYPES, check_module_export, convert_module, prepare_module

    with _staging(folder) as staging:
        source = prepare_module(model, task, example_inputs)
        converted, fusions = convert_module(source)
        _write_model(converted, staging, {"precision": precision, "target": target})
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        manifest = {
            "versions": _versions("torch", "onnx", "onnxscript"),
            "architecture": type(model).__name__,
            "task": None,
            "precision": precision,
            "target": target,
            "opsets": {"ai.onnx": OPSET, "com.microsoft": 1},
            "inputs": [
                {
                    "name": name,
                    "dtype": DTYPES[tensor.dtype],
                    "dimensions": source.dimensions[name],
                    "bounds": source.bounds,
                }
                for name, tensor in source.inputs.items()
            ],
            "outputs": list(source.outputs),
            "fusions": fusions,
            "verification": None,
        }
        _write_json(staging / MANIFEST, manifest)
        report = None
        if verify:
            report = check_module_export(OnnxModel(staging), source)
            _write_json(staging / MANIFEST, {**manifest, "verification": _verification_figures(report)})
        files, size = _files_of(staging)
        _move(staging, folder)
    return ExportResult(folder, files, size, None, source.outputs, len(converted.graph), fusions, report)


def _write_model(model: Any, staging: Path, properties: dict[str, str]) -> None:
    """Write model.onnx, an `onnx_ir.Model`, and check it."""
    import onnx
    import onnx_ir

    model.producer_name, model.producer_version = "fastattn", fastattn.__version__
    model.metadata_props.update({f"fastattn.{name}": value for name, value in properties.items()})
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    external = EXTERNAL_DATA_FILE if weights > EXTERNAL_DATA_BYTES else None
    onnx_ir.save(model, staging / MODEL_FILE, external_data=external)
    onnx.checker.check_model(str(staging / MODEL_FILE))


def _write_config(source: Source, architecture: str, staging: Path) -> None:
    source.config.architectures = [architecture]
    source.config.save_pretrained(staging)


def _manifest(
    source: Source, architecture: str, precision: str, target: str, fusions: dict[str, int]
) -> dict[str, Any]:
    from fastattn.onnx.convert import OPSET

    # What stands in for an input left out, and the number of values it may have.
    defaults = {"input_ids": None, "attention_mask": 1, "token_type_ids": 0}
    limits = {
        "input_ids": source.config.vocab_size,
        "attention_mask": None,
        "token_type_ids": source.config.type_vocab_size,
    }
    return {
        "versions": _versions("torch", "transformers", "onnx", "onnxscript"),
        "architecture": architecture,
        "task": source.task,
        "precision": precision,
        "target": target,
        "opsets": {"ai.onnx": OPSET, "com.microsoft": 1},
        "inputs": [
            {
                "name": name,
                "dtype": "int64",
                "dimensions": list(source.dimensions),
                "longest": source.longest,
                "default": defaults[name],
                "limit": limits[name],
            }
            for name in source.inputs
        ],
        "outputs": list(source.outputs),
        "fusions": fusions,
        "verification": None,
    }


def _verification_figures(report: VerificationReport | None) -> dict[str, Any] | None:
    if report is None:
        return None
    worst = report.worst
    return {
        "passed": report.passed,
        "cases": sorted({result.case for result in report.results}),
        "worst_case": f"{worst.output}, {worst.case}",
        "worst_error": worst.error,
        "tolerance": worst.tolerance,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
