"""Kernels compiled for GPUs that are not here: no spills, shared memory fits, the matrix unit is used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

# Bytes of shared memory one program may have.
SHARED_BYTES = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
MATRIX_UNIT = {"sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Every variant on every architecture, in processes of their own: this one may be in the interpreter."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fastattn_kernels.aot", "--json", "--jobs", "2"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stderr[-4000:]
    found: list[dict[str, Any]] = json.loads(result.stdout)["rows"]
    return found


def attention_rows(rows: list[dict[str, Any]], *parts: str) -> Iterator[dict[str, Any]]:
    for row in rows:
        pieces = row["variant"].split("-")
        if pieces[0] == "attention" and all(part in pieces for part in parts):
            yield row


def test_the_promised_variants_are_there(rows: list[dict[str, Any]]) -> None:
    compiled = {(row["variant"], row["architecture"]) for row in rows}
    for architecture in SHARED_BYTES:
        for head_dim in (64, 128):
            for form in ("fp16", "fp16-padding", "fp16-varlen"):
                for causal in ("", "-causal"):
                    assert (f"attention-d{head_dim}-{form}{causal}", architecture) in compiled


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    spills = {(row["variant"], row["architecture"]): row["spill_bytes"] for row in rows if row["spill_bytes"]}
    # Mask and bias per query, dropout, causality and lengths at once over unaligned rows: what no tile worth
    # having fits.
    tolerated = {
        key for key, spilled in spills.items() if "everything-unaligned" in key[0] and spilled <= 400
    }
    assert spills.keys() == tolerated, f"bytes of registers spilled to memory: {spills}"


def test_shared_memory_fits(rows: list[dict[str, Any]]) -> None:
    over = [row for row in rows if row["shared_bytes"] > SHARED_BYTES[row["architecture"]]]
    assert not over, over


def test_half_precision_dots_run_on_the_matrix_unit(rows: list[dict[str, Any]]) -> None:
    for dtype in ("fp16", "bf16"):
        for row in attention_rows(rows, dtype):
            # Tiles of 16 queries are under wgmma's and tcgen05's 64.
            if row["architecture"] in MATRIX_UNIT and "16queries" not in row["variant"]:
                assert row[MATRIX_UNIT[row["architecture"]]] > 0, row


def test_float32_stays_float32(rows: list[dict[str, Any]]) -> None:
    checked = list(attention_rows(rows, "fp32"))
    assert {row["architecture"] for row in checked} == set(SHARED_BYTES)
    for row in checked:
        assert row["tf32"] == row["xf32"] == row["tcgen05"] == row["wgmma"] == 0, row
