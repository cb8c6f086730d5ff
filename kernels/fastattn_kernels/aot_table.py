"""The committed table of what ahead-of-time compilation gives, and the rules its rows keep.

aot_table.csv has a row for every variant, architecture and Triton version: `python -m fastattn_kernels.aot
--table` writes it, `--check` compiles again and compares.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

__all__ = [
    "SPILL_BUDGET_BYTES",
    "TABLE",
    "TRITON_VERSIONS",
    "Row",
    "broken_rules",
    "read_table",
    "write_table",
]

TABLE = Path(__file__).with_name("aot_table.csv")
# What torch 2.11 and torch 2.13 pin, and the newest.
TRITON_VERSIONS = ("3.6.0", "3.7.1", "3.9.0")
# Bytes of shared memory one program may have.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
# Bytes of registers a thread may keep in memory, by variant; what no pattern names may spill nothing.
SPILL_BUDGET_BYTES: dict[str, int] = {}


@dataclass(frozen=True)
class Row:
    """What one Triton version made of one variant.

    Attributes:
        variant: its name in aot_variants.py.
        architecture: a key of `aot.TARGETS`.
        triton: the version that compiled it.
        registers: vector registers a thread.
        spill_bytes: bytes of a thread's registers kept in memory (NVIDIA: the stack frame; AMD: VGPRs).
        shared_bytes: shared memory a program.
        num_warps, num_stages: as launched.
        wgmma, tcgen05, mfma: matrix instructions of Hopper, Blackwell and AMD in the assembly.
        tf32, xf32: instructions that would cut float32 to 10 bits of mantissa.
    """

    variant: str
    architecture: str
    triton: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    num_warps: int
    num_stages: int
    wgmma: int
    tcgen05: int
    mfma: int
    tf32: int
    xf32: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What names the row."""
        return self.variant, self.architecture, self.triton


COLUMNS = [field.name for field in fields(Row)]


def read_table(path: Path = TABLE) -> dict[tuple[str, str, str], Row]:
    """The rows of a table by variant, architecture and Triton version.

    Raises:
        ValueError: the file's columns are not a table's.
    """
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}; a table has {COLUMNS}")
        rows = [Row(**{name: _cell(name, text) for name, text in line.items()}) for line in reader]
    return {row.key: row for row in rows}


def _cell(name: str, text: str) -> Any:
    return text if name in ("variant", "architecture", "triton") else int(text)


def write_table(rows: Iterable[Row], path: Path, variants: Iterable[str]) -> None:
    """Put `rows` into the table at `path` and take out what is no longer among `variants`."""
    table = read_table(path) if path.exists() else {}
    known = set(variants)
    table.update({row.key: row for row in rows})
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for key, row in sorted(table.items()) if row.variant in known)


def spill_budget(variant: str) -> int:
    """Bytes of registers `variant` may keep in memory."""
    return max((size for name, size in SPILL_BUDGET_BYTES.items() if fnmatch(variant, name)), default=0)


def broken_rules(row: Row) -> list[str]:
    """What is wrong with a row: spills, shared memory, a dot off the matrix unit, float32 cut short."""
    wrong = []
    parts = row.variant.split("-")
    if row.spill_bytes > spill_budget(row.variant):
        wrong.append(f"spills {row.spill_bytes} bytes, allowed {spill_budget(row.variant)}")
    if row.shared_bytes > SHARED_BYTES[row.architecture]:
        wrong.append(f"{row.shared_bytes} bytes of shared memory, there are {SHARED_BYTES[row.architecture]}")
    unit = MATRIX_UNIT.get(row.architecture)
    # Tiles of 16 queries are under wgmma's and tcgen05's 64 rows.
    tall = parts[0] == "attention" and not any(part.endswith("queries") for part in parts)
    if unit and tall and {"fp16", "bf16"} & set(parts) and getattr(row, unit) == 0:
        wrong.append(f"no {unit} instruction")
    if "fp32" in parts and row.tf32 + row.xf32 + row.tcgen05 + row.wgmma:
        wrong.append("float32 products run on a matrix unit that cuts them short")
    return [f"{row.variant} on {row.architecture}, Triton {row.triton}: {what}" for what in wrong]


def differences(measured: Iterable[Row], table: dict[tuple[str, str, str], Row]) -> list[str]:
    """Where rows compiled now are not what the table says; a row the table lacks is a difference."""
    found = []
    for row in measured:
        committed = table.get(row.key)
        name = f"{row.variant} on {row.architecture}, Triton {row.triton}"
        if committed is None:
            found.append(f"{name}: not in the table")
        elif committed != row:
            changes = (
                f"{column} is {getattr(row, column)}, the table has {getattr(committed, column)}"
                for column in COLUMNS
                if getattr(row, column) != getattr(committed, column)
            )
            found.append(f"{name}: {', '.join(changes)}")
    return found
