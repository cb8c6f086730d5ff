"""The calls that `tune` measures run, ask for one choice each, and give the same with every configuration."""

from __future__ import annotations

from functools import partial
from itertools import islice

import pytest
import torch
from fastattn_kernels import tune_workloads
from fastattn_kernels.tune import tune_workload
from fastattn_kernels.tune_workloads import Workload

# Small copies of what is measured, in what the interpreter computes rightly.
SMALL = {
    "attention-64-float16-4096queries": partial(
        tune_workloads.attention, size=64, dtype=torch.float16, crowded=False, queries=17, keys=40, batch=1
    ),
    "norm-256-bfloat16": partial(tune_workloads.norm, width=256, dtype=torch.float32, elements=1024),
    "softmax-256-bfloat16": partial(tune_workloads.softmax, width=256, dtype=torch.float32, elements=1024),
    "gated_activation-64": partial(tune_workloads.gated, width=64, elements=512),
    "decode-64-int8-paged-4": partial(
        tune_workloads.decode,
        size=64,
        cache_dtype=torch.int8,
        block_size=16,
        group=4,
        positions=48,
        dtype=torch.float16,
    ),
    "rotary-8x64": partial(tune_workloads.rotary, heads=8, size=64, positions=3),
}


@pytest.mark.parametrize("name", SMALL)
def test_a_workload_runs_with_several_configurations(name: str) -> None:
    (full,) = [workload for workload in tune_workloads.WORKLOADS if workload.name == name]
    # The first few: a configuration that is refused would be an error here.
    small = Workload(name, full.op, SMALL[name], lambda _: islice(full.candidates("sm_80"), 3))
    finding = tune_workload(small, torch.device("cpu"), timer=lambda run: 1.0)
    assert finding.tried == 3 and not finding.refused, finding.refused
    assert finding.key and finding.choice is None
