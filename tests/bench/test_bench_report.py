"""The HTML page: self-contained, escaped, and complete without being rendered."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from fastattn.bench import Ratio, Row, Workload
from fastattn.bench.attribution import Attribution, Step
from fastattn.bench.ceilings import Ceilings
from fastattn.bench.op_costs import OpCost
from fastattn.bench.report import (
    Bar,
    BarsPlot,
    Cell,
    Environment,
    Fall,
    Line,
    LinePlot,
    Point,
    RatioPlot,
    Report,
    Roof,
    RooflinePlot,
    RoofOp,
    Section,
    Table,
    Text,
    TimePlot,
    Waterfall,
)
from fastattn.bench.report_sections import (
    attribution_sections,
    cold_start_sections,
    memory_sections,
    parts_sections,
    roofline_sections,
    scaling_sections,
)
from fastattn.bench.roofline import Roofline, RoofPoint
from fastattn.bench.scaling import Curve, Fit, Scaling, ScalingPoint

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
            BarsPlot(text, [text, "b"], {text: [1.0, None], "device": [2.0, 3.0]}, unit=text, note=text),
            Waterfall(text, [Fall(text, None, 2.0, 2.0, 2.0, text), Fall("b", 2.0, 1.0, 0.9, 1.1, text)]),
            LinePlot(text, [Line(text, [(1, 2, 1, 3), (9, 8, 7, 9)], [(1, 2), (9, 8)])], text, text),
            RooflinePlot(
                text, [Roof(text, 1e10, 1e11)], [RoofOp(1, text, 2.0, 1e10, text, 0.5, [text])], note=text
            ),
            Environment({"cpu": {"model": text, "flags": ["a", text]}, "gpu": None, "dirty": True}),
        ],
    )


def figure(section: Section) -> dict[str, Any]:
    assert not isinstance(section, Text | Table | Environment)
    return section.figure()


def table_of(sections: list[Section]) -> list[dict[str, str]]:
    """The last table as one mapping a row."""
    table = [each for each in sections if isinstance(each, Table)][-1]
    plain = [[each.text if isinstance(each, Cell) else str(each) for each in row] for row in table.rows]
    return [dict(zip(table.columns, row, strict=True)) for row in plain]


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
    # Plotly reads a little markup of its own: what it is given holds none but our own line breaks.
    assert len(hostile.figures) == 6
    assert "<" not in json.dumps(hostile.figures).replace("<br>", "").replace("<extra></extra>", "")


def test_figures_hold_the_medians_whiskers_and_intervals() -> None:
    times, ratios = Page(sample().html(scripts=False)).figures[:2]
    bars = times["data"][0]  # type: ignore[index]
    assert bars["x"] == [2.0, 1.0]
    assert bars["error_x"]["arrayminus"] == [1.0, pytest.approx(0.1)] and bars["error_x"]["array"] == [
        2.0,
        0.5,
    ]
    points = ratios["data"][0]  # type: ignore[index]
    assert points["x"] == [2.0] and points["hovertext"] == ["plain<br>2.00x (1.90 to 2.10)"]
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


def test_a_plot_names_every_row_above_its_bar_and_shortens_only_what_is_shown() -> None:
    name = "optimum ORTModelForFeatureExtraction with a very long configuration name fp32"
    times = figure(TimePlot("", [Bar(name, 2.0, 1.0, 4.0), Bar("ours", 1.0, 0.9, 1.5)]))
    shown = [each["text"] for each in times["layout"]["annotations"]]
    assert len(shown[0]) <= 46 and shown[0].startswith("optimum ORT") and shown[0].endswith("name fp32")
    assert shown[1] == "ours" and name in times["data"][0]["hovertext"][0]


def test_twenty_lines_can_be_told_apart_and_hidden() -> None:
    lines = [
        Line(f"contender {index}", [(64, 1.0 + index, 1, 2), (1024, 90.0, 80, 95)]) for index in range(20)
    ]
    drawn = figure(LinePlot("", lines, "length", "ms"))
    looks = {(each["line"]["color"], each["line"]["dash"]) for each in drawn["data"]}
    groups = {each["legendgroup"] for each in drawn["data"] if each["showlegend"]}
    assert len(looks) == len(groups) == 20
    # 64 to 1024 tokens and 1 to 95 ms: on a linear axis all but the last point would lie in a corner.
    assert drawn["layout"]["xaxis"]["type"] == drawn["layout"]["yaxis"]["type"] == "log"
    assert drawn["layout"]["xaxis"]["tickvals"] == [64, 1024]
    flat = figure(LinePlot("", [Line("a", [(0.5, 3, 3, 3), (1.0, 4, 4, 4)])], "fill", "ms"))
    assert "type" not in flat["layout"]["xaxis"] and flat["layout"]["yaxis"]["rangemode"] == "tozero"


def ratio(value: float) -> Ratio:
    return Ratio(value, value * 0.9, value * 1.1, "before", 9)


def test_a_waterfall_goes_from_start_to_end_and_names_what_was_not_measured() -> None:
    steps = (
        Step("kernels", "padded", "SDPA fp32", ratio(0.8)),
        Step("graph", "graph", "padded", None, "CUDA graphs need a GPU"),
        Step("padding removal", "fastattn fp32", "padded", ratio(2.0)),
    )
    found = Attribution(Workload(), "PyTorch", "SDPA fp32", 80.0, 51.0, steps, ratio(1.57))
    sections = attribution_sections(found)
    bars = figure(sections[0])["data"][0]
    # 80 ms, slower by the kernels to 100, then half of it; the last bar is the measured 51.
    assert bars["base"] == pytest.approx([0, 80, 100, 50, 0])
    assert bars["x"] == pytest.approx([80, 20, 0, 50, 51])
    assert bars["marker"]["color"] == ["plain", "bad", "accent", "accent", "plain"]
    whiskers = figure(sections[0])["data"][1]["error_x"]
    assert whiskers["array"][3] == pytest.approx(100 / 1.8 - 50)
    assert isinstance(sections[0], Waterfall) and "graph" in sections[0].note
    rows = {row["switched on"]: row for row in table_of(sections)}
    assert rows["graph"]["times as fast (95%)"] == "not measured: CUDA graphs need a GPU"
    assert rows["padding removal"]["ms after it"] == "50" and rows["in all"]["ms after it"] == "51"
    assert attribution_sections(Attribution(Workload(), "PyTorch", "SDPA", None, None, steps, None)) == []


def test_scaling_draws_the_fit_and_says_where_memory_ran_out() -> None:
    fit = Fit("a + b n", {"a": 2.0, "b": 0.5}, 0.99, 1.0)
    memory = Fit("a + b n", {"a": 1024.0**2, "b": 1024.0**2}, 1.0, 1.0)
    points = (
        ScalingPoint(64, 34.0, 33.0, 36.0, 65 * 2**20),
        ScalingPoint(128, 66.0, 65.0, 70.0, 129 * 2**20),
        ScalingPoint(256, None, None, None, None, "out of memory: asked for 4 GiB"),
    )
    curves = (Curve("ours", points, fit, memory), Curve("bare", points[:1], None, None))
    sections = scaling_sections(Scaling("length", {"batch": 8, "fill": 0.47}, curves))
    time, space = (each for each in sections if isinstance(each, LinePlot))
    assert "batch 8, fill 47%" in time.heading
    markers, curve, bare = figure(time)["data"]
    assert markers["x"] == [64, 128] and markers["error_y"]["array"] == [2.0, 4.0] and bare["y"] == [34.0]
    # What is drawn between the points is the fit itself.
    assert curve["x"][0] == 64 and curve["x"][-1] == pytest.approx(128)
    assert all(y == pytest.approx(2 + 0.5 * x) for x, y in zip(curve["x"], curve["y"], strict=True))
    assert figure(space)["data"][1]["y"][0] == pytest.approx(65)
    first, last = (each for each in sections if isinstance(each, Table))
    assert table_of([first])[0]["256"] == "out of memory" and "asked for 4 GiB" in first.note
    assert table_of([first])[0]["fit, ms"] == "2 + 0.5 n" and table_of([last])[0]["fit, MiB"] == "1 + 1 n"


def test_a_roofline_has_its_ridge_and_leaves_out_what_has_no_arithmetic() -> None:
    ceilings = Ceilings("cpu", 2, 2e10, 1e10, {"fp32": 1e11, "bf16": 1e12})
    matrix = OpCost("aten.addmm", "[8, 8]", "fp32", 2, 4e9, 4e8, 50.0)
    copy = OpCost("aten.copy_", "[8]", "fp32", 1, 0, 1e8, 12.5)
    points = (
        RoofPoint(matrix, 10.0, 8e10, 8e9, "compute", 40.0, 80.0),
        RoofPoint(copy, 0.0, 0.0, 8e9, "memory", 10.0, 80.0),
    )
    sections = roofline_sections(Roofline("BERT", ceilings, points, 70.0, 71.4))
    roof, ops = figure(sections[0])["data"]
    # 1e11 FLOP/s over 1e10 bytes/s: bandwidth ends and arithmetic begins at 10 FLOP a byte.
    assert roof["x"][1] == pytest.approx(10) and roof["y"][1] == roof["y"][2] == 1e11
    assert roof["y"][0] == pytest.approx(roof["x"][0] * 1e10)
    assert ops["x"] == [10.0] and ops["text"] == ["1"] and ops["marker"]["size"][0] > 17
    assert math.log10(ops["y"][0]) < figure(sections[0])["layout"]["yaxis"]["range"][1]
    assert [row["operation"] for row in table_of(sections)] == ["#1 aten.addmm", "#2 aten.copy_"]
    assert table_of(sections)[1]["time"] == "20%" and table_of(sections)[0]["of ceiling"] == "80%"
    only_copies = roofline_sections(Roofline("BERT", ceilings, points[1:], 70.0, 71.4))
    assert [type(each) for each in only_copies] == [Table]


def test_cold_start_memory_and_parts_leave_out_who_has_none() -> None:
    rows = [
        Row("eager fp32", "fp32", "measured", first_call_ms=300.0, peak_host_bytes=3 * 2**20),
        Row(
            "ONNX fp32",
            "fp32",
            "measured",
            stages_ms={"export": 2000.0, "load": 500.0},
            first_call_ms=100.0,
            parts_ms={"first_token_ms": (5.0, 7.0, 6.0)},
            highlight=True,
        ),
        Row("OpenVINO fp32", "fp32", "missing", "missing: pip install openvino"),
    ]
    cold = figure(cold_start_sections(rows)[0])
    assert [(each["name"], each["x"]) for each in cold["data"] if "name" in each] == [
        ("export", [None, 2.0]),
        ("load", [None, 0.5]),
        ("first call", [0.3, 0.1]),
    ]
    assert [text.strip() for text in cold["data"][-1]["text"]] == ["0.3 s", "2.6 s"]
    (memory,) = memory_sections(rows)
    assert figure(memory)["data"][0]["x"] == [3.0] and len(figure(memory)["layout"]["annotations"]) == 1
    parts = table_of(parts_sections(rows))
    assert parts == [
        {
            "part": "time to the first token",
            "contender": "ONNX fp32",
            "p50 ms": "6",
            "p90 ms": "7",
            "p99 ms": "7",
            "samples": "3",
        }
    ]
    for make in (cold_start_sections, memory_sections, parts_sections):
        assert make(rows[2:]) == []


def test_a_series_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="1 values of 'host' for 2 rows"):
        BarsPlot("", ["a", "b"], {"host": [1.0]})
