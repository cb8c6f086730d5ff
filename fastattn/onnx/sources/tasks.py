"""What a model's head is for, in optimum's words."""

from __future__ import annotations

from typing import Any

from torch import nn

__all__ = ["infer_task"]

# End of a class's name -> its task, where optimum's manager knows none, or that of another auto class which
# can load this one too: BART's language model comes first among those that fill masks, and CLIP's two towers
# with their similarities among the models without a head.
_OWN = {
    "ForNextSentencePrediction": "next-sentence-prediction",
    "ForPreTraining": "pretraining",
    "EncoderModel": "feature-extraction",
    "ModelWithProjection": "feature-extraction",
    "BartForConditionalGeneration": "text2text-generation",
    "CLIPModel": "zero-shot-image-classification",
}


def infer_task(model: nn.Module, task: str | None) -> str:
    """The task of the model's head.

    Args:
        model: a transformers model, or one of a class derived from one of transformers'.
        task: what the caller thinks it is: optimum's name or a synonym, "-with-past" included.

    Raises:
        ImportError: optimum is missing.
        ValueError: the class is of no known task, or of another than `task`.
    """
    found = _of_class(model)
    if task is None or task.removesuffix("-with-past") == found:
        return found
    manager = _tasks_manager()
    wanted = manager.map_from_synonym(task).removesuffix("-with-past")
    if wanted == found:
        return found
    name = type(model).__name__
    known = sorted({*manager.get_all_tasks(), *_OWN.values()})
    if wanted not in known:
        raise ValueError(f"task is {task!r}, which is none of {', '.join(known)}")
    config: Any = model.config
    loader = _loader(manager, wanted, getattr(config, "model_type", None))
    way = f"load the model with {loader}" if loader else "load the model with that head"
    raise ValueError(f"task is {task!r}, but {name} has the head of {found!r}; {way}, or leave task out")


def _of_class(model: nn.Module) -> str:
    manager = _tasks_manager()
    # A class of the user's own has the task of the one it is derived from.
    for base in type(model).__mro__:
        if not base.__module__.startswith("transformers."):
            continue
        for ending, task in _OWN.items():
            if base.__name__.endswith(ending):
                return task
        try:
            found: str = manager.infer_task_from_model(base)
        except ValueError:
            continue
        return found
    raise ValueError(
        f"no task is known of {type(model).__name__}; classes that one of transformers' auto classes loads "
        "can be exported (AutoModel, AutoModelForSequenceClassification, ...), and, with example_inputs, "
        "modules that are no transformers models"
    )


def _loader(manager: Any, task: str, model_type: str | None) -> str | None:
    """The auto class that loads a model with the head for `task`."""
    try:
        return str(manager.get_model_class_for_task(task, model_type=model_type).__name__)
    except (ValueError, KeyError, AttributeError):
        return None


def _tasks_manager() -> Any:
    try:
        from optimum.exporters.tasks import TasksManager
    except ImportError as error:
        raise ImportError(
            f"optimum, which names a model's task, cannot be imported ({error}); "
            'pip install "fastattn[onnx]"',
            name=error.name,
        ) from error
    return TasksManager
