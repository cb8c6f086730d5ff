"""A contender in a process of its own: timed by itself, and whatever becomes of it is a row."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastattn.bench import Contender, Interrupted, MissingError, Parity, measure
from fastattn.bench.remote import CHILD, RemoteError, RemoteProcess
from fastattn.bench.rows import Row

DOUBLING = """
import sys, time
import numpy

def prepare(child):
    with child.stage("load"):
        weights = numpy.ones(24 << 17)  # 24 MiB
    child.versions["numpy"] = numpy.__version__
    print("libraries talk on stdout")

    def task(request, arrays):
        def run():
            BODY
            double = arrays["x"] * (request["factor"] * weights[0])
            return {"double": double}, {"first_ms": [1.5], "later_ms": [2.5, 3.5]}
        return run
    return task
"""

StartChild = Callable[..., RemoteProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartChild]:
    """Starts a worker whose timed call does `body` first."""
    with ExitStack() as stack:

        def make(body: str = "pass", text: str = DOUBLING, **options: Any) -> RemoteProcess:
            worker = tmp_path / "worker.py"
            worker.write_text(text.replace("BODY", body))
            command = [sys.executable, CHILD, worker]
            return stack.enter_context(RemoteProcess(command, tmp_path, **options))

        yield make


def inputs() -> dict[str, np.ndarray[Any, Any]]:
    return {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


def right(contender: Contender, answer: Any) -> Parity:
    if isinstance(answer, Mapping):
        np.testing.assert_array_equal(answer["double"], 2 * inputs()["x"])
    return Parity(0.0, 1.0, 1e-4)


def rows_beside_a_healthy_one(child: RemoteProcess, **options: Any) -> list[Row]:
    run = child.run({"factor": 2}, inputs())
    contenders = [Contender("here", lambda: time.sleep(0.002)), Contender("there", prepare=run.prepared)]
    return measure(contenders, check=right, budget_s=0, **options)


def test_a_remote_contender_is_a_row_like_any_other(start: StartChild) -> None:
    here, there = rows_beside_a_healthy_one(start("time.sleep(0.004)"))
    assert (there.status, there.reason) == ("measured", "")
    # It timed itself: the pipe and the settling, some 10 ms, are not in it.
    assert there.median_ms is not None and 4.0 <= there.median_ms < 9.0
    assert there.ratio is not None and there.ratio.baseline == "here" and here.status == "measured"
    assert there.parity is not None and there.parity.passed
    assert there.stages_ms.keys() == {"load"}
    assert there.versions == {"numpy": np.__version__}
    rounds = len(there.wall_ms)
    assert there.parts_ms == {"first_ms": (1.5,) * rounds, "later_ms": (2.5, 3.5) * rounds}


def test_one_child_serves_several_workloads_each_with_its_own_answer(start: StartChild) -> None:
    child = start()
    double, triple = (child.run({"factor": factor}, inputs()) for factor in (2, 3))
    outputs = [double(), triple()]
    for factor, output in zip((2, 3), outputs, strict=True):
        np.testing.assert_array_equal(output.arrays()["double"], factor * inputs()["x"])
    assert child.versions == {"numpy": np.__version__}
    # Nothing is left of what passed between them.
    assert not list(child.folder.glob("**/*.npz"))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_its_peak_memory_is_the_childs_and_its_processor_time_too(start: StartChild) -> None:
    # Each page is written: 40 MiB beside the 24 it holds.
    spins = "end = time.process_time() + 0.02\n            while time.process_time() < end: pass"
    body = f"numpy.ones(40 << 17); {spins}"
    there = rows_beside_a_healthy_one(start(body))[1]
    assert there.peak_host_bytes is not None and 60 < there.peak_host_bytes / 2**20 < 90
    assert there.cpu_median_ms is not None and there.cpu_median_ms >= 20


ENDS = {
    "os.kill(os.getpid(), signal.SIGSEGV)": "the contender's process died of SIGSEGV",
    "print('heap is corrupt', file=sys.stderr); os.abort()": "died of SIGABRT; its last words: ",
    "os.write(2, b'no such weights\\n'); os._exit(3)": "ended with status 3; its last words: no such weights",
    "os.kill(os.getpid(), signal.SIGKILL)": "died of SIGKILL",
    "raise ValueError('wrong shape')": "ValueError: wrong shape",
    "numpy.empty(1 << 50)": "out of memory: ",
    "time.sleep(60)": "gave no answer within 1 s",
}


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("body", ENDS)
def test_a_child_that_fails_is_a_row_that_says_how_and_the_rest_go_on(body: str, start: StartChild) -> None:
    # After it was prepared and found right, in the middle of the rounds.
    text = DOUBLING.replace("import sys, time", "import os, signal, sys, time\ncounted = []")
    child = start(f"counted.append(0)\n            if len(counted) > 3: {body}", text, reply_s=1.0)
    here, there = rows_beside_a_healthy_one(child, min_sample_ms=0)
    assert there.status == "failed" and ENDS[body] in there.reason, there.reason
    assert there.wall_ms == () and there.ratio is None
    assert here.status == "measured" and len(here.wall_ms) == 7


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("import a_package_nobody_has", RemoteError, "No module named 'a_package_nobody_has'"),
        ("def prepare(child): raise child.missing('optimum')", MissingError, "^optimum$"),
        ("def prepare(child): raise OSError('no weights')", RemoteError, "OSError: no weights"),
        ("import time; time.sleep(60)", RemoteError, r"no answer within 2 s \(getting ready\)"),
    ],
)
def test_a_child_that_cannot_be_built_says_why(
    text: str, error: type[Exception], message: str, start: StartChild
) -> None:
    with pytest.raises(error, match=message):
        start(text=text, ready_s=2.0)


@pytest.mark.parametrize(
    ("script", "message"),
    [("print('hello')", "'hello', which is not its protocol"), ("print(7)", "not its protocol")],
)
def test_a_command_that_speaks_another_language_is_refused(script: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RemoteError, match=message):
        RemoteProcess([sys.executable, "-c", script], tmp_path)
    with pytest.raises(RemoteError, match="no-such-python cannot be run"):
        RemoteProcess(["no-such-python"], tmp_path)


def test_modules_beside_the_child_s_script_are_not_found_by_its_imports(start: StartChild) -> None:
    """fastattn.bench has a timing.py, a memory.py and an openvino.py: so do others, under the same names."""
    text = DOUBLING.replace(
        "import sys, time", "import sys, time, importlib.util\nassert not importlib.util.find_spec('timing')"
    )
    assert start(text=text).stages_ms.keys() == {"load"}


def is_gone(pid: int) -> bool:
    """Whether there is no such process, not even one that waits to be reaped."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_while_a_child_works_keeps_the_rows_and_leaves_no_process(
    start: StartChild, tmp_path: Path
) -> None:
    text = DOUBLING.replace("import sys, time", "import os, subprocess, sys, time\ncounted = []").replace(
        "def prepare(child):",
        "def prepare(child):\n    helper = subprocess.Popen(['sleep', '60'])\n"
        "    open(child.arguments[0], 'w').write(f'{os.getpid()} {helper.pid}')",
    )
    worker = tmp_path / "hangs.py"
    worker.write_text(
        text.replace(
            "BODY",
            "counted.append(0)\n            if len(counted) > 9: open('hangs', 'w').close(); time.sleep(60)",
        ).replace("'hangs'", repr(str(tmp_path / "hangs")))
    )
    pids = tmp_path / "pids"
    child = RemoteProcess([sys.executable, CHILD, worker, pids], tmp_path)
    # Two calls of warm-up, seven rounds, and then one that does not end.

    def interrupt() -> None:
        deadline = time.monotonic() + 30
        while not (tmp_path / "hangs").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    # A process that was started in the background of a shell may ignore it.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(Interrupted) as stopped:
            rows_beside_a_healthy_one(child, min_sample_ms=0, min_rounds=20)
    finally:
        signal.signal(signal.SIGINT, handler)
    here, there = stopped.value.rows
    assert here.stopped == there.stopped == "interrupted"
    assert len(here.wall_ms) == len(there.wall_ms) == 7 and there.ratio is not None
    for pid in map(int, pids.read_text().split()):
        deadline = time.monotonic() + 5
        while not is_gone(pid) and time.monotonic() < deadline:
            time.sleep(0.05)  # the helper is reaped by init
        assert is_gone(pid)


def test_closing_is_final_and_may_be_done_twice(start: StartChild) -> None:
    child = start()
    run = child.run({"factor": 2}, inputs())
    child.close()
    child.close()
    with pytest.raises(RemoteError, match="was closed"):
        run()
