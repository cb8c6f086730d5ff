"""What a contender adds in memory, with real allocations; and too large a shape is a row, not a crash."""

from __future__ import annotations

import errno
import gc
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fastattn.bench import Contender, MissingError, Parity, Prepared, Row, measure, memory, process
from fastattn.bench.contender import describe
from fastattn.bench.energy import EnergyMeter
from fastattn.bench.memory import Memory, MemoryMeter, available_bytes, is_out_of_memory, memory_limit

MIB = 2**20
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, sets RLIMIT_DATA")


def touched(mebibytes: int) -> np.ndarray[Any, Any]:
    """An array whose every page is written."""
    return np.ones(mebibytes * MIB // 8)


def right(contender: Contender, output: Any) -> Parity:
    return Parity(0.0, 1.0, 1e-4)


def peak_mib(row: Row) -> float:
    assert row.peak_host_bytes is not None, row.reason
    return row.peak_host_bytes / MIB


@linux
def test_peak_memory_is_what_a_contender_holds_and_works_with_and_not_what_building_took() -> None:
    def prepare() -> Callable[[], float]:
        touched(200)
        weights = touched(64)
        return lambda: float((weights + 1.0)[-1])  # 64 MiB more

    before = touched(100)  # somebody else's
    rows = measure(
        [
            Contender("light", lambda: 1.0),
            Contender("heavy", prepare=prepare),
            Contender("works", lambda: float(touched(32)[-1])),
        ],
        budget_s=0,
        min_rounds=1,
    )
    assert before[0] == 1.0
    light, heavy, works = map(peak_mib, rows)
    assert light < 8 and 124 < heavy < 140 and 28 < works < 44, (light, heavy, works)


@linux
def test_what_was_built_once_for_several_measurements_counts_in_each() -> None:
    meter = MemoryMeter("cpu")
    weights = touched(48)
    held = meter.added()
    assert held.host_bytes is not None and 47 < held.host_bytes / MIB < 52
    contender = Contender("shared", prepare=lambda: Prepared(lambda: float(weights.sum()), held=held))
    for _ in range(2):
        row = measure([contender], budget_s=0, min_rounds=1)[0]
        assert 46 < peak_mib(row) < 60


def test_memory_is_unknown_where_the_system_does_not_tell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(process, "_PROC", tmp_path / "nothing")
    row = measure([Contender("a", lambda: 1.0)], budget_s=0)[0]
    assert row.status == "measured" and row.peak_host_bytes is None and row.peak_device_bytes is None
    with memory_limit():
        touched(1)


def test_device_memory_is_the_peak_of_a_call_over_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    device = SimpleNamespace(now=100, peak=900)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: device.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: device.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(device, "peak", device.now))
    meter = MemoryMeter("cuda")
    device.now = 400  # weights; building took 900 for a while
    meter.begin_call()
    device.peak = 450
    assert meter.end_call().device_bytes == 350 and meter.added().device_bytes == 300
    assert Memory(1, None) + Memory(2, 3) == Memory(3, None)


