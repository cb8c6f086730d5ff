"""What an exported graph is for: the operator set, whose operators, in which precisions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = [
    "FIRST_OPSET_WITH_ATTENTION",
    "PRECISIONS",
    "TARGETS",
    "Target",
    "current_target",
    "using_target",
]

PRECISIONS = ("fp32", "fp16", "int8", "int8-weight", "int4-weight")

# The first operator set with Attention, RMSNormalization and RotaryEmbedding.
FIRST_OPSET_WITH_ATTENTION = 23


@dataclass(frozen=True)
class Target:
    """One target of `fastattn.export`.

    Attributes:
        name: what `export` calls it.
        opset: of ai.onnx.
        contrib: whether ONNX Runtime's own operators (com.microsoft) may be used.
        provider: the ONNX Runtime execution provider that runs it.
        precisions: those that run well there.
        addition: the operator of a residual addition before a norm, "Sum" or "Add". On the CPU ONNX Runtime
            fuses Add and LayerNormalization to SkipLayerNormalization, there a scalar loop seven times
            slower; Sum escapes it. On a GPU that fusion is the fast form.
        loops: whether attention over a packed batch is a Loop over its sequences. On a GPU every iteration
            would wait for the host to read where a sequence begins; there the sequences are padded for
            attention alone.
        bias_gelu: whether the bias before a GELU stays with the GELU. A CPU's Gemm adds it for free; a GPU's
            writes it to memory first.
        unknown: what the runtime of this target does not have of today's com.microsoft: names of operators,
            "Operator.attribute" and "Operator.input".
        layouts: those written under `layouts="auto"`, besides what every export has.
    """

    name: str
    opset: int
    contrib: bool
    provider: str
    precisions: tuple[str, ...]
    addition: str = "Sum"
    loops: bool = True
    bias_gelu: bool = False
    unknown: frozenset[str] = frozenset()
    layouts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        unknown = set(self.precisions) - set(PRECISIONS)
        if unknown:
            raise ValueError(f"precisions has {sorted(unknown)}; they must be of {PRECISIONS}")
        if self.addition not in ("Sum", "Add"):
            raise ValueError(f"addition is {self.addition!r}; it must be 'Sum' or 'Add'")
        if not self.contrib and (self.opset < FIRST_OPSET_WITH_ATTENTION or not self.loops or self.bias_gelu):
            raise ValueError(
                f"target {self.name!r} may use no contrib operators: its opset must be at least "
                f"{FIRST_OPSET_WITH_ATTENTION}, which has Attention, with loops=True and bias_gelu=False; "
                f"it is {self.opset}, with loops={self.loops} and bias_gelu={self.bias_gelu}"
            )

    @property
    def opsets(self) -> dict[str, int]:
        """Operator set -> version."""
        return {"ai.onnx": self.opset, **({"com.microsoft": 1} if self.contrib else {})}


_QUANTIZED = ("int8", "int8-weight", "int4-weight")

# com.microsoft of ONNX Runtime 1.31 less that of 1.26, as far as an export could hold it.
_SINCE_1_26 = frozenset(
    {
        "GroupQueryAttention.causal",
        "GroupQueryAttention.sliding_window_cache",
        "GroupQueryAttention.qk_norm_epsilon",
        "GroupQueryAttention.q_norm_weight",
        "GroupQueryAttention.k_norm_weight",
        "MatMulNBits.weight_prepacked",
        "MatMulNBitsMlp",
        "MatMulNBitsQkv",
        "GatedAdd",
        "GatedRMSNorm",
        "ScaledSiLU",
        "MRotaryEmbedding",
    }
)

TARGETS = {
    target.name: target
    for target in (
        # Opset 20 is what torch exports and the last that web runtimes of 2025 take; onnx's own default is
        # newer than ONNX Runtime accepts.
        Target("cpu", 20, True, "CPUExecutionProvider", ("fp32", *_QUANTIZED)),
        Target(
            "cuda",
            20,
            True,
            "CUDAExecutionProvider",
            ("fp32", "fp16", "int8-weight", "int4-weight"),
            addition="Add",
            loops=False,
            bias_gelu=True,
        ),
        # transformers.js 4.2 runs ONNX Runtime 1.26: its WebAssembly build is the CPU provider of that
        # version, without a kernel of GatherBlockQuantized (the build with WebGPU, up to 1.31 at least).
        Target(
            "web",
            20,
            True,
            "CPUExecutionProvider",
            ("fp32", *_QUANTIZED),
            unknown=_SINCE_1_26 | {"GatherBlockQuantized"},
            layouts=("transformers.js",),
        ),
        # 24 adds key lengths to Attention, which a mask says as well at the same speed, and fewer runtimes
        # have it.
        Target("standard", FIRST_OPSET_WITH_ATTENTION, False, "CPUExecutionProvider", ("fp32", "int8")),
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
