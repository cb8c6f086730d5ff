"""The drift guard: every method our layers replace is one that was read, in every supported version."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastattn.models import drift
from fastattn.models.family import Site

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.model

SITES = [(family.name, site) for family in drift.families() for site in family.sites]


@pytest.mark.parametrize(
    ("family", "site"), SITES, ids=[f"{name}-{site.replacement.__name__}" for name, site in SITES]
)
def test_every_replaced_method_was_checked(family: str, site: Site):
    """Fails with the family and the method where a release changed one: read the change, adapt the layer,
    then `make digests`.
    """
    methods = drift.replaced_methods(site.replacement)
    assert methods, f"{family}: {site.replacement.__name__} replaces nothing"
    records = drift.read(drift.DIGESTS)
    problems = [problem for method in methods if (problem := drift.problem(method, records))]
    assert not problems, f"{family}: {'; '.join(problems)}"
    assert drift.unknown(site.replacement) is None


def test_this_transformers_is_recorded():
    """Without a source to read, only a recorded version is swapped."""
    versions = {
        version
        for name, entries in drift.read(drift.DIGESTS).items()
        if name.startswith("transformers.")
        for entry in entries
        for version in entry["versions"]
    }
    assert transformers.__version__ in versions


class Original(torch.nn.Module):
    def forward(self, x, scale=1.0):
        return self.inner(x) * scale

    def inner(self, x):
        return x

    def untouched(self, x):
        return x

    @property
    def width(self):
        return 3

    @staticmethod
    def helper(x):
        return x


class Mixin:
    def forward(self, x, scale=1.0):
        return x * scale

    def added(self):
        return None

    def extra_repr(self):
        return ""


class Replacement(Mixin, Original):
    fastattn_original = Original

    width = property(lambda self: 4)

    @staticmethod
    def helper(x):
        return x


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.2.0+cpu", raising=False)
    path = tmp_path / "digests.json"
    drift.record(drift.replaced_methods(Replacement), path)
    return path


def problems(path) -> list[str]:
    records = drift.read(path)
    found = (drift.problem(method, records) for method in drift.replaced_methods(Replacement))
    return [text for text in found if text]


def test_a_default_that_is_a_function_is_recorded_without_its_address():
    def forward(self, x, activation=problems):
        return activation(x)

    method = drift._method(Original, "forward", forward)
    assert method.signature == "(self, x, activation=<function problems>)"


def test_what_counts_as_replaced(recorded):
    """Overridden by the class or a mixin; not what is added, inherited, or torch.nn.Module's own."""
    assert [method.short_name for method in drift.replaced_methods(Replacement)] == [
        "Original.forward",
        "Original.helper",
        "Original.width",
    ]
    assert problems(recorded) == []
    entries = json.loads(recorded.read_text())["methods"][f"{__name__}.Original.forward"]
    assert [entry["versions"] for entry in entries] == [["1.2.0"]]
    assert entries[0]["signature"] == "(self, x, scale=1.0)"


def test_a_changed_source_is_unknown_and_a_known_one_is_not_in_any_version(recorded, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.3.0")
    assert problems(recorded) == []

    def forward(self, x, scale=1.0):
        return x + scale

    monkeypatch.setattr(Original, "forward", forward)
    assert problems(recorded) == [f"{__name__} 1.3.0 changed Original.forward since it was checked"]


def test_without_a_source_the_version_and_the_signature_decide(recorded, monkeypatch):
    def no_source(function):
        raise OSError("could not get source code")

    monkeypatch.setattr(drift.inspect, "getsource", no_source)
    assert problems(recorded) == []
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.3.0")
    assert len(problems(recorded)) == 3
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.2.0")
    monkeypatch.setattr(Original, "forward", lambda self, x: x)
    assert problems(recorded) == [f"{__name__} 1.2.0 changed Original.forward since it was checked"]


def test_recording_merges_versions(recorded, monkeypatch):
    """One entry a form of a method; a version recorded again takes its new place."""
    key = f"{__name__}.Original.forward"
    unchanged = drift.replaced_methods(Replacement)
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.10.0")
    drift.record(drift.replaced_methods(Replacement), recorded)
    assert [entry["versions"] for entry in drift.read(recorded)[key]] == [["1.2.0", "1.10.0"]]
    monkeypatch.setattr(Original, "forward", lambda self, x: x)
    drift.record(drift.replaced_methods(Replacement), recorded)
    assert [entry["versions"] for entry in drift.read(recorded)[key]] == [["1.2.0"], ["1.10.0"]]
    drift.record(unchanged, recorded)
    monkeypatch.undo()


def test_a_method_never_recorded_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "__version__", "1.2.0", raising=False)
    drift.record([], tmp_path / "digests.json")
    assert problems(tmp_path / "digests.json")[0] == f"Original.forward of {__name__} 1.2.0 was never checked"


def test_another_torch_is_read_from_its_sources(tmp_path):
    """Without importing it: its binaries may be another machine's."""
    methods = [
        m for _, site in SITES for m in drift.replaced_methods(site.replacement) if m.package == "torch"
    ]
    modules = {method.name.rsplit(".", 2)[0] for method in methods}
    assert modules
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "version.py").write_text("__version__ = '2.99.1+cpu'\ndebug = False\n")
    for module in modules:
        path = (tmp_path / module.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        source = Path(sys.modules[module].__file__).read_text(encoding="utf-8")
        path.write_text(source.replace("def forward(", "def forward(  # another\n", 1), encoding="utf-8")
    found = list(drift.from_sources(methods, tmp_path))
    assert {method.version for method in found} == {"2.99.1"}
    assert {method.name for method in found} == {method.name for method in methods}
    same = {method.name: method.sha256 for method in methods}
    assert any(same[method.name] == method.sha256 for method in found)


def test_the_command_names_family_and_method(tmp_path, capsys):
    assert drift.main([]) == 0
    assert drift.main(["--file", str(tmp_path / "none.json")]) == 1
    said = capsys.readouterr().err
    assert "bert: BertSelfAttention.forward of transformers" in said
