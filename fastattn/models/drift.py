"""The drift guard: the methods our layers take the place of, as they were when the replacement was checked.

digests.json holds the signature and the sha256 of the source of each, with the versions of transformers (or
torch) that have it so. `optimize` leaves alone a layer whose original is none of them, and says so.

python -m fastattn.models.drift             # is what is installed known? exit status 1 where it is not
python -m fastattn.models.drift --record    # adds what is installed to digests.json: after reading the change

`make digests` records every supported version of transformers and torch.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import os
import re
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any

from torch import nn

from fastattn.models.family import Family, known_families, load_family

__all__ = ["Method", "families", "from_sources", "main", "record", "replaced_methods", "unknown"]

DIGESTS = Path(__file__).with_name("digests.json")

# Recorded methods by full name, each with every form it was seen in: {"signature", "sha256", "versions"}.
Records = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Method:
    """One method of an original class, as it is installed."""

    name: str  # with module and class
    package: str
    version: str
    signature: str
    sha256: str | None  # None where the source is not there

    @property
    def short_name(self) -> str:
        return ".".join(self.name.split(".")[-2:])


def replaced_methods(replacement: type[Any]) -> tuple[Method, ...]:
    """The methods of `replacement.fastattn_original` that the replacement, or a mixin of ours, overrides.

    What nn.Module itself defines (`__getstate__`, `extra_repr`) is no part of an architecture.
    """
    original: type[Any] = replacement.fastattn_original
    ours = [cls for cls in replacement.__mro__ if cls not in original.__mro__]
    found = []
    for name in sorted({name for cls in ours for name in vars(cls)}):
        owner = next((cls for cls in original.__mro__ if name in vars(cls)), object)
        function = _function(vars(owner).get(name))
        if function is not None and owner not in (nn.Module, object):
            found.append(_method(owner, name, function))
    return tuple(found)


def _function(attribute: Any) -> Callable[..., Any] | None:
    if isinstance(attribute, staticmethod | classmethod):
        attribute = attribute.__func__
    if isinstance(attribute, property):
        attribute = attribute.fget
    return attribute if inspect.isfunction(attribute) else None


def _method(owner: type[Any], name: str, function: Callable[..., Any]) -> Method:
    package = owner.__module__.partition(".")[0]
    version = str(getattr(sys.modules[package], "__version__", "")).partition("+")[0]
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):  # no source is installed
        digest = None
    else:
        text = "\n".join(line.rstrip() for line in source.strip().splitlines())
        digest = hashlib.sha256(text.encode()).hexdigest()
    full_name = f"{owner.__module__}.{owner.__qualname__}.{name}"
    return Method(full_name, package, version, _signature(function), digest)


def _signature(function: Callable[..., Any]) -> str:
    """Names, kinds and defaults, without annotations: how those print depends on Python's version."""
    signature = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()
    ]
    text = str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    # A default that is a function prints its address.
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@cache
def _records() -> Records:
    return read(DIGESTS)


def read(path: Path) -> Records:
    """What was recorded, by full method name; nothing where the file is missing."""
    if not path.exists():
        return {}
    document: dict[str, Records] = json.loads(path.read_text(encoding="utf-8"))
    return document["methods"]


def problem(method: Method, records: Records) -> str | None:
    """Why the replacement of `method` cannot be trusted; None where it was checked against this very source.

    Without a source the signature decides, in the versions that were recorded.
    """
    entries = records.get(method.name, [])
    if not entries:
        return f"{method.short_name} of {method.package} {method.version} was never checked"
    for entry in entries:
        if entry["signature"] != method.signature:
            continue
        if entry["sha256"] == method.sha256 or (
            method.sha256 is None and method.version in entry["versions"]
        ):
            return None
    return f"{method.package} {method.version} changed {method.short_name} since it was checked"


# Kept by hand: to mypy a class is no key of functools.cache.
_unknown: dict[type[Any], str | None] = {}


def unknown(replacement: type[Any]) -> str | None:
    """Why a layer must not be swapped: what it would replace is not what the replacement was written for.

    Args:
        replacement: a class with `fastattn_original`.

    Returns:
        The first method that is unknown, in words; None where all are known.
    """
    if replacement not in _unknown:
        problems = (problem(method, _records()) for method in replaced_methods(replacement))
        _unknown[replacement] = next((text for text in problems if text), None)
    return _unknown[replacement]


def families() -> Iterator[Family]:
    """Every family of the registry, its adapter loaded."""
    for name in known_families():
        yield load_family(name)


def from_sources(found: Iterable[Method], folder: Path) -> Iterator[Method]:
    """Those methods of `found` that are torch's, as the version whose `torch` lies in `folder` has them.

    Its sources are read by the torch that runs: another one's binaries need not fit this machine.
    """
    about = (folder / "torch" / "version.py").read_text(encoding="utf-8")
    version = about.partition("__version__ = ")[2].splitlines()[0].strip("'\"").partition("+")[0]
    modules: dict[str, Any] = {}
    for method in found:
        module, owner, name = method.name.rsplit(".", 2)
        if method.package != "torch":
            continue
        if module not in modules:
            spec = util.spec_from_file_location(
                module, (folder / module.replace(".", "/")).with_suffix(".py")
            )
            assert spec is not None and spec.loader is not None
            modules[module] = util.module_from_spec(spec)
            spec.loader.exec_module(modules[module])
        cls = getattr(modules[module], owner, object)
        function = _function(vars(cls).get(name))
        if function is not None:
            yield replace(_method(cls, name, function), version=version)


def record(found: Iterable[Method], path: Path = DIGESTS) -> None:
    """Write `found` as what its versions of its packages hold; other versions stay as they were recorded."""
    methods = sorted(set(found), key=lambda method: method.name)
    versions = {(method.package, method.version) for method in methods}
    records = read(path)
    for name, entries in records.items():
        for package, version in versions:
            if name.startswith(f"{package}."):
                for entry in entries:
                    entry["versions"] = [each for each in entry["versions"] if each != version]
    for method in methods:
        entries = records.setdefault(method.name, [])
        form = {"signature": method.signature, "sha256": method.sha256}
        same = [entry for entry in entries if form.items() <= entry.items()]
        if not same:
            same = [{**form, "versions": []}]
            entries += same
        same[0]["versions"] = sorted({*same[0]["versions"], method.version}, key=_order)
    kept = {
        name: sorted((entry for entry in entries if entry["versions"]), key=_first_version)
        for name, entries in sorted(records.items())
    }
    text = json.dumps({"methods": {name: entries for name, entries in kept.items() if entries}}, indent=1)
    # Whole or not at all.
    partial = path.with_suffix(".partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)


def _order(version: str) -> tuple[int, ...]:
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("."))


def _first_version(entry: dict[str, Any]) -> tuple[int, ...]:
    return _order(entry["versions"][0])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--record", action="store_true", help="add the installed versions to the file")
    parser.add_argument(
        "--torch", type=Path, metavar="FOLDER", help="record the torch unpacked there, not what is installed"
    )
    parser.add_argument("--file", type=Path, default=DIGESTS)
    args = parser.parse_args(argv)
    found = [
        (family.name, method)
        for family in families()
        for site in family.sites
        for method in replaced_methods(site.replacement)
    ]
    if args.record or args.torch:
        methods = [method for _, method in found]
        record(methods if args.torch is None else from_sources(methods, args.torch), args.file)
        return 0
    records = read(args.file)
    problems = {f"{name}: {text}" for name, method in found if (text := problem(method, records))}
    for text in sorted(problems):
        print(text, file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
