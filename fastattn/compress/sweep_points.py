"""What a sweep tries: points as mappings of arguments, checked, named, and those it chooses itself."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

import fastattn
from fastattn.compress.frontier import UNTOUCHED

__all__ = ["auto_points", "named_points", "title"]

_KEYS = ("name", "prune", "recover", "quantize", "optimize")
_SPEED_UPS = (1.5, 2.0, 3.0)


def auto_points(model: nn.Module, *, recovers: bool) -> list[dict[str, Any]]:
    """What a sweep tries where nothing was asked for: the fused layers alone, every scheme, and pruning to
    half as much time again, twice and (where what it costs can be recovered) three times the speed, without
    and with int8.
    """
    schemes = ["int8", "int8-weight", "int4-weight"]
    if next(model.parameters()).is_cuda:
        schemes.append("fp8")
    points: list[dict[str, Any]] = [{"name": "fused"}, *({"quantize": scheme} for scheme in schemes)]
    for speed_up in _SPEED_UPS if recovers else _SPEED_UPS[:2]:
        points.append({"prune": {"target_speedup": speed_up}})
        points.append({"prune": {"target_speedup": speed_up}, "quantize": "int8"})
    return points


def named_points(points: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options of every point by its name.

    Raises:
        ValueError: as `sweep`.
    """
    if not points:
        raise ValueError("points is empty; give at least one mapping of prune and quantize arguments")
    named: dict[str, dict[str, Any]] = {}
    for point in points:
        if not isinstance(point, Mapping):
            raise ValueError(
                f"a point is a {type(point).__name__}; a mapping with {', '.join(_KEYS)} is accepted"
            )
        if unknown := [key for key in point if key not in _KEYS]:
            raise ValueError(f"a point has {unknown[0]!r}; it may have {', '.join(_KEYS)}")
        for verb in ("prune", "quantize"):
            _check_arguments(verb, point.get(verb))
        # As JSON gives it back.
        options = json.loads(json.dumps({key: value for key, value in point.items() if key != "name"}))
        name = str(point.get("name") or title(options))
        if name in named or name == UNTOUCHED:
            raise ValueError(f"two points are named {name!r}; give one of them a name of its own")
        named[name] = options
    return named


def _check_arguments(verb: str, given: Any) -> None:
    if given is None or (verb == "quantize" and isinstance(given, str)):
        return
    if not isinstance(given, Mapping):
        raise ValueError(
            f"a point's {verb} is {given!r}; a mapping of fastattn.{verb}'s arguments is accepted"
        )
    accepted = list(inspect.signature(getattr(fastattn, verb)).parameters)[1:]
    if unknown := [name for name in given if name not in accepted]:
        raise ValueError(f"fastattn.{verb} has no argument {unknown[0]!r}; it has {', '.join(accepted)}")


def title(options: Mapping[str, Any]) -> str:
    parts = []
    if "prune" in options:
        prune = dict(options["prune"])
        target = prune.pop("target_speedup", None)
        said = [f"to {target:g}x"] if target is not None else []
        parts.append(" ".join(["pruned", *said, *(f"{key} {value}" for key, value in prune.items())]))
    if quantize := options.get("quantize"):
        given = {"scheme": quantize} if isinstance(quantize, str) else dict(quantize)
        scheme = given.pop("scheme", "")
        parts.append(" ".join([scheme, *(f"{key} {value}" for key, value in given.items())]))
    if options.get("recover") is False:
        parts.append("not recovered")
    if options.get("optimize") is False:
        parts.append("plain layers")
    return ", ".join(parts) or "fused"
