"""Who else used the machine while something was measured."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastattn.bench import load
from fastattn.bench.load import LoadMeter

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/stat")


@linux
def test_other_processes_count_and_this_one_does_not() -> None:
    def share(work: str) -> float:
        meter, end = LoadMeter(), time.perf_counter() + 0.6
        other = subprocess.Popen([sys.executable, "-c", work])
        while time.perf_counter() < end:
            pass
        found = meter.read()["others_share"]
        other.kill()
        other.wait()
        assert found is not None and 0 <= found <= 1
        return found

    cores = os.cpu_count() or 1
    assert share("while True: pass") >= 0.2 / cores
    found = LoadMeter().read()
    assert found["load_average_before"] is not None and found["others_share"] in (None, 0.0)


@linux
def test_time_stolen_by_the_hypervisor_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "_PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text("cpu MHz\t\t: 2000.000\nflags : a\ncpu MHz\t\t: 3000.000\n")
    (tmp_path / "stat").write_text("cpu  100 0 100 800 0 0 0 0 0 0\ncpu0 1 2 3\n")
    meter = LoadMeter()
    # 200 ticks: 60 idle, 40 stolen, and 100 busy, of which this process had next to none.
    (tmp_path / "stat").write_text("cpu  180 0 120 850 10 0 0 40 0 0\ncpu0 1 2 3\n")
    found = meter.read()
    assert found["stolen_share"] == 0.2 and found["cpu_mhz"] == 2500.0
    assert found["others_share"] == pytest.approx(0.5, abs=0.2)


def test_what_the_system_does_not_tell_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(load, "_PROC", tmp_path)
    found = LoadMeter().read()
    assert found["others_share"] is None and found["stolen_share"] is None and found["cpu_mhz"] is None
