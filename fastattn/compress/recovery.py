"""`recover`: training after compression, taught by the model as it was, through transformers' Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastattn.compress.recovery_run import Metrics, Recovery, RecoveryReport

__all__ = ["LOSSES", "PRECISIONS", "RecoveryReport", "recover"]

LOSSES = ("auto", "task", "distillation", "both")
PRECISIONS = ("fp32", "bf16")


def recover(
    student: nn.Module,
    teacher: nn.Module | None = None,
    train_dataset: Any = None,
    *,
    eval_dataset: Any = None,
    output_dir: str | Path,
    loss: str = "auto",
    temperature: float = 2.0,
    hidden_states: bool = True,
    epochs: int = 1,
    learning_rate: float = 5e-5,
    batch_size: int = 32,
    resume: bool = True,
    tokenizer: Any = None,
    metrics: Metrics | None = None,
    seed: int = 0,
    precision: str = "fp32",
) -> RecoveryReport:
    """Train a compressed model back towards what it could do, in place, by distillation from `teacher`.

    It trains with transformers' `Trainer` (AdamW, the learning rate rising over a tenth of the steps and then
    falling to zero), padding-free where fastattn knows the layers. Ten times a run it is saved below
    `output_dir`; called again with the same arguments after an interruption it goes on from there, and ends
    with the same weights. What is trained is written to `output_dir` for `fastattn.load`.

    Args:
        student: the model to train, float32, on the device it shall train on; it stays in its own mode.
        teacher: the model before compression, on the same device; it is not changed. None trains on the
            labels alone.
        train_dataset: rows, each a mapping of `forward`'s arguments as a tokenizer gives them (lists of
            token ids are padded with `tokenizer`); "labels" where there are any.
        eval_dataset: rows with labels; both models are measured on them, before and after.
        output_dir: a folder, made where it does not exist.
        loss: "distillation" (what `Distillation` compares), "task" (the model's own loss on its labels),
            "both" (their sum), or "auto": "both" with a teacher and labels, else the one that can be had.
        temperature, hidden_states: as in `Distillation`; layers are mapped where the student has fewer.
        epochs, learning_rate, batch_size: of the training; batches are drawn by `seed`.
        resume: False begins anew and throws away what an earlier run left in `output_dir`.
        tokenizer: pads rows of unequal length, and is saved beside the model.
        metrics: as `Trainer`'s `compute_metrics`: an `EvalPrediction` to named figures.
        seed: of the batches and of dropout; the global generators are set to it, as `Trainer` does.
        precision: "fp32", or "bf16": products in bfloat16, the teacher's too; weights in float32.

    Returns:
        The report.

    Raises:
        ValueError: an argument that is not one of the accepted, no rows, no trainable parameters, a loss
            that cannot be had from what was given, models that do not answer alike, or an `output_dir` with
            an unfinished run of other arguments. Nothing is changed then.
        ImportError: transformers or accelerate is missing.

    Example:
        >>> import tempfile, transformers
        >>> config = transformers.BertConfig(
        ...     vocab_size=50, hidden_size=16, num_attention_heads=2, num_hidden_layers=2,
        ...     intermediate_size=32,
        ... )
        >>> teacher = transformers.BertForSequenceClassification(config)
        >>> config.num_hidden_layers = 1
        >>> student = transformers.BertForSequenceClassification(config)
        >>> rows = [{"input_ids": [2, 7 + index, 3]} for index in range(8)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recover(student, teacher, rows, output_dir=folder, batch_size=4).steps
        2
    """
    _require()
    run = Recovery(
        student, teacher, train_dataset, eval_dataset, Path(output_dir), tokenizer, metrics,
        settings=dict(
            loss=_check(student, teacher, train_dataset, loss, precision), temperature=temperature,
            hidden_states=hidden_states, epochs=epochs, learning_rate=learning_rate, batch_size=batch_size,
            seed=seed, precision=precision,
        ),
    )  # fmt: skip
    run.rehearse()
    record = run.open_record(resume)
    training = student.training
    try:
        return run.run(record)
    finally:
        student.train(training)


def _require() -> None:
    missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(f'recover needs {", ".join(missing)}: pip install "fastattn[compress]"')


def _check(student: Any, teacher: Any, rows: Any, loss: str, precision: str) -> str:
    """The loss to train on, after every check that needs no computation."""
    if loss not in LOSSES:
        raise ValueError(f"loss is {loss!r}; it must be one of {', '.join(LOSSES)}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    for name, model in (("student", student), ("teacher", teacher)):
        if not isinstance(model, nn.Module) and (name == "student" or model is not None):
            raise ValueError(f"{name} is a {type(model).__name__}; a torch.nn.Module is accepted")
    if teacher is student:
        raise ValueError("teacher is the student itself; give a copy made before compressing it")
    trained = [each for each in student.parameters() if each.requires_grad]
    if not trained:
        raise ValueError("the student has no parameter that requires a gradient; recover before quantizing")
    if teacher is not None and _device(teacher) != _device(student):
        raise ValueError(
            f"the teacher is on {_device(teacher)} and the student on {_device(student)}; put both on one"
        )
    if rows is None or not hasattr(rows, "__len__") or not len(rows):
        raise ValueError(
            f"train_dataset is {type(rows).__name__} without rows; give a sequence of mappings, such as "
            '[{"input_ids": [...], "labels": 0}, ...]'
        )
    if not isinstance(rows[0], Mapping):
        raise ValueError(f"a row of train_dataset is a {type(rows[0]).__name__}; a mapping is accepted")
    has_labels = any("label" in name for name in rows[0])
    if loss in ("distillation", "both") and teacher is None:
        raise ValueError(f"loss {loss!r} needs a teacher: the model before it was compressed")
    if loss in ("task", "both") and not has_labels:
        raise ValueError(f"loss {loss!r} needs labels, and rows have only {', '.join(rows[0])}")
    if loss != "auto":
        return loss
    if teacher is None and not has_labels:
        raise ValueError("there is neither a teacher nor a label to learn from")
    return "task" if teacher is None else "both" if has_labels else "distillation"


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
