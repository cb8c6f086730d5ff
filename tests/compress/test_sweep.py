"""The sweep: points measured against the untouched model, resumed, failures as rows, the frontier right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastattn
from fastattn.compress import sweep_run
from fastattn.compress.frontier import SweepPoint, SweepResult, pareto
from fastattn.compress.sweep_points import auto_points
from fastattn.compress.sweep_run import sweep


class Notes:
    def __init__(self, *notes: str) -> None:
        self.notes = list(notes)


class Network(nn.Module):
    """Time and size grow with the width."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, width), nn.Linear(width, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(x).relu())


def prune(
    model: Any, ffn: float = 0.0, target_speedup: float | None = None, calibration: Any = None
) -> Notes:
    """Stands for `fastattn.prune` on a module it would not know."""
    width = int(model.up.out_features * (1 - ffn))
    if width < 1:
        raise ValueError("nothing would be left")
    model.up, model.down = nn.Linear(64, width), nn.Linear(width, 64)
    return Notes(f"kept {width}")


def quantize(model: Any, scheme: str, calibration: Any = None) -> Notes:
    if scheme not in ("int8", "int4-weight"):
        raise ValueError(f"scheme is {scheme!r}")
    return Notes()


@pytest.fixture(autouse=True)
def _brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_run, "_TIMING_S", 0.05)
    monkeypatch.setattr(fastattn, "prune", prune, raising=False)
    monkeypatch.setattr(fastattn, "quantize", quantize, raising=False)


BATCH = {"x": torch.randn(32, 64)}
POINTS: list[dict[str, Any]] = [
    {"name": "fused"},
    {"prune": {"ffn": 0.9}, "name": "narrow"},
    {"prune": {"ffn": 1.0}, "name": "empty"},
    {"prune": {"ffn": 0.9}, "quantize": "int8"},
]


def kept_width(model: Any) -> dict[str, float]:
    return {"accuracy": model.up.out_features / 256, "width": model.up.out_features}


def run(folder: Path, evaluate: Any = kept_width, points: Any = POINTS, **options: Any) -> SweepResult:
    torch.manual_seed(0)
    return sweep(Network().eval(), evaluate, points, folder=folder, workload=BATCH, **options)


def test_every_point_is_measured_a_failing_one_is_a_row_and_the_model_stays(tmp_path: Path) -> None:
    model = Network().eval()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    result = sweep(model, kept_width, POINTS, folder=tmp_path, workload=BATCH)
    points = {point.name: point for point in result.points}
    assert list(points) == ["untouched", "fused", "narrow", "empty", "pruned ffn 0.9, int8"]
    assert result.metric == "accuracy" and points["narrow"].figures["width"] == 25
    assert points["untouched"].score == 1.0 and points["untouched"].speed_up == 1.0
    assert points["narrow"].model_bytes == 4 * (64 * 25 * 2 + 25 + 64)
    assert points["narrow"].speed_up_low <= points["narrow"].speed_up <= points["narrow"].speed_up_high
    assert points["narrow"].notes == ("kept 25",)
    assert points["empty"].status == "failed" and "nothing would be left" in points["empty"].reason
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    saved = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert saved["schema"] == "fastattn.sweep/1" and len(saved["points"]) == 5
    table = result.table()
    assert "empty: failed: ValueError: nothing would be left" in table and "note: narrow: kept 25" in table


def test_what_is_finished_is_read_back_and_what_failed_is_tried_again(tmp_path: Path) -> None:
    calls: list[int] = []

    def count(model: Any) -> float:
        calls.append(model.up.out_features)
        return float(len(calls))

    def interrupted(model: Any) -> float:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return count(model)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, interrupted)
    first = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))["points"]
    assert [point["name"] for point in first] == ["untouched", "fused"]
    calls.clear()
    result = run(tmp_path, count)
    # The two that were finished keep their figures; only the others were evaluated.
    assert calls == [25, 25]
    assert [point.score for point in result.points[:2]] == [point["score"] for point in first]
    calls.clear()
    again = run(tmp_path, count)
    assert calls == [] and again.points[3].status == "failed"
    assert [point.latency_ms for point in again.points] == [point.latency_ms for point in result.points]
    # The same name with other arguments is another point.
    changed = run(tmp_path, count, [{**POINTS[1], "prune": {"ffn": 0.5}}])
    assert calls == [128] and changed.points[1].score == 1.0


