"""The printed form of what the sections found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastattn.report import format_table

HEADS = (
    "case",
    "contender",
    "min us",
    "median us",
    "TFLOP/s",
    "GB/s",
    "roofline",
    "ratio",
    "interval",
    "error",
)


def section_text(content: Mapping[str, Any]) -> str:
    """One section: its entries as a table, then what failed."""
    entries = content["entries"]
    lines = [f"== {content['section']}" + ("" if content["complete"] else " (cut short)")]
    if "missing" in content:
        lines.append(f"missing: {content['missing']}")
    if "ceilings" in content:
        copy, gemm = content["ceilings"]["copy_gbps"], content["ceilings"]["gemm_tflops"]
        lines.append(f"measured here: copy {copy:.0f} GB/s, bf16 GEMM {gemm:.0f} TFLOP/s")
    if any("rows" in entry for entry in entries):
        lines.append(format_table(HEADS, [line for entry in entries for line in _case_lines(entry)]))
    elif entries:
        heads = [name for name in entries[0] if name not in ("reason", "failed_tests")]
        lines.append(
            format_table(heads, [[_plain(entry.get(name, "-")) for name in heads] for entry in entries])
        )
    lines += [f"failed: {failure}" for failure in content["failures"]]
    return "\n".join(lines)


def _case_lines(entry: Mapping[str, Any]) -> list[Sequence[str]]:
    if "left_out" in entry:
        return [(entry["case"], entry["left_out"], *[""] * 8)]
    lines = []
    for row in entry["rows"]:
        if row["status"] != "measured":
            lines.append((entry["case"], row["name"], row["reason"][:60], *[""] * 7))
            continue
        ratio, parity = row["ratio"], row["parity"]
        lines.append(
            (
                entry["case"],
                row["name"],
                f"{row['min_ms'] * 1e3:.1f}",
                f"{row['median_ms'] * 1e3:.1f}",
                f"{row['tflops']:.0f}" if row["tflops"] else "-",
                f"{row['gbps']:.0f}" if row["gbps"] else "-",
                f"{row['roofline']:.2f}" if row["roofline"] else "-",
                "baseline" if row["baseline"] else f"{ratio['value']:.2f}x" if ratio else "-",
                f"{ratio['low']:.2f}..{ratio['high']:.2f}" if ratio else "",
                f"{parity['relative_error']:.1e}" if parity else "-",
            )
        )
    return lines


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def promises_text(promises: Sequence[Mapping[str, Any]]) -> str:
    """What was promised, what was measured, and whether it holds."""
    words = {True: "held", False: "BROKEN", None: "not judged"}
    rows = []
    for promise in promises:
        measured = "-" if promise["measured"] is None else f"{promise['measured']:.2f}"
        if promise["low"] is not None:
            measured += f" ({promise['low']:.2f} to {promise['high']:.2f})"
        note = promise.get("reason") or promise.get("over", "")
        rows.append((promise["what"], f"{promise['at_least']:.2f}", measured, words[promise["held"]], note))
    return "== promises\n" + format_table(("promise", "at least", "measured", "", "note"), rows)
