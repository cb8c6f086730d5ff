"""`fastattn.export`: a model's fused ONNX graphs in a folder, verified before they get there."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastattn
from fastattn.onnx.requirements import require
from fastattn.onnx.result import ExportResult, verification_figures
from fastattn.onnx.runtime.manifest import MANIFEST, SCHEMA, read_manifest, write_manifest
from fastattn.onnx.stages import Stages
from fastattn.onnx.staging import files_of, move, staging
from fastattn.onnx.targets import PRECISIONS, TARGETS, Target

if TYPE_CHECKING:
    from torch import Tensor

    from fastattn.onnx.convert import Converted
    from fastattn.onnx.graph_spec import GraphSpec, Source

__all__ = ["ExportResult", "checked_target", "export"]

# A protobuf file ends at 2 GiB; above this the weights go beside the graph.
EXTERNAL_DATA_BYTES = 2**31 - 2**24


def export(
    model: Any,
    output_dir: str | os.PathLike[str],
    precision: str = "fp32",
    target: str = "cpu",
    task: str | None = None,
    tokenizer: Any = None,
    example_inputs: Mapping[str, Tensor] | None = None,
    layouts: str | Iterable[str] = "auto",
    verify: bool = True,
    *,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    reference: Any = None,
) -> ExportResult:
    """Export a Hugging Face model with any head, or a module of your own, to ONNX: fused, padding-free,
    dynamic.

    The model is not touched: a swapped one is exported as it is (with `padding="padded"` the graph pads), one
    that is not is swapped on a copy that shares its parameters. Either is exported in eval mode.

    Args:
        model: a transformers model, a SentenceTransformer, or, with example_inputs, any module that
            torch.export can trace, one written by hand from torch.nn's or fastattn.layers' classes for
            example; weights of other devices and dtypes are copied to the CPU and float32.
        output_dir: gets the graphs (model.onnx, with model.onnx.data above 2 GiB; encoder-decoders
            encoder_model.onnx and decoder_model_merged.onnx), config.json, fastattn.json, the tokenizer's
            files, and what the layouts add. Files of an earlier export there are replaced, once everything is
            written.
        precision: "fp32"; "int8" (dynamic, or static with calibration); "int8-weight" and "int4-weight" for
            decoding; "fp16" for target "cuda".
        target: "cpu" and "web": ONNX Runtime's own operators; "cuda": those of its CUDA provider; "standard":
            ai.onnx alone.
        task: found from the model's class, in optimum's words; a task given must be one the model has the
            head for.
        tokenizer: saved beside the model (or a processor); a SentenceTransformer's own if left out.
        example_inputs: the batch to trace with; for a module of your own its forward's arguments by name,
            float32, int64, int32 or bool, in a batch of at least two sequences whose length is another
            number.
        layouts: "auto", one name or several of `fastattn.onnx.layouts.LAYOUTS`.
        verify: compare the written files, in ONNX Runtime, with the unswapped model in PyTorch.
        calibration: typical batches of the model's inputs, for static int8.
        reference: the model that verification compares with and the loss of precision is measured from;
            default the model's own weights on the original layers.

    Returns:
        The result: files, fusion counts, what was quantized, verification figures.

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
    chosen = checked_target(precision, target, calibration)
    batches = None if calibration is None else list(calibration)
    if tokenizer is None:
        tokenizer = (
            getattr(model, "tokenizer", None) if hasattr(model, "encode") else None
        )  # a SentenceTransformer's
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is a {type(tokenizer).__name__}; it must have save_pretrained")
    require("onnx", "onnxscript", *(["onnxruntime"] if verify or precision != "fp32" else []))
    if verify:
        _require_provider(chosen)
    from fastattn.layers import rounds_inputs
    from fastattn.onnx.convert import convert
    from fastattn.onnx.layouts import LayoutContext, resolve_layouts, write_layouts
    from fastattn.onnx.sources import prepare

    folder = Path(output_dir)
    with staging(folder) as made, Stages() as stages:
        stages.begin("preparing")
        source = prepare(model, task, example_inputs)
        wanted = resolve_layouts(layouts, source, chosen)
        converted: dict[str, Converted] = {}
        for spec in source.graphs:
            stages.begin(f"tracing {spec.name}")
            converted[spec.name] = convert(spec, chosen)
        _write_configs(source, tokenizer, made)
        manifest = _manifest(source, precision, chosen, wanted, converted)
        report = loss = speed = None
        if verify or precision == "fp32":
            _write_graphs(converted, manifest, made, chosen, stages)
        rounds = rounds_inputs(source.reference)
        if verify and not rounds:
            from fastattn.onnx.checks import check_export

            stages.begin("verifying")
            report = check_export(made, source, manifest)
        if precision != "fp32":
            from fastattn.onnx.quantization import quantize, without_block_gathers

            for name, graph in converted.items():
                stages.begin(f"quantizing {name}")
                found = quantize(
                    graph.model,
                    precision,
                    provider=chosen.provider,
                    contrib=chosen.contrib,
                    calibration=None if batches is None else _calibration(source, batches),
                )
                if "GatherBlockQuantized" in chosen.unknown:
                    without_block_gathers(graph.model)
                manifest["decisions"] += [{"graph": name, **decision} for decision in found]
                # Half precision changes the caches' dtype.
                dtypes = {value.name: value.dtype for value in graph.model.graph.inputs}
                for entry in manifest["graphs"][name]["inputs"]:
                    dtype = dtypes[entry["name"]]
                    assert dtype is not None
                    entry["dtype"] = dtype.numpy().name
            _write_graphs(converted, manifest, made, chosen, stages)
        if verify:
            stages.begin("measuring")
            # Of a model that rounds the inputs of its layers parity cannot ask more than of int8.
            held = "int8" if rounds and precision == "fp32" else precision
            loss, speed = _measured(made, source, held, reference, batches)
            manifest["verification"] = verification_figures(report, loss)
        if wanted:
            stages.begin("writing layouts")
            write_layouts(LayoutContext(made, source, chosen, precision, tokenizer, manifest), wanted)
        weights = sum(file.stat().st_size for file in made.glob("*.onnx*"))
        manifest["files"] = sorted({*files_of(made), MANIFEST})
        write_manifest(made, manifest)
        move(made, folder, _files_before(folder))
    return ExportResult(
        folder=folder,
        files=tuple(manifest["files"]),
        size_bytes=weights,
        task=source.task,
        precision=precision,
        target=target,
        outputs=tuple(source.graphs[-1].outputs),
        nodes=sum(entry["nodes"] for entry in manifest["graphs"].values()),
        fusions=dict(sum((Counter(graph.fusions) for graph in converted.values()), Counter())),
        verification=report,
        loss=loss,
        decisions=tuple(manifest["decisions"]),
        layouts=wanted,
        speed=speed,
    )


