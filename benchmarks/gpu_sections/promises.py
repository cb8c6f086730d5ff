"""What a GPU run must show, as data, and whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastattn.bench import paired_ratio

OURS = "fastattn"


@dataclass(frozen=True)
class Promise:
    """One figure of one case, and what it must reach.

    Attributes:
        what: in words.
        section, case: where it is measured.
        at_least: the bound.
        figure: "tflops" or "of_copy" (share of the measured copy bandwidth) of ours, or "ratio": the time of
            `over` divided by ours.
        over: names of contenders for a ratio; the fastest of them counts.
        gpu: part of the name of the GPU it is made for; on others it is shown and not judged.
    """

    what: str
    section: str
    case: str
    at_least: float
    figure: str = "ratio"
    over: tuple[str, ...] = ()
    gpu: str = ""

    def __post_init__(self) -> None:
        if self.figure not in ("tflops", "of_copy", "ratio"):
            raise ValueError(f"figure is {self.figure!r}; it must be tflops, of_copy or ratio")
        if (self.figure == "ratio") != bool(self.over):
            raise ValueError("a ratio, and only a ratio, names the contenders it is over")

    def judge(self, cases: Mapping[str, Mapping[str, Any]], gpu: str) -> dict[str, Any]:
        """The promise with what was measured: "held" is None where it was not, or on another GPU."""
        plain = {"what": self.what, "section": self.section, "case": self.case, "at_least": self.at_least}
        judged: dict[str, Any] = {**plain, "measured": None, "low": None, "high": None, "held": None}
        rows = {row["name"]: row for row in cases.get(self.case, {}).get("rows", [])}
        ours = rows.get(OURS)
        if ours is None or ours["status"] != "measured":
            return judged | {"reason": "not measured" if ours is None else ours["reason"]}
        if self.figure != "ratio":
            judged["measured"] = ours[self.figure]
        else:
            others = [rows[name] for name in self.over if rows.get(name, {}).get("status") == "measured"]
            if not others:
                return judged | {"reason": f"{' and '.join(self.over)} not measured"}
            fastest = min(others, key=lambda row: row["median_ms"])
            ratio = paired_ratio(fastest["wall_ms"], ours["wall_ms"], fastest["name"])
            if ratio is None:
                return judged | {"reason": "too few rounds"}
            judged |= {"measured": ratio.value, "low": ratio.low, "high": ratio.high, "over": ratio.baseline}
        if self.gpu.lower() not in gpu.lower():
            return judged | {"reason": f"made for the {self.gpu}"}
        return judged | {"held": judged["measured"] >= self.at_least}


# At most 10% slower is a ratio of 1 / 1.1 over the same call without the mask or bias.
_TENTH = 1 / 1.1
_PADDING, _T5 = "attention-padding-d64-4k", "attention-t5-d64-4k"
_DENSE = ("SDPA, dense bias",)
PROMISES = (
    Promise("bf16, D=128, 8k: TFLOP/s", "attention", "attention-d128-8k", 450.0, "tflops", gpu="H100"),
    Promise("D=64, 8k: over cuDNN", "attention", "attention-d64-8k", 0.85, over=("SDPA cuDNN",)),
    Promise("key padding: over no mask", "attention", _PADDING, _TENTH, over=(f"{OURS}, no mask",)),
    Promise("T5 bias: over no bias", "attention", _T5, _TENTH, over=(f"{OURS}, no bias",)),
    Promise("key padding: over SDPA with a dense bias", "attention", _PADDING, 3.0, over=_DENSE),
    Promise("T5 bias: over SDPA with a dense bias", "attention", _T5, 3.0, over=_DENSE),
    Promise(
        "varlen, lengths 32 to 512: over padded SDPA", "varlen", "varlen-32-to-512", 1.5,
        over=("SDPA, padded, mask", "SDPA efficient, padded, mask"),
    ),
    Promise("decode, 16k keys: of copy bandwidth", "decode", "decode-16k", 0.85, "of_copy"),
    Promise("decode, 64k keys: of copy bandwidth", "decode", "decode-64k", 0.85, "of_copy"),
    *(
        Promise(
            f"add_layer_norm, {width} wide: over a copy", "norm", f"add_layer_norm-{width}", 0.97,
            over=("copy, same bytes",),
        )
        for width in (512, 1024, 2048, 4096, 8192, 16384)
    ),
)  # fmt: skip


def judge(sections: Mapping[str, Mapping[str, Any]], gpu: str) -> list[dict[str, Any]]:
    """Every promise against the sections' entries."""
    judged = []
    for promise in PROMISES:
        entries = sections.get(promise.section, {}).get("entries", [])
        judged.append(promise.judge({entry["case"]: entry for entry in entries}, gpu))
    return judged
