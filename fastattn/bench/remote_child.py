"""The child's side of remote.py: runs a contender in a process, or a Python environment, of its own.

    python remote_child.py WORKER.py ARGUMENT...

needs numpy and nothing of fastattn. WORKER.py defines

    def prepare(child):                       # once; what it raises is the row's reason
        with child.stage("load"):             # build times, in order
            model = ORTModel.from_pretrained(child.arguments[0])
        child.versions["optimum"] = optimum.__version__

        def task(request, arrays):            # once a workload: plain JSON values, and arrays by name
            def run():                        # the timed call
                return {"logits": model(**arrays)}            # arrays by name, or
                # return {"tokens": tokens}, {"first_token_ms": [12.0]}    with named parts of the call
            return run

        return task

and may `raise child.missing("optimum")`. One JSON object a line goes each way; arrays lie in .npz files in
the folder the parent names. Whatever the worker and its libraries print goes to stderr.

    child:  {"ready": true, "stages_ms": {..}, "versions": {..}}
    parent: {"do": "task", "task": 0, "request": {..}, "arrays": "path.npz"}   child: {"task": 0}
    parent: {"do": "run", "task": 0, "calls": 5}
    child:  {"wall_s": .., "cpu_s": .., "peak_bytes": .. | null, "parts": {..}}
    parent: {"do": "answer", "task": 0, "path": "path.npz"}                     child: {"path": "path.npz"}
    parent: closes the pipe, and the child ends
    child, instead of any of these: {"error": "message", "type": "ValueError"}
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Tuple, Union  # noqa: UP035

__all__ = ["Child", "serve"]

_FOLDER = Path(__file__).resolve().parent

# Written for the child's Python, which may be older than fastattn's.
Output = Union[Mapping[str, Any], Tuple[Mapping[str, Any], Mapping[str, Sequence[float]]]]  # noqa: UP006, UP007
Run = Callable[[], Output]
MakeTask = Callable[[Mapping[str, Any], Mapping[str, Any]], Run]


def _load(name: str) -> Any:
    """A module beside this file, by its path: the folder itself must not be searched for modules."""
    spec = importlib.util.spec_from_file_location(f"_fastattn_{name}", _FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


process = _load("process")


class MissingError(RuntimeError):
    """What the worker needs is not on this machine; made by `Child.missing`."""


class Child:
    """What a worker's `prepare` is given.

    Attributes:
        arguments: those after the worker's path.
        versions: of the packages it uses, for the worker to fill in.
        stages_ms: what `stage` timed.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self.arguments = list(arguments)
        self.versions: dict[str, str] = {}
        self.stages_ms: dict[str, float] = {}
        self._count_memory()

    def _count_memory(self) -> None:
        process.return_free_memory()
        self._floor_bytes, self._code_bytes = process.resident_bytes(), process.code_bytes()

    def beyond(self, peak_bytes: int | None) -> int | None:
        """What of a peak is the contender's: not the libraries loaded since, nor what converting left."""
        if peak_bytes is None or self._floor_bytes is None:
            return None
        return max(0, peak_bytes - self._floor_bytes - (process.code_bytes() - self._code_bytes))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a step of the build; memory is counted from the last one that is a "load"."""
        if name == "load":
            self._count_memory()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.stages_ms[name] = self.stages_ms.get(name, 0.0) + (time.perf_counter() - begin) * 1e3

    def missing(self, what: str) -> MissingError:
        """The error to raise where something is not on this machine: the row says "missing: what"."""
        return MissingError(what)


class _Task:
    """One workload: the call, and what its last call gave."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._output: Mapping[str, Any] = {}

    def sample(self, calls: int, child: Child) -> dict[str, Any]:
        """Times of `calls` calls, taken here: the pipe and the parent have no part in them."""
        self._output = {}
        process.wait_until_idle()
        knows_peak = process.reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(calls):
            output = self._run()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        peak = process.peak_bytes() if knows_peak else None
        parts: Mapping[str, Sequence[float]] = {}
        if isinstance(output, tuple):
            output, parts = output
        self._output = output
        # Worker threads that spin on would slow the contender that comes next, in another process.
        process.wait_until_idle()
        return {
            "wall_s": wall,
            "cpu_s": cpu,
            "peak_bytes": child.beyond(peak),
            "parts": {name: [float(each) for each in values] for name, values in parts.items()},
        }

    def save(self, path: str) -> dict[str, Any]:
        """Write the last output where the parent reads it."""
        import numpy

        arrays: dict[str, Any] = {name: numpy.asarray(each) for name, each in self._output.items()}
        numpy.savez(path, **arrays)
        return {"path": path}


def serve(prepare: Callable[[Child], MakeTask], arguments: Sequence[str] = ()) -> None:
    """Answer the parent, on stdin and stdout, until it closes the pipe; see the top of this file.

    Args:
        prepare: the worker's.
        arguments: `Child.arguments`.
    """
    # Libraries print to stdout, from C++ too: the pipe to the parent moves to a descriptor of its own.
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    process.offer_to_out_of_memory_killer()
    import numpy  # before the memory is read: it is not the contender's

    child = Child(arguments)
    make_task: MakeTask
    tasks: dict[int, _Task] = {}

    def build(_: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal make_task
        make_task = prepare(child)
        return {"ready": True, "stages_ms": child.stages_ms, "versions": child.versions}

    def act(message: Mapping[str, Any]) -> dict[str, Any]:
        if message["do"] == "task":
            with numpy.load(message["arrays"]) as stored:
                arrays = {name: stored[name] for name in stored.files}
            tasks[message["task"]] = _Task(make_task(message["request"], arrays))
            return {"task": message["task"]}
        task = tasks[message["task"]]
        if message["do"] == "run":
            return task.sample(message["calls"], child)
        return task.save(message["path"])

    def reply(action: Callable[[Mapping[str, Any]], dict[str, Any]], message: Mapping[str, Any]) -> bool:
        try:
            answer = action(message)
        except Exception as error:
            answer = {"error": str(error), "type": type(error).__name__}
        pipe.write(json.dumps(answer) + "\n")
        pipe.flush()
        return "error" not in answer

    if reply(build, {}):
        for line in sys.stdin:
            reply(act, json.loads(line))


if __name__ == "__main__":
    # Modules beside this file have names that packages have too.
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != _FOLDER]
    serve(runpy.run_path(sys.argv[1])["prepare"], sys.argv[2:])
