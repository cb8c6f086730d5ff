"""`sweep`: several compressions of one model, each measured against the model as it was."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastattn
from fastattn.bench import Contender, Workload, capture_environment, measure, paired_ratio
from fastattn.bench.contender import describe
from fastattn.bench.contenders.source import copy_of
from fastattn.bench.files import write_text
from fastattn.compress.frontier import SCHEMA, UNTOUCHED, SweepPoint, SweepResult, pareto
from fastattn.compress.sweep_batches import timed_batches
from fastattn.compress.sweep_export import exported
from fastattn.compress.sweep_points import auto_points, named_points, title
from fastattn.swap import unfuse

__all__ = ["sweep"]

# Called with a module, or with what `fastattn.load` opens of an export, which is called alike.
Evaluate = Callable[[Any], "float | Mapping[str, float]"]
Recover = Callable[[nn.Module, nn.Module, Path], Any]

# Timing of one point against the untouched model.
_TIMING_S, _MOST_ROUNDS, _KNOWN_TO = 6.0, 60, 0.02
_FILE, _PAGE = "sweep.json", "sweep.html"
# In a folder of a model: all of it was written.
_COMPLETE = "notes.json"


def sweep(
    model: nn.Module,
    evaluate: Evaluate,
    points: str | Iterable[Mapping[str, Any]] = "auto",
    *,
    folder: str | Path,
    recover: Recover | None = None,
    calibration: Any = None,
    workload: Workload | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None,
    budget_s: float | None = None,
    higher_is_better: bool = True,
) -> SweepResult:
    """Compress copies of `model` in several ways and measure what each costs and gains; `model` is unchanged.

    Every point is pruned, recovered, swapped, quantized, exported, evaluated and timed: its batches in the
    same rounds as the untouched model's. What is finished is in `folder` and read back when the sweep is
    called again; a point that fails is a row with its reason, tried again then. After every point `folder`
    has the result so far as sweep.json and, where plotly is installed, sweep.html; exports and models of
    transformers are saved below it.

    Args:
        model: any module, in the precision it is used in.
        evaluate: gives a copy's score, or named figures of which the first is the score. Of an exported
            point it is called with what `fastattn.load` opens, which is called as the model is.
        points: "auto" (see `auto_points`), or mappings of "prune" (arguments of `fastattn.prune`), "recover"
            (False leaves it out), "quantize" (a scheme, or arguments of `fastattn.quantize`), "optimize"
            (False keeps the plain layers), "export" (a precision, or arguments of `fastattn.export`; the
            graphs then run in ONNX Runtime) and "name".
        folder: made where it does not exist.
        recover: trains a pruned student, called with the student, the untouched model and a folder for its
            checkpoints; None leaves pruned models as they are.
        calibration: inputs for pruning and quantizing by. An int8 export rounds by each batch's own range.
        workload: what is timed: a `fastattn.bench.Workload`, a batch, or several batches run one after the
            other. None takes the ragged batch that suits the model. A module of your own is traced for
            export with the first batch.
        budget_s: no point is begun after so many seconds; the rest are rows "not reached".
        higher_is_better: what the score means; False for a perplexity.

    Returns:
        The result.

    Raises:
        ValueError: a point with an unknown key or argument, two of one name, no points, or a `folder` with
            the sweep of another model.

    Example:
        >>> import tempfile, torch
        >>> model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
        >>> batch = {"src": torch.randn(2, 4, 16)}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result = sweep(model, lambda each: 1.0, [{"name": "fused"}], folder=folder, workload=batch)
        >>> [point.name for point in result.points]
        ['untouched', 'fused']
    """
    wanted = auto_points(model, recovers=recover is not None) if isinstance(points, str) else list(points)
    if points != "auto" and isinstance(points, str):
        raise ValueError(
            f'points is {points!r}; it must be "auto" or mappings of prune, quantize and export arguments'
        )
    named = named_points(wanted)
    batches, text = timed_batches(model, workload)
    work = _Sweep(model, evaluate, Path(folder), recover, calibration, batches)
    identity = {"model": _weights_digest(model), "workload": _digest(text)}
    known = _read_back(work.folder, identity)
    work.folder.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    done: list[SweepPoint] = []
    metric = "score"
    result = None
    with tqdm(total=len(named) + 1, desc="sweep", disable=None, leave=False) as bar:
        for name, options in [(UNTOUCHED, {}), *named.items()]:
            bar.set_postfix_str(name)
            found = known.get(name)
            if found is not None and found.status == "measured" and found.options == options:
                done.append(found)
            elif budget_s is not None and time.monotonic() - begin > budget_s:
                done.append(SweepPoint(name, options, "not reached", f"{budget_s:g} s had passed"))
            else:
                done.append(work.point(name, options))
            if metric == "score" and done[-1].figures:
                metric = next(iter(done[-1].figures))
            result = SweepResult(
                tuple(pareto(done, higher_is_better=higher_is_better)), type(model).__name__, metric,
                higher_is_better, text, capture_environment(),
            )  # fmt: skip
            _write(result, work.folder, identity)
            bar.update()
    assert result is not None
    return result


@dataclass
class _Sweep:
    """What every point is made from."""

    model: nn.Module
    evaluate: Evaluate
    folder: Path
    recover: Recover | None
    calibration: Any
    batches: list[dict[str, Tensor]]
    # Modules that have no folder format: what was pruned and recovered, with its notes.
    students: dict[str, tuple[nn.Module, list[str]]] = field(default_factory=dict)

    def point(self, name: str, options: dict[str, Any]) -> SweepPoint:
        """One row, whatever happens."""
        try:
            student, notes = self.compressed(name, options)
            size, place = _held_bytes(student), None
            if (export := options.get("export")) is not None:
                place = self.new_place(name)
                student, size = exported(student, export, place, self.batches[0])
            figures = self.evaluate(student)
            if not isinstance(figures, Mapping):
                figures = {"score": figures}
            figures = {key: float(value) for key, value in figures.items()}
            measured = SweepPoint(
                name,
                options,
                score=next(iter(figures.values())),
                figures=figures,
                model_bytes=size,
                notes=tuple(notes),
            )
            measured = self.timed(measured, student)
            if place is None and name != UNTOUCHED and hasattr(student, "save_pretrained"):
                place = self.new_place(name)
                _save(student, place, [])
            return replace(
                measured, folder=None if place is None else place.relative_to(self.folder).as_posix()
            )
        except Exception as error:
            return SweepPoint(name, options, "failed", describe(error))

    def compressed(self, name: str, options: dict[str, Any]) -> tuple[nn.Module, list[str]]:
        notes: list[str] = []
        prune = options.get("prune")
        student = self.untouched() if prune is None else self.pruned(prune, options, notes)
        if name == UNTOUCHED:
            return student, notes
        if options.get("optimize", True):
            notes += fastattn.optimize(student).notes
        if quantize := options.get("quantize"):
            given = {"scheme": quantize} if isinstance(quantize, str) else dict(quantize)
            if self.calibration is not None:
                given.setdefault("calibration", self.calibration)
            notes += fastattn.quantize(student, **given).notes
        return student.eval(), notes

    def untouched(self) -> nn.Module:
        student = copy_of(self.model)
        unfuse(student)
        return student

    def pruned(self, prune: Mapping[str, Any], options: Mapping[str, Any], notes: list[str]) -> nn.Module:
        """The pruned and recovered student. Points that differ in what comes after share it: it is kept in
        the folder, for a search over measured times need not find the same sizes twice.
        """
        recovers = self.recover is not None and options.get("recover", True)
        place = self.folder / "pruned" / _slug(title({"prune": prune}))
        final = place / ("recovered" if recovers else "student")
        student = self.kept(final, notes)
        if student is not None:
            return student
        student = self.kept(place / "student", notes)
        if student is None:
            # Gradients are needed to recover, and by importances that are gradients.
            student = copy.deepcopy(self.model)
            unfuse(student)
            given = dict(prune)
            if self.calibration is not None:
                given.setdefault("calibration", self.calibration)
            notes += fastattn.prune(student, **given).notes
            self.keep(student, place / "student", notes)
        if recovers:
            assert self.recover is not None
            for parameter in student.parameters():
                parameter.requires_grad_(parameter.is_floating_point())
            self.recover(student, self.untouched(), place / "training")
            self.keep(student, final, notes)
        return student.eval().requires_grad_(False)

    def keep(self, student: nn.Module, place: Path, notes: list[str]) -> None:
        if not _save(student, place, notes):
            self.students[place.as_posix()] = copy.deepcopy(student), list(notes)

    def kept(self, place: Path, notes: list[str]) -> nn.Module | None:
        if place.as_posix() in self.students:
            student, said = self.students[place.as_posix()]
            student = copy.deepcopy(student)
        elif (place / _COMPLETE).is_file():
            said = json.loads((place / _COMPLETE).read_text(encoding="utf-8"))
            student = fastattn.load(place)
        else:
            return None
        notes[:] = said
        return student

    def timed(self, point: SweepPoint, student: Any) -> SweepPoint:
        """With its times, and the untouched model's in the same rounds."""
        rows = measure(
            [Contender(UNTOUCHED, self.runner(self.untouched())), Contender(".", self.runner(student))],
            device=next(self.model.parameters()).device.type,
            budget_s=_TIMING_S,
            max_rounds=_MOST_ROUNDS,
            until=_KNOWN_TO,
            resources=False,
        )
        for row in rows:
            if row.status != "measured":
                raise RuntimeError(row.reason)
        baseline, mine = rows
        if point.name == UNTOUCHED:
            return replace(point, latency_ms=statistics.median(mine.wall_ms), speed_up=1.0)
        ratio = paired_ratio(baseline.wall_ms, mine.wall_ms, UNTOUCHED)
        assert ratio is not None
        return replace(
            point,
            latency_ms=statistics.median(mine.wall_ms),
            speed_up=ratio.value,
            speed_up_low=ratio.low,
            speed_up_high=ratio.high,
        )

    def runner(self, model: Any) -> Callable[[], Any]:
        @torch.inference_mode()
        def run() -> Any:
            for batch in self.batches:
                output = model(**batch)
            return output

        return run

    def new_place(self, name: str) -> Path:
        """The point's folder, without what another point of this name left there: loading takes an export
        before a saved model.
        """
        place = self.folder / "models" / _slug(name)
        shutil.rmtree(place, ignore_errors=True)
        return place


