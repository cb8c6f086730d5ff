"""verify: which cases a model is put to, run one after another, and the report."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.layers import dequantize_layers, rounds_inputs
from fastattn.swap import is_swapped, unfuse
from fastattn.verification.cases import CASES, cases_for, cases_of_inputs, checked_inputs
from fastattn.verification.comparison import TOLERANCE
from fastattn.verification.locate import first_difference
from fastattn.verification.report import CaseResult, NotApplicable, VerificationError, VerificationReport
from fastattn.verification.state import device_of, left_as_found, shared_copy
from fastattn.verification.subject import Case, ModelFailed, Subject, Unavailable
from fastattn.verification.undefined import split_undefined

__all__ = ["verify"]

# Stands for an output where a call gave none.
_CALL = "the call"


def verify(
    model: nn.Module,
    reference: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
    *,
    cases: Iterable[str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> VerificationReport:
    """Compare `model` with the same model unswapped, in every way of running it that breaks implementations.

    Batches are drawn from the model's config for what its forward takes: right, left and no padding (on both
    sides of an encoder-decoder), as many rows as columns, one token, a row of nothing but padding (which must
    be finite and leave the other rows unchanged); decoders also with packed sequences, a dynamic and a static
    cache. Then gradients in training mode, autocast, `torch.compile`. Compared are all outputs at real
    positions. float32 errors may reach 1e-4 of the output's largest value; in float16 and bfloat16, and under
    autocast, an output may be twice as far from the float32 reference as the unswapped model's, plus two
    units of the precision. The model is left as it was: modes, gradients, buffers, config, random states.

    Args:
        model: a swapped model, one loaded with `attn_implementation="fastattn"`, or any module with a
            reference.
        reference: compared with, called with the same inputs; default the model unswapped, sharing its
            parameters.
        inputs: one batch of keyword arguments to compare on, in place of the drawn ones. Its `attention_mask`
            (nonzero = real) or `...key_padding_mask` (True = padding) says which positions are compared.
        cases: names of the cases to run, of `fastattn.verification.CASES`; default all but "rows alone".
        progress: called with the name of each case before it runs.

    Returns:
        The report: every comparison, and the cases that do not apply, with the reason.

    Raises:
        VerificationError: an output is too far off; the message names the worst case and the layer where the
            error first appears.
        TypeError: `inputs` lack an argument, hold one that forward does not take, or one of a wrong type.
        ValueError: the model is not swapped and no reference is given; there is nothing to draw batches from;
            the reference cannot run `inputs`; a case has no such name; the model is on the meta device.

    Example:
        >>> import fastattn, transformers
        >>> config = transformers.BertConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)
        >>> model = transformers.BertModel(config)
        >>> _ = fastattn.optimize(model)
        >>> fastattn.verify(model).passed
        True
    """
    wanted = _check(model, reference, cases)
    given = None if inputs is None else checked_inputs(model, inputs)
    # Gradients are compared under a caller's inference_mode too, and nothing under a caller's autocast.
    with torch.inference_mode(False), torch.autocast(device_of(model).type, enabled=False):
        report = _verify(
            model, _unswapped(model) if reference is None else reference, given, wanted, progress
        )
    if not report.passed:
        raise VerificationError(report)
    return report


def _verify(
    model: nn.Module,
    reference: nn.Module,
    given: Mapping[str, Any] | None,
    wanted: Sequence[str],
    progress: Callable[[str], None] | None,
) -> VerificationReport:
    report = VerificationReport()
    with left_as_found(model, reference):
        subject = Subject(model, reference, _exact_copy(reference))
        planned = cases_for(subject) if given is None else cases_of_inputs(subject, given)
        ran: list[tuple[Case, list[CaseResult]]] = []
        for case in planned:
            if case.name not in wanted:
                continue
            if progress is not None:
                progress(case.name)
            with left_as_found(model, reference):
                try:
                    results = _results(case, subject)
                except Unavailable as reason:
                    report.not_applicable.append(NotApplicable(case.name, str(reason)))
                    continue
                results, undefined = split_undefined(case, results, subject, report.not_applicable)
                report.not_applicable.extend(undefined)
            report.results.extend(results)
            ran.append((case, results))
        if not report.results:
            reasons = "; ".join(f"{each.case}: {each.reason}" for each in report.not_applicable)
            raise ValueError(f"none of the cases applies to {type(model).__name__}: {reasons}")
        if not report.passed:
            worst = report.worst
            failed = next(case for case, results in ran if worst in results)
            if progress is not None:
                progress("locating the error")
            with left_as_found(model, reference):
                report.first_difference = first_difference(
                    failed, worst, subject, lambda other: _passes(failed, worst, other)
                )
    return report


def _passes(case: Case, worst: CaseResult, subject: Subject) -> bool:
    """Whether what went wrong in a case does not with these models."""
    results = [each for each in _results(case, subject) if each.output in (worst.output, _CALL)]
    return bool(results) and all(each.passed for each in results)


def _results(case: Case, subject: Subject) -> list[CaseResult]:
    try:
        return list(case.results(subject))
    except ModelFailed as failure:
        return [CaseResult(case.name, _CALL, float("inf"), TOLERANCE, 0.0, False, str(failure))]


def _check(model: Any, reference: Any, cases: Iterable[str] | None) -> Sequence[str]:
    for name, module in (("model", model), ("reference", reference)):
        if module is None and name == "reference":
            continue
        if not isinstance(module, nn.Module):
            raise TypeError(f"{name} is a {type(module).__name__}; a torch.nn.Module is accepted")
        compiled = hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        if compiled or isinstance(module, torch.jit.ScriptModule):
            raise TypeError(f"{name} is compiled or scripted: verify the model before that")
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{name} is on the meta device: it has no weights to compute with; load them first"
            )
    if reference is model:
        raise ValueError("reference is the model itself; give the model before the swap, or leave it out")
    wanted = [cases] if isinstance(cases, str) else CASES if cases is None else list(cases)
    unknown = [name for name in wanted if name not in CASES]
    if unknown or not wanted:
        raise ValueError(f"cases names {unknown}; a case is one of {list(CASES)}")
    if cases is None:
        return [name for name in CASES if name != "rows alone"]
    return list(wanted)


def _unswapped(model: nn.Module) -> nn.Module:
    """The reference a model carries in itself."""
    dispatching = any(_implementation(module) == "fastattn" for module in model.modules())
    if not is_swapped(model) and not dispatching:
        raise ValueError(
            "model has no swapped layer to verify; call fastattn.optimize first, or give a reference"
        )
    reference = shared_copy(model)
    unfuse(reference)
    if any(_implementation(module) == "fastattn" for module in reference.modules()):
        # Loaded with attn_implementation="fastattn": there is no implementation it had before.
        set_attention: Any = getattr(reference, "set_attn_implementation", None)
        if set_attention is None:
            raise ValueError(
                f"{type(model).__name__} has layers inside that ask for fastattn; give a reference"
            )
        set_attention("eager")
    return reference


def _implementation(module: nn.Module) -> str | None:
    return getattr(module.__dict__.get("config"), "_attn_implementation", None)


def _exact_copy(reference: nn.Module) -> nn.Module | None:
    """The reference in float32 where it is half precision or rounds the inputs of its layers: what both
    errors are measured against.
    """
    dtype = next((p.dtype for p in reference.parameters() if p.is_floating_point()), torch.float32)
    rounds = rounds_inputs(reference)
    if dtype in (torch.float32, torch.float64) and not rounds:
        return None
    exact = copy.deepcopy(reference)
    if rounds:
        dequantize_layers(exact)
    exact = exact.float().eval()

    def widen(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {
            name: x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x
            for name, x in kwargs.items()
        }

    exact.register_forward_pre_hook(widen, with_kwargs=True)
    return exact
