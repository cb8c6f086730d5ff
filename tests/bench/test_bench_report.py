"""The HTML page: self-contained, escaped, and complete without being rendered."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastattn.bench.report import Bar, Cell, Environment, Point, RatioPlot, Report, Table, Text, TimePlot

HOSTILE = '</script><script>alert("x")</script><img src=x onerror=alert(1)> & "quoted"'


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, the text, and the scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts, self._inside = "", [], ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    @property
    def figures(self) -> list[dict[str, object]]:
        kinds = [attributes.get("type") for tag, attributes in self.elements if tag == "script"]
        pairs = zip(kinds, self.scripts, strict=True)
        return [json.loads(text) for kind, text in pairs if kind == "application/json"]


def sample(text: str = "plain") -> Report:
    return Report(
        title=text,
        summary=[text],
        sections=[
            Text(text, [text]),
            Table(text, [text, "ms"], [[text, 1.5], [Cell(text, "bad"), None]], note=text),
            TimePlot(text, [Bar(text, 2.0, 1.0, 4.0), Bar("ours", 1.0, 0.9, 1.5, True)], note=text),
            RatioPlot(text, [Point(text, 2.0, 1.9, 2.1, True)], note=text),
            Environment({"cpu": {"model": text, "flags": ["a", text]}, "gpu": None, "dirty": True}),
        ],
    )


def test_nothing_is_loaded_from_anywhere() -> None:
    page = Page(sample().html())
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "img", "object", "embed", "base")
        assert not {"src", "href", "data", "action", "background", "srcset"} & set(attributes), (
            tag,
            attributes,
        )
    policy = [each["content"] for tag, each in page.elements if tag == "meta" and each.get("http-equiv")]
    # Whatever the plotting script might try, the browser refuses: no source but the page itself.
    assert len(policy) == 1 and "default-src 'none'" in (policy[0] or "") and "http" not in (policy[0] or "")
    style = sample().html(scripts=False).partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert any("Plotly" in script and len(script) > 1_000_000 for script in page.scripts)


def test_every_string_is_escaped() -> None:
    plain, hostile = Page(sample().html(scripts=False)), Page(sample(HOSTILE).html(scripts=False))
    assert [tag for tag, _ in hostile.elements] == [tag for tag, _ in plain.elements]
    # Title twice (head and heading), summary, and every section's strings are all there, as text.
    assert hostile.text.count(HOSTILE) == plain.text.count("plain")
    assert hostile.figures and "<" not in json.dumps(hostile.figures[0]["data"][0]["y"])  # type: ignore[index]


def test_figures_hold_the_medians_whiskers_and_intervals() -> None:
    times, ratios = Page(sample().html(scripts=False)).figures
    bars = times["data"][0]  # type: ignore[index]
    assert bars["x"] == [2.0, 1.0]
    assert bars["error_x"]["arrayminus"] == [1.0, pytest.approx(0.1)] and bars["error_x"]["array"] == [
        2.0,
        0.5,
    ]
    points = ratios["data"][0]  # type: ignore[index]
    assert points["x"] == [2.0] and points["customdata"] == [[1.9, 2.1]]
    assert points["marker"]["color"] == ["accent"]


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "page.html"
    assert sample().write(target) == target
    before = target.read_text(encoding="utf-8")
    assert before.startswith("<!DOCTYPE html>") and target.stat().st_mode & 0o044 == 0o044

    def full(*arguments: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space left"):
        sample("other").write(target)
    assert target.read_text(encoding="utf-8") == before
    assert [each.name for each in tmp_path.iterdir()] == ["page.html"]


def test_an_unwritable_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="does not exist"):
        sample().write(tmp_path / "nowhere" / "page.html")
    with pytest.raises(OSError, match="is a folder"):
        sample().write(tmp_path)


def test_wrong_use_is_refused() -> None:
    with pytest.raises(ValueError, match="a row of 1 cells in a table of 2 columns"):
        Table("", ["a", "b"], [["only one"]])
    with pytest.raises(ValueError, match="tone is 'loud'; it must be one of plain, good, bad, muted"):
        Cell("text", "loud")