def checked_target(precision: str, target: str, calibration: Any = None) -> Target:
    """The target of that name.

    Raises:
        ValueError: it or the precision is unknown, the two do not go together, or calibration is for neither.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(map(repr, PRECISIONS))}")
    if target not in TARGETS:
        raise ValueError(f"target is {target!r}; it must be one of {', '.join(map(repr, TARGETS))}")
    chosen = TARGETS[target]
    if precision not in chosen.precisions:
        able = [name for name, each in TARGETS.items() if precision in each.precisions]
        raise ValueError(
            f"precision is {precision!r}, which target {target!r} does not run well; it takes "
            f"{', '.join(map(repr, chosen.precisions))} ({precision!r} is for {', '.join(map(repr, able))})"
        )
    if calibration is not None and precision != "int8":
        raise ValueError(f"calibration is for precision 'int8'; precision is {precision!r}")
    return chosen


def _require_provider(target: Target) -> None:
    import onnxruntime

    available = onnxruntime.get_available_providers()
    if target.provider not in available:
        raise ValueError(
            f"target {target.name!r} cannot be verified here: onnxruntime has no {target.provider} (it has "
            f"{', '.join(available)}); install a build that has it, or pass verify=False and verify elsewhere"
        )


def _manifest(
    source: Source, precision: str, target: Target, layouts: tuple[str, ...], converted: dict[str, Converted]
) -> dict[str, Any]:
    packages = ["torch", "onnx", "onnxscript", *(["transformers"] if source.config is not None else [])]
    return {
        "schema": SCHEMA,
        "versions": {"fastattn": fastattn.__version__, **{name: version(name) for name in packages}},
        "architecture": source.architecture,
        "kind": source.kind,
        "task": source.task,
        "precision": precision,
        "target": target.name,
        "opsets": target.opsets,
        "graphs": {spec.name: _described(spec, converted[spec.name]) for spec in source.graphs},
        "cache": source.cache,
        "layouts": list(layouts),
        "decisions": [],
        "verification": None,
    }


def _calibration(source: Source, batches: Iterable[Mapping[str, Tensor]]) -> list[dict[str, Any]]:
    """The batches (tensors or arrays) as the graph's inputs; what it does not take and the model does is left
    out.

    Raises:
        ValueError: an input that is missing, or one the model does not take.
    """
    import torch

    from fastattn.verification.batches import forward_parameters

    if len(source.graphs) != 1:
        raise ValueError(f"calibration is for models of one graph; a {source.architecture} has several")
    (spec,) = source.graphs
    accepted = {*spec.inputs, *forward_parameters(source.reference)}
    feeds = []
    for number, batch in enumerate(batches):
        unknown = [name for name in batch if name not in accepted]
        if unknown:
            raise ValueError(
                f"calibration batch {number} has {unknown[0]!r}; the model takes {sorted(accepted)}"
            )
        given = {
            name: torch.as_tensor(batch[name]).detach().cpu().numpy() for name in spec.inputs if name in batch
        }
        for name in spec.inputs:
            if name not in given and name in spec.defaults and given:
                given[name] = next(iter(given.values())) * 0 + spec.defaults[name]
        missing = [name for name in spec.inputs if name not in given]
        if missing:
            raise ValueError(f"calibration batch {number} has no {missing[0]!r}; it has {sorted(batch)}")
        feeds.append(given)
    return feeds


def _measured(
    made: Path,
    source: Source,
    precision: str,
    reference: Any,
    calibration: list[Mapping[str, Tensor]] | None,
) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The loss of precision, where there is one, and the speed."""
    from fastattn.onnx.checks.precision import check_precision
    from fastattn.onnx.checks.speed import measure_speed
    from fastattn.onnx.checks.whole_forward import WholeForward

    run = WholeForward(made, source)
    loss = None
    if precision != "fp32" or reference is not None:
        original = source.reference if reference is None else reference.eval()
        # Ranges measured on typical inputs are right for those, not for random tokens.
        drawn = None if calibration is None else _some(run, calibration)
        loss = check_precision(run, precision, original, drawn)
    return loss, measure_speed(run, source.reference)


