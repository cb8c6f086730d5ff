"""What an exported graph is for: the operator set, whose operators, in which precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = ["PRECISIONS", "TARGETS", "Target", "current_target", "using_target"]

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight", "int4-weight")


@dataclass(frozen=True)
class Target:
    """One target of `fastattn.export`.

    Attributes:
        name: what `export` calls it.
        opset: of ai.onnx.
        contrib: whether ONNX Runtime's own operators (com.microsoft) may be used.
        provider: the ONNX Runtime execution provider that runs it.
        precisions: those that run well there.
        addition: the operator of a residual addition before a norm. On the CPU ONNX Runtime fuses Add and
            LayerNormalization to SkipLayerNormalization, there a scalar loop seven times slower; Sum escapes
            it.
        layouts: those written under `layouts="auto"`, besides what every export has.
    """

    name: str
    opset: int
    contrib: bool
    provider: str
    precisions: tuple[str, ...]
    addition: str = "Sum"
    layouts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.precisions) - set(PRECISIONS)
        if unknown:
            raise ValueError(f"precisions has {sorted(unknown)}; they must be of {PRECISIONS}")

    @property
    def opsets(self) -> dict[str, int]:
        """Operator set -> version."""
        return {"ai.onnx": self.opset, **({"com.microsoft": 1} if self.contrib else {})}


_QUANTIZED = ("int8", "int8-weight", "int4-weight")

TARGETS = {
    target.name: target
    for target in (
        # Opset 20 is what torch exports and the last that web runtimes of 2025 take; onnx's own default is
        # newer than ONNX Runtime accepts.
        Target("cpu", 20, True, "CPUExecutionProvider", ("fp32", *_QUANTIZED)),
        Target("cuda", 20, True, "CUDAExecutionProvider", ("fp32", "fp16", "int8-weight", "int4-weight"), "Add"),
        Target("web", 20, True, "CPUExecutionProvider", ("fp32", *_QUANTIZED), layouts=("transformers.js",)),
        Target("standard", 23, False, "CPUExecutionProvider", ("fp32", "int8")),
    )
}

_CURRENT: ContextVar[Target] = ContextVar("fastattn_onnx_target", default=TARGETS["cpu"])


def current_target() -> Target:
    """The target that translations are written for; "cpu" outside `using_target`."""
    return _CURRENT.get()


@contextmanager
def using_target(target: Target) -> Iterator[None]:
    """Translate for `target` within this context."""
    token = _CURRENT.set(target)
    try:
        yield
    finally:
        _CURRENT.reset(token)
