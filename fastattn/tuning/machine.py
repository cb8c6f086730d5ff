"""Which machine a measurement is of."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Machine", "this_machine"]


@dataclass(frozen=True)
class Machine:
    """What must be the same for a measurement to hold.

    Attributes:
        device: "cpu" or "cuda", the type of a tensor's device.
        name: the GPU's, or the processor's with its instruction sets and the cores this process may use.
        torch: torch's version, with what it was built for.
    """

    device: str
    name: str
    torch: str

    @property
    def key(self) -> str:
        """One line that differs between machines that differ."""
        return f"{self.device}: {self.name}; torch {self.torch}"


def this_machine(device: str) -> Machine:
    """The machine this process runs on, as tensors of `device` ("cpu" or "cuda") see it."""
    import torch

    from fastattn.processor import processor

    if device == "cuda":
        name = torch.cuda.get_device_properties(0).name
    else:
        facts = processor()
        name = (
            f"{facts['model']}, {facts['usable_cores']} cores, {' '.join(facts['flags']) or 'no known flags'}"
        )
    return Machine(device, name, torch.__version__)