def _some(run: Any, calibration: list[Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    import torch

    batches = ({name: torch.as_tensor(x) for name, x in batch.items()} for batch in calibration[:4])
    return {f"calibration batch {number}": run.batch(batch) for number, batch in enumerate(batches)}


def _files_before(folder: Path) -> tuple[str, ...]:
    """What an earlier export wrote in the folder."""
    if not (folder / MANIFEST).is_file():
        return ()
    try:
        return tuple(name for name in read_manifest(folder).get("files", ()) if ".." not in Path(name).parts)
    except ValueError:
        return ()


def _write_graphs(
    converted: Mapping[str, Converted], manifest: dict[str, Any], made: Path, target: Target, stages: Stages
) -> None:
    """Write every graph, check it, and write the manifest that says what is there."""
    import onnx
    import onnx_ir

    from fastattn.onnx.fusions import check_operators

    for name, graph in converted.items():
        stages.begin(f"writing {name}")
        model, file = graph.model, made / f"{name}.onnx"
        check_operators(model, target)
        properties = {key: manifest[key] or "" for key in ("precision", "target", "task")}
        decisions = [each for each in manifest["decisions"] if each["graph"] == name]
        if decisions:
            properties["decisions"] = json.dumps(decisions)
        model.producer_name, model.producer_version = "fastattn", fastattn.__version__
        model.metadata_props.update({f"fastattn.{key}": value for key, value in properties.items()})
        tensors = (value.const_value for value in model.graph.initializers.values())
        weights = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        external = f"{file.name}.data" if weights > EXTERNAL_DATA_BYTES else None
        onnx_ir.save(model, file, external_data=external)
        onnx.checker.check_model(str(file), full_check=not target.contrib)
        manifest["graphs"][name]["nodes"] = len(model.graph)
    write_manifest(made, manifest)


def _described(spec: GraphSpec, converted: Converted) -> dict[str, Any]:
    """The manifest's entry of a graph."""
    return {
        "file": f"{spec.name}.onnx",
        "nodes": len(converted.model.graph),
        "inputs": [
            {
                "name": name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "dimensions": list(converted.dimensions[name]),
                "default": spec.defaults.get(name),
                "limit": spec.value_limits.get(name),
                "bounds": {
                    size: limit
                    for size, limit in converted.bounds.items()
                    if size in converted.dimensions[name]
                },
            }
            for name, tensor in spec.inputs.items()
        ],
        "outputs": list(spec.outputs),
        "fusions": converted.fusions,
    }


def _write_configs(source: Source, tokenizer: Any, made: Path) -> None:
    if source.config is not None:
        source.config.architectures = [source.architecture]
        source.config.save_pretrained(made)
    if source.generation_config is not None:
        source.generation_config.save_pretrained(made)
    if tokenizer is not None:
        tokenizer.save_pretrained(made)
