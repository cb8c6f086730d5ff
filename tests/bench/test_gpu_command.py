"""benchmarks/gpu.py without a GPU: what it refuses, its smoke section in the interpreter, the cases it would
time made small on the CPU, and how promises are judged.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests" / "gpu")]

import gpu_sections  # noqa: E402
from gpu_sections import attention, decode, norm, pointwise, varlen  # noqa: E402
from gpu_sections.promises import PROMISES, Promise, judge  # noqa: E402
from gpu_sections.record import Record  # noqa: E402
from gpu_sections.sanitizer import find_sanitizer  # noqa: E402
from gpu_sections.table import promises_text, section_text  # noqa: E402
from gpu_sections.timing import Case  # noqa: E402

from fastattn.bench import MissingError  # noqa: E402

TIMED = {"attention": attention, "varlen": varlen, "decode": decode, "norm": norm, "pointwise": pointwise}


def gpu_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments],
        # Nothing but the checkout: not even an installed fastattn on the path.
        env=os.environ | {"PYTHONPATH": ""} | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_stops_before_any_work(tmp_path: Path) -> None:
    result = gpu_command("--output", str(tmp_path / "out"), TRITON_INTERPRET="0")
    assert result.returncode == 2 and "no CUDA or ROCm device" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--section", "attention"], "smoke section only"), (["--section", "smoke"], "set TRITON_INTERPRET=1")],
)
def test_the_cpu_runs_the_smoke_section_in_the_interpreter_only(arguments: list[str], message: str) -> None:
    result = gpu_command("--device", "cpu", *arguments, TRITON_INTERPRET="0")
    assert result.returncode == 2 and message in result.stderr


def test_the_smoke_section_runs_in_the_interpreter(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    result = gpu_command(
        "--section", "smoke", "--device", "cpu", "--output", str(tmp_path), TRITON_INTERPRET="1"
    )
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    smoke = json.loads((tmp_path / "smoke.json").read_text())
    assert smoke["complete"] and not smoke["failures"]
    assert all(entry["passed"] for entry in smoke["entries"]) and len(smoke["entries"]) >= 11
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["sections"] == {"smoke": {"status": "passed", "exit_status": 0}}
    assert summary["environment"]["packages"]["torch"] == torch.__version__


def test_all_sections_together_take_less_than_nine_minutes() -> None:
    spec = (ROOT / "benchmarks" / "gpu.py").read_text()
    grace = int(spec.split("GRACE_S = ")[1].split()[0])
    assert sum(gpu_sections.BUDGETS_S.values()) + grace * len(gpu_sections.BUDGETS_S) <= 540
    for section in gpu_sections.BUDGETS_S:
        assert callable(gpu_sections.load(section).run)


# Every kind of case, small: what a GPU would time is called once on the CPU and checked.
SMALL: dict[str, Callable[[str], Case]] = {
    "plain": partial(attention.plain, sizes=attention.Sizes(2, 2, 48, 32), causal=False),
    "causal GQA": partial(attention.plain, sizes=attention.Sizes(2, 4, 48, 32, 2), causal=True),
    "padding": partial(attention.padding, sizes=attention.Sizes(2, 2, 48, 32)),
    "t5": partial(attention.t5, sizes=attention.Sizes(2, 3, 48, 32)),
    "window": partial(attention.window, sizes=attention.Sizes(2, 2, 48, 32), left=7),
    "softcap": partial(attention.formula, sizes=attention.Sizes(2, 2, 48, 32)),
    "varlen": partial(
        varlen.lengths_case, low=3, high=24, batch=5, heads=2, head_dim=16, causal=False
    ),
    "varlen causal": partial(
        varlen.lengths_case, low=3, high=24, batch=5, heads=2, head_dim=16, causal=True
    ),
    "decode": partial(decode.decode_case, batch=2, positions=64),
    "decode paged": partial(decode.decode_case, batch=2, positions=64, block_size=16),
    "decode int8 paged": partial(decode.decode_case, batch=2, positions=64, kind="int8", block_size=16),
    "decode fp8": partial(decode.decode_case, batch=2, positions=64, kind="fp8"),
    **{
        kind: partial(norm.norm_case, kind=kind, width=64, elements=64 * 70)
        for kind in ("layer_norm", "rms_norm", "add_layer_norm", "add_rms_norm")
    },
    "softmax": partial(pointwise.softmax, width=64, elements=64 * 70),
    "bias_gelu": partial(pointwise.bias_gelu, width=64, elements=64 * 70),
    "silu": partial(pointwise.gated, width=64, kind="silu", elements=128 * 70),
    "gelu_tanh": partial(pointwise.gated, width=64, kind="gelu_tanh", elements=128 * 70),
    "rotary": partial(pointwise.rotary, interleaved=False, positions=8),
    "rotary interleaved": partial(pointwise.rotary, interleaved=True, positions=8),
}  # fmt: skip
# PyTorch's backends that a CPU has not got, and what would be compiled.
GPU_ONLY = ("SDPA cuDNN", "SDPA efficient", "SDPA flash, padded")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sections themselves run on a GPU")
@pytest.mark.parametrize("name", SMALL)
def test_a_case_s_contenders_give_its_answer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    case = SMALL[name](name)
    checked = set()
    for contender in case.contenders:
        if contender.prepare is not None and contender.name == "Liger":
            with pytest.raises(MissingError, match="Liger"):
                contender.prepare()
        elif contender.prepare is not None and contender.name != "PyTorch varlen_attn":
            # Compiling waits for the first call; masks and closures are made here.
            assert callable(contender.prepare())
        if contender.run is None or contender.name.startswith(GPU_ONLY):
            continue
        with torch.no_grad():
            parity = case.check(contender, contender.run())
        assert parity.passed, f"{contender.name}: {parity}"
        checked.add(contender.name)
    assert {"fastattn"} < checked, checked
    assert set(case.baselines) <= {contender.name for contender in case.contenders}
    assert set(case.answers) - {""} <= {contender.name for contender in case.contenders}
    assert case.flops > 0 or case.moved_bytes > 0


@pytest.mark.parametrize("section", TIMED)
def test_promised_cases_and_contenders_exist(section: str) -> None:
    for promise in PROMISES:
        if promise.section == section:
            assert promise.case in TIMED[section].CASES, promise


def row(name: str, milliseconds: float, **more: Any) -> dict[str, Any]:
    measured = {"name": name, "status": "measured", "reason": "", "wall_ms": [milliseconds] * 7}
    plain = {"baseline": False, "tflops": 0.0, "gbps": 0.0, "roofline": 0.0, "ratio": None, "parity": None}
    return {**measured, **plain, "median_ms": milliseconds, "min_ms": milliseconds, **more}


def test_a_promise_is_judged_by_what_was_measured() -> None:
    promise = Promise("faster", "varlen", "case", 1.5, over=("slow", "slower"))
    rows = [row("fastattn", 1.0), row("slow", 1.6), row("slower", 3.0)]
    held = promise.judge({"case": {"rows": rows}}, "any")
    assert held["held"] is True and held["measured"] == pytest.approx(1.6) and held["over"] == "slow"
    rows[1] = row("slow", 1.4)
    assert promise.judge({"case": {"rows": rows}}, "any")["held"] is False
    assert promise.judge({}, "any") | {"held": None} == promise.judge({}, "any")
    rows[0] |= {"status": "wrong", "reason": "wrong answer"}
    assert promise.judge({"case": {"rows": rows}}, "any")["reason"] == "wrong answer"


def test_a_promise_made_for_one_gpu_is_not_judged_on_another() -> None:
    promise = Promise("quick", "attention", "case", 450.0, "tflops", gpu="H100")
    cases = {"case": {"rows": [row("fastattn", 1.0, tflops=400.0)]}}
    assert promise.judge(cases, "NVIDIA H100 80GB HBM3")["held"] is False
    other = promise.judge(cases, "NVIDIA H200")
    assert other["held"] is None and other["measured"] == 400.0


@pytest.mark.parametrize("changes", [{"figure": "speed"}, {"figure": "ratio"}, {"over": ("a",)}])
def test_a_promise_without_sense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"figure is|a ratio, and only"):
        Promise(**{"what": "", "section": "", "case": "", "at_least": 1.0, "figure": "tflops"} | changes)


def test_what_is_promised_is_what_the_issue_asks() -> None:
    bounds = {(promise.case, promise.figure, promise.over): promise.at_least for promise in PROMISES}
    assert bounds["attention-d128-8k", "tflops", ()] == 450
    assert bounds["attention-d64-8k", "ratio", ("SDPA cuDNN",)] == 0.85
    assert [b for (case, _, _), b in bounds.items() if case.startswith("add_layer_norm-")] == [0.97] * 6
    judged = judge({}, "")
    assert len(judged) == len(PROMISES) and all(promise["held"] is None for promise in judged)
    assert "not judged" in promises_text(judged)


def test_a_record_is_on_disk_after_every_entry(tmp_path: Path) -> None:
    record = Record("norm", tmp_path / "norm.json", budget_s=100.0)
    record.set(ceilings={"copy_gbps": 3000.0, "gemm_tflops": 700.0})
    record.add({"case": "a", "rows": [row("fastattn", 1.0, baseline=True)]})
    record.add({"case": "b", "left_out": "the section's time was up", "rows": []})
    record.fail("b: left out")
    content = json.loads((tmp_path / "norm.json").read_text())
    assert not content["complete"] and len(content["entries"]) == 2 and 0 < record.seconds_left <= 100
    text = section_text(content)
    for part in (
        "norm (cut short)",
        "copy 3000 GB/s",
        "1000.0",
        "the section's time was up",
        "failed: b: left out",
    ):
        assert part in text


def test_compute_sanitizer_is_found_in_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "bin" / "compute-sanitizer"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", "")
    assert find_sanitizer() == tool


def test_what_the_sanitizer_watches_runs_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_sections" / "sanitized.py"), "--every", "6"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "FASTATTN_BACKEND": "triton", "PYTHONPATH": ""}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert int(result.stdout.split()[-3]) == result.stdout.count("done: ") >= 7


def test_a_command_past_its_limit_is_stopped_with_its_children(tmp_path: Path) -> None:
    from gpu_sections.processes import STOPPED, Limited

    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert Limited([sys.executable, "-c", parent], tmp_path, os.environ, None).wait(1.0) == STOPPED
    import time

    time.sleep(3.0)
    assert not mark.exists()
