"""Operations inside CUDA graphs, on a second stream and from several threads at once."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from gpu_checks import INTERPRETED, Draw, bounds
from torch import Tensor

from fastattn import ops

pytestmark = pytest.mark.skipif(INTERPRETED, reason="streams and graphs are a GPU's")


@dataclass(frozen=True)
class Call:
    """One operation over fixed buffers, so that a graph can be captured and fed.

    Attributes:
        inputs: what fresh numbers are copied into.
        run: the operation; its first output counts.
    """

    inputs: tuple[Tensor, ...]
    run: Callable[[], Tensor]


def attention(draw: Draw) -> Call:
    query, key, value = (draw.heads(2, 4, 300, 64) for _ in range(3))
    mask = draw.mask(2, 300)
    return Call((query, key, value), lambda: ops.attention(query, key, value, mask=mask, causal=True))


def varlen_attention(draw: Draw) -> Call:
    lengths = [100, 1, 37, 162]
    query, key, value = (draw(300, 4, 64) for _ in range(3))
    starts = bounds(lengths, draw.device)
    return Call(
        (query, key, value), lambda: ops.varlen_attention(query, key, value, starts, starts, 162, 162)
    )


def decode_attention(draw: Draw) -> Call:
    query, key, value = draw.heads(2, 8, 1, 128), draw(2, 2, 5000, 128), draw(2, 2, 5000, 128)
    lengths = draw.integers(1, 5000, 2)
    return Call((query, key, value), lambda: ops.decode_attention(query, key, value, lengths))


def add_layer_norm(draw: Draw) -> Call:
    x, residual, weight, bias = draw(64, 768), draw(64, 768), draw(768), draw(768)
    return Call((x, residual), lambda: ops.add_layer_norm(x, residual, weight, bias, 1e-5)[0])


def rms_norm(draw: Draw) -> Call:
    x, weight = draw(64, 4096), draw(4096)
    return Call((x,), lambda: ops.rms_norm(x, weight, eps=1e-5))


def softmax(draw: Draw) -> Call:
    x = draw(64, 1000)
    return Call((x,), lambda: ops.softmax(x, scale=0.5))


def gated_activation(draw: Draw) -> Call:
    gate, up = draw(64, 1000), draw(64, 1000)
    return Call((gate, up), lambda: ops.gated_activation(gate, up, kind="silu"))


def rotary(draw: Draw) -> Call:
    query, key, angles = draw.heads(2, 4, 100, 64), draw.heads(2, 4, 100, 64), draw(100, 64)
    return Call((query, key), lambda: ops.rotary(query, key, angles.cos(), angles.sin())[0])


CALLS = [
    attention, varlen_attention, decode_attention,
    add_layer_norm, rms_norm, softmax, gated_activation, rotary,
]  # fmt: skip


@pytest.fixture(params=CALLS, ids=lambda make: make.__name__)
def call(request: pytest.FixtureRequest, generator: torch.Generator, device: torch.device) -> Call:
    return request.param(Draw(generator, device, torch.float16))


def test_a_captured_graph_computes_on_new_inputs(call: Call) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call.run()
    for _ in range(3):
        for each in call.inputs:
            each.copy_(torch.randn_like(each))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, call.run())


def test_work_runs_on_the_current_stream(call: Call) -> None:
    """Inputs that a busy side stream writes last are what the operation sees there."""
    late = [torch.randn_like(each) for each in call.inputs]
    call.run()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # Some ten milliseconds: work on another stream would finish before the inputs are there.
        torch.cuda._sleep(20_000_000)
        for each, new in zip(call.inputs, late, strict=True):
            each.copy_(new)
        found = call.run()
    stream.synchronize()
    assert torch.equal(found, call.run())


def test_eight_threads_get_the_same_answer(call: Call) -> None:
    expected = call.run()
    torch.cuda.synchronize()
    same: list[bool] = []

    def work() -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(5):
                same.append(torch.equal(call.run(), expected))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True] * 40
