"""What a sweep tries: points as mappings of arguments, checked, named, and those it chooses itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import fastattn
from fastattn.compress.frontier import UNTOUCHED
from fastattn.compress.sweep_export import can_export
from fastattn.onnx.exporter import checked_target

__all__ = ["auto_points", "named_points", "title"]

_KEYS = ("name", "prune", "recover", "quantize", "optimize", "export")
# What a point's verbs take as one word instead of a mapping.
_WORDS = {"quantize": "scheme", "export": "precision"}
# Arguments that a sweep gives itself, or that no JSON holds.
_NOT_A_POINTS = {
    "export": ("output_dir", "tokenizer", "example_inputs", "calibration", "reference"),
}
_SPEED_UPS = (1.5, 2.0, 3.0)


def auto_points(model: nn.Module, *, recovers: bool) -> list[dict[str, Any]]:
    """What a sweep tries where nothing was asked for: the fused layers alone, every scheme, and pruning to
    half as much time again, twice and (where what it costs can be recovered) three times the speed, without
    and with int8. Where the model exports (`can_export`) so it is, untouched and pruned: fp32 and int8.
    """
    schemes = ["int8", "int8-weight", "int4-weight"]
    if next(model.parameters()).is_cuda:
        schemes.append("fp8")
    points: list[dict[str, Any]] = [{"name": "fused"}, *({"quantize": scheme} for scheme in schemes)]
    exports = can_export(model)
    if exports:
        points += [{"export": "fp32"}, {"export": "int8"}]
    for speed_up in _SPEED_UPS if recovers else _SPEED_UPS[:2]:
        points.append({"prune": {"target_speedup": speed_up}})
        points.append({"prune": {"target_speedup": speed_up}, "quantize": "int8"})
        if exports:
            points.append({"prune": {"target_speedup": speed_up}, "export": "int8"})
    return points


def named_points(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of every point by its name.

    Raises:
        ValueError: as `sweep`.
    """
    if not points:
        raise ValueError("points is empty; give at least one mapping of prune, quantize and export arguments")
    named: dict[str, dict[str, Any]] = {}
    for point in points:
        if not isinstance(point, Mapping):
            raise ValueError(
                f"a point is a {type(point).__name__}; a mapping with {', '.join(_KEYS)} is accepted"
            )
        if unknown := [key for key in point if key not in _KEYS]:
            raise ValueError(f"a point has {unknown[0]!r}; it may have {', '.join(_KEYS)}")
        for verb in ("prune", "quantize", "export"):
            _check_arguments(verb, point.get(verb))
        _check_export(point)
        # As JSON gives it back.
        options = json.loads(json.dumps({key: value for key, value in point.items() if key != "name"}))
        name = str(point.get("name") or title(options))
        if name in named or name == UNTOUCHED:
            raise ValueError(f"two points are named {name!r}; give one of them a name of its own")
        named[name] = options
    return named


def _check_arguments(verb: str, given: Any) -> None:
    if given is None or (verb in _WORDS and isinstance(given, str)):
        return
    if not isinstance(given, Mapping):
        word = f"a {_WORDS[verb]}, or " if verb in _WORDS else ""
        raise ValueError(
            f"a point's {verb} is {given!r}; {word}a mapping of fastattn.{verb}'s arguments is accepted"
        )
    own = _NOT_A_POINTS.get(verb, ())
    parameters = list(inspect.signature(getattr(fastattn, verb)).parameters)[1:]
    accepted = [name for name in parameters if name not in own]
    for name in given:
        if name in own:
            raise ValueError(
                f"a point's {verb} has {name!r}, which a sweep's point cannot give; it has "
                f"{', '.join(accepted)}"
            )
        if name not in accepted:
            raise ValueError(f"fastattn.{verb} has no argument {name!r}; it has {', '.join(accepted)}")


def _check_export(point: Mapping[str, Any]) -> None:
    """What is wrong with an export is said before a model is pruned and trained for it."""
    export = point.get("export")
    if export is None:
        return
    given = {"precision": export} if isinstance(export, str) else export
    try:
        checked_target(given.get("precision", "fp32"), given.get("target", "cpu"))
    except ValueError as error:
        raise ValueError(f"a point's export cannot be made: {error}") from error
    if not point.get("optimize", True):
        raise ValueError("a point has export and optimize=False; what is exported is always the fused layers")


def title(options: Mapping[str, Any]) -> str:
    """What a point without a name is called.

    Example:
        >>> title({"prune": {"target_speedup": 3.0, "importance": "taylor"}, "export": "int8"})
        'pruned to 3x importance taylor, ONNX int8'
    """
    parts = []
    if "prune" in options:
        prune = dict(options["prune"])
        target = prune.pop("target_speedup", None)
        said = [f"to {target:g}x"] if target is not None else []
        parts.append(" ".join(["pruned", *said, *(f"{key} {value}" for key, value in prune.items())]))
    if quantize := options.get("quantize"):
        parts.append(_words(quantize, "scheme", ""))
    if options.get("recover") is False:
        parts.append("not recovered")
    if options.get("optimize") is False:
        parts.append("plain layers")
    if (export := options.get("export")) is not None:
        parts.append(f"ONNX {_words(export, 'precision', 'fp32')}")
    return ", ".join(parts) or "fused"


def _words(given: str | Mapping[str, Any], first: str, default: str) -> str:
    options = {first: given} if isinstance(given, str) else dict(given)
    return " ".join([options.pop(first, default), *(f"{key} {value}" for key, value in options.items())])
