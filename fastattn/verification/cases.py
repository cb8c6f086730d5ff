"""The cases a model is put to, as its kind demands: encoder, decoder, encoder-decoder, vision, audio, or any
module on given inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastattn.verification.batches import Batch, Drawing, forward_parameters, window_of
from fastattn.verification.caches import cache_cases, keeps_a_cache, unavailable_case, with_positions
from fastattn.verification.comparison import lone_padding, with_a_row_of_padding
from fastattn.verification.execution import autocast_case, compile_case, rows_case
from fastattn.verification.inputs import checked_inputs
from fastattn.verification.report import CaseResult
from fastattn.verification.state import evaluating
from fastattn.verification.subject import (
    Case,
    Replay,
    Subject,
    Unavailable,
    call,
    forward_case,
    from_model,
    from_reference,
    layer_masks,
    masks_of,
    short,
)
from fastattn.verification.training import gradient_case

__all__ = ["CASES", "cases_for", "cases_of_inputs", "checked_inputs"]

# Every case by name, in the order they run.
CASES = (
    "given inputs",
    "right padding",
    "left padding",
    "no padding",
    "no mask",
    "batch == length",
    "one token",
    "one row",
    "longer than the window",
    "a row of padding",
    "packed sequences",
    "dynamic cache",
    "static cache",
    "gradients",
    "autocast",
    "compile",
    "rows alone",
)

# A longer window is not tried: the batch would take longer than all other cases.
_LONGEST_WINDOW = 1024


def cases_for(subject: Subject) -> list[Case]:
    """The cases of a model that batches can be drawn for.

    Raises:
        ValueError: its config does not say what it takes, or the reference refuses what it says.
    """
    drawing = Drawing(subject.reference)
    batches = drawing.batches()
    runs = _must_run(subject, batches)
    has_masks = "attention_mask" in batches["no padding"]
    cached = keeps_a_cache(subject.reference, batches[runs])
    decoder = cached and not drawing.encoder_decoder
    if decoder:
        batches = {name: with_positions(subject.reference, batch) for name, batch in batches.items()}
    cases = [forward_case(name, batch) for name, batch in batches.items()]
    no_padding = "its inputs are images or recordings of one size" if not drawing.sides else ""
    cases += [
        unavailable_case(name, no_padding) for name in CASES[1:8] if name not in batches and name != "no mask"
    ]
    if drawing.sides:
        unmasked = {k: v for k, v in batches["no padding"].items() if not k.endswith("attention_mask")}
        unmasked.pop("position_ids", None)
        cases.append(forward_case("no mask", unmasked))
    else:
        cases.append(unavailable_case("no mask", no_padding))
    cases.append(_window_case(subject, drawing, decoder))
    if has_masks or "decoder_attention_mask" in batches["no padding"]:
        cases.append(_lone_padding_case(batches["right padding"]))
    else:
        cases.append(
            unavailable_case("a row of padding", no_padding or "its forward takes no attention_mask")
        )
    cases.append(_packed_case(subject, drawing, decoder))
    if cached:
        cases += cache_cases(subject.reference, drawing)
    else:
        reason = "it keeps no cache: not a decoder"
        cases += [unavailable_case(name, reason) for name in ("dynamic cache", "static cache")]
    padded: dict[str, Batch] = {
        name: batches[name] for name in ("right padding", "left padding") if name in batches
    }
    first = batches[runs]
    if runs not in padded:
        padded = {runs: first}
    cases += [gradient_case(first), _autocast(subject, first), compile_case(padded)]
    cases.append(rows_case(first))
    return sorted(cases, key=lambda case: CASES.index(case.name))


def cases_of_inputs(subject: Subject, inputs: Mapping[str, Any]) -> list[Case]:
    """The cases of any module, on inputs it is given.

    Raises:
        ValueError: the reference cannot run them.
    """
    try:
        with torch.no_grad(), evaluating(subject.reference):
            outputs = call(subject.reference, inputs)
    except Exception as error:
        raise ValueError(f"the reference cannot run the given inputs: {short(error)}") from error
    if not outputs:
        raise ValueError("the reference gives no tensor to compare for the given inputs")
    return [
        forward_case("given inputs", inputs),
        gradient_case(inputs),
        autocast_case(inputs),
        compile_case({"the given inputs": inputs}),
        rows_case(inputs),
    ]


def _autocast(subject: Subject, batch: Batch) -> Case:
    config = getattr(subject.reference, "config", None)
    if any(getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")):
        return unavailable_case("autocast", "which experts a token is sent to turns on single roundings")
    return autocast_case(batch)


def _must_run(subject: Subject, batches: Mapping[str, Batch]) -> str:
    """The name of the batch for cases that need only one; ValueError where the reference takes none of them.

    One row where more are refused: a GPT-2 classifier without a padding token.
    """
    failures = []
    for name in [name for name in ("right padding", "no padding", "one row") if name in batches]:
        try:
            with torch.no_grad(), evaluating(subject.reference):
                call(subject.reference, batches[name])
            return name
        except Exception as error:
            failures.append(short(error))
    name, drawn = type(subject.reference).__name__, ", ".join(batches["one row"])
    raise ValueError(f"{name} cannot run what was drawn for it ({drawn}): {failures[0]}; give inputs")


def _lone_padding_case(batch: Batch) -> Case:
    padded = with_a_row_of_padding(batch)
    run = partial(_called, padded)

    def results(subject: Subject) -> Iterable[CaseResult]:
        with torch.no_grad(), evaluating(subject.model, subject.reference):
            return list(from_rows(subject))

    def from_rows(subject: Subject) -> Iterable[CaseResult]:
        found: list[CaseResult] = []
        from_reference(partial(run, subject.reference))

        def rows() -> dict[str, Tensor]:
            found.extend(lone_padding(partial(call, subject.model), batch, masks_of(padded)))
            return {}

        from_model(rows)
        if not found:
            raise Unavailable("none of its outputs has a row for every row of the batch")
        return found

    return Case("a row of padding", results, Replay(run, run, layer_masks(padded)))


def _called(batch: Batch, model: Any) -> Any:
    return call(model, batch)


def _packed_case(subject: Subject, drawing: Drawing, decoder: bool) -> Case:
    name = "packed sequences"
    parameters = forward_parameters(subject.reference)
    if not decoder or "position_ids" not in parameters:
        reason = "it is not a decoder alone" if not decoder else "its forward takes no position_ids"
        return unavailable_case(name, reason)
    width = drawing.longest
    if width < 4:
        return unavailable_case(name, f"it has positions for {width} tokens only")
    batch = drawing.batch([width, width], width)
    batch.pop("attention_mask", None)
    lengths = ([width // 2, width // 4, width - width // 2 - width // 4], [1, width - 2, 1])
    rows = [torch.cat([torch.arange(n) for n in row]) for row in lengths]
    batch["position_ids"] = torch.stack(rows).to(drawing.device)

    # With a cache, transformers takes the positions for one sequence's.
    def run(model: Any) -> Any:
        return call(model, batch, use_cache=False)

    return forward_case(name, batch, run)


def _window_case(subject: Subject, drawing: Drawing, decoder: bool) -> Case:
    name = "longer than the window"
    window = window_of(subject.reference)
    if window is None or not drawing.sides:
        return unavailable_case(name, "it has no sliding window")
    if window > _LONGEST_WINDOW:
        return unavailable_case(name, f"its window is {window} tokens; up to {_LONGEST_WINDOW} are tried")
    width = window + 9
    if width > drawing.positions:
        return unavailable_case(
            name, f"its window is {window} tokens, of {drawing.positions} positions in all"
        )
    batch = drawing.batch([width, max(1, width - 3)], width, left=decoder)
    return forward_case(name, with_positions(subject.reference, batch) if decoder else batch)
