"""Measured launch choices: what `tune` writes is what launches take, and a malformed file is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastattn_kernels import _tuned
from fastattn_kernels._tuned import gpu_of, normalized, read_tuned, tuned_choice
from fastattn_kernels.norm_config import NormConfig, candidates, choose_norm_config
from fastattn_kernels.tune import tune_workload, write_findings
from fastattn_kernels.tune_workloads import WORKLOADS, Workload

CPU = torch.device("cpu")
GPU = "acme-gpu-1"


class Machine:
    """A GPU on which a norm of 256 columns takes as long as `cost` says of its configuration."""

    def __init__(self, cost: Callable[[NormConfig], float], wrong: Callable[[NormConfig], bool]) -> None:
        self.cost, self.wrong = cost, wrong
        self.config: NormConfig | None = None

    def prepare(self, device: torch.device) -> Callable[[], torch.Tensor]:
        def run() -> torch.Tensor:
            self.config = choose_norm_config(4096, 256, 2, "sm_90", gpu_of(device), "norm")
            return torch.ones(8) * (2.0 if self.wrong(self.config) else 1.0)

        return run

    def milliseconds(self, run: Callable[[], Any]) -> float:
        run()
        assert self.config is not None
        return self.cost(self.config)

    def workload(self) -> Workload:
        return Workload("a norm", "norm", self.prepare, lambda architecture: candidates(256, 2))


def machine(
    cost: Callable[[NormConfig], float], wrong: Callable[[NormConfig], bool] = lambda _: False
) -> Machine:
    return Machine(cost, wrong)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FASTATTN_TUNED", str(tmp_path))
    return tmp_path


def test_what_was_fastest_is_written_and_then_chosen(folder: Path) -> None:
    before = choose_norm_config(4096, 256, 2, "sm_90", GPU, "norm")
    simulated = machine(lambda config: 1.0 if config.num_warps == 2 and config.block_rows == 4 else 3.0)
    finding = tune_workload(simulated.workload(), CPU, simulated.milliseconds)
    assert finding.choice is not None and finding.fastest_ms == 1.0 and finding.heuristic_ms == 3.0
    write_findings([finding], GPU, folder / f"{GPU}.json")
    _tuned._table.cache_clear()
    choose_norm_config.cache_clear()
    after = choose_norm_config(4096, 256, 2, "sm_90", GPU, "norm")
    assert (after.num_warps, after.block_rows) == (2, 4) and after != before
    # Other keys, other GPUs and no GPU keep their heuristics.
    assert choose_norm_config(4096, 256, 4, "sm_90", GPU, "norm") == choose_norm_config(4096, 256, 4, "sm_90")
    assert choose_norm_config(4096, 256, 2, "sm_90", None, "norm") == before


def test_a_gain_within_the_noise_keeps_the_heuristic(folder: Path) -> None:
    simulated = machine(lambda config: 0.99 if config.num_warps == 2 else 1.0)
    finding = tune_workload(simulated.workload(), CPU, simulated.milliseconds)
    assert finding.choice is None
    write_findings([finding], GPU, folder / f"{GPU}.json")
    assert read_tuned(folder / f"{GPU}.json") == {}


def test_a_wrong_result_is_never_chosen_however_fast() -> None:
    simulated = machine(
        lambda config: 0.1 if config.num_warps == 2 else 1.0, wrong=lambda config: config.num_warps == 2
    )
    finding = tune_workload(simulated.workload(), CPU, simulated.milliseconds)
    assert finding.choice is None and finding.refused
    assert all("off by" in reason for reason in finding.refused.values())


def test_a_launch_that_fails_is_noted_and_the_rest_is_measured() -> None:
    def cost(config: NormConfig) -> float:
        if config.num_warps == 2:
            raise RuntimeError("out of shared memory")
        return 0.5 if config.num_warps == 8 else 1.0

    simulated = machine(cost)
    finding = tune_workload(simulated.workload(), CPU, simulated.milliseconds)
    assert finding.choice is not None and finding.choice["num_warps"] == 8
    assert finding.refused and "out of shared memory" in next(iter(finding.refused.values()))


def test_tuning_stops_in_time_and_leaves_no_trace() -> None:
    simulated = machine(lambda config: 1.0)
    assert tune_workload(simulated.workload(), CPU, simulated.milliseconds, until=0.0).tried == 0
    assert gpu_of(CPU) is None and tuned_choice("norm", None, block_n=256, element_bytes=2) is None


def test_writing_again_replaces_the_key_and_keeps_the_others(folder: Path) -> None:
    path = folder / f"{GPU}.json"
    other = {"key": {"block_n": 512, "element_bytes": 2}, "choice": {"num_warps": 1}}
    path.write_text(json.dumps({"ops": {"norm": [other], "rotary": [other]}}))
    for warps in (2, 8):
        simulated = machine(lambda config, warps=warps: 0.5 if config.num_warps == warps else 1.0)
        write_findings([tune_workload(simulated.workload(), CPU, simulated.milliseconds)], GPU, path)
    found = read_tuned(path)
    assert len(found) == 3
    (mine,) = [choice for (op, key), choice in found.items() if op == "norm" and ("block_n", "256") in key]
    assert mine["num_warps"] == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[]", 'has no "ops"'),
        ('{"ops": {"norm": [1]}}', "an entry of 'norm' needs objects"),
        ('{"ops": {"norm": [{"key": {}, "choice": {}}]}}', "an entry of 'norm' needs objects"),
        ('{"ops": {"norm": [{"key": {}, "choice": {"num_warps": "4"}}]}}', "must be whole numbers"),
    ],
)
def test_a_malformed_file_is_refused_by_name(folder: Path, text: str, message: str) -> None:
    (folder / "broken.json").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        tuned_choice("norm", "broken", block_n=256)
    assert "broken.json" in str(caught.value)
    _tuned._table.cache_clear()


def test_the_files_that_ship_are_whole_and_named_for_their_gpu() -> None:
    for path in _tuned.TUNED_FOLDER.glob("*.json"):
        read_tuned(path)
        assert json.loads(path.read_text())["gpu"] == path.stem == normalized(path.stem)


def test_names_become_file_names() -> None:
    assert normalized("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert normalized(" AMD Instinct(TM) MI300X ") == "amd-instinct-tm-mi300x"


def test_every_workload_has_a_name_of_its_own_and_candidates() -> None:
    assert len({workload.name for workload in WORKLOADS}) == len(WORKLOADS)
    for workload in WORKLOADS:
        for architecture in ("sm_80", "sm_90", "sm_100", "gfx942"):
            assert list(workload.candidates(architecture)), (workload.name, architecture)
    assert {workload.op for workload in WORKLOADS} >= {
        "attention", "decode_attention", "norm", "softmax", "pointwise", "rotary",
    }  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_command_says_so() -> None:
    command = [sys.executable, "-m", "fastattn_kernels.tune"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 2 and "no CUDA or ROCm device" in result.stderr
