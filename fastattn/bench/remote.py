"""A contender in a process of its own: another Python environment, or one whose crash must stay its own.

    with RemoteProcess([python, CHILD, worker, model_folder], folder) as child:
        run = child.run({"task": "encode"}, {"input_ids": ids, "attention_mask": mask})
        measure([Contender("ORTModel", prepare=lambda: run.prepared()), ...])

The child times itself (remote_child.py has the protocol): `measure` asks a RemoteRun for its samples.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from fastattn.bench import process
from fastattn.bench.contender import FailedError, MissingError, Prepared
from fastattn.bench.timers import Sample

__all__ = ["CHILD", "RemoteError", "RemoteOutput", "RemoteProcess", "RemoteRun"]

CHILD = Path(__file__).with_name("remote_child.py")
"""The script the command runs, followed by the worker's path and its arguments."""


class RemoteError(FailedError):
    """The child raised, died, hung or did not keep to the protocol; the message says which."""


@dataclass(frozen=True)
class RemoteOutput:
    """What the last call of a sample gave.

    Attributes:
        parts: milliseconds of named parts of that call.
    """

    run: RemoteRun
    parts: Mapping[str, Sequence[float]]

    def arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """The output's arrays by name, fetched now; of the run's latest sample."""
        return self.run.answer()


class RemoteProcess:
    """A child that runs one contender, for as many workloads as are asked for.

    Args:
        command: the child's, such as [python, CHILD, worker, argument].
        folder: where arrays and the child's stderr lie; must exist.
        environment: its environment variables; those of this process if None, without PYTHONPATH and
            PYTHONHOME, which belong to this Python.
        ready_s: the longest its build may take.
        reply_s: the longest it may take over anything later.

    Attributes:
        stages_ms: what building took, in order.
        versions: of the packages it uses.

    Raises:
        MissingError: the worker misses something.
        RemoteError: the command cannot be run, or the child did not get ready.
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        folder: str | Path,
        *,
        environment: Mapping[str, str] | None = None,
        ready_s: float = 600.0,
        reply_s: float = 120.0,
    ) -> None:
        self.folder = Path(folder)
        self._reply_s = reply_s
        self._tasks = 0
        self._reason = "the contender's process was closed"
        self._kills = process.out_of_memory_kills()
        if environment is None:
            environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
        handle, log = tempfile.mkstemp(prefix="child-", suffix=".log", dir=self.folder)
        self._log = Path(log)
        try:
            self._child = subprocess.Popen(
                [str(each) for each in command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=handle,
                encoding="utf-8",
                errors="replace",
                env=dict(environment),
                # Ctrl-C is ours to handle: the child must not see it, and what it started ends with it.
                start_new_session=os.name == "posix",
            )
        except OSError as error:
            raise RemoteError(f"{command[0]} cannot be run: {error}") from None
        finally:
            os.close(handle)
        # Runs once: by `close`, with the last reference, or when Python exits.
        self.close = weakref.finalize(self, _end, self._child)
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        assert self._child.stdout is not None
        threading.Thread(target=_read, args=(self._child.stdout, self._lines), daemon=True).start()
        ready = self._reply(ready_s, "getting ready")
        if ready.get("ready") is not True:
            self._give_up(f"sent {json.dumps(ready)[:160]} where it was to say that it is ready")
        self.stages_ms: dict[str, float] = dict(ready.get("stages_ms", {}))
        self.versions: dict[str, str] = dict(ready.get("versions", {}))

    def run(self, request: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> RemoteRun:
        """One workload in the child.

        Args:
            request: what the worker's task needs to know, plain JSON values.
            arrays: its inputs by name.

        Raises:
            RemoteError: the worker cannot do it, or the child is gone.
        """
        task, self._tasks = self._tasks, self._tasks + 1
        with tempfile.TemporaryDirectory(dir=self.folder) as inputs:
            path = Path(inputs) / "inputs.npz"
            np.savez(path, **dict(arrays))  # type: ignore[arg-type]
            self.ask({"do": "task", "task": task, "request": dict(request), "arrays": str(path)})
        return RemoteRun(self, task)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for the child's reply.

        Raises:
            RemoteError: it raised, died, took too long or answered in another language.
        """
        assert self._child.stdin is not None
        if not self.close.alive:
            raise RemoteError(self._reason)
        # A broken pipe: the child is gone, and waiting for its reply tells how.
        with suppress(OSError, ValueError):
            self._child.stdin.write(json.dumps(message) + "\n")
            self._child.stdin.flush()
        return self._reply(self._reply_s, f"to {message['do']}")

    def __enter__(self) -> RemoteProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _reply(self, limit_s: float, doing: str) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=limit_s)
        except queue.Empty:
            self._give_up(f"gave no answer within {limit_s:g} s ({doing})")
        except BaseException:
            # Interrupted: a reply that is still to come would be taken for the next one.
            self.close()
            raise
        if not line:
            self._give_up(self._death())
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            self._give_up(f"sent {line.strip()[:80]!r}, which is not its protocol")
        if "error" in answer:
            if answer.get("type") == MissingError.__name__:
                raise MissingError(answer["error"])
            raise RemoteError(f"{answer.get('type')}: {answer['error']}")
        return answer

    def _death(self) -> str:
        """How the child ended."""
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(10.0)
        status = self._child.returncode
        if status is None:
            return "closed its output"
        if status >= 0:
            return f"ended with status {status}"
        name = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
        if -status == getattr(signal, "SIGKILL", 0) and process.out_of_memory_kills() > self._kills:
            return f"out of memory: ended by the system ({name})"
        return f"died of {name}"

    def _give_up(self, what: str) -> Any:
        self.close()
        said = ""
        with suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").split("\n")
            said = next((line.strip() for line in reversed(lines) if line.strip()), "")
        subject = "" if what.startswith("out of memory") else "the contender's process "
        self._reason = f"{subject}{what}" + (f"; its last words: {said[:160]}" if said else "")
        raise RemoteError(self._reason) from None