def _read_back(folder: Path, identity: Mapping[str, str]) -> dict[str, SweepPoint]:
    """The points an earlier call finished.

    Raises:
        ValueError: they are another model's, or of other batches.
    """
    file = folder / _FILE
    if not file.is_file():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"folder {folder} is a file; name a folder")
        return {}
    saved = json.loads(file.read_text(encoding="utf-8"))
    if saved.get("schema") != SCHEMA:
        raise ValueError(f"{file} has schema {saved.get('schema')!r}, not {SCHEMA!r}; give another folder")
    if differing := [name for name in identity if saved["identity"].get(name) != identity[name]]:
        raise ValueError(f"{folder} holds a sweep of another {' and '.join(differing)}; give another folder")
    return {each["name"]: SweepPoint(**{**each, "notes": tuple(each["notes"])}) for each in saved["points"]}


def _write(result: SweepResult, folder: Path, identity: Mapping[str, str]) -> None:
    write_text(folder / _FILE, json.dumps({**result.to_dict(), "identity": dict(identity)}, indent=1) + "\n")
    try:
        result.write_html(folder / _PAGE)
    except ImportError:
        # The page takes plotly; table and JSON do not.
        return


def _save(model: Any, place: Path, notes: list[str]) -> bool:
    """A model of transformers, and last its notes, which mark that all is there; False for any other."""
    if not hasattr(model, "save_pretrained"):
        return False
    place.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(place)
    write_text(place / _COMPLETE, json.dumps(notes))
    return True


def _held_bytes(model: nn.Module) -> int:
    storages = {}
    for tensor in (*model.parameters(), *model.buffers()):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _weights_digest(model: nn.Module) -> str:
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
