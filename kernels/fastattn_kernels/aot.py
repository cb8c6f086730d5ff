"""Compile launches ahead of time for GPUs this machine lacks, and read registers, spills and shared memory.

`python -m fastattn_kernels.aot` prints it for the variants of aot_variants.py; with --table it writes the
committed table, with --check it compares with it. Another Triton is put first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ._launch import Launch
from .aot_table import COLUMNS, TABLE, Row, broken_rules, differences, read_table, write_table
from .aot_variants import VARIANTS

__all__ = ["TARGETS", "CompiledKernel", "compile_launch", "measure"]

# Threads of a warp: 64 on AMD's CDNA.
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What tells in the assembly which matrix unit runs a dot, and whether float32 is cut to TF32 ("xf32" on AMD)
# for it.
MATRIX_INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mfma": "v_mfma",
    "tf32": "tf32",
    "xf32": "xf32",
}


@dataclass(frozen=True)
class CompiledKernel:
    """What the compiler made of a launch.

    Attributes:
        registers: vector registers a thread (AMD: accumulation registers included).
        spill_bytes: bytes of a thread's registers kept in memory; on NVIDIA the whole stack frame.
        shared_bytes: shared memory a program.
        assembly: PTX, or AMD's assembly.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    assembly: str


def compile_launch(launch: Launch, architecture: str) -> CompiledKernel:
    """Compile exactly what `launch.run` would on `architecture`, a key of `TARGETS`; no GPU is needed.

    The signature, constants and alignment hints come from Triton's own binder, as in a launch. Meta tensors
    will do as the launch's tensors: their address of 0 counts as aligned.

    Raises:
        RuntimeError: Triton's interpreter is on, which replaces the compiler.
    """
    if not isinstance(launch.kernel, JITFunction):
        raise RuntimeError("TRITON_INTERPRET=1 was set when triton was imported; unset it to compile kernels")
    target = TARGETS[architecture]
    backend = make_backend(target)
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    keywords = {**launch.arguments, **launch.options}
    arguments, specialization, options = bind(**keywords)
    options, signature, constants, attributes = launch.kernel._pack_args(
        backend, launch.options, arguments, specialization, options
    )
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=options.__dict__)
    return _read_amd(compiled) if target.backend == "hip" else _read_nvidia(compiled)


def _read_nvidia(compiled: Any) -> CompiledKernel:
    # LOCAL stays 0 in cuobjdump's table; spilled registers are in STACK.
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no register usage: {usage[-300:]}")
    return CompiledKernel(int(found[1]), int(found[2]), compiled.metadata.shared, compiled.asm["ptx"])


def _read_amd(compiled: Any) -> CompiledKernel:
    assembly = compiled.asm["amdgcn"]
    # SGPR spills go to lanes of a vector register and cost no memory traffic: only VGPR spills count.
    counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s*(\d+)", assembly))
    registers, spills = int(counts["vgpr_count"]), int(counts["vgpr_spill_count"])
    return CompiledKernel(registers, 4 * spills, compiled.metadata.shared, assembly)


def _measure(pair: tuple[str, str]) -> Row:
    name, architecture = pair
    launch = VARIANTS[name](architecture)
    compiled = compile_launch(launch, architecture)
    return Row(
        variant=name,
        architecture=architecture,
        triton=triton.__version__,
        registers=compiled.registers,
        spill_bytes=compiled.spill_bytes,
        shared_bytes=compiled.shared_bytes,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **{unit: compiled.assembly.count(opcode) for unit, opcode in MATRIX_INSTRUCTIONS.items()},
    )


def measure(pairs: Sequence[tuple[str, str]], jobs: int) -> list[Row]:
    """Compile each (variant, architecture) in `jobs` processes."""
    # Spawned, not forked: the compiler's threads do not survive a fork.
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        return pool.map(_measure, pairs, chunksize=1)


def main(argv: list[str] | None = None) -> int:
    """`python -m fastattn_kernels.aot`: compile the named variants, print or write what each costs, and check
    it: 1 is returned where a rule is broken or the compiler gives other figures than the table."""
    parser = argparse.ArgumentParser(prog="python -m fastattn_kernels.aot", description=main.__doc__)
    parser.add_argument("--architecture", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument(
        "--variant", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME"
    )
    parser.add_argument("--every", type=int, default=1, metavar="N", help="compile every N-th of them only")
    parser.add_argument("--jobs", type=int, default=1, help="processes to compile in")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    for option, what in (("--table", "write the rows into"), ("--check", "compare the rows with")):
        parser.add_argument(
            option, nargs="?", type=Path, const=TABLE, metavar="FILE", help=f"{what} a table ({TABLE.name})"
        )
    arguments = parser.parse_args(argv)
    pairs = sorted((name, target) for name in arguments.variant for target in arguments.architecture)
    rows = measure(pairs[:: arguments.every], arguments.jobs)
    problems = [problem for row in rows for problem in broken_rules(row)]
    if arguments.check:
        problems += differences(rows, read_table(arguments.check))
    if arguments.table:
        write_table(rows, arguments.table, VARIANTS)
    elif arguments.json:
        print(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}))
    elif not arguments.check:
        _print_rows(rows)
    print(f"Triton {triton.__version__}: {len(rows)} compiled, {len(problems)} wrong", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def _print_rows(rows: Sequence[Row]) -> None:
    lines = [COLUMNS, *([str(cell) for cell in asdict(row).values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


if __name__ == "__main__":
    raise SystemExit(main())
