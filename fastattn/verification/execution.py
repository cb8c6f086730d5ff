"""The same forward executed otherwise: under autocast, compiled, each row by itself."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.verification.batches import forward_parameters
from fastattn.verification.comparison import compare
from fastattn.verification.report import CaseResult
from fastattn.verification.state import evaluating
from fastattn.verification.subject import (
    Case,
    ModelFailed,
    Outputs,
    Replay,
    Subject,
    Unavailable,
    arguments,
    call,
    forward_case,
    from_model,
    from_reference,
    layer_masks,
    masks_of,
    outputs_of,
    short,
)

__all__ = ["COMPILER_BACKEND", "autocast_case", "compile_case", "rows_case"]

# Traces through Dynamo, our operations' fake implementations and AOTAutograd's functionalization: where a
# graph breaks or a fused operation is mis-declared. Generating code is torch's own work, and minutes of it.
COMPILER_BACKEND = "aot_eager"

_AUTOCAST = torch.bfloat16


def autocast_case(batch: Mapping[str, Any]) -> Case:
    """bfloat16 autocast of a float32 model: at most twice as far from float32 as the reference under it."""

    def run(device: str, model: nn.Module) -> Outputs:
        with torch.autocast(device, _AUTOCAST):
            return call(model, batch)

    def results(subject: Subject) -> Iterable[CaseResult]:
        if subject.exact is not None:
            raise Unavailable("the model is half precision already, or rounds the inputs of its layers")
        device = subject.device.type
        with torch.no_grad(), evaluating(subject.model, subject.reference):
            truth = from_reference(lambda: call(subject.reference, batch))
            expected = from_reference(lambda: run(device, subject.reference))
            found = from_model(lambda: run(device, subject.model))
        return list(compare("autocast", found, expected, masks_of(batch), truth, _AUTOCAST))

    device = next((value.device.type for value in batch.values() if isinstance(value, Tensor)), "cpu")
    run_there = partial(run, device)
    replay = Replay(run_there, run_there, layer_masks(batch), precise=False)
    return Case("autocast", results, replay)


def compile_case(batches: Mapping[str, Mapping[str, Any]]) -> Case:
    """`torch.compile(fullgraph=True)`: one graph for batches of one shape."""
    first = next(iter(batches.values()))

    def options(model: nn.Module) -> dict[str, bool]:
        # A graph that makes a cache of its own is not what anybody compiles.
        return {"use_cache": False} if "use_cache" in forward_parameters(model) else {}

    def run(model: nn.Module) -> Outputs:
        return call(model, first, **options(model))

    def results(subject: Subject) -> Iterable[CaseResult]:
        found: list[CaseResult] = []
        with torch.no_grad(), evaluating(subject.model, subject.reference):
            expected = {
                case: from_reference(partial(call, subject.reference, batch, **options(subject.reference)))
                for case, batch in batches.items()
            }
            compiled = _compiled(subject.model)
            for case, batch in batches.items():
                try:
                    got = from_model(partial(compiled, batch, **options(subject.model)))
                except ModelFailed as error:
                    if any(
                        vars(module).get("fastattn_padding") == "packed" for module in subject.model.modules()
                    ):
                        reason = 'padding="packed" was asked for, and a compiled graph cannot pack'
                        raise Unavailable(reason) from error
                    _reference_compiles(subject.reference, batch, options(subject.reference))
                    raise ModelFailed(f"with {case}, {error}") from error
                truth = None
                if subject.exact is not None:
                    truth = call(subject.exact, batch, **options(subject.exact))
                results = compare("compile", got, expected[case], masks_of(batch), truth)
                found += [replace(each, output=f"{case}: {each.output}") for each in results]
        return found

    return Case("compile", results, Replay(run, run, layer_masks(first), undisturbed=False))


def _reference_compiles(reference: nn.Module, batch: Mapping[str, Any], options: dict[str, bool]) -> None:
    try:
        _compiled(reference)(batch, **options)
    except Exception as error:
        raise Unavailable(f"the reference itself does not compile into one graph: {short(error)}") from error


def _compiled(model: nn.Module) -> Any:
    """The model's call, compiled under a code object of its own: Dynamo counts recompilations by code object,
    and those of the user's own compiled model are left alone.
    """

    def run(inputs: dict[str, Any]) -> Any:
        return model(**inputs)

    fresh = types.FunctionType(run.__code__.replace(), globals(), "run", None, run.__closure__)
    compiled = torch.compile(fresh, fullgraph=True, backend=COMPILER_BACKEND, dynamic=False)

    def called(batch: Mapping[str, Any], **options: Any) -> Outputs:
        # The batch is prepared, and the outputs are named, outside the graph.
        return outputs_of(compiled({**arguments(model, batch), **options}))

    return called


def rows_case(batch: Mapping[str, Any]) -> Case:
    """Every row by itself against the reference's batch: a row's answer does not depend on its neighbours."""
    rows = max(
        (value.shape[0] for value in batch.values() if isinstance(value, Tensor) and value.dim()), default=0
    )

    def row(index: int) -> dict[str, Any]:
        return {k: v[index : index + 1] if _has_rows(v, rows) else v for k, v in batch.items()}

    def alone(model: nn.Module) -> Outputs:
        each = [call(model, row(i)) for i in range(rows)]
        return {name: torch.cat([row[name] for row in each]) for name in each[0] if each[0][name].dim()}

    def together(model: nn.Module) -> Outputs:
        found = {k: v for k, v in call(model, batch).items() if _has_rows(v, rows)}
        if not found:
            raise Unavailable("none of its outputs has a row for every row of the batch")
        return {k: v for k, v in found.items() if v.shape[:2] != (rows, rows)}

    def first(model: nn.Module) -> Outputs:
        return call(model, row(0))

    case = forward_case("rows alone", batch, alone, together)
    return Case("rows alone", case.results, Replay(first, first, layer_masks(row(0))))


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
