"""One recovery: a student, its teacher and their rows, trained, saved as it goes, measured and reported."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastattn.bench.files import write_text
from fastattn.compress.distillation import Distillation, named_outputs
from fastattn.report import format_table
from fastattn.swap import optimized

if TYPE_CHECKING:
    from fastattn.compress.recovery_trainer import RecoveryTrainer

__all__ = ["Metrics", "Recovery", "RecoveryReport"]

SCHEMA = "fastattn.recovery/1"
_RECORD = "recovery.json"
_CHECKPOINTS = "checkpoints"
# A run is saved so often, or every so many steps where it is long: what an interruption can cost.
_SAVES, _MOST_STEPS = 10, 500
# Of the steps, over which the learning rate rises from zero.
_WARM_UP = 0.1
# Outputs that evaluation need not keep.
_UNMEASURED = ("hidden_states", "encoder_hidden_states", "decoder_hidden_states", "attentions",
               "cross_attentions", "past_key_values", "encoder_last_hidden_state")  # fmt: skip

Metrics = Callable[[Any], dict[str, float]]


@dataclass
class RecoveryReport:
    """What `recover` did.

    Attributes:
        settings: the arguments that decide the result.
        steps: optimizer steps of the whole run, those before an interruption counted.
        resumed_from: the step this call began at; 0 where nothing had been done.
        seconds: that this call trained.
        history: the training loss along the run, each {"step", "loss", "learning_rate"}.
        metrics: of the student "before" and "after" and of the "teacher", on the evaluation rows; empty
            without them.
    """

    settings: dict[str, Any]
    steps: int = 0
    resumed_from: int = 0
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def table(self) -> str:
        """The metrics side by side, then what was run."""
        names = sorted({name for each in self.metrics.values() for name in each})
        rows = [[who, *[_figure(self.metrics[who].get(name)) for name in names]] for who in self.metrics]
        ran = f"{self.steps} steps" + (f", resumed at {self.resumed_from}" if self.resumed_from else "")
        if self.history:
            ran += f", training loss {self.history[0]['loss']:.4g} to {self.history[-1]['loss']:.4g}"
        return "\n\n".join([format_table(("model", *names), rows)] * bool(names) + [ran])


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


@dataclass
class Recovery:
    """A run: what is trained on what, checked and not yet begun."""

    student: nn.Module
    teacher: nn.Module | None
    train_rows: Any
    eval_rows: Any
    folder: Path
    tokenizer: Any
    metrics: Metrics | None
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            value = self.settings[name]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer of 1 or more")
        if not self.settings["learning_rate"] > 0:
            raise ValueError(
                f"learning_rate is {self.settings['learning_rate']!r}; it must be above 0, such as 5e-5"
            )
        config = getattr(self.student, "config", None)
        kind = getattr(config, "problem_type", None)
        self.distillation = Distillation(
            self.settings["temperature"],
            self.settings["hidden_states"],
            independent=kind in ("regression", "multi_label_classification"),
            encoder_decoder=bool(getattr(config, "is_encoder_decoder", False)),
        )
        self.device = next(self.student.parameters()).device.type
        self.halves = self.settings["precision"] == "bf16"
        self.steps = self.settings["epochs"] * -(-len(self.train_rows) // self.settings["batch_size"])

    def loss(self, student: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a batch and the student's output."""
        teaches = self.teacher is not None and self.settings["loss"] != "task"
        # A plain module has no such argument.
        more: dict[str, Any] = {}
        if teaches and self.settings["hidden_states"] and hasattr(self.student, "config"):
            more = {"output_hidden_states": True}
        output = student(**inputs, **more)
        parts = []
        if self.settings["loss"] != "distillation":
            own = named_outputs(output).get("loss")
            if own is None:
                raise ValueError(
                    f"{type(self.student).__name__} returns no loss for {', '.join(inputs)}; give labels its "
                    "forward takes, or loss='distillation'"
                )
            parts.append(own)
        if teaches:
            assert self.teacher is not None
            # The trainer casts in the model it trains alone.
            with torch.no_grad(), torch.autocast(self.device, torch.bfloat16, self.halves):
                taught = self.teacher(**inputs, **more)
            parts.append(self.distillation.loss(output, taught, inputs))
        return torch.stack(parts).sum(), output

    def rehearse(self) -> None:
        """Two rows through both models and the loss, so that what does not fit is said before any work."""
        with TemporaryDirectory() as place:
            # A trainer makes its folder.
            trainer = self.trainer(place=Path(place))
            batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        few = {
            name: each[:2] if isinstance(each, Tensor) and each.dim() else each
            for name, each in batch.items()
        }
        with torch.no_grad(), _evaluating(self.student), _evaluating(self.teacher):
            self.loss(self.student, few)

    def open_record(self, resume: bool) -> dict[str, Any]:
        """What is known of this run from before, and `output_dir` ready for it.

        Raises:
            ValueError: it holds a run of other arguments.
        """
        identity = {
            **self.settings,
            "rows": len(self.train_rows),
            "first_row": _digest(self.train_rows[0]),
            "shapes": _digest({name: list(each.shape) for name, each in self.student.named_parameters()}),
        }
        file = self.folder / _RECORD
        if resume and file.is_file():
            record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            known = record["identity"]
            if differing := [name for name in identity if known.get(name) != identity[name]]:
                raise ValueError(
                    f"{self.folder} holds a run of other arguments: {', '.join(differing)} differ "
                    f"({', '.join(str(known.get(name)) for name in differing)} there); give another "
                    "output_dir, or resume=False to begin anew"
                )
            return record
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"output_dir {self.folder} is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / _CHECKPOINTS, ignore_errors=True)
        record = {"schema": SCHEMA, "identity": identity, "metrics": {}}
        write_text(file, json.dumps(record, indent=1))
        return record

    def run(self, record: dict[str, Any]) -> RecoveryReport:
        with (
            _own_forward(self.student),
            _own_forward(self.teacher),
            optimized(self.student, mode="training"),
            _teaching(self.teacher),
        ):
            # Measured once: a student that is resumed is no longer the one it was.
            if self.eval_rows is not None and "before" not in record["metrics"]:
                record["metrics"]["before"] = self.measure(self.student)
                if self.teacher is not None:
                    record["metrics"]["teacher"] = self.measure(self.teacher)
                write_text(self.folder / _RECORD, json.dumps(record, indent=1))
            trainer = self.trainer()
            checkpoint = _last_checkpoint(self.folder / _CHECKPOINTS)
            begin = time.monotonic()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            seconds = time.monotonic() - begin
            metrics = dict(record["metrics"])
            if self.eval_rows is not None:
                metrics["after"] = self.measure(self.student)
        # Gradients of a finished run are only memory.
        self.student.zero_grad(set_to_none=True)
        report = RecoveryReport(
            self.settings,
            trainer.state.global_step,
            0 if checkpoint is None else int(checkpoint.name.rsplit("-", 1)[1]),
            seconds,
            [
                {name: entry[name] for name in ("step", "loss", "learning_rate")}
                for entry in trainer.state.log_history
                if "loss" in entry
            ],
            metrics,
        )
        self.save()
        write_text(self.folder / _RECORD, json.dumps({**record, **report.to_dict()}, indent=1))
        return report

    def save(self) -> None:
        student: Any = self.student
        if hasattr(student, "save_pretrained"):
            student.save_pretrained(self.folder)
        else:
            from safetensors.torch import save_model

            save_model(student, str(self.folder / "model.safetensors"))
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(self.folder)

    def measure(self, model: nn.Module) -> dict[str, float]:
        """The loss on the labels and the metrics, of the evaluation rows."""
        training = model.training
        found = self.trainer(model).evaluate(ignore_keys=list(_UNMEASURED))
        model.train(training)
        left_out = ("runtime", "per_second", "eval_model_preparation_time")
        return {
            name.removeprefix("eval_"): float(value)
            for name, value in found.items()
            if not name.endswith(left_out) and name != "epoch"
        }

    def trainer(self, model: nn.Module | None = None, *, place: Path | None = None) -> RecoveryTrainer:
        """A trainer of the student; or, for a model given, one that only measures it on its own loss."""
        from fastattn.compress.recovery_trainer import recovery_trainer

        return recovery_trainer(
            model or self.student,
            None if model is not None else self.loss,
            self.train_rows,
            self.eval_rows,
            self.tokenizer,
            self.metrics,
            output_dir=str(place or self.folder / _CHECKPOINTS),
            num_train_epochs=self.settings["epochs"],
            learning_rate=self.settings["learning_rate"],
            per_device_train_batch_size=self.settings["batch_size"],
            per_device_eval_batch_size=self.settings["batch_size"],
            warmup_steps=int(self.steps * _WARM_UP),
            save_steps=min(_MOST_STEPS, -(-self.steps // _SAVES)),
            logging_steps=max(1, self.steps // (5 * _SAVES)),
            seed=self.settings["seed"],
            bf16=self.halves,
            use_cpu=self.device == "cpu",
        )


@contextmanager
def _evaluating(model: nn.Module | None) -> Iterator[None]:
    """In eval mode for the duration, and in its own again after."""
    training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        yield
    finally:
        if model is not None:
            model.train(training)


@contextmanager
def _own_forward(model: nn.Module | None) -> Iterator[None]:
    """With the model's own forward again after: for bf16, accelerate puts one that casts on the instance."""
    before = set() if model is None else set(model.__dict__)
    try:
        yield
    finally:
        for name in ("forward", "_original_forward"):
            if model is not None and name not in before:
                model.__dict__.pop(name, None)


@contextmanager
def _teaching(teacher: nn.Module | None) -> Iterator[None]:
    if teacher is None:
        yield
        return
    with optimized(teacher, mode="inference"), _evaluating(teacher):
        yield


def _last_checkpoint(folder: Path) -> Path | None:
    """The last that is whole: the trainer's state is written last."""
    found = [path for path in folder.glob("checkpoint-*") if (path / "trainer_state.json").is_file()]
    return max(found, key=lambda path: int(path.name.rsplit("-", 1)[1]), default=None)


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