def test_another_model_or_other_batches_in_the_folder_are_an_error(tmp_path: Path) -> None:
    run(tmp_path, points=POINTS[:1])
    torch.manual_seed(1)
    with pytest.raises(ValueError, match="a sweep of another model"):
        sweep(Network().eval(), kept_width, POINTS[:1], folder=tmp_path, workload=BATCH)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="a sweep of another workload"):
        sweep(Network().eval(), kept_width, POINTS[:1], folder=tmp_path, workload={"x": torch.randn(4, 64)})


def test_pruned_students_are_recovered_once_with_the_untouched_teacher(tmp_path: Path) -> None:
    seen: list[tuple[int, int, bool]] = []

    def recover(student: Any, teacher: Any, folder: Path) -> None:
        trainable = all(each.requires_grad for each in student.parameters())
        seen.append((student.up.out_features, teacher.up.out_features, trainable))
        with torch.no_grad():
            student.up.bias.fill_(7.0)

    result = run(tmp_path, lambda model: model.up.bias[0].item(), recover=recover)
    points = {point.name: point for point in result.points}
    assert seen == [(25, 256, True)]
    assert points["narrow"].score == points["pruned ffn 0.9, int8"].score == 7.0
    assert points["fused"].score != 7.0


def test_the_budget_leaves_rows_that_say_so(tmp_path: Path) -> None:
    result = run(tmp_path, budget_s=0.0)
    assert {point.status for point in result.points} == {"not reached"}
    assert run(tmp_path).points[0].status == "measured"


def point(name: str, score: float, size: int, speed: float) -> SweepPoint:
    return SweepPoint(name, score=score, model_bytes=size, speed_up=speed, latency_ms=1 / speed)


def test_the_frontier_is_what_nothing_else_beats() -> None:
    points = [
        point("untouched", 0.90, 100, 1.0),
        point("small", 0.89, 25, 1.0),
        point("fast", 0.85, 100, 3.0),
        point("worse than fast", 0.85, 100, 2.9),
        point("twin of fast", 0.85, 100, 3.0),
        point("no number", float("nan"), 1, 9.0),
        SweepPoint("failed", status="failed", reason="no"),
    ]
    best = {each.name for each in pareto(points) if each.pareto}
    assert best == {"untouched", "small", "fast", "twin of fast"}
    losses = {each.name for each in pareto(points[:4], higher_is_better=False) if each.pareto}
    assert losses == {"small", "fast"}


def test_the_page_holds_every_point_and_loads_nothing(tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    points = pareto([point("untouched", 0.9, 100, 1.0), point("<b>int8</b>", 0.89, 30, 3.0)])
    failed = SweepPoint("int4", status="failed", reason="ValueError: no")
    result = SweepResult((*points, failed), "Network", "accuracy", workload="a batch of 8x32")
    page = result.write_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;int8&lt;/b&gt;" in page and "<b>int8" not in page.split("<script>")[0]
    assert "int4: failed: ValueError: no" in page and "1 of 3 points were not measured" in page
    assert 'src="http' not in page and "default-src 'none'" in page


@pytest.mark.parametrize(
    ("points", "message"),
    [
        ("all", 'it must be "auto"'),
        ([], "points is empty"),
        ([{"heads": 0.5}], "a point has 'heads'; it may have name, prune"),
        ([{"prune": {"head": 0.5}}], "fastattn.prune has no argument 'head'; it has ffn"),
        ([{"prune": 0.5}], "a point's prune is 0.5"),
        ([{"quantize": "int8"}, {"quantize": {"scheme": "int8"}}], "two points are named 'int8'"),
    ],
)
def test_bad_points_are_said_before_any_work(tmp_path: Path, points: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", points=points)
    assert not (tmp_path / "out").exists()


def test_a_module_that_does_not_say_what_it_takes_needs_a_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give a batch"):
        sweep(Network(), kept_width, POINTS, folder=tmp_path)


def test_chosen_points_prune_further_where_the_loss_is_recovered() -> None:
    model = Network()
    targets = {
        each["prune"]["target_speedup"] for each in auto_points(model, recovers=True) if "prune" in each
    }
    without = {
        each["prune"]["target_speedup"] for each in auto_points(model, recovers=False) if "prune" in each
    }
    assert without < targets and "fp8" not in [
        each.get("quantize") for each in auto_points(model, recovers=True)
    ]