class RemoteRun:
    """One workload in a child; times itself, so `measure` takes its samples from it.

    Attributes:
        peak_host_bytes: what the child held at the peak of the latest sample, beyond what it held before it
            loaded the contender; None where it cannot tell.
    """

    def __init__(self, child: RemoteProcess, task: int) -> None:
        self.child, self.task = child, task
        self.peak_host_bytes: int | None = None

    def __call__(self) -> RemoteOutput:
        """One call."""
        return self.sample(1).output

    def sample(self, calls: int) -> Sample:
        """The child's wall and processor seconds of `calls` calls, and the last one's output."""
        reply = self.child.ask({"do": "run", "task": self.task, "calls": calls})
        self.peak_host_bytes = reply["peak_bytes"]
        return Sample(reply["wall_s"], reply["cpu_s"], None, RemoteOutput(self, reply["parts"]))

    def answer(self) -> dict[str, np.ndarray[Any, Any]]:
        """The arrays of the latest sample's last call."""
        with tempfile.TemporaryDirectory(dir=self.child.folder) as outputs:
            path = Path(outputs) / "answer.npz"
            self.child.ask({"do": "answer", "task": self.task, "path": str(path)})
            with np.load(path) as stored:
                return {name: stored[name] for name in stored.files}

    def prepared(self) -> Prepared:
        """For `Contender.prepare`: with the build's times, the arrays as the answer, and the parts."""
        return Prepared(
            self,
            self.child.stages_ms,
            answer=lambda output: output.arrays(),
            parts=lambda output: output.parts,
            versions=self.child.versions,
        )


def _read(stream: IO[str], lines: queue.SimpleQueue[str]) -> None:
    """Hand on what the child writes; an empty line for its end."""
    with suppress(OSError, ValueError):
        for line in stream:
            lines.put(line)
    lines.put("")


def _end(child: subprocess.Popen[str]) -> None:
    """End the child and what it started, and wait for it, so that no zombie is left."""
    if child.poll() is None:  # else its number may be another's by now
        if os.name == "posix":
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()
        child.wait()
    with suppress(OSError):
        if child.stdin is not None:
            child.stdin.close()
