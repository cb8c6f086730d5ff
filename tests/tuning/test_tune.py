"""Tuning: what is measured decides, what is stored is read and said, and nothing of it changes an answer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import fastattn
from fastattn.bench.parity import Parity
from fastattn.bench.rows import Row, with_ratios
from fastattn.cli import tune as verb
from fastattn.tuning import fills
from fastattn.tuning.cache import cache_file, load, machines, save
from fastattn.tuning.machine import Machine, this_machine
from fastattn.tuning.outcome import Tuning
from fastattn.tuning.tuner import tune

transformers = pytest.importorskip("transformers")

Cost = Callable[[str, tuple[str, ...], int], float]


class FakeMeasure:
    """Rows with the times `cost(contender, all names, number of the question)` gives; nothing is run."""

    def __init__(self, cost: Cost) -> None:
        self.cost, self.asked = cost, 0

    def __call__(self, contenders: Any, **_: Any) -> list[Row]:
        names = tuple(each.name for each in contenders)
        rows = [
            Row(
                name,
                "fp32",
                "measured",
                wall_ms=tuple(self.cost(name, names, self.asked) for _ in range(7)),
                parity=Parity(0.0, 1.0, 1e-4),
            )
            for name in names
        ]
        self.asked += 1
        return [with_ratios(row, rows[0], None) for row in rows]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning.json"


def constant(**faster: float) -> FakeMeasure:
    """Every contender takes 10 ms, those named (spaces as underscores) 10 ms over their factor."""
    return FakeMeasure(lambda name, *_: 10.0 / faster.get(name.replace(" ", "_"), 1.0))


def tuned(**changes: Any) -> Tuning:
    return replace(Tuning(this_machine("cpu"), "2026-01-31 12:00"), **changes)


def test_what_is_faster_is_chosen() -> None:
    measure = constant(padded=1.2, bf16=2.9, multiple_of_16=1.3)
    found = tune("cpu", measure=measure)
    assert found.fills == tuple((batch * length, min(fills.FILLS)) for batch, length in fills.SHAPES)
    assert (found.precision, found.multiple) == ("bf16", 16)
    assert found.precision_ratio == pytest.approx(2.9)
    assert any("2.9x" in line and "torch.bfloat16" in line for line in found.advice())
    assert any("pad_to_multiple_of=16" in line for line in found.advice())
    assert "chosen" in found.table() and "applied by optimize(): a batch runs padded" in found.table()


def test_what_is_not_surely_faster_changes_nothing() -> None:
    """Equal on the whole, but every other round one or the other is ahead by far."""
    turn = iter(range(10**6))
    found = tune("cpu", measure=FakeMeasure(lambda name, *_: 10.0 if next(turn) % 2 else 14.0))
    assert found.applied() == [] and found.advice() == []
    assert all(fill == 1.0 for _, fill in found.fills) and found.multiple == 1 and found.precision == "fp32"


def test_the_threshold_is_the_lowest_fill_at_which_padded_still_wins() -> None:
    asked: list[int] = []

    def cost(name: str, names: tuple[str, ...], question: int) -> float:
        if names != ("packed", "padded"):
            return 10.0
        asked.append(question) if question not in asked else None
        # The first shape: three fills won, the fourth lost. The other shapes: lost at once.
        return 8.0 if name == "padded" and asked.index(question) < 3 else 10.0

    found = tune("cpu", measure=FakeMeasure(cost))
    assert [fill for _, fill in found.fills] == [fills.FILLS[2], 1.0, 1.0]


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()

    def interrupted(contenders: Any, **_: Any) -> list[Row]:
        for each in contenders:
            if "thread" in each.name:
                torch.set_num_threads(before + 1)
                raise KeyboardInterrupt
        return constant()(contenders)

    with pytest.raises(KeyboardInterrupt):
        tune("cpu", measure=interrupted)
    assert torch.get_num_threads() == before


def test_every_contender_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contenders themselves, run once each: none is compared with an answer that is not its own."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(fills, "SHAPES", ((2, 8),))
    statuses: dict[str, str] = {}

    def once(contenders: Any, *, check: Any, **_: Any) -> list[Row]:
        rows = []
        for each in contenders:
            try:
                figure = check(each, (each.run or each.prepare())())
            except fastattn.bench.MissingError as error:
                rows.append(Row(each.name, each.dtype, "missing", str(error)))
                continue
            assert figure.passed, f"{each.name}: {figure}"
            rows.append(Row(each.name, each.dtype, "measured", parity=figure))
        statuses.update({row.name: row.status for row in rows})
        return rows

    tune("cpu", measure=once)
    assert statuses.pop("triton") == "missing"
    assert set(statuses.values()) == {"measured"}
    assert {"bf16", "int8", "padded", "multiple of 32"} <= set(statuses)


def test_it_is_stored_and_read_again_beside_other_machines() -> None:
    other = Machine("cpu", "another processor, 64 cores", "2.11.0")
    found = tune("cpu", measure=constant(padded=1.2, bf16=2.0))
    save(replace(found, machine=other))
    assert load(this_machine("cpu")) is None
    save(found)
    assert load(this_machine("cpu")) == found
    assert set(machines()) == {other.key, found.machine.key}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[1, 2]",
        '{"schema": "fastattn.tuning/9", "machines": {}}',
        '{"schema": "fastattn.tuning/1"}',
        "\x00",
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(cache: Path, text: str, bert_config: Any) -> None:
    cache.parent.mkdir()
    cache.write_text(text, encoding="utf-8")
    with pytest.warns(RuntimeWarning, match=r"tuning\.json is ignored"):
        report = fastattn.optimize(transformers.BertModel(bert_config))
    assert report.swapped and not report.notes


@pytest.mark.parametrize(
    "damage",
    [
        {"fills": [[0, 0.5]]},
        {"fills": "many"},
        {"precision": "fp7"},
        {"threads": {"small": "two"}},
        {"multiple": 0},
        {"more": 1},
    ],
    ids=lambda damage: next(iter(damage)),
)
def test_a_damaged_entry_is_ignored_with_a_warning(cache: Path, damage: dict[str, Any]) -> None:
    save(tuned(fills=((1024, 0.9),)))
    held = json.loads(cache.read_text(encoding="utf-8"))
    held["machines"][this_machine("cpu").key] |= damage
    cache.write_text(json.dumps(held), encoding="utf-8")
    with pytest.warns(RuntimeWarning, match="damaged"):
        assert load(this_machine("cpu")) is None


def test_a_failed_write_leaves_what_was_there(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tuned(multiple=8))
    before = cache.read_text(encoding="utf-8")

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        save(tuned(multiple=16))
    assert cache.read_text(encoding="utf-8") == before and list(cache.parent.iterdir()) == [cache]


def test_optimize_reads_it_and_says_so(bert_config: Any) -> None:
    save(tuned(fills=((1024, 0.9),), precision="bf16", precision_ratio=2.9))
    model = transformers.BertModel(bert_config)
    original = type(model.encoder)
    notes = fastattn.optimize(model).notes
    assert any(
        "runs padded, not packed, from 90% fill" in note and str(cache_file()) in note for note in notes
    )
    assert any("2.9x as fast" in note for note in notes)
    assert model.encoder.fastattn_threshold == tuned(fills=((1024, 0.9),)).threshold
    assert model.dtype == torch.float32
    fastattn.restore(model)
    assert type(model.encoder) is original
    assert not [name for name in vars(model.encoder) if name.startswith("fastattn")]


@pytest.mark.parametrize("options", [{"mode": "inference"}, {"mode": "training"}])
def test_a_mode_the_caller_names_is_not_tuned(bert_config: Any, options: dict[str, str]) -> None:
    save(tuned(fills=((1024, 0.0),)))
    model = transformers.BertModel(bert_config)
    fastattn.optimize(model)
    assert not fastattn.optimize(model, **options).notes
    assert model.encoder.fastattn_threshold is None


def test_another_machines_file_changes_nothing(bert_config: Any) -> None:
    save(tuned(machine=Machine("cpu", "another processor", "2.11.0"), fills=((1024, 0.0),)))
    model = transformers.BertModel(bert_config)
    assert not fastattn.optimize(model).notes
    assert model.encoder.fastattn_threshold is None


def call(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    return verb.run(parser.parse_args(arguments))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measure = constant(padded=1.2, bf16=2.0)
    monkeypatch.setattr("fastattn.tuning.tuner.tune.__kwdefaults__", {"measure": measure, "progress": False})


def test_the_command_measures_shows_and_forgets(
    cache: Path, measured: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("--device", "cpu", "--budget", "1") == 0
    table = capsys.readouterr().out
    assert "packing" in table and "advice: linears run 2.0x" in table and cache.is_file()
    assert call("--device", "cpu", "--show") == 0
    assert capsys.readouterr().out == table
    assert call("--device", "cpu", "--show", "--json") == 0
    assert json.loads(capsys.readouterr().out)["precision"] == "bf16"
    assert call("--device", "cpu", "--clear") == 0
    assert not cache.exists()
    with pytest.raises(Exception, match="run `fastattn tune`"):
        call("--device", "cpu", "--show")


def test_ctrl_c_writes_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any, **__: Any) -> list[Row]:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastattn.tuning.tuner.tune.__kwdefaults__", {"measure": stop, "progress": False})
    assert call("--device", "cpu") == 130
    assert not cache.exists() and "nothing was written" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_said_before_measuring(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.mkdir(parents=True)
    monkeypatch.setattr("fastattn.tuning.tuner.tune.__kwdefaults__", {"measure": None, "progress": False})
    with pytest.raises(OSError, match="is a folder"):
        call("--device", "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "soon"), "--budget is 'soon'; it must be a number"),
        (("--budget", "0"), "it must be a number of seconds above 0"),
        (("--budget", "nan"), "it must be a number of seconds above 0"),
        (("--device", "tpu"), "it must be one of auto, cpu, cuda"),
    ],
)
def test_wrong_use_is_named(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(Exception, match=message.replace("(", r"\(")):
        call(*arguments)


def test_the_environment_names_the_file(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fastattn.cli import env

    save(tuned())
    assert env.run(argparse.Namespace(json=True)) == 0
    told = json.loads(capsys.readouterr().out)["tuning"]
    assert told["machines"] == [this_machine("cpu").key] and told["file"].endswith("tuning.json")


@pytest.mark.parametrize(
    ("platform", "variables", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "/caches"}, "/caches/fastattn/tuning.json"),
        ("linux", {"XDG_CACHE_HOME": "relative"}, "/home/me/.cache/fastattn/tuning.json"),
        ("darwin", {}, "/home/me/Library/Caches/fastattn/tuning.json"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local/fastattn/tuning.json"),
        ("win32", {}, "/home/me/AppData/Local/fastattn/tuning.json"),
        ("linux", {"FASTATTN_CACHE": "/mine"}, "/mine/tuning.json"),
    ],
)
def test_it_is_in_the_users_cache_folder(
    platform: str, variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("FASTATTN_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("fastattn.tuning.cache.sys.platform", platform)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("/home/me")))
    assert cache_file().as_posix() == expected
