"""Which precision linears run fastest in: fp32, bf16, or int8 through ONNX Runtime."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastattn.bench.parity import FP32_TOLERANCE, Parity, compare
from fastattn.bench.timing import Contender, MissingError
from fastattn.tuning.trials import Trials, fastest

__all__ = ["measure_precision"]

_ROWS, _WIDTH, _FFN = 512, 768, 3072
# A lower precision that moves outputs by more than a tenth of their scale is not the same model any more.
_LIMIT = 0.1
# A precision is not free: it has to gain more than this.
_WORTH = 1.1


def measure_precision(trials: Trials, budget_s: float) -> tuple[str, float | None, float | None]:
    """The fastest precision, its ratio over fp32 and its error of the output's scale, both None for fp32.

    What is run are two feed-forward blocks of BERT-base's width.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        blocks = [
            each for _ in range(2) for each in (nn.Linear(_WIDTH, _FFN), nn.GELU(), nn.Linear(_FFN, _WIDTH))
        ]
        model = nn.Sequential(*blocks).eval().to(trials.device)
        x = torch.randn(_ROWS, _WIDTH).to(trials.device)
    with torch.inference_mode():
        expected = model(x)

    def check(contender: Contender, output: Any) -> Parity:
        exact = contender.name == "fp32"
        if exact and trials.device == "cpu":
            return compare(expected, output, tolerance=FP32_TOLERANCE)
        return compare(expected, output, tolerance=_LIMIT, kind="precision")

    with tempfile.TemporaryDirectory(prefix="fastattn-tune-") as folder:
        contenders = [
            Contender("fp32", lambda: model(x)),
            Contender("bf16", prepare=lambda: _bf16(model, x), dtype="bf16"),
            Contender("int8", prepare=lambda: _int8(model, x, Path(folder)), dtype="int8"),
        ]
        case = f"{len(blocks) - 2} linears of {_WIDTH} x {_FFN}, {_ROWS} tokens"
        rows = trials.ask(
            "precision", case, contenders, lambda rows: fastest(rows, _WORTH).name, budget_s, check
        )
    best = fastest(rows, _WORTH)
    if best.ratio is None or best.parity is None:
        return "fp32", None, None
    return best.name, best.ratio.value, best.parity.relative_error


def _bf16(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    lower, given = copy.deepcopy(model).to(torch.bfloat16), x.to(torch.bfloat16)
    return lambda: lower(given)


def _int8(model: nn.Module, x: Tensor, folder: Path) -> Callable[[], Any]:
    if x.device.type != "cpu":
        raise MissingError("int8 exports are for a CPU")
    try:
        import onnxruntime
    except ImportError:
        raise MissingError("onnxruntime: pip install 'fastattn[onnx]'") from None
    import fastattn

    # Two sequences, as an export's example has to have.
    example = x.view(2, -1, _WIDTH)
    fastattn.export(model, folder, precision="int8", example_inputs={"input": example}, verify=False)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    given = {"input": example.numpy()}
    return lambda: session.run(None, given)[0].reshape(x.shape)
