"""From which fill on a padded batch is faster computed whole than packed."""

from __future__ import annotations

import copy
import time
from typing import Any

import torch

from fastattn.bench.rows import Row
from fastattn.bench.timing import Contender
from fastattn.bench.workloads import Workload
from fastattn.packing import PackingThreshold
from fastattn.tuning.trials import Trials, is_faster

__all__ = ["FILLS", "SHAPES", "encoder", "measure_fills"]

# Sequences and padded length: short questions, sentences, paragraphs.
SHAPES = ((8, 16), (8, 64), (8, 128))
# From full down: as long as padded is surely faster, the next is asked too.
FILLS = (0.98, 0.95, 0.9, 0.8, 0.65)
_PACKED, _PADDED = "packed", "padded"
# Packing is what users know from the documentation: leaving it has to gain more than this.
_WORTH = 1.03
# MiniLM's width: the smaller a model, the more packing costs beside it.
_WIDTH, _HEADS, _LAYERS = 384, 12, 4


def measure_fills(trials: Trials, budget_s: float) -> tuple[tuple[int, float], ...]:
    """`PackingThreshold.fills`: of each of SHAPES the lowest fill at which padded is surely faster, 1.0 where
    packing never loses by more than the measurement can tell.
    """
    packed = encoder(trials.device, trials.dtype)
    padded = copy.deepcopy(packed)
    packed.fastattn_padding = "packed"
    found = []
    share_s = budget_s / len(SHAPES)
    for batch, length in SHAPES:
        # From 0.0 on: every batch with padding.
        positions = batch * length
        padded.fastattn_threshold = PackingThreshold(trials.device, ((positions, 0.0),))
        lowest, begin = 1.0, time.monotonic()
        for fill in FILLS:
            # Most machines answer each shape at its first fill or two.
            rows = _ask(trials, packed, padded, Workload(batch, length, fill), share_s / 2)
            if not is_faster(rows[1], _WORTH):
                break
            lowest = fill
            if time.monotonic() - begin > share_s:
                break
        found.append((positions, lowest))
    return tuple(found)


def _ask(trials: Trials, packed: Any, padded: Any, workload: Workload, budget_s: float) -> list[Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(workload.batch, workload.seq, _WIDTH, generator=generator).to(trials.device, trials.dtype)
    hidden = workload.tokens(1000, device=trials.device)["attention_mask"] == 0
    contenders = [
        Contender(name, lambda model=model: model(x, src_key_padding_mask=hidden))  # type: ignore[misc]
        for name, model in ((_PACKED, packed), (_PADDED, padded))
    ]
    return trials.ask(
        "packing",
        str(workload),
        contenders,
        lambda rows: _PADDED if is_faster(rows[1], _WORTH) else _PACKED,
        budget_s,
    )


def encoder(device: str, dtype: torch.dtype) -> Any:
    """A small encoder of fastattn's layers with fixed weights."""
    from fastattn.layers import TransformerEncoder, TransformerEncoderLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = TransformerEncoderLayer(
            _WIDTH, _HEADS, 4 * _WIDTH, dropout=0.0, activation="gelu", batch_first=True
        )
        return TransformerEncoder(layer, _LAYERS).eval().to(device, dtype)
