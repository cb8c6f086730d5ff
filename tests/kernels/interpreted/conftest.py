"""These files need Triton's interpreter, which is chosen before triton is imported.

test_interpreted.py runs each in a process of its own. By hand:
TRITON_INTERPRET=1 python -m pytest tests/kernels/interpreted
"""

import os
import sys
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_outputs() -> Iterator[None]:
    """Fill every new tensor with NaN, so that what a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many attention cases were drawn and compared; test_interpreted.py asks for a number of them."""
    cases = sys.modules.get("attention_cases")
    if cases is not None and cases.DRAWN:
        by_theme = ", ".join(f"{theme} {count}" for theme, count in cases.DRAWN.items())
        terminalreporter.write_line(f"drawn attention cases: {sum(cases.DRAWN.values())} ({by_theme})")
