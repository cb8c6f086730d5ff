"""What a caller of `fastattn.quantize` may ask for, checked before any work."""

from __future__ import annotations

from dataclasses import dataclass

from fastattn.ops.packed_weight import GROUP_SIZES, SCHEMES

__all__ = ["MAX_ERRORS", "QuantizationSettings"]

METHODS = ("auto", "absmax", "hqq", "gptq")
KV_CACHES = (None, "int8", "fp8")

# A layer whose relative error is above is kept as it is. Gaussian weights have 0.7% (int8), 2.6% (fp8) and 9%
# (int4 in groups of 64): these are about three times as much, which only outliers reach.
MAX_ERRORS = {"int8": 0.03, "int8-weight": 0.03, "int4-weight": 0.25, "fp8": 0.08}


@dataclass(frozen=True)
class QuantizationSettings:
    """How linear layers are quantized.

    Args:
        scheme: "int8", "int8-weight", "int4-weight" or "fp8".
        group_size: columns that share a scale in "int4-weight": 32, 64 or 128.
        method: "absmax" rounds to the nearest, "hqq" fits the zero points of "int4-weight", "gptq" makes up
            for each column's error in the next ones and needs calibration; "auto" takes, for "int4-weight",
            "gptq" where there is calibration and else "hqq", and for the others "absmax".
        smooth: SmoothQuant's alpha in [0, 1] for "int8" and "fp8", needs calibration; None: not smoothed.
        max_error: a layer whose relative error is above is kept; None: `MAX_ERRORS` of the scheme.
        kv_cache: None, "int8" or "fp8": what `generate` keeps keys and values in.
        faster_at: a layer that is not faster quantized at so many rows is kept; None: whatever its speed.
        calibrated: whether calibration data is there.

    Raises:
        ValueError: a value that is none of the accepted, or that the scheme or missing calibration rules out.
    """

    scheme: str
    group_size: int = 64
    method: str = "auto"
    smooth: float | None = None
    max_error: float | None = None
    kv_cache: str | None = None
    faster_at: int | None = None
    calibrated: bool = False

    def __post_init__(self) -> None:
        _check_choice("scheme", self.scheme, SCHEMES)
        _check_choice("group_size", self.group_size, GROUP_SIZES)
        _check_choice("method", self.method, METHODS)
        _check_choice("kv_cache", self.kv_cache, KV_CACHES)
        if self.method == "hqq" and self.scheme != "int4-weight":
            raise ValueError(f"method 'hqq' is for scheme 'int4-weight'; scheme is {self.scheme!r}")
        if self.method == "gptq" and self.scheme == "fp8":
            raise ValueError("method 'gptq' is for integer schemes; scheme is 'fp8', which takes 'absmax'")
        if self.method == "gptq" and not self.calibrated:
            raise ValueError("method 'gptq' needs calibration: batches the model is run on")
        if self.smooth is not None:
            if not 0.0 <= self.smooth <= 1.0:
                raise ValueError(f"smooth is {self.smooth}; SmoothQuant's alpha must lie in [0, 1]")
            if self.scheme not in ("int8", "fp8"):
                raise ValueError(
                    f"smooth is for schemes that quantize activations, 'int8' and 'fp8'; scheme is "
                    f"{self.scheme!r}"
                )
            if not self.calibrated:
                raise ValueError("smooth needs calibration: batches the model is run on")
        if self.max_error is not None and not self.max_error > 0.0:
            raise ValueError(f"max_error is {self.max_error}; it must be above 0 (0.05 allows 5%)")
        rows = self.faster_at
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(
                f"faster_at is {rows!r}; it must be a whole number of rows, 1 or more: the tokens of a batch"
            )

    @property
    def limit(self) -> float:
        """The largest relative error of a layer that is quantized."""
        return MAX_ERRORS[self.scheme] if self.max_error is None else self.max_error

    @property
    def rounding(self) -> str:
        """The method, "auto" resolved."""
        if self.method != "auto":
            return self.method
        if self.scheme != "int4-weight":
            return "absmax"
        return "gptq" if self.calibrated else "hqq"


def _check_choice(name: str, given: object, accepted: tuple[object, ...]) -> None:
    if given not in accepted:
        raise ValueError(f"{name} is {given!r}; accepted are {', '.join(map(repr, accepted))}")
