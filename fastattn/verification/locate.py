"""Where an error first appears: a clause for the report that names a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastattn.layers import FusedLayer
from fastattn.verification.bisect import first_site
from fastattn.verification.comparison import TOLERANCE
from fastattn.verification.recording import layer_errors, watched
from fastattn.verification.report import CaseResult
from fastattn.verification.subject import Case, Replay, Subject
from fastattn.verification.training import parameter_of

__all__ = ["first_difference"]

# An error grows on its way: a layer counts as the first although it is below the tolerance by up to this
# factor, if it is this many times as far off as every layer before it.
_JUMP = 10.0


def first_difference(
    case: Case, worst: CaseResult, subject: Subject, passes: Callable[[Subject], bool]
) -> str:
    """A clause for the report that names the layer where the error of a failing case first appears.

    Args:
        case: the one that failed.
        worst: its worst result.
        subject: the two models.
        passes: whether the case passes with another model in the place of this one.
    """
    replay = case.replay
    if replay is None:
        return ""
    fused = _fused_leaves(subject)
    if not replay.undisturbed:
        found = _first(replay, subject, fused, TOLERANCE)
        return "only when compiled" if found is None else f"first differs in {found}, not only when compiled"
    if worst.note.startswith("raised"):
        return _of_a_failed_call(replay, subject)
    # Hooks inside a fused layer make it run unfused, so that they may find nothing: first around those alone.
    coarse = _first(replay, subject, fused, worst.tolerance)
    parameter = parameter_of(worst)
    if coarse is None and parameter is not None:
        return _of_a_gradient(case, replay, subject, parameter)
    if coarse is None:
        with watched(subject.model, fused):
            is_hidden = passes(subject)
        if is_hidden:
            return first_site(subject.model, lambda model: passes(subject.with_model(model)))
        return "no layer differs at a real position: padding is read, or made, outside of the layers"
    fine = _first(replay, subject, (), worst.tolerance)
    if fine is not None and (coarse == "" or fine == coarse or fine.startswith(f"{coarse}.")):
        return _named(fine, _enters_wrong(replay, subject, fine, ()))
    return _named(coarse, _enters_wrong(replay, subject, coarse, fused))


def _fused_leaves(subject: Subject) -> tuple[str, ...]:
    """Names of the swapped layers with no other swapped layer inside."""
    names = [name for name, module in subject.model.named_modules() if isinstance(module, FusedLayer)]
    return tuple(name for name in names if not any(other.startswith(f"{name}.") for other in names))


def _first(replay: Replay, subject: Subject, closed: tuple[str, ...], tolerance: float) -> str | None:
    """The first layer, in the order they finish, whose error exceeds the tolerance; "" for the model itself.

    None where nothing differs.
    """
    largest_before, candidate = 0.0, None
    precise = replay.precise and subject.exact is None
    for name, error in layer_errors(replay, subject, closed):
        if precise and candidate is None and error > max(tolerance / _JUMP, _JUMP * largest_before):
            candidate = name
        if error > tolerance:
            return name if candidate is None else candidate
        largest_before = max(largest_before, error)
    return None


def _enters_wrong(replay: Replay, subject: Subject, layer: str, closed: tuple[str, ...]) -> bool:
    """Whether what goes into the first layer that gives something wrong is wrong already."""
    if not layer or not replay.precise or subject.exact is not None:
        return False
    return any(error > TOLERANCE / _JUMP for _, error in layer_errors(replay, subject, closed, layer))


def _named(layer: str, enters_wrong: bool) -> str:
    """The clause for the first layer with a wrong output; for what is around it where its input is wrong."""
    if not layer:
        return "first differs in the model's own forward, not in a layer"
    if not enters_wrong:
        return f"first differs in {layer}"
    outer, _, inner = layer.rpartition(".")
    return f"first differs in {outer or 'the model itself'}, before its {inner}"


def _of_a_failed_call(replay: Replay, subject: Subject) -> str:
    running: list[str] = []

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for name, module in subject.model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: running.append(name)))
        handles.append(module.register_forward_hook(leave))
    try:
        with torch.no_grad(), replay.environment(subject.model):
            replay.model(subject.model)
    except Exception:
        named = [name for name in running if name]
        return f"raised in {named[-1]}" if named else "raised in the model's own forward"
    finally:
        for handle in handles:
            handle.remove()
    return "raised only without hooks on the layers, i.e. in fused or padding-free execution"


def _of_a_gradient(case: Case, replay: Replay, subject: Subject, parameter: str) -> str:
    """Gradients flow backwards: of the layers with parameters whose gradients are wrong, the last to run."""
    failed = [parameter_of(result) for result in case.results(subject) if not result.passed]
    wrong = {name.rpartition(".")[0] for name in (*failed, parameter) if name is not None}
    order: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: order.append(name))
        for name, module in subject.reference.named_modules()
    ]
    try:
        with torch.no_grad(), replay.environment(subject.reference):
            replay.reference(subject.reference)
    finally:
        for handle in handles:
            handle.remove()
    last = max(wrong, key=lambda name: order.index(name) if name in order else -1)
    return f"first differs, going backwards, in {last or 'the parameters of the model itself'}"