@linux
@pytest.mark.parametrize("when", ["preparing", "called"])
def test_more_than_the_machine_has_is_a_row_and_the_rest_go_on(when: str) -> None:
    available = available_bytes()
    assert available is not None

    def allocate() -> torch.Tensor:
        # In pieces that the system would each grant, and could not all back.
        pieces = [torch.empty(available // 10, dtype=torch.int8) for _ in range(12)]
        return pieces[0]

    def prepare() -> Any:
        allocate()

    contenders = [
        Contender("base", lambda: 1.0),
        Contender("large", prepare=prepare) if when == "preparing" else Contender("large", allocate),
        Contender("other", lambda: 1.0),
    ]
    base, large, other = measure(contenders, check=right, budget_s=0)
    assert (large.status, large.reason[:15]) == ("failed", "out of memory: ")
    assert large.wall_ms == () and base.wall_ms and other.ratio is not None


@linux
def test_a_lower_limit_holds_for_every_allocator_and_is_lifted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    monkeypatch.setattr(memory, "available_bytes", lambda: 512 * MIB)

    def all_of(make: Callable[[], Any]) -> Callable[[], int]:
        def run() -> int:
            kept = []
            while len(kept) < 64:
                kept.append(make())
            return len(kept)

        return run

    rows = measure(
        [
            Contender("numpy", all_of(lambda: np.empty(16 * MIB, np.int8))),
            Contender("torch", all_of(lambda: torch.empty(16 * MIB, dtype=torch.int8))),
            Contender("python", all_of(lambda: bytearray(16 * MIB))),
            Contender("modest", lambda: np.ones(16 * MIB, np.int8).sum()),
        ],
        budget_s=0,
    )
    for row in rows[:3]:
        assert row.status == "failed" and row.reason.startswith("out of memory: "), row
    assert rows[3].status == "measured"
    assert resource.getrlimit(resource.RLIMIT_DATA) == limits
    gc.collect()
    assert all_of(lambda: np.empty(16 * MIB, np.int8))() == 64


@linux
def test_onnx_runtime_keeps_to_the_limit_with_and_without_its_arena(monkeypatch: pytest.MonkeyPatch) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    describe_value, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["a", "b"], ["c"])],
        "outer",
        [describe_value("a", kind, ["n", 1]), describe_value("b", kind, [1, "m"])],
        [describe_value("c", kind, ["n", "m"])],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString()
    monkeypatch.setattr(memory, "available_bytes", lambda: 512 * MIB)

    def contender(arena: bool, rows: int) -> Contender:
        options = runtime.SessionOptions()
        options.enable_cpu_mem_arena, options.log_severity_level, options.intra_op_num_threads = arena, 4, 1
        session = runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        feeds = {"a": np.ones((rows, 1), np.float32), "b": np.ones((1, 16384), np.float32)}
        return Contender(f"{rows} rows, {arena=}", lambda: session.run(None, feeds))

    rows = measure([contender(arena, n) for arena in (True, False) for n in (64, 16384)], budget_s=0)
    for small, large in (rows[:2], rows[2:]):
        assert small.status == "measured", small.reason
        assert large.status == "failed" and large.reason.startswith("out of memory: "), large.reason


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
        RuntimeError("Non-zero status code returned while running Mul node. Status Message: std::bad_alloc"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_every_library_s_way_to_say_it_is_named_alike(error: Exception) -> None:
    assert is_out_of_memory(error) and describe(error).lower().startswith("out of memory: ")
    assert describe(error).lower().count("out of memory: ") == 1


def test_other_errors_are_not_taken_for_it() -> None:
    for error in (
        ValueError("mat1 and mat2 cannot be multiplied"),
        MissingError("memory profiler"),
        OSError(),
    ):
        assert not is_out_of_memory(error)


@linux
def test_a_container_s_limit_counts_where_it_is_lower(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def group(folder: str, limit: str, use: str, names: tuple[str, str]) -> None:
        path = tmp_path / folder
        path.mkdir(parents=True, exist_ok=True)
        for name, text in zip(names, (limit, use), strict=True):
            (path / name).write_text(text)
        (path / "memory.stat").write_text("anon 5\ninactive_file 20\nactive_file 3\n")

    v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    (tmp_path / "own").write_text("0::/outer/inner\n")
    group("outer/inner", "max", "50", v2)
    group("outer", "1000", "700", v2)  # what holds is the outer group's
    assert available_bytes() == 323
    (tmp_path / "own").write_text("3:cpu:/\n2:memory:/not/visible/inside\n")
    group("memory", "500", "400", v1)
    assert available_bytes() == 123
    (tmp_path / "own").unlink()
    whole = available_bytes()
    assert whole is not None and whole > 16 * MIB


def fake_nvml(counts: bool = True) -> Any:
    """A GPU that takes 250 W."""
    import time

    module: Any = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.closed = []
    module.nvmlShutdown = lambda: module.closed.append(True)
    module.nvmlDeviceGetHandleByUUID = lambda uuid: {"GPU-1234": "handle"}[uuid]

    def millijoules(handle: str) -> int:
        if not counts:
            raise module.NVMLError("Not Supported")
        assert handle == "handle"
        return round(time.perf_counter() * 250e3)

    module.nvmlDeviceGetTotalEnergyConsumption = millijoules
    return module


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)


def test_energy_is_the_counter_over_the_calls(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    with EnergyMeter.open("cuda") as meter:
        assert meter is not None
        begin, calls = time.perf_counter(), []
        found = meter.per_call(lambda: calls.append(time.sleep(0.1)))
        seconds = time.perf_counter() - begin
    assert found == pytest.approx(250 * seconds / len(calls), rel=0.05)
    assert nvml.closed == [True]


@pytest.mark.parametrize("counts", [False, None])
def test_energy_is_unknown_on_a_cpu_without_the_library_and_where_it_is_not_counted(
    counts: bool | None, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None if counts is None else fake_nvml(counts))
    for device in ("cpu", "cuda"):
        with EnergyMeter.open(device) as meter:
            assert meter is None
