"""A kernel launch as data: the same object is launched on a device or compiled ahead of time for a target."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

__all__ = ["Launch", "architecture_of", "family_of", "power_of_two"]


@dataclass(frozen=True)
class Launch:
    """One kernel with everything it is launched with.

    Attributes:
        kernel: the `@triton.jit` function.
        grid: number of programs; one dimension, because the others stop at 65535.
        arguments: the kernel's arguments by name, compile-time constants included.
        num_warps: warps a program.
        num_stages: depth of the software pipeline.
        max_registers: registers a thread may have; None leaves it to the compiler. NVIDIA's alone.
    """

    kernel: Any
    grid: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Compiler options. FP fusion is named because Triton 3.10 turns its default, and so speed, off."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}

    def run(self, device: torch.device) -> None:
        """Launch on `device`, which need not be the current one; CPU tensors run in Triton's interpreter."""
        with _device_guard(device):
            self.kernel[(self.grid,)](**self.arguments, **self.options)


def _device_guard(device: torch.device) -> AbstractContextManager[object]:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@cache
def architecture_of(device: torch.device) -> str:
    """The architecture launch choices are keyed by: "sm_90" and the like, "gfx942" on ROCm.

    The interpreter's CPU tensors get sm_80's choices: the tests then run tiles that a GPU runs.
    """
    if device.type != "cuda":
        return "sm_80"
    if torch.version.hip:
        return str(torch.cuda.get_device_properties(device).gcnArchName).split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def family_of(architecture: str) -> str:
    """Whose launch choices `architecture` takes: consumer Blackwell and Ada have neither wgmma nor tcgen05,
    nor the shared memory of the GPUs that do.
    """
    if architecture.startswith("gfx"):
        return "gfx942"
    if architecture.startswith("sm_9"):
        return "sm_90"
    return "sm_100" if architecture.startswith("sm_10") else "sm_80"


def power_of_two(size: int, least: int = 1) -> int:
    """The smallest power of two, `least` or more, that holds `size`; a dot's operands need at least 16."""
    return max(least, 1 << max(size - 1, 0).bit_length())
