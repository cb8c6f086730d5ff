"""Kernels compiled for GPUs that are not here: no spills, shared memory fits, the matrix unit is used.

Every row of the committed table keeps the rules, and what the installed Triton gives now is what the table
says: a sample here, everything on three Triton versions in `make aot-full`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from fastattn_kernels import aot_table  # noqa: E402
from fastattn_kernels.aot_table import Row  # noqa: E402

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")
# Odd, so that the sample visits all architectures: the pairs are sorted by variant, then architecture.
EVERY = "19"


def aot(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A run of its own: this process may be in the interpreter."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastattn_kernels.aot", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def table() -> dict[tuple[str, str, str], Row]:
    return aot_table.read_table()


def test_the_table_has_every_variant_on_every_architecture_and_triton(
    table: dict[tuple[str, str, str], Row],
) -> None:
    from fastattn_kernels.aot_variants import VARIANTS

    expected = {
        (name, architecture, version)
        for name in VARIANTS
        for architecture in ARCHITECTURES
        for version in aot_table.TRITON_VERSIONS
    }
    assert table.keys() == expected, sorted(table.keys() ^ expected)[:10]


def test_the_promised_variants_are_there(table: dict[tuple[str, str, str], Row]) -> None:
    names = {row.variant for row in table.values()}
    for head_dim in (64, 128):
        for form in ("fp16", "fp16-padding", "fp16-varlen"):
            for causal in ("", "-causal"):
                assert f"attention-d{head_dim}-{form}{causal}" in names
    # One family an operation: a kernel without a variant would never be compiled for a GPU here.
    families = {name.split("-")[0] for name in names}
    operations = {"add_layer_norm", "add_rms_norm", "attention", "bias_gelu", "gated_activation", "rotary"}
    operations |= {"decode", "layer_norm", "rms_norm", "softmax"}
    assert families >= operations, operations - families


def test_every_row_of_the_table_keeps_the_rules(table: dict[tuple[str, str, str], Row]) -> None:
    broken = [problem for row in table.values() for problem in aot_table.broken_rules(row)]
    assert not broken, "\n".join(broken)


def test_only_wide_heads_have_a_spill_budget() -> None:
    for pattern, size in aot_table.SPILL_BUDGET_BYTES.items():
        assert "-d256" in pattern or "-d192" in pattern, pattern
        assert size <= 512, (pattern, size)


@pytest.mark.skipif(
    triton.__version__ not in aot_table.TRITON_VERSIONS,
    reason=f"the table has Triton {', '.join(aot_table.TRITON_VERSIONS)}",
)
def test_the_installed_triton_gives_what_the_table_says() -> None:
    result = aot("--every", EVERY, "--check")
    assert result.returncode == 0, (
        f"{result.stderr[-4000:]}\nWhere the kernels were changed on purpose: make aot-table"
    )


def test_the_makefile_compiles_with_the_table_s_versions() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    (line,) = [line for line in makefile.splitlines() if line.startswith("TRITONS := ")]
    assert tuple(line.split()[2:]) == aot_table.TRITON_VERSIONS


def row(**changes: object) -> Row:
    usual = Row("attention-d64-fp16", "sm_90", "3.7.1", 128, 0, 65536, 8, 3, 16, 0, 0, 0, 0)
    return replace(usual, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spill_bytes": 8}, "spills 8 bytes, allowed 0"),
        ({"shared_bytes": 240 * 1024}, "245760 bytes of shared memory"),
        ({"wgmma": 0}, "no wgmma instruction"),
        ({"architecture": "sm_100"}, "no tcgen05 instruction"),
        ({"variant": "attention-d64-fp32", "tf32": 4}, "cuts them short"),
    ],
)
def test_a_bad_row_breaks_a_rule(changes: dict[str, object], message: str) -> None:
    assert aot_table.broken_rules(row()) == []
    (problem,) = aot_table.broken_rules(row(**changes))
    assert message in problem


def test_a_changed_or_missing_row_is_a_difference() -> None:
    table = {row().key: row()}
    assert aot_table.differences([row()], table) == []
    (changed,) = aot_table.differences([row(registers=130)], table)
    assert "registers is 130, the table has 128" in changed
    (missing,) = aot_table.differences([row(variant="softmax-64-fp16")], table)
    assert missing.endswith("not in the table")


def test_writing_replaces_rows_and_drops_variants_that_are_gone(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    other = row(variant="gone")
    aot_table.write_table([row(), other], path, ["attention-d64-fp16", "gone"])
    assert aot_table.read_table(path) == {row().key: row(), other.key: other}
    aot_table.write_table([row(registers=99)], path, ["attention-d64-fp16"])
    assert aot_table.read_table(path) == {row().key: row(registers=99)}


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("variant,registers\n")
    with pytest.raises(ValueError, match="has the columns"):
        aot_table.read_table(path)
